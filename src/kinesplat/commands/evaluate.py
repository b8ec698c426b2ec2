"""How good self-models are on held-out images: evaluate."""

from pathlib import Path
from typing import Annotated

import torch
import tyro

from kinesplat.commands.common import (
    DEFAULTS,
    CommonOptions,
    Output,
    device_of,
    err,
    load_model,
    make_folder,
    out,
    write_json,
)
from kinesplat.dataset.container import Dataset
from kinesplat.errors import InputError
from kinesplat.evaluation.figure import write_figure
from kinesplat.evaluation.table import Renderable
from kinesplat.evaluation.table import evaluate as evaluate_models
from kinesplat.files import written_whole
from kinesplat.training.loop import Budget


def evaluate(
    models: Annotated[tuple[str, ...], tyro.conf.Positional],
    dataset: Path,
    output: Output = Path("evaluation"),
    images: int | None = None,
    baselines: bool = True,
    train_baselines: int | None = None,
    skip_corrupt: bool = False,
    *,
    common: CommonOptions = DEFAULTS,
) -> None:
    """Measure self-models on the test images of a data set: PSNR, SSIM, masks, Chamfer distance, and baselines.

    Writes evaluation.json, evaluation.md and figure.png into the output folder.

    Args:
        models: model files, or names of packaged models; each gets a row.
        dataset: folder that `kinesplat dataset` wrote, of the same robot.
        output: folder for the results; created if needed.
        images: measure on so many test images only.
        baselines: also measure what a model has to beat: images looked up among those of training, a random one, the
            model without its appearance field, and without motion.
        train_baselines: also train what Table 1 compares with, "no deform" and K-planes, for so many steps each (a
            quarter of a second a step), into OUTPUT/baselines; a run that was killed goes on there.
        skip_corrupt: leave out shards of the data set that cannot be read.
    """
    device = device_of(common)
    if not models:
        raise InputError("no model given: kinesplat evaluate MODEL... --dataset DIR")
    data = Dataset.open(dataset, skip_corrupt)
    loaded: dict[str, Renderable] = {
        name: load_model(model).to(device) for model, name in zip(models, _names(models), strict=True)
    }
    make_folder(output)
    models_and_baselines = loaded | _trained_baselines(data, train_baselines, output, device, common.seed)
    evaluation = evaluate_models(
        models_and_baselines,
        data,
        limit=images,
        baselines=baselines,
        seed=common.seed,
        report=(lambda name: err.print(f"measuring {name}")) if err.is_terminal else None,
    )
    write_json(output / "evaluation.json", evaluation.to_json())
    with written_whole(output / "evaluation.md") as temporary:
        temporary.write_text(evaluation.to_markdown())
    write_figure(output / "figure.png", evaluation)
    out.print(evaluation.to_markdown())
    out.print(f"wrote evaluation.json, evaluation.md and figure.png into {output}")
    write_json(common.json, evaluation.to_json())


def _trained_baselines(
    data: Dataset, steps: int | None, output: Path, device: torch.device, seed: int
) -> dict[str, Renderable]:
    """No deform and K-planes, where they are asked for."""
    if steps is None:
        return {}
    from kinesplat.evaluation.trained import train_baselines  # needs the description package, and so MuJoCo

    budget, folder = Budget(steps=steps), output / "baselines"
    more = {"device": str(device), "seed": seed}
    return dict(train_baselines(data, budget, folder, **more, progress=err.is_terminal))


def _names(models: tuple[str, ...]) -> list[str]:
    """Short names of the models, told apart where they repeat."""
    stems = [Path(model).stem if Path(model).suffix else model for model in models]
    return [f"{stem} ({model})" if stems.count(stem) > 1 else stem for stem, model in zip(stems, models, strict=True)]
