"""From a sentence to motion on our own tabletop: `python benchmarks/tabletop.py OUT`.

Seven stages, each of which goes on where it was stopped; name some to run them alone.

episodes     scripted episodes ("reach the red block"), executed and rendered by MuJoCo (kinesplat[render,models]); of
             every scene three, one for each block: with one alone, the scene tells what to do and the sentence nothing
autoencoder  a small video model of Stable Video Diffusion's classes; its autoencoder is trained here
train        the video model itself, by `kinesplat.vision.finetuning`, all weights
listen       whether it listens: its error on 12 scenes that no episode showed, with the right and with other sentences
reference    12 scenes that no episode showed: joints from the true video, and random ones, executed
evaluate     the same with the generated video; films: the true video, the generated one, the robot found in it
autoencoded  the same with what the autoencoder makes of the true video: the best that a generated one could be

The last two write results.json and print a table; what an older model made is done again.
"""

import argparse
import hashlib
import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tabletop_model import small_model
from torch import Tensor

import kinesplat as ks
from kinesplat.files import written_whole
from kinesplat.imagination.execution import check_trajectory, execute, executing
from kinesplat.imagination.following import follow
from kinesplat.imagination.joints import joints_of
from kinesplat.imagination.lerobot import Episode, read_episodes, write_episodes
from kinesplat.imagination.tabletop import COLOURS, Q_START, Scene, Tabletop, TabletopPictures, instruction
from kinesplat.video import write_video
from kinesplat.vision.finetuning import FinetuneSettings, edm_loss, finetune, steps_done
from kinesplat.vision.video_clips import Clip, EncodedClips
from kinesplat.vision.video_diffusion import TextSteeredVideo
from kinesplat.vision.video_pipelines import INDEX, Sampling

SIZE, FRAMES, SECONDS = 48, 10, 2.0
SCENES, SCENE_SEED = 12, 100_000
SHARD = 150
SAMPLING = Sampling(frames=FRAMES, steps=20, guidance=2.0, noise=0.0, decoded_at_once=1)
STAGES = ("episodes", "autoencoder", "train", "listen", "reference", "evaluate", "autoencoded")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--episodes", type=int, default=13 * SHARD, help=f"in folders of {SHARD}")
    parser.add_argument("--autoencoder-steps", type=int, default=700)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--minutes", type=float, help="of a training stage; then stop, and go on with the next call")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        if stage in arguments.stages:
            globals()[stage](arguments)


def episodes(arguments: argparse.Namespace) -> None:
    """Random scenes, in each an episode for every block; a folder at a time."""
    folder = arguments.out / "episodes"
    folder.mkdir(exist_ok=True)
    world = Tabletop()
    pictures = TabletopPictures(world, SIZE)

    def made(indices: range) -> Iterator[Episode]:
        for index in indices:
            scene = Scene.random(torch.Generator().manual_seed(1_000_000 * arguments.seed + index // len(COLOURS)))
            frames, q, _ = true_video(world, pictures, scene, colour_of(index))
            yield Episode((255.0 * frames).round().to(torch.uint8), instruction(colour_of(index)), q.float(), rate())

    for first in range(0, arguments.episodes, SHARD):
        shard = folder / f"{first:06}"
        if not shard.is_dir():
            indices = range(first, min(first + SHARD, arguments.episodes))
            print(f"{write_episodes(shard, made(indices), 'kinearm')} episodes in {shard}", flush=True)


def recorded(arguments: argparse.Namespace) -> Iterator[Episode]:
    """All episodes, one after the other."""
    for first in range(0, arguments.episodes, SHARD):
        yield from read_episodes(arguments.out / "episodes" / f"{first:06}")


def autoencoder(arguments: argparse.Namespace) -> None:
    """Train the autoencoder on single frames, then write the untrained video model around it."""
    folder, path = arguments.out / "start", arguments.out / "autoencoder.pt"
    if folder.is_dir():
        return
    torch.manual_seed(arguments.seed)
    model = small_model(SIZE, FRAMES, list(map(instruction, COLOURS)))
    model = replace(model, sampling=SAMPLING)
    frames = torch.cat([episode.frames for episode in recorded(arguments)])
    odd = (frames.float() - frames.float().mean(dim=0)).abs().mean(dim=-1) / 255.0
    optimizer = torch.optim.AdamW(model.vae.parameters(), lr=2e-3, weight_decay=0.0)
    done, began = 0, time.perf_counter()
    if path.is_file():
        state = torch.load(path, weights_only=True)
        model.vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
    for step in range(done, arguments.autoencoder_steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 30, 2.0 * (1.02 - step / arguments.autoencoder_steps))
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(len(frames), (8,), generator=generator)
        batch = 2.0 * frames[rows].movedim(-1, 1).float() / 255.0 - 1.0
        code = model.vae.encode(batch).latent_dist
        off = (model.vae.decode(code.sample(generator), num_frames=1).sample - batch).abs()
        weight = 1.0 + 10.0 * odd[rows, None]
        loss = ((off + off.square()) * weight).mean() + 1e-4 * code.kl().mean() / code.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.vae.parameters(), 1.0)
        optimizer.step()
        late = arguments.minutes is not None and time.perf_counter() - began > 60.0 * arguments.minutes
        if (step + 1) % 50 == 0 or late or step + 1 == arguments.autoencoder_steps:
            seconds = time.perf_counter() - began
            print(f"autoencoder {step + 1}: {0.5 * off.mean():.4f} off a pixel, {seconds:.0f} s", flush=True)
            state = {"step": step + 1, "vae": model.vae.state_dict(), "optimizer": optimizer.state_dict()}
            with written_whole(path) as temporary:
                torch.save(state, temporary)
        if late and step + 1 < arguments.autoencoder_steps:
            raise SystemExit("stopped; run again to go on")
    with torch.no_grad():
        codes = torch.cat([model.encode(part.float() / 255.0) for part in frames[::10].split(32)])
    model.vae.register_to_config(scaling_factor=1.0 / codes.std().item())
    model.save_pretrained(folder)


def train(arguments: argparse.Namespace) -> None:
    """Train the video model on all episodes; after `minutes` it is written as it stands."""
    folder = arguments.out / "model"
    if (folder / INDEX).is_file() and steps_done(folder) >= arguments.steps:
        return
    model = TextSteeredVideo.from_pretrained(arguments.out / "start", sampling=SAMPLING)
    clips = [episode.clip(FRAMES, SIZE, SIZE) for episode in recorded(arguments)]
    settings = FinetuneSettings(
        steps=arguments.steps,
        batch=8,
        learning_rate=1e-3,
        lora_rank=None,
        dropout=0.05,
        log_sigma=(2.0, 1.7),
        ema=0.998,
        save_every=50,
        minutes=arguments.minutes,
    )
    finetune(model, clips, folder, settings, seed=arguments.seed, resume=True)
    if steps_done(folder) < arguments.steps:
        raise SystemExit(f"stopped after {steps_done(folder)} steps; run again to go on, or --stages evaluate")


@torch.no_grad()
def listen(arguments: argparse.Namespace) -> None:
    """How much worse videos are denoised when they are called by another block."""
    model = TextSteeredVideo.from_pretrained(arguments.out / "model", sampling=SAMPLING)
    clips, colours = [], list(COLOURS)
    for place in scenes(arguments.out, ""):
        clips.append(Clip((255.0 * place.true_video()[0]).round().to(torch.uint8), instruction(place.colour), rate()))
    data, said = EncodedClips.of(model, clips), model.embed(list(map(instruction, colours)))
    asked = torch.tensor([colours.index(colour_of(index)) for index in range(SCENES)])
    print("noise, error with the right sentence, with the others")
    for sigma in (5.0, 20.0, 80.0):
        errors = []
        for turn in range(len(colours)):
            turned = replace(data, prompts=said[(asked + turn) % len(colours)])
            generator = torch.Generator().manual_seed(0)
            drawn = turned.draw(model, 4 * SCENES, 0.0, (math.log(sigma), 0.0), generator)
            errors.append(edm_loss(model.unet, *drawn).item())
        print(f"{sigma:g}", *(f"{error:.4f}" for error in errors), flush=True)


def reference(arguments: argparse.Namespace) -> None:
    """Success with the true video, and at random."""
    for place in unfinished(arguments.out / "reference.jsonl", ""):
        true, q, scripted = place.true_video()
        row: dict[str, Any] = {"scene": place.index, "colour": place.colour, "scripted_policy_reached": scripted}
        row["true"], row["q_true"] = place.followed(true, q)
        row["random"] = place.outcome(random_motion(place.world, q[0], place.index))
        place.finish(row)


def evaluate(arguments: argparse.Namespace) -> None:
    """Success with generated videos; then all results in results.json and as a table."""
    films, folder = arguments.out / "films", arguments.out / "model"
    films.mkdir(exist_ok=True)
    model = TextSteeredVideo.from_pretrained(folder, sampling=SAMPLING)
    for place in unfinished(arguments.out / "generated.jsonl", checksum(folder)):
        true, q, _ = place.true_video()
        made = torch.cat([true[:1], model.generate(true[0], instruction(place.colour), seed=place.index)[1:]])
        found, joints = place.followed(made, q)
        drawn = place.arm.render(torch.tensor(joints), place.pictures.camera).rgb
        assert drawn is not None
        write_video(films / f"{place.index:02}_{place.colour}.gif", film([true, made, drawn]), rate())
        place.finish({"scene": place.index, "generated": found, "q_generated": joints})
    write_results(arguments.out)


def autoencoded(arguments: argparse.Namespace) -> None:
    """Success with what the autoencoder makes of the true video: the best that the generated one could be."""
    folder = arguments.out / "start"
    model = TextSteeredVideo.from_pretrained(folder, sampling=SAMPLING)
    for place in unfinished(arguments.out / "autoencoded.jsonl", checksum(folder, "vae")):
        true, q, _ = place.true_video()
        found, joints = place.followed(torch.cat([true[:1], coded(model, true)[1:]]), q)
        place.finish({"scene": place.index, "autoencoded": found, "q_autoencoded": joints})
    write_results(arguments.out)


def write_results(out: Path) -> None:
    """All that has been finished, in results.json and as a table."""
    made_by = {"reference": "", "autoencoded": checksum(out / "start", "vae"), "generated": checksum(out / "model")}
    parts = [read_rows(out / f"{name}.jsonl", model) for name, model in made_by.items()]
    parts = [part for part in parts if len(part) == SCENES]
    rows = [dict(pair for row in same for pair in row.items()) for same in zip(*parts, strict=True)]
    names = [name for name in ("true", "autoencoded", "generated", "random") if rows and name in rows[0]]
    table = {name: summary([row[name] for row in rows]) for name in names}
    trained = last_line(out / "model" / "log.csv") if (out / "model" / "log.csv").is_file() else None
    result = {"summary": table, "trained": trained, "scenes": rows}
    with written_whole(out / "results.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    print("| joints from | reached | nearest to the asked block | off, median [mm] | joints off, mean [rad] |")
    print("|---|---|---|---|---|")
    for name, numbers in table.items():
        off = numbers.get("joint_error_rad")
        print(
            f"| {name} | {numbers['reached']} of {len(rows)} | {numbers['nearest']} of {len(rows)} | "
            f"{numbers['off_median_mm']:.0f} | {'-' if off is None else f'{off:.3f}'} |"
        )


@dataclass(frozen=True)
class Place:
    """One scene of the evaluation."""

    index: int
    path: Path
    model: str
    world: Tabletop
    pictures: TabletopPictures
    arm: ks.SelfModel

    @property
    def colour(self) -> str:
        return colour_of(self.index)

    @property
    def scene(self) -> Scene:
        return Scene.random(torch.Generator().manual_seed(SCENE_SEED + self.index))

    def true_video(self) -> tuple[Tensor, Tensor, bool]:
        return true_video(self.world, self.pictures, self.scene, self.colour)

    def followed(self, video: Tensor, q: Tensor) -> tuple[dict[str, Any], list[list[float]]]:
        """What becomes of the joints that a video shows; the first ones are known."""
        found = follow(self.arm, video, self.pictures.camera, q[0], seed=self.index)
        off = (found.q - q).abs()[:, :6].mean().item()
        return {**self.outcome(found.q), "joint_error_rad": off, "seconds": found.seconds}, found.q.tolist()

    def outcome(self, q: Tensor) -> dict[str, Any]:
        """What becomes of a motion in MuJoCo."""
        seconds, state, scene = SECONDS / (len(q) - 1), self.world.data(self.scene), self.scene
        check = check_trajectory(self.world.robot, q, seconds, state)
        execution = execute(self.world.robot, q, seconds, state)
        tip = self.world.tip(state)
        away = {name: 1000.0 * float((tip - self.world.goal(scene, name)).norm()) for name in scene.blocks}
        return {
            "reached": self.world.reached(state, scene, self.colour),
            "nearest": min(away, key=lambda name: away[name]) == self.colour,
            "off_mm": away[self.colour],
            "check": check.to_json(),
            "contacts": [list(contact) for contact in execution.contacts or ()],
        }

    def finish(self, row: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({**row, "model": self.model}) + "\n")
        shown = {k: (v["reached"], round(v["off_mm"])) for k, v in row.items() if isinstance(v, dict)}
        print(self.index, self.colour, shown, flush=True)


def unfinished(path: Path, model: str) -> Iterator[Place]:
    """The scenes, those left out that a file already has of this model; what else it has is dropped."""
    rows = read_rows(path, model)
    with written_whole(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    yield from scenes(path, model, len(rows))


def scenes(path: Path, model: str, first: int = 0) -> Iterator[Place]:
    """The scenes of the evaluation from one on."""
    world, arm = Tabletop(), ks.zoo.load("kinearm")
    pictures = TabletopPictures(world, SIZE)
    for index in range(first, SCENES):
        yield Place(index, path, model, world, pictures, arm)


def read_rows(path: Path, model: str) -> list[dict[str, Any]]:
    """Whole lines of this model; the last one may be half, after a kill."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in rows if row.get("model", "") == model]


def checksum(folder: Path, part: str = "unet") -> str:
    """Of a model's weights, so that results are known to be its own; empty where there is no model."""
    paths = sorted((folder / part).glob("*.safetensors"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16] if paths else ""


def random_motion(world: Tabletop, q: Tensor, seed: int) -> Tensor:
    """From the start to random joints: as far away, joint by joint, as scripted motions go, at random."""
    generator = torch.Generator().manual_seed(seed)
    span = torch.tensor([0.55, 0.9, 0.6, 0.0, 0.7, 0.0, 0.0])
    end = world.robot.tree.clamp(q + span * (2.0 * torch.rand(len(Q_START), generator=generator) - 1.0))
    return q + torch.linspace(0.0, 1.0, FRAMES)[:, None] * (end - q)


@torch.no_grad()
def coded(model: TextSteeredVideo, video: Tensor) -> Tensor:
    """What the autoencoder makes of a video: what the generated one could be at best."""
    pixels = model.vae.decode(model.encode(video), num_frames=1).sample
    return (0.5 * pixels + 0.5).clamp(0.0, 1.0).movedim(1, -1)


def film(videos: list[Tensor]) -> list[Tensor]:
    """Side by side, enlarged."""
    wide = torch.cat(videos, dim=2).movedim(-1, 1)
    return list(torch.nn.functional.interpolate(wide, scale_factor=4.0).movedim(1, -1))


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    numbers: dict[str, float] = {name: sum(row[name] for row in rows) for name in ("reached", "nearest")}
    numbers["off_median_mm"] = statistics.median(row["off_mm"] for row in rows)
    if "joint_error_rad" in rows[0]:
        numbers["joint_error_rad"] = sum(row["joint_error_rad"] for row in rows) / len(rows)
    return numbers


def last_line(path: Path) -> dict[str, str]:
    names, *_, values = path.read_text().splitlines()
    return dict(zip(names.split(","), values.split(","), strict=True))


def true_video(world: Tabletop, pictures: TabletopPictures, scene: Scene, colour: str) -> tuple[Tensor, Tensor, bool]:
    """Frames and joints of the scripted policy, executed, and whether it reached the block."""
    plan, state = world.reaching(scene, colour), world.data(scene)
    wanted, frames, q = torch.linspace(0, len(plan) - 1, FRAMES).round().long().tolist(), [], []
    for step in executing(world.robot, plan, SECONDS / (len(plan) - 1), state):
        if step in wanted:
            frames.append(pictures.picture(state))
            q.append(joints_of(world.robot, state))
    return torch.stack(frames), torch.stack(q), world.reached(state, scene, colour)


def colour_of(index: int) -> str:
    return list(COLOURS)[index % len(COLOURS)]


def rate() -> float:
    return (FRAMES - 1) / SECONDS


if __name__ == "__main__":
    main()
