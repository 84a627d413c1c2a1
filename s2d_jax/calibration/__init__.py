"""What an unknown machine needs to choose how to decode: costs are timed, acceptance is recorded, candidates are replayed,
and the best ones are timed.

Nothing here prints; `infer.calibrate` shows it.
"""
