"""Quality of the default recipe against time, and time per step; on data sets that `kinesplat dataset` wrote.

    python benchmarks/training.py --dataset sets/franka_emika_panda --minutes 0.5 5 --write
    python benchmarks/training.py --dataset sets/shadow_hand --minutes --steps 8000 20000 --gaussians 23000 --write

Every budget is a training run of its own, since the rates decay over it. Adds rows to the section "Training" of
docs/results.md (one row per data set, number of splats and budget). On a machine that other work shares, a budget in
steps and the processor seconds say more than minutes do.
"""

import re
import resource
import time
from dataclasses import replace
from pathlib import Path

import torch
import tyro
from torch import Tensor

from kinesplat.dataset.container import Dataset
from kinesplat.dataset.generate import load_robot
from kinesplat.evaluation.metrics import mask_iou, psnr
from kinesplat.self_model import SelfModel
from kinesplat.training.default import DefaultFit, DefaultSettings, fit_splats, prepared
from kinesplat.training.loop import Budget

RESULTS = Path(__file__).parents[1] / "docs" / "results.md"
HEADING = "| data set | splats | budget | steps | wall s | processor s | PSNR dB | lowest | mask IoU |"


@torch.no_grad()
def score(model: SelfModel, data: Dataset) -> tuple[Tensor, Tensor]:
    """PSNR and IoU of every test image."""
    psnrs, ious = [], []
    frames = data.frames("test", geometry=False)
    for rows in torch.arange(len(frames)).split(16):
        part = frames.select(rows)
        out = model.render(part.q.float(), part.camera, outputs=("rgb", "alpha"))
        psnrs.append(psnr(out.rgb, part.rgb / 255.0))
        ious.append(mask_iou(out.alpha, part.alpha / 255.0))
    return torch.cat(psnrs), torch.cat(ious)


def write_rows(rows: list[str]) -> None:
    """Add rows to the table of the section "Training", replacing those of the same data set and budget."""
    text = RESULTS.read_text()
    for row in rows:
        key = "|".join(row.split("|")[:4])
        text = re.sub(rf"^{re.escape(key)}\|.*\n", "", text, flags=re.MULTILINE)
        at = text.index(HEADING) + len(HEADING)
        end = at + text[at:].index("\n\n")
        text = f"{text[:end]}\n{row}{text[end:]}"
    RESULTS.write_text(text)


def time_of_step(start: SelfModel, data: Dataset, settings: DefaultSettings, seed: int) -> float:
    """Median milliseconds of a step."""
    fit = DefaultFit(start, data.frames("train", limit=100, geometry=False), settings, seed)
    times = []
    for number in range(220):
        began = time.perf_counter()
        fit.step(number, 0.0)
        times.append(time.perf_counter() - began)
    return 1000.0 * sorted(times[20:])[100]


def main(
    dataset: Path,
    minutes: tuple[float, ...] = (0.5, 5.0),
    steps: tuple[int, ...] = (),
    gaussians: int | None = None,
    seed: int = 0,
    write: bool = False,
) -> None:
    """Train once for each budget in minutes or steps, and print what came of it."""
    data = Dataset.open(dataset)
    frames, validation = (data.frames(part, geometry=False) for part in ("train", "validation"))
    settings = DefaultSettings()
    if gaussians is not None:
        settings = replace(settings, start=gaussians, gaussians=gaussians)
    light = None if frames.light is None else frames.light[0]
    start = prepared(SelfModel.from_description(load_robot(data.plan), n=settings.start, seed=seed), settings, light)
    rows = []
    step_ms = time_of_step(start, data, settings, seed)
    print(f"{dataset.name}: {settings.start} splats, {step_ms:.2f} ms a step (median)", flush=True)
    budgets = [Budget(minutes=m) for m in minutes] + [Budget(steps=n) for n in steps]
    for budget in budgets:
        began, cpu = time.perf_counter(), time.process_time()
        trained = fit_splats(start, frames, validation, budget, settings, seed=seed)
        spent = [f"{time.perf_counter() - began:.0f}", f"{time.process_time() - cpu:.0f}"]
        psnrs, ious = score(trained, data)
        asked = f"{budget.steps:,} steps" if budget.minutes is None else f"{60 * budget.minutes:.0f} s"
        cells = [dataset.name, f"{len(trained.parameters):,}", asked, f"{trained.provenance['steps']:,}", *spent]
        cells += [f"{psnrs.mean():.2f}", f"{psnrs.min():.2f}", f"{ious.mean():.4f}"]
        rows.append(f"| {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")
    if write:
        write_rows(rows)


if __name__ == "__main__":
    tyro.cli(main)
