"""The jitted loop of rounds: propose, verify, accept, rewind; and its compiled programs.

What happens on the host around the loop belongs to `generation`.
"""
