"""Attention: one function (`attend.py`), and the forms that it may take on a backend, one file each."""
