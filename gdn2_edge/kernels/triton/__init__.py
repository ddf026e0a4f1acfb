"""Kernels for GPUs, in Triton. Like all of `kernels` they know tensors and layouts; no layers, specs or checkpoints.

Each file holds one idea: its kernels, and for each a function that launches it on torch tensors.
"""
