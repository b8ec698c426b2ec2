"""Package trained self-models, score them on the test images of their data sets, and write the tables of both.

docs/models.md (files) and docs/results.md (scores) get them.

    MENAGERIE_ROOT=... python benchmarks/zoo.py --sets sets --trained trained

`sets/NAME` is a folder of `kinesplat dataset`, `trained/NAME.safetensors` what `kinesplat train sets/NAME` made of it.
Names without a trained model keep what is packaged; without a data set they keep their scores too.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from kinesplat import zoo
from kinesplat.dataset.container import Dataset
from kinesplat.evaluation.baselines import random_images
from kinesplat.evaluation.metrics import psnr
from kinesplat.evaluation.table import evaluate
from kinesplat.rasterizer.spherical_harmonics import sh_degree
from kinesplat.training.default import DefaultSettings

ROOT = Path(__file__).parents[1]
CARDS, RESULTS = ROOT / "docs" / "models.md", ROOT / "docs" / "results.md"
SCORES = ROOT / "docs" / "models.json"
PAPER = {  # Liu et al. 2024, Table 1: PSNR [dB], Chamfer distance, PSNR of a random picture [dB]
    "shadow_hand": (31.44, 0.052, 7.63),
    "unitree_g1": (28.31, 0.215, 10.06),
    "unitree_h1": (27.77, 0.241, 7.33),
    "franka_emika_panda": (32.84, 0.225, 16.14),
    "google_robot": (32.60, 0.399, 14.33),
    "trossen_vx300s": (30.59, 0.067, 9.06),
    "ufactory_xarm7": (33.25, 0.174, 18.86),
    "unitree_go1": (29.74, 0.079, 6.52),
    "unitree_go2": (29.60, 0.084, 11.01),
    "universal_robots_ur5e": (32.01, 0.207, 10.67),
}
DESCRIPTIONS = {"unitree_g1": "unitree_g1_37dof_2024"}
HEAD = (
    "| name | PSNR dB | lowest | foreground | SSIM | mask IoU | Chamfer | random "
    "| paper: PSNR | paper: Chamfer | paper: random |"
)
FILES = "| name | dof | splats | MB | steps | PSNR dB | mask IoU | licence of the description |"


@dataclass(frozen=True)
class Card:
    """What is known of one packaged model: means over the test images, and how they were made."""

    name: str
    psnr_db: float
    lowest_db: float
    foreground_db: float
    ssim: float
    iou: float
    chamfer_mm2: float
    random_db: float
    test_images: int
    span: list[float]

    def scores(self) -> str:
        """The row of the table of scores; Chamfer distances in 1e-3 m^2."""
        known = PAPER.get(self.name)
        paper = ["", "", ""] if known is None else [f"{known[0]:.2f}", f"{known[1]:.3f}", f"{known[2]:.2f}"]
        cells = [f"`{self.name}`", *(f"{x:.2f}" for x in (self.psnr_db, self.lowest_db, self.foreground_db))]
        cells += [f"{self.ssim:.4f}", f"{self.iou:.4f}", f"{1e-3 * self.chamfer_mm2:.3f}", f"{self.random_db:.2f}"]
        return f"| {' | '.join([*cells, *paper])} |"

    def file(self) -> str:
        """The row of the table of files."""
        made, size = zoo.card(self.name), (zoo.FOLDER / f"{self.name}.safetensors").stat().st_size
        cells = [f"`{self.name}`", str(made["dof"]), f"{made['gaussians']:,}", f"{1e-6 * size:.1f}"]
        cells += [f"{made['steps']:,}", f"{self.psnr_db:.2f}", f"{self.iou:.4f}", made["licence"].split(" / ")[0]]
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
        usual, degree = DefaultSettings(), sh_degree(zoo.load(self.name).parameters.sh.shape[1])
        steps += f" --gaussians {made['gaussians']}" if made["gaussians"] != usual.gaussians else ""
        steps += f" --degree {degree}" if degree != usual.degree else ""
        return f"{data}\nkinesplat train sets/{self.name} -o trained/{self.name}.safetensors {steps}"


def measured(name: str, data: Dataset) -> Card:
    """Scores of a packaged model on the test images, and that of random training images beside them."""
    row = evaluate({name: zoo.load(name)}, data, baselines=False).rows[0]
    frames, library = data.frames("test", geometry=False), data.frames("train", limit=1000, geometry=False)
    drawn = random_images(library, len(frames), 0)
    random = torch.stack([psnr(library.rgb[r] / 255.0, f / 255.0) for r, f in zip(drawn, frames.rgb, strict=True)])
    assert row.mask_iou is not None
    assert row.chamfer_mm2 is not None
    numbers = [row.psnr_db, row.worst_psnr_db, row.foreground_psnr_db, row.ssim, row.mask_iou, row.chamfer_mm2]
    return Card(name, *numbers, float(random.mean()), len(frames), [*data.plan.span, data.plan.near])


def package(name: str, trained: Path) -> None:
    """Copy model and licence into the package."""
    shutil.copyfile(trained, zoo.FOLDER / f"{name}.safetensors")
    licence = zoo.FOLDER / f"{name}.LICENSE"
    if not licence.exists():
        shutil.copyfile(Path(os.environ["MENAGERIE_ROOT"]) / DESCRIPTIONS.get(name, name) / "LICENSE", licence)


def write(cards: dict[str, Card]) -> None:
    """Tables and commands between their marks, in docs/models.md and docs/results.md; the scores beside them."""
    SCORES.write_text(json.dumps({name: vars(card) for name, card in cards.items()}, indent=1) + "\n")
    replace(RESULTS, "scores", table(HEAD, [card.scores() for card in cards.values()]))
    replace(CARDS, "files", table(FILES, [card.file() for card in cards.values()]))
    replace(CARDS, "commands", "\n".join(["```sh", *(card.command() for card in cards.values()), "```"]))


def replace(path: Path, mark: str, content: str) -> None:
    """Put `content` between the marks."""
    text = path.read_text()
    begin, end = f"<!-- {mark} -->\n", f"\n<!-- end of {mark} -->"
    path.write_text(text[: text.index(begin) + len(begin)] + content + text[text.index(end) :])


def table(head: str, rows: list[str]) -> str:
    """A Markdown table."""
    return "\n".join([head, "|" + "---|" * (head.count("|") - 1), *rows])


def main(sets: Path, trained: Path | None = None, names: tuple[str, ...] = ()) -> None:
    """Package what has been trained, and score every packaged model (or those of `names`) whose data set is there."""
    for file in sorted(trained.glob("*.safetensors")) if trained is not None else ():
        package(file.stem, file)
    cards = {name: Card(**values) for name, values in json.loads(SCORES.read_text()).items()}
    for name in names or zoo.names():
        if (sets / name).is_dir():
            cards[name] = measured(name, Dataset.open(sets / name))
            print(cards[name].scores(), flush=True)
            write(dict(sorted(cards.items())))


if __name__ == "__main__":
    tyro.cli(main)
