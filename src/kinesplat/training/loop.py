"""The training loop as plain functions: a recipe is a for-loop of its own over `run`.

How a recipe looks (``state`` is the recipe's own dictionary of tensors, numbers and optimiser states)::

    state = read_checkpoint(path) if resume else fresh_state()
    with Log(folder, state["step"]) as log:
        for tick in run(step, budget, done=state["step"], seconds=state["seconds"]):
            if tick.due(100):                       # every 100 steps, and at the last one
                log.write(tick.step, {"psnr_db": validate(), **tick.values})
            if tick.due(500) and tick.share < 0.8:
                densify_and_prune()
            if save_due():                          # `every_seconds(30)`: a clock that says when
                write_checkpoint(path, {**state, "step": tick.step, "seconds": tick.seconds})

where ``step(number, share)`` moves the parameters once and returns scalars, the loss among them. Nothing is called
back but `step`; what a recipe does between two steps stands in its own loop. Which images a step sees is a function of
seed and step alone (`batch_rows`), so a resumed run goes on exactly as it would have.
"""

import csv
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from kinesplat.errors import InputError, TrainingError

Step = Callable[[int, float], Mapping[str, Tensor | float]]


@dataclass(frozen=True)
class Budget:
    """When training ends: after so many steps or minutes, whichever comes first; at least one of them is given.

    Attributes:
        steps: number of steps.
        minutes: wall clock, validation and densification included.
    """

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise InputError("training needs a number of steps or of minutes")
        if self.steps is not None and self.steps < 1:
            raise InputError(f"steps is {self.steps}; expected at least 1")
        if self.minutes is not None and not 0.0 < self.minutes < math.inf:
            raise InputError(f"minutes is {self.minutes}; expected a positive number")

    def share(self, steps: int, seconds: float) -> float:
        """How much of the budget `steps` and `seconds` have used up, 1 at the end; schedules follow it."""
        by_steps = 0.0 if self.steps is None else steps / self.steps
        by_time = 0.0 if self.minutes is None else seconds / (60.0 * self.minutes)
        return min(1.0, max(by_steps, by_time))


@dataclass(frozen=True)
class Tick:
    """What is known after a step.

    Attributes:
        step: steps done so far, those of earlier sessions included.
        seconds: wall clock spent so far, earlier sessions included [s].
        share: of the budget that is spent; 1 at the last step.
        values: the scalars that the step returned.
    """

    step: int
    seconds: float
    share: float
    values: Mapping[str, float]

    def due(self, every: int) -> bool:
        """Whether this is an `every`-th step, or the last."""
        return self.step % every == 0 or self.share >= 1.0


def run(
    step: Step, budget: Budget, *, done: int = 0, seconds: float = 0.0, progress: bool = False, title: str = "train"
) -> Iterator[Tick]:
    """Step until the budget is spent, yielding after each step.

    Args:
        step: called as ``step(number, share)``, number from `done` on, share of the budget spent before it; returns
            scalars by name.
        budget: when to end. Time that the caller spends between two steps counts.
        done: steps of earlier sessions.
        seconds: time of earlier sessions [s].
        progress: show a bar with rate and remaining time on stderr.
        title: what the bar is called.

    Raises:
        TrainingError: a scalar, or the input of the rasteriser, became NaN or infinite; names the step.
    """
    began = time.perf_counter() - seconds
    with _bar(progress) as bar:
        task = bar.add_task(title, total=1.0, note="")
        share = budget.share(done, seconds)
        while share < 1.0:
            values = _checked(step, done, share)
            done += 1
            seconds = time.perf_counter() - began
            share = budget.share(done, seconds)
            note = " ".join(f"{name} {value:.4g}" for name, value in values.items())
            bar.update(task, completed=share, note=f"step {done}, {done / max(seconds, 1e-9):.1f}/s, {note}")
            yield Tick(done, seconds, share, values)


def _checked(step: Step, number: int, share: float) -> dict[str, float]:
    try:
        values = {name: float(value) for name, value in step(number, share).items()}
    except InputError as error:
        raise TrainingError(f"stopped at step {number}: {error}") from error
    wrong = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
    if wrong:
        raise TrainingError(f"stopped at step {number}: {', '.join(wrong)}; lower the learning rates")
    return values


def _bar(progress: bool) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%")
    times = TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(), TextColumn("{task.fields[note]}")
    return Progress(*columns, *times, console=Console(stderr=True), disable=not progress, transient=True)


def batch_rows(count: int, batch: int, step: int, seed: int) -> Int[Tensor, " batch"]:
    """Images of step `step` (from 0): each of `count` once per epoch, in an order that is a function of seed and epoch.

    Raises:
        InputError: there is no image.
    """
    if count < 1:
        raise InputError("there is no image to train on")
    first = step * batch
    places = range(first, first + batch)
    return torch.tensor([int(_order(count, place // count, seed)[place % count]) for place in places])


@lru_cache(maxsize=4)
def _order(count: int, epoch: int, seed: int) -> Int[Tensor, " count"]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))


def every_seconds(interval: float) -> Callable[[], bool]:
    """A clock that answers True once per `interval` [s], for the first time after one interval."""
    last = time.perf_counter()

    def due() -> bool:
        nonlocal last
        if time.perf_counter() - last < interval:
            return False
        last = time.perf_counter()
        return True

    return due


@dataclass
class EarlyStop:
    """Whether a validation loss has stopped falling, and when it was lowest.

    Attributes:
        patience: validations without a new minimum after which training stops.
        least: relative improvement that counts.
        best: lowest loss so far.
        waited: validations since.
    """

    patience: int
    least: float = 1e-3
    best: float = math.inf
    waited: int = 0

    def improved(self, loss: float) -> bool:
        """Take note of a validation loss; True where it is a new minimum."""
        if loss < self.best * (1.0 - self.least):
            self.best, self.waited = loss, 0
            return True
        self.waited += 1
        return False

    @property
    def stop(self) -> bool:
        """Whether patience has run out."""
        return self.waited >= self.patience


def decayed(first: float, last: float, share: float, warm_up: float = 0.0) -> float:
    """Exponential decay from `first` to `last` over the budget, after a linear warm-up over the share `warm_up`."""
    rate = first * (last / first) ** share
    return rate * min(1.0, (share + 1e-3) / warm_up) if warm_up > 0.0 else rate


@dataclass
class Log:
    """Scalars by step: ``log.csv`` always, TensorBoard events beside it where `tensorboard` is installed.

    A resumed run drops the rows after the step that it resumes from.

    Attributes:
        folder: where to write; created if needed. None: nowhere.
        step: where the run resumes, 0 for a fresh one.
    """

    folder: Path | None
    step: int = 0
    _writer: Any = field(default=None, repr=False)

    def __enter__(self) -> "Log":
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            rows = [row for row in self.rows() if int(row[0]) <= self.step]
            with (self.folder / "log.csv").open("w", newline="") as file:
                csv.writer(file).writerows([("step", "name", "value"), *rows])
            self._writer = _summary_writer(self.folder, self.step)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append scalars of one step."""
        if self.folder is None:
            return
        with (self.folder / "log.csv").open("a", newline="") as file:
            csv.writer(file).writerows((step, name, f"{value:.6g}") for name, value in values.items())
        for name, value in values.items():
            if self._writer is not None:
                self._writer.add_scalar(name, value, step)

    def rows(self) -> list[Sequence[str]]:
        """Rows of ``log.csv`` so far, without the heading: step, name, value."""
        path = Path() if self.folder is None else self.folder / "log.csv"
        if not path.is_file():
            return []
        with path.open(newline="") as file:
            return [row for row in csv.reader(file) if len(row) == 3 and row[0].isdigit()]


def _summary_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # the CSV tells the same; `pip install kinesplat[train]` brings the events
        return None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def psnr(rendered: Float[Tensor, "*batch h w 3"], truth: Float[Tensor, "*batch h w 3"]) -> Float[Tensor, "*batch"]:
    """Peak signal-to-noise ratio of each image, of values in [0, 1] [dB]."""
    return -10.0 * (rendered.clamp(0.0, 1.0) - truth).square().mean((-1, -2, -3)).clamp(min=1e-12).log10()
