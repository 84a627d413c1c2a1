"""What files look like: Hugging Face directories, safetensors, GGUF, and the names of tensors in each.

Reading and writing of formats belongs here; what becomes of the values (sharding, casting, models) belongs to `weights`.
"""
