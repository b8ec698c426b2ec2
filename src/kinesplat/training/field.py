"""The default recipe with a skinning field in place of rigid links (`--skinning field`).

For bodies that do not come in rigid pieces: every splat follows a blend of links, and the weights are a field that
learns with the splats. It begins where the link-bound model is: a field taught the link of every splat.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kinesplat.dataset.frames import Frames
from kinesplat.errors import InputError
from kinesplat.self_model import SelfModel
from kinesplat.skinning import SkinningField
from kinesplat.training.checkpoint import read_checkpoint, write_checkpoint
from kinesplat.training.joint import JointSettings, bound_to_heaviest, fit_jointly
from kinesplat.training.loop import Budget, Log
from kinesplat.training.skinning import LinkCloud, fit_by_labels
from kinesplat.training.splat_optimizer import Rates

CHECKPOINT = "checkpoint.safetensors"
LABEL_STEPS = 400


def with_skinning_field(
    model: SelfModel, *, steps: int = LABEL_STEPS, seed: int = 0, progress: bool = False
) -> SelfModel:
    """The link-bound `model` with a field in place of its binding: splats in the canonical configuration, and weights
    that have learnt, by cross-entropy, which link each splat rides on. Spherical harmonics turn with the splats.

    Args:
        model: bound to links.
        steps: of learning the labels.
        seed: of the field.
        progress: show a bar.

    Raises:
        InputError: the model has a skinning field already.
    """
    if model.skinning is not None:
        raise InputError("the model has a skinning field already")
    cloud = LinkCloud(model.parameters.means.detach(), model.link_index)
    with torch.no_grad():
        posed = model.posed(model.tree.q_canonical.to(cloud.points))
    field = SkinningField.around(posed.means, len(model.tree.link_names), turns_harmonics=True, seed=seed)
    for _ in fit_by_labels(field, model.tree, cloud, Budget(steps=steps), seed=seed, progress=progress):
        pass
    parameters = replace(model.parameters, means=posed.means, quats=posed.quats, sh=posed.sh)
    return bound_to_heaviest(replace(model, parameters=parameters, skinning=field))


def field_settings() -> JointSettings:
    """Rates of splats and field."""
    rates = Rates(means=4e-4, quats=3e-3, log_scales=1.2e-2, logit_opacities=1e-2, sh=8e-3)
    return JointSettings(rates, {"skinning": 1e-4})


def train_with_field(
    model: SelfModel,
    frames: Frames,
    validation: Frames,
    budget: Budget,
    settings: JointSettings | None = None,
    *,
    folder: Path | None = None,
    resume: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> SelfModel:
    """Splats and skinning field together, on pictures.

    Args:
        model: link-bound, where to start.
        frames: pictures of many configurations.
        validation: pictures of others, for the early stop.
        budget: when to stop.
        settings: `field_settings()` by default.
        folder: where log and checkpoint go; nowhere without one.
        resume: go on from the checkpoint in `folder`, where there is one.
        seed: of all randomness.
        progress: show bars.

    Raises:
        InputError: the model has a skinning field already.
        ModelFileError: the checkpoint to resume from is broken.
        TrainingError: a loss became NaN; names the step.
    """
    path = None if folder is None else folder / CHECKPOINT
    state = read_checkpoint(path) if resume and path is not None and path.is_file() else None
    start = with_skinning_field(model, steps=LABEL_STEPS if state is None else 1, seed=seed, progress=progress)

    if state is not None:
        start = replace(start, link_index=state["link_index"].to(start.link_index))

    def keep(joint: Mapping[str, Any]) -> None:
        if path is not None:
            write_checkpoint(path, {**joint, "link_index": start.link_index})

    with Log(folder, 0 if state is None else state["step"]) as log:
        trained, made = fit_jointly(
            start,
            frames,
            validation,
            budget,
            settings or field_settings(),
            seed=seed,
            progress=progress,
            resume=state,
            checkpoint=keep,
            log=log.write,
        )
    return bound_to_heaviest(replace(trained, provenance={**model.provenance, **made}))
