"""Runs compiled models: nothing here needs a compiler, and nothing here imports one."""
