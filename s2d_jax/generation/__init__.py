"""Generation as users call it: `SpeculativeDecoder`, batches, streams, conversations, policies and statistics.

This is host code around the compiled loop.
"""
