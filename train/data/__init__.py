"""From files of conversations to batches: tokens, masks, packing, mixtures, and the cache of rows."""
