"""Point tracks to motion: `KINESPLAT_SHARED=... python benchmarks/retarget.py -o DIR`.

MuJoCo renders the demonstrations (kinesplat[render,video]).

- `own`: the Shadow Hand moves smoothly between random configurations before a known camera; its motion is sought from
  the video, with a perfect tracker and with Lucas-Kanade, and from their tracks and the true first frame.
- `alone`: the same from those tracks without anything else.
- `allegro`: an Allegro Hand (a URDF below the folder that KINESPLAT_SHARED names) closes and opens, and the Shadow Hand
  follows.
- `g1`: Unitree's G1 follows its own video, 29 joints.
- `rendered`: the paper's objective, with gradients through a tracker on rendered frames, from joints that are off.

Fingertips are the outermost points of the last links; errors are those of visible ones. Writes retarget.json, and films
with a few of their frames.
"""

import argparse
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import kinesplat as ks
from kinesplat.commands.retarget import film_of
from kinesplat.dataset.capture import Capture
from kinesplat.dataset.collision import SelfCollision
from kinesplat.files import write_png, written_whole
from kinesplat.inverse.clip import Clip
from kinesplat.inverse.key_frames import key_frames
from kinesplat.inverse.retarget import clip_of, demonstrated
from kinesplat.inverse.surface_tracks import in_company
from kinesplat.video import write_video
from kinesplat.vision.correlation_tracker import CorrelationTracker
from kinesplat.vision.point_tracks import PointTracks, lucas_kanade

SIZE, FRAMES, KNOTS, KNOT_FRAMES = 512, 40, 3, 30
FAR_FRAMES, SEEN_M, LEAST_PX = 5, 0.003, 20
FINGERS = ("ff", "mf", "rf", "lf", "th")
ALLEGRO = "urdf/allegro_hand/example-robot-data/robots/allegro_hand_description/urdf/allegro_right_hand.urdf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("retarget"))
    parser.add_argument("--parts", nargs="+", default=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--frames", type=int, default=FRAMES)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "retarget.json"
    rows = json.loads(path.read_text()) if path.is_file() else []
    model = ks.zoo.load("shadow_hand")
    for part in arguments.parts:
        for seed in arguments.seeds if part in ("own", "alone") else arguments.seeds[:1]:
            for row in PARTS[part](model, arguments.frames, seed, arguments.output):
                row = {"part": part, "seed": seed, **row}
                rows.append(row)
                path.write_text(json.dumps(rows, indent=1) + "\n")
                print(json.dumps(row), flush=True)


def own(model: ks.SelfModel, frames: int, seed: int, folder: Path) -> Any:
    """The Shadow Hand follows itself: from a video, and from its tracks with the true first frame."""
    q, camera, video = own_video(model, frames, seed, folder)
    began = time.process_time()
    clip = clip_of(video["rgb"], camera, None)
    assert isinstance(clip, Clip)
    known = key_frames(model, clip, camera, seed)
    seconds = time.process_time() - began
    assert known is not None
    row = {"case": "key frames by reconstruct", "cpu_s": seconds, "frames": known.frames.tolist()}
    yield {**row, **errors(model, known.q, q[known.frames], camera)}
    between = torch.nonzero((torch.arange(frames)[:, None] - known.frames).abs().amin(dim=1) >= FAR_FRAMES)[:, 0]
    for name, tracker in (("perfect tracker", PerfectTracker(model, q, camera, video)), ("Lucas-Kanade", lucas_kanade)):
        began = time.process_time()
        with patch("kinesplat.inverse.retarget.key_frames", lambda *_: known):  # found once, used by both
            fit = ks.retarget(model, video["rgb"], camera, tracker=tracker, seed=seed)
        fit.shown.save(folder / f"own_{seed}_{name[0]}.npz")
        row = {
            "cpu_s": seconds + time.process_time() - began,
            "between": errors(model, fit.q[between], q[between], camera),
        }
        yield {"case": f"video, {name}", **row, **facts(fit), **errors(model, fit.q, q, camera)}
        film(folder / f"own_{seed}_{name[0]}", model, video["rgb"], fit.shown, fit)
        began = time.process_time()
        fit = ks.retarget(model, fit.shown, camera, q_init=q[0], seed=seed)
        row = {"case": f"{name}, first frame given", "cpu_s": time.process_time() - began}
        yield {**row, **facts(fit), **errors(model, fit.q, q, camera)}


def alone(model: ks.SelfModel, frames: int, seed: int, folder: Path) -> Any:
    """The Shadow Hand follows the tracks that `own` wrote; nothing else is known."""
    q, camera, _ = own_video(model, frames, seed, folder)
    for name in ("perfect tracker", "Lucas-Kanade"):
        began = time.process_time()
        fit = ks.retarget(model, PointTracks.load(folder / f"own_{seed}_{name[0]}.npz"), camera, seed=seed)
        row = {"case": f"{name}, tracks alone", "cpu_s": time.process_time() - began}
        yield {**row, **facts(fit), **errors(model, fit.q, q, camera)}


def facts(fit: ks.RetargetResult) -> dict[str, Any]:
    """What a result says of itself."""
    said = {"start": fit.start, "verdict": fit.verdict, "tracks": fit.tracks, "near_share": fit.near_share}
    return {**said, "residual_px": fit.residual_px}


@dataclass(frozen=True)
class PerfectTracker:
    """Tracks of what MuJoCo's depth and links say is under a query, by the true joints; seen where its depth agrees."""

    model: ks.SelfModel
    q: Tensor
    camera: ks.Camera
    video: dict[str, Tensor]

    def __call__(self, frames: Tensor, queries: Tensor) -> PointTracks:
        start, (x, y) = queries[:, 0].long(), queries[:, 1:].floor().long().unbind(-1)
        link, depth = self.video["link_id"][start, y, x], self.video["depth"][start, y, x]
        rays = torch.nn.functional.pad(torch.stack([x, y], dim=-1) + 0.5, (0, 1), value=1.0)
        p_cam = torch.nn.functional.pad(rays @ torch.linalg.inv(self.camera.K).T * depth[:, None], (0, 1), value=1.0)
        Ts = self.camera.T_cam_world @ self.model.tree.forward_kinematics(self.q)
        p_link = torch.linalg.solve(Ts[start, link.clamp(min=0)], p_cam)
        places = (Ts[:, link.clamp(min=0)] @ p_link[:, :, None])[..., :3, 0]
        pixels = places @ self.camera.K.T
        pixels = pixels[..., :2] / pixels[..., 2:]
        cells = pixels.floor().long()
        inside = ((cells >= 0) & (cells < SIZE)).all(dim=-1)
        rows, (u, v) = torch.arange(len(places))[:, None], cells.clamp(0, SIZE - 1).unbind(-1)
        same = (places[..., 2] - self.video["depth"][rows, v, u]).abs() < SEEN_M
        return PointTracks(pixels, inside & same & (self.video["link_id"][rows, v, u] == link) & (link >= 0))


def own_video(model: ks.SelfModel, frames: int, seed: int, folder: Path) -> tuple[Tensor, ks.Camera, dict[str, Tensor]]:
    """Joints, a camera that the hand fills, and what MuJoCo renders: kept in the folder."""
    tree, generator = model.tree, torch.Generator().manual_seed(seed)
    lower, upper = tree.q_lower.float(), tree.q_upper.float()
    knots = lower + (upper - lower) * (0.1 + 0.6 * torch.rand(KNOTS, tree.dof, generator=generator))
    t = torch.arange(frames) / KNOT_FRAMES
    i = t.floor().long().clamp(max=KNOTS - 2)
    share = 0.5 - 0.5 * torch.cos(math.pi * (t - i).clamp(max=1.0))[:, None]
    q = knots[i] * (1.0 - share) + knots[i + 1] * share
    hand = model.link_index >= model.tree.link_names.index("rh_palm")
    points = model.posed(q[::4]).means[:, hand].detach().flatten(0, 1)
    camera = filled(ks.Camera.framing(points, (0.55, 0.3, 0.8), width=SIZE, height=SIZE), points)
    return q, camera, filmed("shadow_hand", q, camera, folder / f"own_{seed}_{frames}.pt")


def filmed(robot: str | Path, q: Tensor, camera: ks.Camera, kept: Path) -> dict[str, Tensor]:
    """What MuJoCo renders of a motion: rgb (8 bit), depth, link_id; kept in a file."""
    if not kept.is_file():
        out = Capture(ks.load_description(robot)).render(q, camera)
        assert out.rgb is not None
        assert out.depth is not None
        assert out.link_id is not None
        rgb = (out.rgb.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)
        with written_whole(kept) as temporary:
            torch.save({"rgb": rgb, "depth": out.depth, "link_id": out.link_id}, temporary)
    return torch.load(kept)


def filled(camera: ks.Camera, points: Tensor) -> ks.Camera:
    """The camera zoomed and shifted until the points fill nine tenths of the picture."""
    pixels, _ = camera.project(points)
    low, high = pixels.amin(dim=0), pixels.amax(dim=0)
    zoom = 0.9 * camera.width / float((high - low).max())
    K = camera.K.clone()
    K[:2] *= zoom
    K[:2, 2] += 0.5 * camera.width - zoom * 0.5 * (low + high)
    return ks.Camera(K, camera.T_cam_world, camera.width, camera.height)


def allegro(model: ks.SelfModel, frames: int, seed: int, folder: Path) -> Any:
    """The Shadow Hand follows an Allegro Hand that closes finger by finger, opens, and bends all fingers at once."""
    frames = frames * 3 // 2
    urdf = Path(os.environ["KINESPLAT_SHARED"]) / ALLEGRO
    robot = ks.load_description(urdf)
    other = ks.SelfModel.from_description(robot)
    tree = robot.tree
    t = torch.linspace(0.0, 1.0, frames)[:, None]
    start = (torch.arange(tree.dof) // 4 * 0.12)[None]
    bend = torch.exp(-(((t - start - 0.15) / 0.11) ** 2)) + torch.exp(-(((t - 0.85) / 0.12) ** 2))
    open_, closed = tree.q_canonical.float(), tree.q_upper.float() * 0.75
    closed[[0, 4, 8]] = 0.0
    q = tree.clamp(open_ + bend.clamp(max=1.0) * (closed - open_))
    points = other.posed(q[::4]).means.detach().flatten(0, 1)
    centre = 0.5 * (points.amin(dim=0) + points.amax(dim=0))
    eye = centre + 0.6 * torch.nn.functional.normalize(torch.tensor([1.0, 0.0, 0.35]), dim=0)
    sees = filled(ks.Camera.look_at(eye, centre, width=SIZE, height=SIZE, up=(0.0, 0.0, -1.0)), points)
    video = filmed(urdf, q, sees, folder / f"allegro_{frames}.pt")["rgb"]
    hand = model.link_index >= model.tree.link_names.index("rh_palm")
    own_points = model.posed(model.tree.q_canonical.float()).means[hand].detach()
    camera = filled(ks.Camera.framing(own_points, (0.35, 0.0, 1.0), width=SIZE, height=SIZE), own_points)
    tracks, _ = demonstrated(video, camera, None, lucas_kanade)
    fit = ks.retarget(model, tracks, camera, align=True, self_collision=1.0, seed=seed)
    film(folder / "allegro", model, video, tracks, fit)
    a = fit.alignment
    row = {"case": "Allegro to Shadow", "tracks": fit.tracks, "seconds": fit.seconds, "verdict": fit.verdict}
    row |= {"residual_px": fit.residual_px, "near_share": fit.near_share, "scale": a.scale, "angle_rad": a.angle_rad}
    yield {**row, **alike(other, q, sees, model, fit)}


def g1(_: ks.SelfModel, frames: int, seed: int, folder: Path) -> Any:
    """Unitree's G1 moves all its 29 joints between two postures in which no links touch, and follows its own video.

    Its pelvis is fixed, its model not trained.
    """
    robot = ks.load_description("unitree_g1")
    model = ks.SelfModel.from_description(robot)
    tree, generator = model.tree, torch.Generator().manual_seed(seed)
    rest, half = tree.q_canonical.float(), (0.4 * (tree.q_upper - tree.q_lower)).clamp(max=0.7).float()
    touching, apart = SelfCollision(robot), list[Tensor]()
    while len(apart) < 2:
        drawn = tree.clamp(rest + half * (2.0 * torch.rand(tree.dof, generator=generator) - 1.0))
        apart += [drawn] * (not touching.colliding_bodies(drawn))
    knots = torch.stack(apart)
    share = 0.5 - 0.5 * torch.cos(math.pi * torch.linspace(0.0, 1.0, frames))[:, None]
    q = knots[0] + share * (knots[1] - knots[0])
    points = model.posed(q[::4]).means.detach().flatten(0, 1)
    camera = filled(ks.Camera.framing(points, (1.0, 0.25, 0.1), width=SIZE, height=SIZE), points)
    video = filmed("unitree_g1", q, camera, folder / f"g1_{seed}_{frames}.pt")
    began = time.process_time()
    fit = ks.retarget(model, video["rgb"], camera, seed=seed)
    row = {"case": "G1, video", "cpu_s": time.process_time() - began, **facts(fit)}
    film(folder / "g1", model, video["rgb"], fit.shown, fit)
    a, b = (tree.forward_kinematics(x)[..., :3, 3] for x in (fit.q, q))
    for part, link in (("hands", "wrist_yaw_link"), ("feet", "ankle_roll_link"), ("elbows", "elbow_link")):
        links = [tree.link_names.index(f"{side}_{link}") for side in ("left", "right")]
        seen = torch.stack([(video["link_id"] == i).sum(dim=(1, 2)) >= LEAST_PX for i in links], dim=1)
        away = 1000.0 * (a - b)[:, links].norm(dim=-1)[seen]
        row |= {f"{part}_median_mm": float(away.median()), f"{part}_p90_mm": float(away.quantile(0.9))}
    yield {**row, "joint_error_mean_rad": float((fit.q - q).abs().mean())}


def alike(
    other: ks.SelfModel, q: Tensor, sees: ks.Camera, model: ks.SelfModel, fit: ks.RetargetResult
) -> dict[str, Any]:
    """Correlation over time of how far fingertips have moved down the picture, finger by finger: theirs and ours."""
    theirs = {"ff": "link_3.0_tip", "mf": "link_7.0_tip", "rf": "link_11.0_tip", "th": "link_15.0_tip"}
    out = {}
    for finger, link in theirs.items():
        a = path(other, q, sees, other.tree.link_names.index(link)) * fit.alignment.scale
        b = path(model, fit.q, fit.camera, model.tree.link_names.index(f"rh_{finger}distal"))
        a, b = a - a[0], b - b[0]
        out[f"correlation_{finger}"] = float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-9))
        out[f"size_ratio_{finger}"] = float(b.norm() / a.norm().clamp(min=1e-9))
    return out


def path(model: ks.SelfModel, q: Tensor, camera: ks.Camera, link: int) -> Tensor:
    """Pixels of a link's outermost point over time."""
    return camera.project(tips(model, q, [link])[:, :1])[0][:, 0]


def rendered(model: ks.SelfModel, frames: int, seed: int, folder: Path) -> Any:
    """The paper's objective on every other of the first twelve frames, from joints that are off alike in all."""
    q, camera, video = own_video(model, frames, seed, folder)
    q, rgb = q[:12:2], video["rgb"][:12:2]
    generator = torch.Generator().manual_seed(seed)
    away = torch.randn(1, model.tree.dof, generator=generator)
    for off in (0.05, 0.1):
        start = model.tree.clamp(q + off * away)
        yield {"case": f"start, {off} rad off", **errors(model, start, q, camera)}
        for name, tracker in (("correlation", CorrelationTracker()), ("Lucas-Kanade", lucas_kanade)):
            tracks, _ = demonstrated(rgb, camera, None, lucas_kanade)
            began = time.process_time()
            fit = ks.retarget(model, tracks, camera, q_init=start, objective="rendered", tracker=tracker)
            row = {"case": f"rendered, {name}, {off} rad off", "cpu_s": time.process_time() - began}
            losses = {"loss_start": fit.loss_history[0], "loss_least": min(fit.loss_history)}
            yield {**row, "tracks": fit.tracks, **losses, **errors(model, fit.q, q, camera)}


PARTS = {"own": own, "alone": alone, "g1": g1, "allegro": allegro, "rendered": rendered}


def errors(model: ks.SelfModel, q: Tensor, truth: Tensor, camera: ks.Camera) -> dict[str, Any]:
    """Fingertips in view: distances [mm], in the picture [px]; and joints [rad]."""
    links = [model.tree.link_names.index(f"rh_{finger}distal") for finger in FINGERS]
    ours, theirs = tips(model, q, links), tips(model, truth, links)
    pixels, depth = camera.project(theirs)
    surface = model.render(truth, camera, outputs=("depth", "alpha"))
    assert surface.alpha is not None
    assert surface.depth is not None
    x, y = pixels.floor().long().clamp(0, SIZE - 1).unbind(-1)
    rows = torch.arange(len(q))[:, None]
    seen = (surface.alpha[rows, y, x] < 0.5) | (depth < surface.depth[rows, y, x] + 0.012)
    seen &= ((pixels >= 0) & (pixels < SIZE)).all(dim=-1)
    away = 1000.0 * (ours - theirs).norm(dim=-1)[seen]
    across = (camera.project(ours)[0] - pixels).norm(dim=-1)[seen]
    return {
        "tip_error_median_mm": float(away.median()),
        "tip_error_p90_mm": float(away.quantile(0.9)),
        "tip_error_median_px": float(across.median()),
        "tips_in_view_share": float(seen.float().mean()),
        "joint_error_mean_rad": float((q - truth).abs().mean()),
    }


def tips(model: ks.SelfModel, q: Tensor, links: list[int]) -> Tensor:
    """``(frames, links, 3)`` the outermost points of links in the world [m]; splats off the surface do not count."""
    owns = [model.parameters.means.detach()[model.link_index == link] for link in links]
    owns = [own[in_company(own)] for own in owns]
    points = torch.stack([own[own.norm(dim=-1).argmax()] for own in owns])
    Ts = model.tree.forward_kinematics(q)[:, links]
    return (Ts[..., :3, :3] @ points[:, :, None].to(q))[..., 0] + Ts[..., :3, 3]


def film(stem: Path, model: ks.SelfModel, video: Tensor, tracks: PointTracks, fit: ks.RetargetResult) -> None:
    pictures = list(film_of(model, iter(video), tracks, fit))
    write_video(stem.with_suffix(".mp4"), pictures, 15.0)
    for i in torch.linspace(0, len(pictures) - 1, 6).long().tolist():
        write_png(stem.with_name(f"{stem.name}_{i:03}.png"), pictures[i])


if __name__ == "__main__":
    main()
