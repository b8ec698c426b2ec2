"""How sure a fit may be of itself: figures about it, and what follows from them."""

import math
from collections.abc import Mapping

import torch

from kinesplat.inverse.coarse_to_fine import Refinement
from kinesplat.inverse.objective import PhotometricObjective
from kinesplat.inverse.result import Hypothesis

AMBIGUOUS_RATIO = 1.3
UNEXPLAINED_FAILURE = 0.25
SAME = 1.02


def evidence_of(
    objective: PhotometricObjective, hypotheses: tuple[Hypothesis, ...], found: list[Refinement]
) -> dict[str, float | None]:
    """The figures behind a verdict.

    Returns:
        unexplained: share of the pictures' squared signal (against no robot at all) that the answer leaves;
        gap: loss of the next distinct hypothesis over the answer's, None where there is none;
        agreement: share of the last starts that ended in the answer; attempts: how many were made.
    """
    best = hypotheses[0].loss
    losses = torch.cat([f.last.linearization.loss for f in found])
    return {
        "unexplained": best / max(objective.empty_loss, 1e-30),
        "gap": hypotheses[1].loss / max(best, 1e-30) if len(hypotheses) > 1 else None,
        "agreement": (losses < SAME * best).float().mean().item(),
        "attempts": len(found),
    }


def verdict(evidence: Mapping[str, float | None]) -> str:
    """``converged``, ``ambiguous`` (another hypothesis fits nearly as well) or ``failed`` (too much is left over)."""
    unexplained, gap = evidence["unexplained"], evidence["gap"]
    assert unexplained is not None
    if unexplained > UNEXPLAINED_FAILURE:
        return "failed"
    return "ambiguous" if (math.inf if gap is None else gap) < AMBIGUOUS_RATIO else "converged"
