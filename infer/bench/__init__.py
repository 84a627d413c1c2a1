"""`python -m infer.bench`: methods compared in turn on the same prompts; and the speed of products (`--kernels`)."""
