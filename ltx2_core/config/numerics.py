"""How exactly the transformer computes."""

from __future__ import annotations

# exact: every operation rounds where the reference rounds. fast: as few roundings as possible, in the same dtypes.
# fp8: fast, and most matrix products of blocks in eight bits
NUMERICS = ("exact", "fast", "fp8")

# The layers of blocks whose products fp8 computes in eight bits. Everything else stays as it is: gate logits, norms,
# modulation, and what leads into and out of the blocks; they are small, and what they err reaches every token.
_EIGHT_BIT = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")


def in_eight_bits(name: str) -> bool:
    """Whether fp8 takes the linear layer's weight of this name in the transformer."""
    return name.startswith("blocks.") and name.endswith(tuple(f".{layer}.weight" for layer in _EIGHT_BIT))
