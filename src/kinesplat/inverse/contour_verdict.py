"""How sure answers by contours may be of themselves: shares of evidence, and one rule for what counts as a rival.

A loss is the share that is missing of the evidence which the contours of the best answer could give; what is left of 1
is its evidence, none where contours meet edges by chance. Right arms in five photographs of a real xArm7 have 0.20 to
0.30 of it, wrong ones 0.02 at most, pictures without a robot less than none. These are few pictures of one robot, so
the rule is on the safe side.
"""

UNSEEN = 0.93
CLEAR = 0.85
RIVAL_SHARE = 0.5


def rival_loss(best: float) -> float:
    """The loss up to which another answer is a rival: it has half of the best one's evidence, or more."""
    return 1.0 - RIVAL_SHARE * (1.0 - best)


def verdict_of(losses: list[float]) -> str:
    """``failed`` near chance, ``ambiguous`` with little evidence or a rival, else ``converged``.

    Args:
        losses: of distinct answers, in any order.
    """
    best, *others = sorted(losses)
    if best > UNSEEN:
        return "failed"
    rival = bool(others) and others[0] <= rival_loss(best)
    return "ambiguous" if rival or best > CLEAR else "converged"
