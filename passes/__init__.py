"""Graph to graph: one pass a file, and the pipelines that order them."""
