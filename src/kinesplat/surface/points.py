"""Points on the surface of links."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True)
class SurfacePoints:
    """Points on the surface of links, in link frames.

    Attributes:
        positions: ``(n, 3)`` [m].
        normals: ``(n, 3)`` unit shading normals.
        facing: ``(n, 3)`` unit normals of the triangles, which decide what is seen from where.
        albedo: ``(n, 3)`` in [0, 1].
        area: ``(n,)`` surface that a point stands for [m^2].
        link: ``(n,)`` index of the link.
    """

    positions: Float[np.ndarray, "n 3"]
    normals: Float[np.ndarray, "n 3"]
    facing: Float[np.ndarray, "n 3"]
    albedo: Float[np.ndarray, "n 3"]
    area: Float[np.ndarray, " n"]
    link: Int[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.positions)

    def select(self, index: np.ndarray) -> "SurfacePoints":
        """The points that a mask or index array picks."""
        return type(self)(*(getattr(self, f.name)[index] for f in fields(self)))

    @classmethod
    def concatenate(cls, parts: Sequence["SurfacePoints"]) -> "SurfacePoints":
        """All points of `parts`, in order."""
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)))
