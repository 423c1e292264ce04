"""Conditioning: each kind turns latent states into others; new tokens are only ever appended."""
