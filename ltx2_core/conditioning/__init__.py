"""Conditioning items: each turns a latent state into another one; new tokens are only ever appended."""
