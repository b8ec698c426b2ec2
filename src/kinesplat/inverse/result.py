"""What a fit returns: the answer, how sure it is, and what else it could have been."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.camera import Camera

WEAK_STD_RAD, WEAK_STD_M = 0.05, 0.005
TOGETHER = 0.95
AMBIGUOUS_RATIO = 1.3
DISTINCT_RAD = 0.1
SYSTEMATIC = 25.0


@dataclass(frozen=True)
class Hypothesis:
    """One distinct minimum: ``q (dof,)`` [rad]/[m], its camera, and its loss (see `FitResult.loss`)."""

    q: Float[Tensor, " dof"]
    camera: Camera
    loss: float


@dataclass(frozen=True)
class FitResult:
    """Result of an inverse problem.

    Attributes:
        q: ``(dof,)`` the best configuration [rad]/[m].
        camera: the camera of the view, or a batch of one per view; the given one unless it was optimised.
        loss_history: loss of the best start after each iteration, over all image sizes in turn (values of
            different image sizes are not comparable).
        level_starts: index into `loss_history` at which each image size begins.
        q_history: ``(iterations, dof)`` the configurations behind `loss_history`.
        covariance: ``(p, p)`` of `variable_names`, from the Gauss-Newton Hessian at the answer and the variance of its
            residuals, times 25 squared: what a model cannot explain is no noise that differs from pixel to pixel, and
            on pictures by MuJoCo two thirds of all errors lie within standard deviations that are 25 times as large as
            independent residuals would make them. A variable that the image does not show has an infinite variance.
        variable_names: names of the ``p`` variables: joints, then ``camera0.vx`` ... for free cameras [m], [rad].
        hypotheses: distinct minima, best first, the first is the answer; those within 2 % of the best loss go by their
            distance to `q_init`, or to the canonical configuration.
        verdict: ``converged``, ``ambiguous`` (another hypothesis fits nearly as well, or too much is left over for an
            answer that one attempt alone found) or ``failed`` (residual too large); see `kinesplat.inverse.verdict`.
        seconds: wall time.
        evidence: figures that the verdict rests on.
        joint_types: "hinge" or "slide" of every joint.
        rival_loss: the loss up to which another hypothesis fits nearly as well; None: 1.3 times that of the answer.
    """

    q: Float[Tensor, " dof"]
    camera: Camera
    loss_history: tuple[float, ...]
    level_starts: tuple[int, ...]
    q_history: Float[Tensor, "iterations dof"]
    covariance: Float[Tensor, "p p"]
    variable_names: tuple[str, ...]
    hypotheses: tuple[Hypothesis, ...]
    verdict: str
    seconds: float
    evidence: Mapping[str, Any] = field(default_factory=dict)
    joint_types: tuple[str, ...] = ()
    rival_loss: float | None = None

    @property
    def loss(self) -> float:
        """Squared residuals of the answer at the finest image size: summed over channels, averaged over pixels."""
        return self.hypotheses[0].loss

    @property
    def weak_variables(self) -> tuple[str, ...]:
        """Variables whose standard deviation exceeds 0.05 rad (slides 5 mm, cameras 0.05 m): hardly to be seen here."""
        std = self.covariance.diagonal().sqrt().tolist()
        slides = [kind == "slide" for kind in self.joint_types] + [False] * (len(std) - len(self.joint_types))
        limits = [WEAK_STD_M if slide else WEAK_STD_RAD for slide in slides]
        return tuple(n for n, s, most in zip(self.variable_names, std, limits, strict=True) if not s < most)

    @property
    def weak_pairs(self) -> tuple[tuple[str, str], ...]:
        """Weak variables that are known together only: one makes good what the other is off (correlation over 0.95)."""
        std = self.covariance.diagonal().sqrt()
        related = (self.covariance / (std[:, None] * std)).abs() > TOGETHER
        weak = [i for i, n in enumerate(self.variable_names) if n in self.weak_variables and math.isfinite(std[i])]
        pairs = [(i, j) for i in weak for j in weak if i < j and related[i, j]]
        return tuple((self.variable_names[i], self.variable_names[j]) for i, j in pairs)

    @property
    def ambiguous_joints(self) -> tuple[str, ...]:
        """Joints in which hypotheses that fit nearly as well differ: by 0.1 rad, full turns aside, or 0.1 m."""
        limit = AMBIGUOUS_RATIO * self.loss if self.rival_loss is None else self.rival_loss
        rivals = [h.q for h in self.hypotheses[1:] if h.loss <= limit]
        away = torch.stack([self.q, *rivals]) - self.q
        hinges = torch.tensor([kind == "hinge" for kind in self.joint_types])
        turned = torch.remainder(away + math.pi, 2.0 * math.pi) - math.pi
        away = torch.where(hinges, turned, away) if self.joint_types else away
        differ = (away.abs() > DISTINCT_RAD).any(dim=0).tolist()
        return tuple(name for name, differs in zip(self.variable_names, differ, strict=False) if differs)

    def report(self) -> str:
        """A few lines for a person: verdict, joint values with standard deviations, weak variables, hypotheses."""
        std = self.covariance.diagonal().sqrt().tolist()
        lines = [
            f"{self.verdict}: loss {self.loss:.3g} after {len(self.loss_history)} iterations, {self.seconds:.1f} s"
        ]
        if self.verdict == "ambiguous" and self.ambiguous_joints:
            lines.append(f"  other answers fit nearly as well; they differ in {', '.join(self.ambiguous_joints)}")
        if self.evidence.get("start") == "initializer":
            lines.append("  from a learned start")
        if self.evidence.get("start") == "contours":
            lines.append("  neither masks nor a plain background: found by the robot's contours")
        for name, value, deviation in zip(self.variable_names, self.q.tolist(), std, strict=False):
            lines.append(f"  {name:<24} {value:+.4f} +- {deviation:.1g}")
        for name in self.weak_variables:
            lines.append(f"  {name} is hardly observable from this view")
        for a, b in self.weak_pairs:
            lines.append(f"  {a} and {b} can make good for each other")
        for rank, other in enumerate(self.hypotheses[1:4], start=2):
            away = (other.q - self.q).abs()
            joint = self.variable_names[int(away.argmax())]
            lines.append(f"  hypothesis {rank}: loss {other.loss:.3g}, most different in {joint}: {away.max():.3f}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary; units in the key names. Infinite variances become null."""
        covariance = [[v if math.isfinite(v) else None for v in row] for row in self.covariance.tolist()]
        return {
            "verdict": self.verdict,
            "q": self.q.tolist(),
            "camera": self.camera.to_json(),
            "loss": self.loss,
            "variable_names": list(self.variable_names),
            "covariance": covariance,
            "weak_variables": list(self.weak_variables),
            "ambiguous_joints": list(self.ambiguous_joints),
            "weak_pairs": [list(pair) for pair in self.weak_pairs],
            "hypotheses": [{"q": h.q.tolist(), "camera": h.camera.to_json(), "loss": h.loss} for h in self.hypotheses],
            "evidence": dict(self.evidence),
            "iterations": len(self.loss_history),
            "seconds": self.seconds,
        }


def covariance_of(hessian: Float[Tensor, "p p"], loss: float, residuals: int) -> Float[Tensor, "p p"]:
    """Covariance ``s^2 H^-1`` with ``s^2 = loss / residuals``; directions that H does not see become infinite.

    Args:
        hessian: transposed Jacobian times Jacobian at the solution.
        loss: sum of squared residuals there.
        residuals: their number.
    """
    variance = loss / max(residuals - len(hessian), 1)
    return infinite_where_blind(hessian, variance * hessian.double()).to(hessian.dtype)


def infinite_where_blind(hessian: Float[Tensor, "p p"], meat: Float[Tensor, "p p"]) -> Float[Tensor, "p p"]:
    """``H^-1 M H^-1``; variables in directions that H does not see have an infinite variance.

    Args:
        hessian: transposed Jacobian times Jacobian at the solution.
        meat: covariance of the loss's slope there (half of the slope); ``s^2 H`` for residuals that are independent.
    """
    values, vectors = torch.linalg.eigh(hessian.double())
    seen = values > 1e-10 * values.max().clamp(min=1e-30)
    inverse = (vectors * torch.where(seen, 1.0 / values.clamp(min=1e-300), 0.0)) @ vectors.mT
    covariance = inverse @ meat.double() @ inverse
    blind = (vectors[:, ~seen] ** 2).sum(dim=1) > 1e-6
    covariance[blind, blind] = math.inf
    return covariance
