"""How tokens are drafted in chains: the drafters, the length of a draft, and the guard that may stop drafting.

Everything here runs inside the jitted loop. Verification belongs to `decode`, trees to `tree`.
"""
