"""Package trained self-models: score each on the test images of its data set, copy it, and write docs/models.md.

    MENAGERIE_ROOT=... python benchmarks/zoo.py --sets sets --trained trained

`sets/NAME` is a folder of `kinesplat dataset`, `trained/NAME.safetensors` what `kinesplat train sets/NAME` made of it.
Names without a trained model keep what is packaged.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from training import score

from kinesplat import zoo
from kinesplat.dataset.container import Dataset
from kinesplat.evaluation.baselines import random_images
from kinesplat.evaluation.metrics import psnr
from kinesplat.self_model import SelfModel

ROOT = Path(__file__).parents[1]
TEXT = ROOT / "docs" / "models.md"
SCORES = ROOT / "docs" / "models.json"
PAPER = {
    "shadow_hand": 31.44,
    "unitree_g1": 28.31,
    "unitree_h1": 27.77,
    "franka_emika_panda": 32.84,
    "google_robot": 32.60,
    "trossen_vx300s": 30.59,
    "ufactory_xarm7": 33.25,
    "unitree_go1": 29.74,
    "unitree_go2": 29.60,
    "universal_robots_ur5e": 32.01,
}
DESCRIPTIONS = {"unitree_g1": "unitree_g1_37dof_2024"}
HEAD = "| name | dof | splats | MB | PSNR dB | lowest | mask IoU | random | paper's PSNR | licence of the description |"


@dataclass(frozen=True)
class Card:
    """What is known of one packaged model."""

    name: str
    psnr_db: float
    lowest_db: float
    iou: float
    iou_min: float
    random_db: float
    test_images: int
    span: list[float]

    def markdown(self) -> str:
        """The row of the table."""
        made, size = zoo.card(self.name), (zoo.FOLDER / f"{self.name}.safetensors").stat().st_size
        paper = f"{PAPER[self.name]:.2f}" if self.name in PAPER else ""
        cells = [
            f"`{self.name}`",
            str(made["dof"]),
            f"{made['gaussians']:,}",
            f"{1e-6 * size:.1f}",
            f"{self.psnr_db:.2f}",
        ]
        cells += [
            f"{self.lowest_db:.2f}",
            f"{self.iou:.4f}",
            f"{self.random_db:.2f}",
            paper,
            made["licence"].split(" / ")[0],
        ]
        return f"| {' | '.join(cells)} |"

    def command(self) -> str:
        """What made the model."""
        made = zoo.card(self.name)
        data = (
            f"kinesplat dataset {DESCRIPTIONS.get(self.name, self.name)} -o sets/{self.name} "
            f"--test-views 4 --span {self.span[0]} {self.span[1]} --near {self.span[2]}"
        )
        steps = (
            f"--steps {made['budget']['steps']}"
            if made["budget"]["steps"]
            else f"--minutes {made['budget']['minutes']}"
        )
        return f"{data}\nkinesplat train sets/{self.name} -o trained/{self.name}.safetensors {steps}"


def measured(name: str, model: SelfModel, data: Dataset) -> Card:
    """Scores on the test images, and those of a random training image beside them."""
    psnrs, ious = score(model, data)
    frames, library = data.frames("test", geometry=False), data.frames("train", limit=1000, geometry=False)
    rows = random_images(library, len(frames), 0)
    random = torch.stack([psnr(library.rgb[r] / 255.0, f / 255.0) for r, f in zip(rows, frames.rgb, strict=True)])
    numbers = (float(x) for x in (psnrs.mean(), psnrs.min(), ious.mean(), ious.min(), random.mean()))
    return Card(name, *numbers, len(frames), [*data.plan.span, data.plan.near])


def package(name: str, trained: Path, data: Dataset) -> Card:
    """Copy model and licence into the package, and score the copy."""
    shutil.copyfile(trained, zoo.FOLDER / f"{name}.safetensors")
    licence = zoo.FOLDER / f"{name}.LICENSE"
    if not licence.exists():
        shutil.copyfile(Path(os.environ["MENAGERIE_ROOT"]) / DESCRIPTIONS.get(name, name) / "LICENSE", licence)
    return measured(name, SelfModel.load(trained), data)


def write(cards: dict[str, Card]) -> None:
    """The table and the commands of docs/models.md, between its marks; the scores beside it."""
    SCORES.write_text(json.dumps({name: vars(card) for name, card in cards.items()}, indent=1) + "\n")
    table = "\n".join([HEAD, "|" + "---|" * HEAD.count(" | ") + "---|", *(c.markdown() for c in cards.values())])
    commands = "\n".join(["```sh", *(card.command() for card in cards.values()), "```"])
    text = TEXT.read_text()
    for mark, content in (("table", table), ("commands", commands)):
        begin, end = f"<!-- {mark} -->\n", f"\n<!-- end of {mark} -->"
        text = text[: text.index(begin) + len(begin)] + content + text[text.index(end) :]
    TEXT.write_text(text)


def main(sets: Path, trained: Path) -> None:
    """Package whatever has been trained."""
    cards = {name: Card(**values) for name, values in json.loads(SCORES.read_text()).items()} if SCORES.exists() else {}
    for file in sorted(trained.glob("*.safetensors")):
        cards[file.stem] = package(file.stem, file, Dataset.open(sets / file.stem))
        print(cards[file.stem].markdown(), flush=True)
    write(dict(sorted(cards.items())))


if __name__ == "__main__":
    tyro.cli(main)
