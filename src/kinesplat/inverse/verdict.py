"""How sure a fit may be of itself: figures about it, and what follows from them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kinesplat.inverse.coarse_to_fine import Refinement
from kinesplat.inverse.objective import PhotometricObjective
from kinesplat.inverse.result import AMBIGUOUS_RATIO
from kinesplat.self_model import SelfModel

EQUAL_RATIO = 1.02
UNEXPLAINED_FAILURE = 0.25
TRAINED_DOUBT, UNTRAINED_DOUBT, DIM_DOUBT = 0.0065, 0.018, 0.03
DIM = 0.5
HOPELESS = 5.0


def evidence_of(
    model: SelfModel, objective: PhotometricObjective, hypotheses: Sequence[float], found: list[Refinement]
) -> dict[str, Any]:
    """The figures behind a verdict, from the losses of distinct hypotheses and what each attempt found.

    Returns:
        unexplained: share of the pictures' squared signal (against no robot at all) that the answer leaves;
        doubt: the share from which on one attempt is not enough: more than this kind of model leaves at the truth;
        gap: loss of the next distinct hypothesis over the answer's, None where there is none;
        agreement: share of the last starts that ended in the answer's loss; attempts: how many were made;
        confirmed: whether two of them came upon the answer.
    """
    best, *others = sorted(hypotheses)
    doubt = TRAINED_DOUBT if "validation_psnr_db" in model.provenance else UNTRAINED_DOUBT
    ends = torch.stack([f.last.linearization.loss.min() for f in found])
    losses = torch.cat([f.last.linearization.loss for f in found])
    return {
        "unexplained": best / max(objective.empty_loss, 1e-30),
        "doubt": doubt if objective.colour_weight > DIM else DIM_DOUBT,
        "gap": others[0] / max(best, 1e-30) if others else None,
        "agreement": (losses <= EQUAL_RATIO * best).float().mean().item(),
        "attempts": len(found),
        "confirmed": int((ends <= EQUAL_RATIO * best).sum()) > 1,
    }


def verdict(evidence: Mapping[str, Any]) -> str:
    """``converged``, ``ambiguous`` or ``failed``.

    Failed: a quarter of the signal or more is left over. Ambiguous: a distinct hypothesis fits nearly as well, or more
    is left over than a good self-model leaves of a clean picture, and only one attempt came upon the answer.
    """
    if evidence["unexplained"] > UNEXPLAINED_FAILURE:
        return "failed"
    rival = evidence["gap"] is not None and evidence["gap"] < AMBIGUOUS_RATIO
    doubt = evidence["unexplained"] > evidence["doubt"] and not evidence["confirmed"]
    return "ambiguous" if rival or doubt else "converged"


def settled(evidence: Mapping[str, Any]) -> bool:
    """Whether another attempt is idle: it converged, was confirmed, or all starts ended in equal, good pictures.

    That two attempts agree does not help an answer which leaves five times as much as doubts begin with.
    """
    equal = evidence["gap"] is not None and evidence["gap"] < EQUAL_RATIO and evidence["agreement"] == 1.0
    good = evidence["unexplained"] <= evidence["doubt"]
    confirmed = evidence["confirmed"] and evidence["unexplained"] <= HOPELESS * evidence["doubt"]
    says = verdict(evidence)
    return says == "converged" or (says == "ambiguous" and (confirmed or (equal and good)))
