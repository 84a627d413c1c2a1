"""`python -m infer.accelerator_check`: what decoding and training reach on a GPU or TPU, beside what the chip could do."""
