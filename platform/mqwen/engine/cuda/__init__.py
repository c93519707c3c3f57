"""Decoding on a CUDA card near the speed of its memory: Triton kernels, and the graphs that replay them."""
