"""The transforms: one file a kind of function."""
