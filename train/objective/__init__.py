"""What a draft learns: which tokens count, what each exit is compared with, and the loss over all exits (SoFT)."""
