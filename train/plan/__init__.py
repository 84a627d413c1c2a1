"""`python -m train.plan`: the memory and collectives of a training step, compiled for a mesh without running it."""
