"""One optimizer step: gradients, clipping, AdamW, on a mesh."""
