"""Table 1 of "Differentiable Robot Rendering" by our run of its recipe: ours, no deform, K-planes, on one data set.

    kinesplat dataset franka_emika_panda -o panda --configurations 500 --views 3
    python benchmarks/paper.py panda -o runs --steps 2400

Stages 1 and 2 are run once and shared. Each method then gets as many steps of joint training; "no deform" never had an
appearance field, "no deform (field off)" is the trained model with it switched off. A run that was killed goes on where
it was. Writes the models, table1.json, table1.md and table1.png.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from kinesplat.dataset.container import Dataset
from kinesplat.dataset.generate import load_robot
from kinesplat.dataset.sampling import random_configurations
from kinesplat.description import Robot
from kinesplat.evaluation.figure import write_figure
from kinesplat.evaluation.table import evaluate
from kinesplat.evaluation.trained import K_PLANES, NO_DEFORM, shared_stages, train_from, train_kplanes
from kinesplat.skinning import SkinningField
from kinesplat.training.adaptive_control import Thresholds
from kinesplat.training.canonical import mesh_cloud
from kinesplat.training.loop import Budget
from kinesplat.training.paper import PaperSettings
from kinesplat.training.skinning import fit_by_labels, skinning_error

Method = Literal["ours", "no deform", "K-planes"]
METHODS: tuple[Method, ...] = ("ours", NO_DEFORM, K_PLANES)


@dataclass(frozen=True)
class Options:
    """Arguments.

    Attributes:
        dataset: folder of `kinesplat dataset`.
        output: folder for models, checkpoints and the table.
        steps: of joint training, for each method; one configuration, all its views, a step.
        gaussians: splats at most; 10,000 to begin with.
        methods: which to run.
        images: test images to measure, all by default; 0: only train.
        skinning: also compare the skinning fields learnt from clouds and from labels.
    """

    dataset: tyro.conf.Positional[Path]
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    steps: int = 2400
    gaussians: int = 12_000
    methods: tuple[Method, ...] = field(default=METHODS)
    images: int | None = None
    skinning: bool = True


def main(options: Options) -> None:
    data = Dataset.open(options.dataset)
    robot, settings = load_robot(data.plan), PaperSettings(thresholds=Thresholds(most=options.gaussians))
    frames = data.frames("train", geometry=False), data.frames("validation", geometry=False)
    stages = shared_stages(robot, data.canonical, settings, options.output / "stages", progress=True)
    if options.skinning:
        print(json.dumps(_skinning(robot, stages)), flush=True)
    budget, models = Budget(steps=options.steps), {}
    for method in options.methods:
        began, cpu = time.perf_counter(), time.process_time()
        folder = options.output / method.replace(" ", "_").lower()
        if method == K_PLANES:
            models[method] = train_kplanes(stages, robot, frames, budget, folder, progress=True)
        else:
            chosen = replace(settings, appearance=method != NO_DEFORM)
            models[method] = train_from(stages, robot, frames, budget, folder, chosen, progress=True)
            models[method].save(folder / "model.safetensors")
        spent = f"{time.perf_counter() - began:.0f} s wall, {time.process_time() - cpu:.0f} s processor"
        print(f"{method}: {options.steps} steps in {spent}", flush=True)
    if options.images != 0:
        result = evaluate(models, data, limit=options.images)
        (options.output / "table1.json").write_text(json.dumps(result.to_json(), indent=1))
        (options.output / "table1.md").write_text(result.to_markdown())
        write_figure(options.output / "table1.png", result)
        print(result.to_markdown())


def _skinning(robot: Robot, shared: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Errors of the field of stage 2, and of one taught the links, on configurations and points of their own."""
    tree, cloud = robot.tree, mesh_cloud(robot, 10_000, seed=77)[0]
    q = random_configurations(tree, 10, torch.Generator().manual_seed(9))
    by_clouds = SkinningField.like(dict(shared["skinning"]))
    taught, _ = mesh_cloud(robot, 40_000, seed=1)
    by_labels = SkinningField.around(taught.posed(tree, tree.q_canonical), len(tree.link_names))
    for _ in fit_by_labels(by_labels, tree, taught, Budget(steps=400)):
        pass
    rigid = torch.nn.functional.one_hot(cloud.link_index, len(tree.link_names)).float()
    even = torch.randperm(len(cloud.points), generator=torch.Generator().manual_seed(0)).tensor_split(2)[0]
    return {
        "rigid": skinning_error(lambda points: rigid[even], tree, cloud, q),
        "labels": skinning_error(by_labels, tree, cloud, q),
        "chamfer": skinning_error(by_clouds, tree, cloud, q),
    }


if __name__ == "__main__":
    main(tyro.cli(Options))
