"""The levels that retargeting goes through: where partners are looked for, and how softly."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One level of the search; lengths are for a picture of 256 px.

    Attributes:
        reach: partners are looked for within this distance in a track's first frame [px].
        width: of the soft minimum [px]; None for the nearest partner.
        iterations: at most.
        robust: distance beyond which a pair counts less [px]; None: least squares.
        dense: whether all of our points are used.
        late: whether tracks that begin after the first frame are used, too.
        held: whether partners are those of the first frame throughout, instead of those of the whole path.
    """

    reach: float
    width: float | None
    iterations: int
    robust: float | None = None
    dense: bool = True
    late: bool = False
    held: bool = False


SEARCH = (Stage(80.0, 12.0, 10, dense=False), Stage(50.0, 6.0, 10, dense=False), Stage(30.0, 3.0, 10, dense=False))
JUDGE = Stage(15.0, None, 8, robust=8.0)
NEAR = (Stage(24.0, 8.0, 12), Stage(20.0, 4.0, 12), Stage(12.0, 2.0, 12))
HOLD = Stage(12.0, 1.5, 15, held=True)
FINE = Stage(8.0, None, 12, robust=6.0, late=True)
LAST = Stage(6.0, None, 10, robust=6.0, late=True)
