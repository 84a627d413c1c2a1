"""What a draft learns: which tokens count, what each exit is compared with, and the sum of it (SoFT)."""
