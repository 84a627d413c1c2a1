"""`python -m infer.generate`: answers to prompts, from a file, streamed, explained, or as training data."""
