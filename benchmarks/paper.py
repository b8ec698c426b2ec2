"""Table 1 of "Differentiable Robot Rendering" by our run of its recipe: ours, no deform, K-planes, on one data set.

    kinesplat dataset franka_emika_panda -o panda --configurations 500 --views 3
    python benchmarks/paper.py panda -o runs --steps 2400

Stages 1 and 2 are run once and shared. Each method then gets as many steps of joint training; "no deform, trained so"
never had an appearance field, "no deform" is the trained model with it switched off. A run that was killed goes on
where it was, method by method. Writes the models, table1.json and table1.md.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from kinesplat.dataset.container import Dataset
from kinesplat.dataset.frames import Frames
from kinesplat.dataset.generate import load_robot
from kinesplat.dataset.sampling import random_configurations
from kinesplat.description import Robot
from kinesplat.evaluation.kplanes import KPlanesModel, kplanes_settings
from kinesplat.evaluation.table import evaluate
from kinesplat.gaussians import Parameters
from kinesplat.self_model import SelfModel
from kinesplat.skinning import SkinningField
from kinesplat.training.adaptive_control import Thresholds
from kinesplat.training.canonical import mesh_cloud
from kinesplat.training.checkpoint import read_checkpoint, write_checkpoint
from kinesplat.training.joint import fit_jointly
from kinesplat.training.loop import Budget
from kinesplat.training.paper import CHECKPOINT, PaperSettings, train_paper
from kinesplat.training.skinning import fit_by_labels, skinning_error

Method = Literal["ours", "no deform, trained so", "K-planes"]
METHODS: tuple[Method, ...] = ("ours", "no deform, trained so", "K-planes")
NEVER = 10**6  # every method gets all of its steps: no early stop


@dataclass(frozen=True)
class Options:
    """Arguments.

    Attributes:
        dataset: folder of `kinesplat dataset`.
        output: folder for models, checkpoints and the table.
        steps: of joint training, for each method; one configuration, all its views, a step.
        gaussians: splats at most; 10,000 to begin with.
        methods: which to run.
        images: test images to measure, all by default.
        skinning: also compare the skinning fields learnt from clouds and from labels.
    """

    dataset: tyro.conf.Positional[Path]
    output: Path
    steps: int = 2400
    gaussians: int = 12_000
    methods: tuple[Method, ...] = field(default=METHODS)
    images: int | None = None
    skinning: bool = True


def main(options: Options) -> None:
    data = Dataset.open(options.dataset)
    robot, settings = load_robot(data.plan), PaperSettings(thresholds=Thresholds(most=options.gaussians))
    settings = replace(settings, joint=replace(settings.joint, patience=NEVER))
    train, validation = (data.frames(part, geometry=False) for part in ("train", "validation"))
    options.output.mkdir(parents=True, exist_ok=True)
    shared = _first_stages(robot, data.canonical, settings, options.output)
    if options.skinning:
        print(json.dumps(_skinning(robot, shared)), flush=True)
    models: dict[str, Any] = {}
    for method in options.methods:
        began, cpu = time.perf_counter(), time.process_time()
        models[method] = _trained(method, robot, shared, (train, validation), settings, options)
        spent = f"{time.perf_counter() - began:.0f} s wall, {time.process_time() - cpu:.0f} s processor"
        print(f"{method}: {options.steps} steps in {spent}", flush=True)
    result = evaluate(models, data, limit=options.images)
    (options.output / "table1.json").write_text(json.dumps(result.to_json(), indent=1))
    (options.output / "table1.md").write_text(result.to_markdown())
    print(result.to_markdown())


def _first_stages(robot: Robot, canonical: Frames, settings: PaperSettings, output: Path) -> Mapping[str, Any]:
    """The checkpoint after the stages that all methods share."""
    folder = output / "stages"
    one = canonical.select(slice(0, 1))
    train_paper(robot, canonical, one, one, Budget(steps=1), settings, folder=folder, resume=True)
    state = read_checkpoint(folder / CHECKPOINT)
    return {"canonical": state["canonical"], "skinning": state["skinning"]}


def _trained(
    method: Method,
    robot: Robot,
    shared: Mapping[str, Any],
    frames: tuple[Frames, Frames],
    settings: PaperSettings,
    options: Options,
) -> SelfModel | KPlanesModel:
    budget = Budget(steps=options.steps)
    if method == "K-planes":
        start = KPlanesModel.around(Parameters(**shared["canonical"]), robot.tree)
        rates = replace(kplanes_settings(start), patience=NEVER)
        return fit_jointly(start, *frames, budget, rates, progress=True)[0]
    folder = options.output / method.split(",")[0].replace(" ", "_")
    if not (folder / CHECKPOINT).is_file():
        folder.mkdir(exist_ok=True)
        write_checkpoint(folder / CHECKPOINT, shared)
    settings = replace(settings, appearance=method == "ours")
    canonical = frames[1]  # not looked at: the checkpoint has that stage behind it
    model = train_paper(robot, canonical, *frames, budget, settings, folder=folder, resume=True, progress=True)
    model.save(folder / "model.safetensors")
    return model


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
