"""The sections of benchmarks/gpu.py that train: data sets traced on the card, both recipes, Table 1.

Every robot leaves its files in the folder of the report: sets/NAME (images), models/NAME.safetensors and .json (recipe
default), paper/NAME (checkpoints, models, Table 1). The same command goes on where a call ran out of time.
"""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from zoo import DESCRIPTIONS, PAPER

from kinesplat import zoo
from kinesplat.dataset.container import MANIFEST, Dataset
from kinesplat.dataset.generate import write_dataset
from kinesplat.dataset.plan import Plan
from kinesplat.errors import KinesplatError
from kinesplat.evaluation.table import evaluate
from kinesplat.evaluation.trained import train_baselines
from kinesplat.self_model import SelfModel
from kinesplat.training.default import DefaultSettings
from kinesplat.training.joint import mean_psnr
from kinesplat.training.loop import Budget
from kinesplat.training.paper import PaperSettings
from kinesplat.training.recipes import TrainingOptions
from kinesplat.training.recipes import train as train_model

Report = dict[str, Any]
ABOVE_PAPER_DB = 3.0  # what the training issue asks of the default recipe
RESERVE_S = 20.0  # for reading images, measuring and writing, beside the training itself
TEST_IMAGES = 100
DRY_PAPER = PaperSettings(gaussians=100, canonical_steps=4, skinning_steps=2, layers=1, width=8)


class OutOfTimeError(Exception):
    """The time of a section is over."""


def train(options: Any) -> Report:
    """Ten robots by the default recipe, each within a minute; quality on test images against the paper's + 3 dB."""
    began, rows = time.monotonic(), []
    for name in options.robots or PAPER:
        done = Path(options.folder) / "models" / f"{name}.json"
        left = options.limit - (time.monotonic() - began)
        if done.is_file():
            rows.append(json.loads(done.read_text()))
        elif left < 60.0 * options.minutes + RESERVE_S:
            rows.append({"robot": name, "state": "left for the next call"})
        else:
            try:
                rows.append(by_default_recipe(name, options, done))
            except KinesplatError as error:
                rows.append({"robot": name, "state": f"{type(error).__name__}: {error}"})
    finished = [row for row in rows if row["state"] == "finished"]
    return {"train": rows, "finished": len(finished), "within 60 s": all(r["training [s]"] <= 60.0 for r in finished),
            "at the target": sum(bool(r["at the target"]) for r in finished)}  # fmt: skip


def by_default_recipe(name: str, options: Any, done: Path) -> Report:
    """Images where there are none, a minute of training, quality; written beside the model."""
    device, path = device_of(options), done.with_suffix(".safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    data = data_set(name, options)
    traced, began = time.monotonic() - began, time.monotonic()
    chosen = TrainingOptions(minutes=options.minutes)
    if options.dry_run:
        chosen = TrainingOptions(steps=2, default=DefaultSettings(start=100, gaussians=100, pictures=2))
    model = train_model(data.directory, "default", path, options=chosen, resume=True, device=device.type)
    seconds = time.monotonic() - began
    test = data.frames("test", limit=TEST_IMAGES, geometry=False)
    found, packaged = (mean_psnr(m.to(device), test) for m in (model, zoo.load(name)))
    target = PAPER[name] + ABOVE_PAPER_DB if name in PAPER else None
    row = {
        "robot": name,
        "state": "finished",
        "images [s]": traced,
        "training [s]": seconds,
        "steps": model.provenance.get("steps"),
        "splats": len(model.parameters),
        "PSNR [dB]": found,
        "target [dB]": target,
        "at the target": target is None or found >= target,
        "packaged model [dB]": packaged,
        "better than packaged": found > packaged,
    }
    done.write_text(json.dumps(row) + "\n")
    return row


def paper(options: Any) -> Report:
    """Robots by the recipe `paper` at its full length, "no deform" and K-planes with as long; Table 1 of each."""
    began, rows = time.monotonic(), []
    for name in options.robots or PAPER:
        done = Path(options.folder) / "paper" / name / "table1.json"
        left = options.limit - (time.monotonic() - began)
        if not done.is_file() and left < RESERVE_S:
            rows.append({"robot": name, "model": "", "state": "left for the next call"})
            continue
        if not done.is_file():
            try:
                with at_most(left):
                    table_1(name, options, done.parent)
            except (OutOfTimeError, KinesplatError) as error:
                why = "out of time: the same command goes on" if isinstance(error, OutOfTimeError) else str(error)
                rows.append({"robot": name, "model": "", "state": why})
                continue
        rows += [{"robot": name, **row, "paper: ours [dB]": PAPER.get(name)} for row in json.loads(done.read_text())]
    return {"paper": rows}


def table_1(name: str, options: Any, folder: Path) -> None:
    """Train ours and what it is compared with, and measure them on the test images."""
    device, data = device_of(options), data_set(name, options)
    folder.mkdir(parents=True, exist_ok=True)
    budget = Budget(steps=2) if options.dry_run else Budget(minutes=options.paper_minutes)
    settings = DRY_PAPER if options.dry_run else PaperSettings()
    chosen = TrainingOptions(budget.steps, budget.minutes, paper=settings)
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        train_model(data.directory, "paper", path, options=chosen, resume=True, device=device.type)
    others = train_baselines(data, budget, folder / "baselines", settings=settings, device=device.type)
    models: dict[str, Any] = {"ours": SelfModel.load(path).to(device)} | others
    default = Path(options.folder) / "models" / path.name
    if default.is_file():
        models["recipe default"] = SelfModel.load(default).to(device)
    found = evaluate(models, data, limit=3 if options.dry_run else TEST_IMAGES)
    (folder / "table1.md").write_text(found.to_markdown())
    rows = [{k: v for k, v in asdict(row).items() if k != "pictures" and v is not None} for row in found.rows]
    (folder / "table1.json").write_text(json.dumps([{"model": row.pop("name"), **row} for row in rows]) + "\n")


def data_set(name: str, options: Any) -> Dataset:
    """The data set of a robot: one made elsewhere (--sets), or traced on the card, or what is missing of it."""
    configurations, views = options.images
    if options.sets is not None:
        return Dataset.open(Path(options.sets) / name)
    usual = (configurations, views) == (500, 3)
    folder = Path(options.folder) / "sets" / (name if usual else f"{name}-{configurations}x{views}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    small = {"test_configurations": 2, "test_views": 1, "canonical_views": 2, "size": 16, "samples": 1}
    plan = Plan(
        robot=DESCRIPTIONS.get(name, name),
        configurations=configurations,
        views=views,
        **(small if options.dry_run else {}),
    )
    if (folder / MANIFEST).is_file() and not missing(folder, plan):
        return Dataset.open(folder)
    return write_dataset(folder, plan, device=device_of(options).type)


def missing(folder: Path, plan: Plan) -> int:
    """How many files of a data set are not there yet."""
    return sum(not (folder / shard.file_name).is_file() for shard in plan.shards())


def device_of(options: Any) -> torch.device:
    return torch.device("cpu" if options.dry_run else "cuda")


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """`OutOfTimeError` within, once the time is over; what is written whole stays whole."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
