"""A learned start for the fits of a robot: initializer."""

from typing import Annotated, Literal

import tyro

from kinesplat.commands.common import (
    DEFAULTS,
    CommonOptions,
    Model,
    Output,
    cpu_of,
    err,
    load_model,
    out,
    write_json,
)
from kinesplat.inverse.initializer_training import train_initializer


def initializer(
    action: Annotated[Literal["train"], tyro.conf.Positional],
    model: Model,
    output: Output,
    steps: int = 2_000,
    resume: bool = False,
    *,
    common: CommonOptions = DEFAULTS,
) -> None:
    """Train a learned start: a small network that sees where a robot's keypoints are in a photograph.

    It is trained on renders of the self-model with random backgrounds, colours, crops, occluders and cameras; ten
    minutes on two cores. `kinesplat reconstruct --initializer FILE` then tries its proposals before the search.
    Interrupted runs go on with --resume.

    Args:
        action: train.
        model: model file, or the name of a packaged model.
        output: the initializer file to write (.safetensors); NAME.checkpoint.safetensors stands beside it meanwhile.
        steps: optimiser steps of 64 pictures.
        resume: go on with a run that was interrupted.
    """
    cpu_of(common)
    loaded = load_model(model)
    checkpoint = output.with_name(f"{output.stem}.checkpoint.safetensors")
    found = train_initializer(
        loaded, steps=steps, seed=common.seed, checkpoint=checkpoint, resume=resume, progress=err.is_terminal
    )
    found.save(output)
    checkpoint.unlink(missing_ok=True)
    seen = found.provenance
    out.print(
        f"wrote {output}: {len(found.keypoints.links)} keypoints, found within a 32nd of the picture: "
        f"{100 * seen['found_with_mask']:.0f} % with a mask, {100 * seen['found_without_mask']:.0f} % without"
    )
    write_json(common.json, {"initializer": str(output), "action": action, **seen})
