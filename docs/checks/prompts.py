"""The prompts of the peer comparison: short, so that decoding, not prefill, is what is timed."""

PROMPTS = [
    "Explain photosynthesis in two sentences.",
    "Write a Python function that reverses a list.",
    "Name five rivers in Europe and the countries they cross.",
]
