"""Frozen configurations of every component, read from checkpoint metadata. Torch-free."""
