"""Point tracks to motion: `KINESPLAT_SHARED=... python benchmarks/retarget.py -o DIR`.

MuJoCo renders the demonstrations (kinesplat[render,video]).

- `own`: the Shadow Hand moves smoothly between random configurations before a known camera; its motion is sought from
  the tracks of a perfect tracker, and from Lucas-Kanade's, from nothing, from the first frame as `reconstruct`
  finds it, and from the true one.
- `allegro`: an Allegro Hand (a URDF below the folder that KINESPLAT_SHARED names) closes and opens, and the Shadow Hand
  follows.
- `rendered`: the paper's objective, with gradients through a tracker on rendered frames, from joints that are off by
  0.05 rad.

Fingertips are the outermost points of the last links; errors are those of visible ones. Writes retarget.json, and films
with a few of their frames.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kinesplat as ks
from kinesplat.commands.retarget import film_of
from kinesplat.dataset.capture import Capture
from kinesplat.files import write_png
from kinesplat.inverse.retarget import demonstrated
from kinesplat.inverse.surface_tracks import SurfaceTracks, in_company
from kinesplat.video import write_video
from kinesplat.vision.correlation_tracker import CorrelationTracker
from kinesplat.vision.point_tracks import PointTracks, lucas_kanade

SIZE, FRAMES, KNOTS = 512, 60, 3
PERFECT = 400
FINGERS = ("ff", "mf", "rf", "lf", "th")
ALLEGRO = "urdf/allegro_hand/example-robot-data/robots/allegro_hand_description/urdf/allegro_right_hand.urdf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("retarget"))
    parser.add_argument("--parts", nargs="+", default=["own", "allegro", "rendered"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--frames", type=int, default=FRAMES)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "retarget.json"
    rows = json.loads(path.read_text()) if path.is_file() else []
    model = ks.zoo.load("shadow_hand")
    for part in arguments.parts:
        for seed in arguments.seeds if part == "own" else arguments.seeds[:1]:
            for row in PARTS[part](model, arguments.frames, seed, arguments.output):
                row = {"part": part, "seed": seed, **row}
                rows.append(row)
                path.write_text(json.dumps(rows, indent=1) + "\n")
                print(json.dumps(row), flush=True)


def own(model: ks.SelfModel, frames: int, seed: int, folder: Path) -> Any:
    """The Shadow Hand follows itself."""
    q, camera, video = own_video(model, frames, seed)
    surface = SurfaceTracks.on(model, camera, 100_000)
    generator = torch.Generator().manual_seed(seed)
    some = surface.select(torch.randperm(len(surface.links), generator=generator))
    seen = torch.nonzero(some.visible(q).sum(dim=0) >= 2)[:, 0]
    perfect = some.select(seen[:PERFECT]).tracks(q)
    began = time.perf_counter()
    tracks, _ = demonstrated(video, camera, None, lucas_kanade)
    tracking = time.perf_counter() - began
    began = time.perf_counter()
    first = ks.reconstruct(model, video[0], camera, seed=seed).q
    seconds = time.perf_counter() - began
    yield {"case": "first frame by reconstruct", "seconds": seconds, **errors(model, first[None], q[:1], camera)}
    starts = (("", None), (", first frame by reconstruct", first), (", first frame given", q[0]))
    cases = [(f"perfect tracker{words}", perfect, start) for words, start in starts]
    cases += [(f"Lucas-Kanade{words}", tracks, start) for words, start in starts]
    for name, shown, start in cases:
        fit = ks.retarget(model, shown, camera, q_init=start, seed=seed)
        row = {"case": name, "tracks": fit.tracks, "seconds": fit.seconds, "verdict": fit.verdict}
        yield {**row, "residual_px": fit.residual_px, **errors(model, fit.q, q, camera)}
    yield {"case": "Lucas-Kanade alone", "seconds": tracking, "tracks": tracks.points.shape[1]}
    film(folder / f"own_{seed}", model, video, tracks, fit)


def own_video(model: ks.SelfModel, frames: int, seed: int) -> tuple[Tensor, ks.Camera, Tensor]:
    """Joints, a camera that the hand fills, and what MuJoCo renders."""
    tree, generator = model.tree, torch.Generator().manual_seed(seed)
    lower, upper = tree.q_lower.float(), tree.q_upper.float()
    knots = lower + (upper - lower) * (0.1 + 0.6 * torch.rand(KNOTS, tree.dof, generator=generator))
    t = torch.linspace(0.0, KNOTS - 1.001, frames)
    i, share = t.floor().long(), 0.5 - 0.5 * torch.cos(math.pi * (t - t.floor()))[:, None]
    q = knots[i] * (1.0 - share) + knots[i + 1] * share
    hand = model.link_index >= model.tree.link_names.index("rh_palm")
    points = model.posed(q[::4]).means[:, hand].detach().flatten(0, 1)
    camera = filled(ks.Camera.framing(points, (0.55, 0.3, 0.8), width=SIZE, height=SIZE), points)
    return q, camera, Capture(ks.load_description("shadow_hand")).render(q, camera).rgb.clamp(0.0, 1.0)


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
    robot = ks.load_description(Path(os.environ["KINESPLAT_SHARED"]) / ALLEGRO)
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
    video = Capture(robot).render(q, sees).rgb.clamp(0.0, 1.0)
    hand = model.link_index >= model.tree.link_names.index("rh_palm")
    own_points = model.posed(model.tree.q_canonical.float()).means[hand].detach()
    camera = filled(ks.Camera.framing(own_points, (0.35, 0.0, 1.0), width=SIZE, height=SIZE), own_points)
    tracks, _ = demonstrated(video, camera, None, lucas_kanade)
    fit = ks.retarget(model, tracks, camera, align=True, seed=seed)
    film(folder / "allegro", model, video, tracks, fit)
    a = fit.alignment
    row = {"case": "Allegro to Shadow", "tracks": fit.tracks, "seconds": fit.seconds, "verdict": fit.verdict}
    row |= {"residual_px": fit.residual_px, "near_share": fit.near_share, "scale": a.scale, "angle_rad": a.angle_rad}
    yield {**row, **alike(other, q, sees, model, fit)}


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
    """The paper's objective on a piece of the first video."""
    q, camera, video = own_video(model, frames, seed)
    q, video = q[:12:2], video[:12:2]
    generator = torch.Generator().manual_seed(seed)
    start = model.tree.clamp(q + 0.05 * torch.randn(1, model.tree.dof, generator=generator))
    yield {"case": "start", **errors(model, start, q, camera)}
    for name, tracker in (("correlation", CorrelationTracker()), ("Lucas-Kanade", lucas_kanade)):
        tracks, _ = demonstrated(video, camera, None, tracker)
        for objective in ("rendered", "frames", "tracks"):
            fit = ks.retarget(model, tracks, camera, q_init=start, objective=objective, tracker=tracker)
            row = {"case": f"{objective}, {name}", "seconds": fit.seconds, "tracks": fit.tracks}
            losses = {"loss_start": fit.loss_history[0], "loss_least": min(fit.loss_history)}
            yield {**row, **losses, **errors(model, fit.q, q, camera)}


PARTS = {"own": own, "allegro": allegro, "rendered": rendered}


def errors(model: ks.SelfModel, q: Tensor, truth: Tensor, camera: ks.Camera) -> dict[str, Any]:
    """Fingertips in view: distances [mm], in the picture [px]; and joints [rad]."""
    links = [model.tree.link_names.index(f"rh_{finger}distal") for finger in FINGERS]
    ours, theirs = tips(model, q, links), tips(model, truth, links)
    pixels, depth = camera.project(theirs)
    surface = model.render(truth, camera, outputs=("depth", "alpha"))
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
