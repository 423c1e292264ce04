"""The order in which block scales lie in a file: tiles of 128 rows and 4 columns, as tensor cores read them.

Element (row, col) of the padded scales lies at tile * 512 + (row % 32) * 16 + (row % 128 // 32) * 4 + col % 4, with
tile = row // 128 * (padded columns // 4) + col // 4.
"""

from __future__ import annotations

from torch import Tensor

_ROWS, _COLUMNS = 128, 4


def padded_shape(rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of the whole tiles that hold so many scales."""
    return rows + -rows % _ROWS, columns + -columns % _COLUMNS


def unswizzle(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Scales in their natural order, [rows, columns], from ``padded_shape(rows, columns)`` of them."""
    height, width = padded_shape(rows, columns)
    tiles = scales.reshape(height // _ROWS, width // _COLUMNS, 32, _ROWS // 32, _COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(height, width)[:rows, :columns]


def swizzle(scales: Tensor) -> Tensor:
    """The inverse of ``unswizzle``, with zeros as padding. scales: [rows, columns]."""
    rows, columns = scales.shape
    height, width = padded_shape(rows, columns)
    padded = scales.new_zeros(height, width)
    padded[:rows, :columns] = scales
    tiles = padded.view(height // _ROWS, _ROWS // 32, 32, width // _COLUMNS, _COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(height, width)
