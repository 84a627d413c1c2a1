"""`python -m train.memory`: the memory of SoFT's step beside that of Medusa heads, compiled without running it."""
