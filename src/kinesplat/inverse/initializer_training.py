"""Training of an initializer on the self-model's own renders; minutes on two CPU cores."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from kinesplat import __version__
from kinesplat.errors import InputError, ModelFileError, TrainingError
from kinesplat.inverse.initializer import Initializer, modes_of
from kinesplat.inverse.initializer_network import CELLS, KeypointNetwork
from kinesplat.inverse.initializer_pictures import Pictures, random_pictures
from kinesplat.inverse.keypoints import Keypoints
from kinesplat.model_file import read_model_file, write_model_file
from kinesplat.self_model import SelfModel

SPLATS = 3_000
FRESH, REPLAYED, POOL = 24, 40, 3_072
RATE, DECAY, WARM_UP = 3e-3, 1e-2, 60
SPREAD = 0.7
TESTED = 256
CHECKPOINT_SECONDS = 60.0
KIND = "initializer run"


@dataclass
class Run:
    """A training run: what a checkpoint holds."""

    network: KeypointNetwork
    optimizer: torch.optim.AdamW
    step: int = 0

    @classmethod
    def new(cls, keypoints: int, seed: int) -> "Run":
        """Random weights."""
        torch.manual_seed(seed)
        network = KeypointNetwork(keypoints).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        return cls(network, torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=DECAY, fused=True))

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all."""
        weights = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        moments = {
            f"optimizer.{i}.{name}": value
            for i, state in self.optimizer.state_dict()["state"].items()
            for name, value in state.items()
        }
        write_model_file(path, weights | moments, {"kind": KIND, "step": self.step})

    def load(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            ModelFileError: it is broken, or of another robot.
        """
        tensors, header = read_model_file(path)
        if header.get("kind") != KIND:
            raise ModelFileError(f"{path}: no checkpoint of an initializer")
        whole = self.optimizer.state_dict()
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                whole["state"].setdefault(int(index), {})[key] = value
        try:
            self.network.load_state_dict({k[8:]: v for k, v in tensors.items() if k.startswith("network.")})
            self.optimizer.load_state_dict(whole)
        except (RuntimeError, ValueError) as error:
            raise ModelFileError(f"{path}: a checkpoint of another robot ({error})") from error
        self.step = int(header["step"])


def train_initializer(
    model: SelfModel,
    *,
    steps: int = 2_000,
    seed: int = 0,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: bool = False,
) -> Initializer:
    """Train a network to see keypoints in pictures of the robot, and return it with a figure of how well it does.

    Args:
        model: self-model of the robot.
        steps: optimiser steps; 64 pictures each, 24 of them new.
        seed: of weights and pictures.
        checkpoint: file that is written every minute, and when the run is interrupted.
        resume: go on from the checkpoint.
        progress: show a bar on the terminal.

    Raises:
        InputError: `steps` is below 1, or there is no checkpoint to resume.
        TrainingError: the loss is no finite number.
    """
    if steps < 1:
        raise InputError(f"steps is {steps}; expected at least 1")
    small, keypoints = model.subsample(max(SPLATS, len(model.tree.link_names))), Keypoints.on(model)
    run = Run.new(len(keypoints.links), seed)
    if resume:
        if checkpoint is None or not checkpoint.is_file():
            raise InputError(f"nothing to resume: {checkpoint} does not exist")
        run.load(checkpoint)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task("training", total=steps, completed=run.step)
        saved = time.monotonic()
        try:
            for loss in _losses(run, small, keypoints, steps, seed):
                bar.update(task, completed=run.step, description=f"loss {loss:.2f}")
                if checkpoint is not None and time.monotonic() - saved > CHECKPOINT_SECONDS:
                    run.save(checkpoint)
                    saved = time.monotonic()
        except KeyboardInterrupt:
            if checkpoint is not None:
                run.save(checkpoint)
            raise
    provenance = {
        "robot": model.provenance.get("robot", ""),
        "steps": steps,
        "seed": seed,
        "kinesplat": __version__,
        **accuracy(run.network, random_pictures(small, keypoints, TESTED, torch.Generator().manual_seed(seed - 1))),
    }
    return Initializer(run.network, keypoints, tuple(model.tree.joint_names), provenance)


def _losses(run: Run, model: SelfModel, keypoints: Keypoints, steps: int, seed: int) -> Iterator[float]:
    """One optimiser step at a time; yields its loss. The pictures of a step depend on the seed and its number alone."""
    pool: list[Pictures] = []
    while run.step < steps:
        generator = torch.Generator().manual_seed(1_000_003 * seed + run.step)
        pool = [*pool[-POOL // FRESH :], packed(random_pictures(model, keypoints, FRESH, generator))]
        batch = _batch(pool, generator)
        rate = RATE * min(1.0, (run.step + 1) / WARM_UP) * (0.02 + 0.49 * (1.0 + math.cos(math.pi * run.step / steps)))
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        run.network.train()
        with torch.autocast("cpu", torch.bfloat16):
            logits = run.network(batch.inputs.contiguous(memory_format=torch.channels_last))
        loss = cross_entropy(logits.float(), batch.places)
        if not math.isfinite(loss.item()):
            raise TrainingError(f"the loss is {loss.item()} at step {run.step}")
        run.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(run.network.parameters(), 1.0)
        run.optimizer.step()
        run.step += 1
        yield loss.item()


def packed(pictures: Pictures) -> Pictures:
    """The same in 8 bits a channel."""
    return replace(pictures, inputs=(255.0 * pictures.inputs).round().to(torch.uint8))


def _batch(pool: list[Pictures], generator: torch.Generator) -> Pictures:
    """The newest pictures and some old ones."""
    rows = torch.randint(len(pool), (REPLAYED,), generator=generator).tolist()
    which = torch.randint(FRESH, (REPLAYED,), generator=generator).tolist()
    old = [(pool[r].inputs[w], pool[r].places[w]) for r, w in zip(rows, which, strict=True)]
    inputs, places = (torch.stack(part) for part in zip(*old, strict=True))
    inputs = torch.cat([pool[-1].inputs, inputs]).float() / 255.0
    return Pictures(inputs, torch.cat([pool[-1].places, places]))


def cross_entropy(logits: Float[Tensor, "n k bins"], places: Float[Tensor, "n k 2"]) -> Tensor:
    """Against a Gaussian of 0.7 cells around the place, or the last bin where it is not in the picture."""
    cells = torch.arange(CELLS) + 0.5
    line = torch.exp(-0.5 * ((cells - places[..., None]) / SPREAD) ** 2)
    line = line / line.sum(dim=-1, keepdim=True).clamp(min=1e-6)
    target = (line[..., 1, :, None] * line[..., 0, None, :]).flatten(-2)
    inside = ((places > 0.0) & (places < CELLS)).all(dim=-1, keepdim=True).float()
    target = torch.cat([target * inside, 1.0 - inside], dim=-1)
    return -(target * logits.log_softmax(dim=-1)).sum(dim=-1).mean()


@torch.no_grad()
def accuracy(network: KeypointNetwork, pictures: Pictures) -> dict[str, float]:
    """Share of the keypoints in the picture that are found within one cell, with a mask and without."""
    network.eval()
    shares = network(pictures.inputs).softmax(dim=-1)[..., :-1].unflatten(-1, (CELLS, CELLS))
    found = modes_of(shares)[0][..., 0, :]
    inside = ((pictures.places > 0.0) & (pictures.places < CELLS)).all(dim=-1)
    near = (found - pictures.places).norm(dim=-1) < 1.0
    blind = (pictures.inputs[:, 3] == 0.5).all(dim=2).all(dim=1)[:, None] & inside
    masked = inside & ~blind
    return {
        "found_with_mask": near[masked].float().mean().item() if bool(masked.any()) else math.nan,
        "found_without_mask": near[blind].float().mean().item() if bool(blind.any()) else math.nan,
    }
