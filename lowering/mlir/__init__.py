"""CPU kernels as MLIR text, and the rules that choose them."""
