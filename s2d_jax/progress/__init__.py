"""Shows what goes on while somebody waits, and about how long it will take.

Here belong the activities that loading, compiling and prefill report, how they are shown (in a terminal, in a notebook, as
lines of a log) and the durations that are remembered for the next time. An activity is reported where it happens.
"""
