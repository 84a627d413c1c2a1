"""Sorted Fine-Tuning (SoFT): from conversations to checkpoints."""
