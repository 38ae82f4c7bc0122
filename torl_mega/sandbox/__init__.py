"""Runs untrusted Python: a pool of confined, forked children (`pool.py`), its process (`serve.py`) and clients.

See docs/sandbox.md for the whole. Nothing is imported here: the zygote must start light.
"""
