"""Kernels of our own for a GPU: their source, what builds them, what launches them."""
