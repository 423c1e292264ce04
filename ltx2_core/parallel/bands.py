"""What the video decoder sees of other ranks: which rows of every picture are this rank's, and the rows next to them.

The rows of a clip's latent frames are dealt to ranks in bands, one below the other. Up-sampling makes so many finer rows
of each, so a rank owns whole rows of every feature map and of the pixels. Only what a convolution looks at beyond a band
is another's, and neighbours exchange it. With one rank the band is the whole picture and nothing is exchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

# rows that a convolution sees above a band and below it: all kernels of the decoder are 3 high
HALO = 1


class Neighbours(Protocol):
    """The ranks that have the bands above and below. All ranks with rows call it equally often, with alike shapes."""

    def exchange_edges(self, top: Tensor | None, bottom: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Give the first row to the rank above and the last row to the one below; take what each of them gives.

        Contiguous; None in place of a neighbour that is not there, and None comes back for it.
        """
        ...


def deal(rows: int, ranks: int) -> tuple[int, ...]:
    """Rows of every rank's band: equal but for one row, the taller bands first; ranks beyond ``rows`` get none."""
    if rows < 1 or ranks < 1:
        raise ValueError(f"{rows} rows cannot be dealt to {ranks} ranks: there must be one of each")
    least, taller = divmod(rows, ranks)
    return (least + 1,) * taller + (least,) * (ranks - taller)


@dataclass(frozen=True)
class Bands:
    """How the rows of one clip lie on the ranks, and which of them is this one.

    heights: latent rows of every rank's band, the top one first; ranks without rows come last. () is one rank with all.
    """

    rank: int = 0
    heights: tuple[int, ...] = ()
    neighbours: Neighbours | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} is not among {self.size} ranks")
        filled = [height for height in self.heights if height]
        if self.heights and (not filled or min(filled) < HALO or self.heights[: len(filled)] != tuple(filled)):
            raise ValueError(f"bands of {self.heights} rows: the first ranks have {HALO} row or more, the others none")
        if len(filled) > 1 and self.neighbours is None:
            raise ValueError(f"{len(filled)} bands need neighbours to exchange their edges")

    @property
    def size(self) -> int:
        return max(len(self.heights), 1)

    @property
    def halo(self) -> int:
        """Rows that lie around this band's while they are convolved: 0 for a whole picture, and where there is none."""
        return HALO if self.size > 1 and self.heights[self.rank] else 0

    def rows(self, factor: int = 1) -> slice:
        """This rank's rows of a picture with ``factor`` rows to a latent one."""
        if self.size == 1:
            return slice(None)
        begin = sum(self.heights[: self.rank])
        return slice(begin * factor, (begin + self.heights[self.rank]) * factor)

    def take(self, x: Tensor) -> Tensor:
        """This rank's rows of latents [B, C, F, H, W]. Raises ValueError where the bands are another picture's."""
        if self.heights and sum(self.heights) != x.shape[3]:
            raise ValueError(f"bands of {self.heights} rows are not those of a picture with {x.shape[3]}")
        return x[:, :, :, self.rows()]

    def edges(self, own: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The rows above and below ``own`` [B, C, T, h, W]: each [B, C, T, W], or None at the picture's border.

        One exchange.
        """
        above, below = self.rank > 0, any(self.heights[self.rank + 1 :])
        if not (above or below):
            return None, None
        assert self.neighbours is not None
        return self.neighbours.exchange_edges(
            own[:, :, :, 0].contiguous() if above else None,
            own[:, :, :, -1].contiguous() if below else None,
        )


WHOLE = Bands()
