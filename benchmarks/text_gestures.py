"""Words to gestures of the Shadow Hand: `python benchmarks/text_gestures.py --output text_gestures`.

A small CLIP (a ResNet and CLIP's text tower, classes of transformers) learns six gestures and sentences about single
fingers from random views of the hand, among them views of what it is led to while it learns; a linear head, which is
thrown away afterwards, reads the joints from the same features. `text_to_q` then finds every gesture from its name,
from random starts, and a classifier of another architecture, trained on other pictures, says what the answers show.
Nothing is downloaded. Writes the trained encoder, text_gestures.json and text_gestures.png (a row for each gesture: the
gesture, then pairs of start and answer) into the output folder; a killed run goes on where it stopped.
"""

import argparse
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from gesture_networks import THRESHOLD, trained_classifier, trained_encoder
from gestures import NAMES, NO_GESTURE, TEMPLATES, VARIED, World, cameras
from torch import Tensor

import kinesplat as ks
from kinesplat.files import write_png, written_whole
from kinesplat.vision.clip import ClipEncoder

SHEET = 5
FINEST = 30_000


@torch.no_grad()
def shows(world: World, network: torch.nn.Module, q: Tensor, seed: int, views: int = 12) -> Tensor:
    """Probabilities of the six gestures and none for one configuration, averaged over new views ``(7,)``."""
    generator = torch.Generator().manual_seed(seed)
    out = world.model.render(q[None], cameras(views, generator, spread=True))
    assert out.rgb is not None
    return network(out.rgb.permute(0, 3, 1, 2)).softmax(dim=1).mean(dim=0)


def run(
    world: World, encoder: ClipEncoder, judge: torch.nn.Module, gesture: int, trial: int, options: argparse.Namespace
) -> dict:
    """One optimisation from random starts, with random cameras, and what it led to."""
    seed = 1_000 + 10 * trial + gesture
    views = cameras(options.views, torch.Generator().manual_seed(seed), spread=True)
    others = [name for name in (*NAMES, NO_GESTURE) if name != NAMES[gesture]] if options.negatives else []
    fit = ks.text_to_q(
        world.model,
        NAMES[gesture],
        views,
        encoder=encoder,
        negatives=others,
        starts=options.starts,
        iterations=options.iterations,
        augmentation=replace(VARIED, copies=options.copies),
        self_collision=options.self_collision,
        seed=seed,
    )
    start, goal = fit.q_history[0], world.q[gesture]
    seen, before = shows(world, judge, fit.q, 50_000 + seed), shows(world, judge, start, 50_000 + seed)
    return {
        "gesture": NAMES[gesture],
        "trial": trial,
        "classified_as": (*NAMES, "no gesture")[int(seen.argmax())],
        "probability": float(seen[gesture]),
        "distance": float(world.distances(fit.q[None])[0, gesture]),
        "start_classified_as": (*NAMES, "no gesture")[int(before.argmax())],
        "start_joint_error_rad": float((start - goal).abs().mean()),
        "joint_error_rad": float((fit.q - goal).abs().mean()),
        "cosine": fit.cosine,
        "verdict": fit.verdict,
        "seconds": fit.seconds,
        "q_start": start.tolist(),
        "q": fit.q.tolist(),
    }


def sheet(world: World, rows: list[dict], path: Path) -> None:
    """One row per gesture: the gesture itself, then pairs of start and answer."""
    view = ks.Camera.look_at((0.36, -0.16, 0.34), (0.33, 0.0, 0.0), 0.785, 128, 128, up=(1.0, 0.0, 0.0))
    finest = World.create(FINEST).model
    lines, most = [], min(SHEET, max(Counter(row["gesture"] for row in rows).values()))
    for gesture, name in enumerate(NAMES):
        own = [row for row in rows if row["gesture"] == name][:most]
        q = [world.q[gesture], *(torch.tensor(row[key]) for row in own for key in ("q_start", "q"))]
        pictures = finest.render(torch.stack(q), view).rgb
        assert pictures is not None
        missing = torch.ones(2 * (most - len(own)), *pictures.shape[1:])
        lines.append(torch.cat([*pictures, *missing], dim=1))
    write_png(path, torch.cat(lines))


def summary(rows: list[dict]) -> dict:
    """The two figures that count, over all runs and by gesture."""
    good = [row["classified_as"] == row["gesture"] for row in rows]
    ratio = torch.tensor([row["joint_error_rad"] / row["start_joint_error_rad"] for row in rows])
    errors = torch.tensor([[row["start_joint_error_rad"], row["joint_error_rad"]] for row in rows])
    return {
        "runs": len(rows),
        "classified_as_asked": sum(good),
        "start_classified_as_asked": sum(row["start_classified_as"] == row["gesture"] for row in rows),
        "by_gesture": dict(Counter(row["gesture"] for row, ok in zip(rows, good, strict=True) if ok)),
        "below_half_of_start": int((ratio < 0.5).sum()),
        "as_near_as_the_judge_was_taught": sum(row["distance"] < THRESHOLD for row in rows),
        "mean_start_joint_error_rad": float(errors[:, 0].mean()),
        "mean_joint_error_rad": float(errors[:, 1].mean()),
        "mean_error_ratio": float(ratio.mean()),
        "median_error_ratio": float(ratio.median()),
        "mean_seconds": sum(row["seconds"] for row in rows) / len(rows),
    }


@torch.no_grad()
def held_out(world: World, encoder: ClipEncoder, judge: torch.nn.Module) -> dict:
    """How often each network names new pictures of jittered gestures right, one view each."""
    generator = torch.Generator().manual_seed(999)
    which = torch.arange(600) % 6
    lower, upper = world.limits
    q = world.model.tree.clamp(
        world.q[which] + 0.05 * (upper - lower) * torch.randn(600, len(lower), generator=generator)
    )
    pictures = world.model.render(q, cameras(600, generator)).rgb
    assert pictures is not None
    words = torch.stack([encoder.embed_text([t.format(name) for t in TEMPLATES]).mean(dim=0) for name in NAMES])
    said = (encoder.embed_images(pictures) @ words.mT).argmax(dim=1)
    judged = judge(pictures.permute(0, 3, 1, 2)).argmax(dim=1)
    return {
        "encoder_accuracy": float((said == which).float().mean()),
        "judge_accuracy": float((judged == which).float().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("text_gestures"))
    parser.add_argument("--encoder-steps", type=int, default=10_000)
    parser.add_argument("--judge-steps", type=int, default=1_500)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--trials", type=int, default=5, help="runs for every gesture")
    parser.add_argument("--starts", type=int, default=12)
    parser.add_argument("--iterations", type=int, default=120)
    parser.add_argument("--views", type=int, default=12)
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--negatives", action="store_true", help="maximise the probability among all names")
    parser.add_argument("--self-collision", type=float, default=0.01)
    parser.add_argument("--name", default="text_gestures", help="of the result files")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    world = World.create()
    encoder = trained_encoder(world, options.output, options.encoder_steps, options.batch)
    judge = trained_classifier(world, options.output, options.judge_steps, options.batch)
    held = held_out(world, encoder, judge)
    print(held, flush=True)
    path, said = options.output / f"{options.name}.json", {k: str(v) for k, v in vars(options).items()}
    earlier = json.loads(path.read_text()) if path.is_file() else {}
    rows = earlier["rows"] if earlier.get("options") == said else []
    for number in range(len(rows), options.trials * len(NAMES)):
        rows.append(run(world, encoder, judge, number % len(NAMES), number // len(NAMES), options))
        row = rows[-1]
        print(
            f"{row['gesture']:>18} -> {row['classified_as']:<18} {row['start_joint_error_rad']:.2f} -> "
            f"{row['joint_error_rad']:.2f} rad, cosine {row['cosine']:.3f}, {row['seconds']:.0f} s",
            flush=True,
        )
        with written_whole(path) as temporary:
            temporary.write_text(json.dumps({**held, **summary(rows), "options": said, "rows": rows}, indent=1) + "\n")
        sheet(world, rows, options.output / f"{options.name}.png")
    print(json.dumps(summary(rows), indent=1))


if __name__ == "__main__":
    main()
