"""What users choose and what files say: a model's shape, a draft's exits, sampling, decoding, trees, costs of a round.

A config checks itself when it is made. No arrays and no I/O belong here.
"""
