"""Engines for NVIDIA GPUs: a chunk of thousands of coalitions is a fixed list of launches of Triton or CUDA kernels."""
