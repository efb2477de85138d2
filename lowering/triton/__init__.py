"""Graph nodes to Triton kernels: text made from data, compiled ahead of time for NVIDIA GPUs."""
