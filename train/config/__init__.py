"""The config of a run: its sections, and how files and flags fill them."""
