"""Joints that follow others: from the independent q to the coordinate of every joint of the tree."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int64
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Couplings:
    """Which coordinates are independent, and a piecewise polynomial for each that follows another one.

    A coordinate is one scalar of one joint, [rad] or [m]. Coordinate ``dependent[i]`` is a polynomial of coordinate
    ``driver[i]``; a driver may itself be dependent, then its `level` is lower. A closed linkage is a table of cubic
    segments over the driver's range, a mimic joint or a joint equality has a single segment (``step`` 0).

    Attributes:
        coordinates: number of coordinates of the tree.
        independent: ``(dof,)`` coordinate of every entry of q.
        dependent: ``(k,)`` coordinates that follow.
        driver: ``(k,)`` coordinate that each of them follows.
        level: ``(k,)`` ascending; rows of one level depend on lower levels alone.
        lower: ``(k,)`` value of the driver at which the first segment starts [rad or m].
        step: ``(k,)`` length of a segment [rad or m], 0 for a single segment.
        coefficients: ``(k, segments, degree + 1)`` in ascending powers of (driver - start of its segment).
    """

    coordinates: int
    independent: Int64[Tensor, " dof"]
    dependent: Int64[Tensor, " k"]
    driver: Int64[Tensor, " k"]
    level: Int64[Tensor, " k"]
    lower: Float[Tensor, " k"]
    step: Float[Tensor, " k"]
    coefficients: Float[Tensor, "k segments powers"]

    @classmethod
    def none(cls, coordinates: int) -> "Couplings":
        """Every coordinate independent."""
        index, number = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64)
        return cls(coordinates, torch.arange(coordinates), index, index, index, number, number, number.reshape(0, 1, 1))

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Couplings":
        """The same couplings on another device, their numbers in another dtype."""
        indices = {name: getattr(self, name).to(device) for name in ("independent", "dependent", "driver", "level")}
        numbers = {name: getattr(self, name).to(device, dtype) for name in ("lower", "step", "coefficients")}
        return replace(self, **indices, **numbers)

    def coordinates_of(self, q: Float[Tensor, "*batch dof"]) -> Float[Tensor, "*batch coordinates"]:
        """Value of every coordinate, independent or not, [rad] or [m]."""
        if not len(self.dependent):
            return q
        theta = q.new_zeros(*q.shape[:-1], self.coordinates).index_copy(-1, self.independent, q)
        for rows in self._levels:
            value, _ = self._evaluate(theta, rows)
            theta = theta.index_copy(-1, self.dependent[rows], value)
        return theta

    def jacobian(self, q: Float[Tensor, "*batch dof"]) -> Float[Tensor, "*batch coordinates dof"]:
        """Derivative of every coordinate with respect to q."""
        identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device).expand(*q.shape, q.shape[-1])
        if not len(self.dependent):
            return identity
        theta = self.coordinates_of(q)
        J = q.new_zeros(*q.shape[:-1], self.coordinates, q.shape[-1]).index_copy(-2, self.independent, identity)
        for rows in self._levels:
            _, slope = self._evaluate(theta, rows)
            J = J.index_copy(-2, self.dependent[rows], slope[..., None] * J.index_select(-2, self.driver[rows]))
        return J

    @cached_property
    def _levels(self) -> list[slice]:
        counts = torch.unique_consecutive(self.level, return_counts=True)[1].tolist()
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]

    def _evaluate(self, theta: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Polynomials of `rows` and their slopes at the drivers' values, by Horner's rule."""
        x = theta.index_select(-1, self.driver[rows]) - self.lower[rows]
        coefficients = self.coefficients[rows]
        segments = coefficients.shape[1]
        if segments == 1:
            coefficients = coefficients[:, 0]
        else:
            step = self.step[rows]
            position = torch.where(step > 0, x.detach() / torch.where(step > 0, step, 1.0), 0.0)
            segment = position.floor().clamp(0, segments - 1).long()
            x = x - segment * step
            coefficients = coefficients[torch.arange(len(coefficients), device=x.device), segment]
        value, slope = coefficients[..., -1].expand_as(x), torch.zeros_like(x)
        for power in range(coefficients.shape[-1] - 2, -1, -1):
            value, slope = value * x + coefficients[..., power], slope * x + value
        return value, slope
