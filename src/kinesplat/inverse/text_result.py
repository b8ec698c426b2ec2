"""What `text_to_q` returns: the answer, how much more it looks like the words than chance, and what else does."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.inverse.result import FitResult

LOOSE_STD = 0.2
RIVAL_SHARE = 0.95


@dataclass(frozen=True)
class TextResult(FitResult):
    """Result of `text_to_q`: a `FitResult` some of whose fields have another meaning.

    Attributes:
        loss_history: of the answer's start, each on that step's random variations of the pictures.
        covariance: ``(dof, dof)`` spread of the better half of the ends about the answer. No curvature of the loss:
            a cosine has no noise, so its Hessian says nothing about how far other answers lie. Joints that the words
            leave open have a wide spread; with a single start all variances are infinite.
        hypotheses: distinct ends, best first; their loss is judged on plain pictures and the same few variations.
        verdict: ``converged``; ``ambiguous``: a distinct end has gained nearly as much; ``failed``: no more like the
            words than the best of the random starts, or more like one of the negatives.
        evidence: ``prompt``; ``cosine`` of the answer, ``start_cosines`` and ``start_losses`` of all starts, lowest
            first; ``rival_share``: what the best other hypothesis has gained on the median start, against the answer's
            gain; ``most_like``: the likest sentence; with negatives ``probability`` of the prompt ``among`` them.
    """

    @property
    def cosine(self) -> float:
        """Similarity of the answer's pictures and the prompt, -1 to 1; what is high depends on the encoder."""
        return self.evidence["cosine"]

    @property
    def weak_variables(self) -> tuple[str, ...]:
        """Joints that good answers do not agree about: a spread above 0.2 rad or m."""
        std = self.covariance.diagonal().sqrt()
        return tuple(n for n, s in zip(self.variable_names, std.tolist(), strict=True) if not s < LOOSE_STD)

    def report(self) -> str:
        """A few lines for a person: verdict, similarity, joint values with their spread, other answers."""
        start = self.evidence["start_cosines"]
        lines = [
            f"{self.verdict}: cosine {self.cosine:.3f} with {self.evidence['prompt']!r} after "
            f"{len(self.loss_history)} iterations, {self.seconds:.1f} s; {len(start)} starts had {start[0]:.3f} to "
            f"{start[-1]:.3f}"
        ]
        if "probability" in self.evidence:
            lines.append(f"  probability {self.evidence['probability']:.3f} among {', '.join(self.evidence['among'])}")
        for name, value, deviation in zip(
            self.variable_names, self.q.tolist(), self.covariance.diagonal().sqrt().tolist(), strict=True
        ):
            lines.append(f"  {name:<24} {value:+.4f}, good answers spread {deviation:.1g}")
        for rank, other in enumerate(self.hypotheses[1:4], start=2):
            away = (other.q - self.q).abs()
            joint = self.variable_names[int(away.argmax())]
            lines.append(f"  hypothesis {rank}: loss {other.loss:.3f}, most different in {joint}: {away.max():.2f}")
        return "\n".join(lines)


def evidence_of(
    names: Sequence[str],
    cosines: Float[Tensor, " m"],
    start_cosines: Float[Tensor, "batch m"],
    losses: Sequence[float],
    start_losses: Float[Tensor, " batch"],
    logit_scale: float,
) -> dict[str, Any]:
    """The figures behind a verdict.

    Args:
        names: of the sentences, the prompt first.
        cosines: of the answer with every sentence.
        start_cosines: of all starts with every sentence.
        losses: of the distinct ends, best first.
        start_losses: of the starts.
        logit_scale: of the encoder.
    """
    found: dict[str, Any] = {
        "cosine": float(cosines[0]),
        "start_cosines": sorted(start_cosines[:, 0].tolist()),
        "start_losses": sorted(start_losses.tolist()),
        "rival_share": None,
        "most_like": names[int(cosines.argmax())],
    }
    if len(losses) > 1:
        middle = float(start_losses.median())
        found["rival_share"] = (middle - losses[1]) / max(middle - losses[0], 1e-9)
    if len(names) > 1:
        found["probability"] = float((logit_scale * cosines).softmax(dim=0)[0])
        found["among"] = list(names)
    return found


def verdict(evidence: Mapping[str, Any], name: str, loss: float) -> str:
    """``converged``, ``ambiguous`` or ``failed``; see `TextResult`."""
    if loss >= evidence["start_losses"][0] or evidence["most_like"] != name:
        return "failed"
    share = evidence["rival_share"]
    return "ambiguous" if share is not None and share > RIVAL_SHARE else "converged"


def spread_of(q: Float[Tensor, "batch dof"], losses: Float[Tensor, " batch"]) -> Float[Tensor, "dof dof"]:
    """Second moments of the better half of the ends about the best one; infinite variances where there is but one."""
    order = losses.argsort()
    others = q[order[1 : (len(q) + 1) // 2 + 1]] - q[order[0]]
    if not len(others):
        return torch.diag(torch.full((q.shape[1],), math.inf).to(q))
    return others.mT @ others / len(others)
