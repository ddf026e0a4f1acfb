"""The arithmetic of GDN-2 on plain tensors.

Knows torch and the layout of its arguments; knows nothing of layers, specs or checkpoints, and does not
choose between implementations.
"""
