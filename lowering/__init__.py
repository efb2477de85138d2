"""Graph nodes to kernels: the rules, the kernel templates of each backend, and the walk that applies them."""
