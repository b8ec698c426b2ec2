"""Table 1: models and baselines on the held-out images of a data set."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.dataset.container import Dataset
from kinesplat.dataset.frames import Frames
from kinesplat.errors import InputError
from kinesplat.evaluation.baselines import (
    LIBRARY_SIZE,
    Unmoved,
    nearest_images,
    nearest_inputs,
    random_images,
    without_appearance,
)
from kinesplat.evaluation.lpips import Distance, lpips_distance
from kinesplat.evaluation.metrics import chamfer, mask_iou, psnr, ssim
from kinesplat.gaussians import Gaussians
from kinesplat.rasterizer import Render
from kinesplat.self_model import SelfModel
from kinesplat.training.default import has_many_lights

Picture = Float[Tensor, "height width 3"]
Mask = Float[Tensor, "height width"]
Surfaces = list[tuple[Float[Tensor, " dof"], Float[Tensor, "n 3"]]]
Draw = Callable[[int], tuple[Picture, Mask]]
CHAMFER_CONFIGURATIONS = 20
CHAMFER_POINTS = 10_000
UNITS = {
    "psnr_db": ("PSNR [dB]", "{:.2f}"),
    "worst_psnr_db": ("worst [dB]", "{:.2f}"),
    "foreground_psnr_db": ("foreground PSNR [dB]", "{:.2f}"),
    "ssim": ("SSIM", "{:.4f}"),
    "lpips": ("LPIPS", "{:.4f}"),
    "mask_iou": ("mask IoU", "{:.4f}"),
    "chamfer_mm2": ("Chamfer [mm^2]", "{:.1f}"),
    "milliseconds_per_image": ("ms an image", "{:.1f}"),
}


@runtime_checkable
class Renderable(Protocol):
    """Anything that draws a configuration: a self-model, or a baseline."""

    def render(self, q: Any, camera: Camera) -> Render:
        """The images of `q` from `camera`, with rgb and alpha."""
        ...


@runtime_checkable
class Posable(Protocol):
    """Anything whose splats can be placed in the world."""

    def posed(self, q: Any) -> Gaussians:
        """The splats of configuration `q`."""
        ...


@dataclass(frozen=True)
class Row:
    """Means over the test images; None where a measure does not apply or was not computed.

    Attributes:
        name: of the model or baseline.
        psnr_db: mean of the images' PSNR.
        worst_psnr_db: of the worst image.
        foreground_psnr_db: mean PSNR over the pixels of which the truth covers any part.
        ssim: mean structural similarity.
        lpips: mean LPIPS (AlexNet).
        mask_iou: mean intersection over union of the masks.
        chamfer_mm2: mean over configurations, posed splat means against points on the true surface.
        milliseconds_per_image: wall clock of rendering.
        pictures: some of the images, for the figure.
    """

    name: str
    psnr_db: float
    worst_psnr_db: float
    foreground_psnr_db: float
    ssim: float
    lpips: float | None = None
    mask_iou: float | None = None
    chamfer_mm2: float | None = None
    milliseconds_per_image: float | None = None
    pictures: tuple[Picture, ...] = field(default=(), repr=False)

    def to_json(self) -> dict[str, Any]:
        """The numbers by name."""
        return {key: value for key, value in asdict(self).items() if key != "pictures"}


@dataclass(frozen=True)
class Evaluation:
    """Rows for one data set.

    Attributes:
        robot: name of the robot.
        facts: about the data: folder, light, counts.
        rows: models first, then baselines.
        lpips_missing: why there is no LPIPS, or "".
        truth: the true images that belong to the rows' pictures.
    """

    robot: str
    facts: Mapping[str, Any]
    rows: tuple[Row, ...]
    lpips_missing: str
    truth: tuple[Picture, ...] = field(default=(), repr=False)

    def to_json(self) -> dict[str, Any]:
        """Everything but the pictures."""
        rows = [row.to_json() for row in self.rows]
        return {
            "robot": self.robot,
            "data": dict(self.facts),
            "lpips_missing": self.lpips_missing or None,
            "rows": rows,
        }

    def to_markdown(self) -> str:
        """A table with a heading and one sentence on the data."""
        used = [key for key in UNITS if any(getattr(row, key) is not None for row in self.rows)]
        facts = self.facts
        lines = [
            f"### {self.robot}",
            "",
            f"{facts['images']} held-out images of {facts['configurations']} configurations, "
            f"{facts['size']} x {facts['size']} px, light: {facts['light']}.",
            "",
            "| | " + " | ".join(UNITS[key][0] for key in used) + " |",
            "|---" * (len(used) + 1) + "|",
        ]
        for row in self.rows:
            cells = (_cell(key, getattr(row, key)) for key in used)
            lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
        if self.lpips_missing:
            lines += ["", f"LPIPS was not computed: {self.lpips_missing}."]
        return "\n".join(lines) + "\n"


def evaluate(
    models: Mapping[str, Renderable],
    dataset: Dataset,
    *,
    limit: int | None = None,
    baselines: bool = True,
    pictures: int = 4,
    seed: int = 0,
    report: Callable[[str], None] | None = None,
) -> Evaluation:
    """Measure models and baselines on the test images of a data set.

    Args:
        models: by the name that their row gets; anything with ``render(q, camera)``; with ``posed(q)`` there is a
            Chamfer distance too, and self-models get more rows. They render where their splats are.
        dataset: whose "test" part is rendered; the baselines look up images of its "train" part.
        limit: measure on so many test images only.
        baselines: also measure what the models have to beat, see `kinesplat.evaluation.baselines`.
        pictures: how many images to keep for a figure.
        seed: of the random baseline.
        report: called with every row's name before it is measured.

    Raises:
        InputError: a model is of another robot; there is no test image.
        DatasetError: a shard is missing or corrupt.
    """
    _refuse_other_robots(models, dataset)
    frames = dataset.frames("test", limit=limit, geometry=False)
    distance, lpips_missing = lpips_distance()
    picks = sorted({round(i * (len(frames) - 1) / max(1, pictures - 1)) for i in range(pictures)})
    surfaces, rows = _surfaces(frames, dataset), []
    for name, model in _with_variants(models, baselines).items():
        if report is not None:
            report(name)
        rows.append(_model_row(name, model, frames, surfaces, distance, picks))
    if baselines:
        rows += _image_rows(models, dataset, frames, distance, picks, seed, report)
    configurations = len(torch.unique(frames.q, dim=0))
    facts = {
        "directory": dataset.directory.name,
        "images": len(frames),
        "configurations": configurations,
        "size": dataset.plan.size,
        "light": dataset.plan.light,
        "seed": dataset.plan.seed,
    }
    truth = tuple(frames.rgb[i] / 255.0 for i in picks)
    return Evaluation(str(dataset.manifest["robot"]), facts, tuple(rows), lpips_missing, truth)


def _with_variants(models: Mapping[str, Renderable], baselines: bool) -> dict[str, Renderable]:
    """The models, then the self-models without their appearance field, then the first of them without motion."""
    self_models = {name: model for name, model in models.items() if isinstance(model, SelfModel)} if baselines else {}
    plain = {f"{name}: no deform (field off)": without_appearance(model) for name, model in self_models.items()}
    still = {f"{name}: never moves (canonical splats)": Unmoved(model) for name, model in self_models.items()}
    return {
        **models,
        **{name: model for name, model in plain.items() if model is not None},
        **dict([*still.items()][:1]),
    }


def _model_row(
    name: str, model: Renderable, frames: Frames, surfaces: Surfaces, distance: Distance | None, picks: Sequence[int]
) -> Row:
    seconds, device, many = 0.0, _device_of(model), has_many_lights(frames)

    def draw(row: int) -> tuple[Picture, Mask]:
        """Picture ``(height, width, 3)`` and mask ``(height, width)`` of a row of the data set; keeps the time [s]."""
        nonlocal seconds
        view = frames.select([row]).camera
        camera = Camera(view.K[0].float(), view.T_cam_world[0].float(), view.width, view.height).to(device)
        q = frames.q[row].float().to(device)
        shown = _under(frames.light[row], model) if frames.light is not None and many else model
        began = time.perf_counter()
        image = shown.render(q, camera)
        assert image.rgb is not None
        assert image.alpha is not None
        rgb, alpha = image.rgb.cpu(), image.alpha.cpu()
        seconds += time.perf_counter() - began
        return rgb, alpha

    with torch.no_grad():
        draw(0)
        seconds = 0.0
        row = _scores(name, draw, frames, distance, picks)
        row["chamfer_mm2"] = _chamfer(model, surfaces)
    return Row(**row, milliseconds_per_image=1000.0 * seconds / len(frames))


def _under(light: Float[Tensor, "7"], model: Renderable) -> Renderable:
    """The model under the light of a picture, where it can be relit."""
    return model.relit(light) if isinstance(model, SelfModel) and model.shader is not None else model


def _image_rows(
    models: Mapping[str, Renderable],
    dataset: Dataset,
    frames: Frames,
    distance: Distance | None,
    picks: Sequence[int],
    seed: int,
    report: Callable[[str], None] | None,
) -> list[Row]:
    """Baselines that answer with a training image."""
    if report is not None:
        report("training images")
    library = dataset.frames("train", limit=LIBRARY_SIZE, geometry=False)
    tree = next((m.tree for m in models.values() if isinstance(m, SelfModel)), None)
    found = {f"nearest of {len(library)} images": nearest_images(library, frames)}
    if tree is not None:
        found[f"nearest of {len(library)} by input (prev)"] = nearest_inputs(library, frames, tree)
    found["random image"] = random_images(library, len(frames), seed)

    def looked_up(index: Tensor) -> Draw:
        return lambda row: (library.rgb[index[row]] / 255.0, library.alpha[index[row]] / 255.0)

    return [Row(**_scores(name, looked_up(index), frames, distance, picks)) for name, index in found.items()]


def _scores(name: str, draw: Draw, frames: Frames, distance: Distance | None, picks: Sequence[int]) -> dict[str, Any]:
    """Measures of every test image, averaged; images one at a time, so that memory does not matter."""
    values: dict[str, list[float]] = {}
    kept: dict[int, Picture] = {}
    for row in range(len(frames)):
        truth, mask = frames.rgb[row] / 255.0, frames.alpha[row] / 255.0
        rgb, alpha = draw(row)
        measured = {
            "psnr_db": float(psnr(rgb, truth)),
            "foreground_psnr_db": float(psnr(rgb, truth, mask > 0)) if bool((mask > 0).any()) else math.nan,
            "ssim": float(ssim(rgb, truth)),
            "mask_iou": float(mask_iou(alpha, mask)),
            **({} if distance is None else {"lpips": distance(rgb, truth)}),
        }
        for key, value in measured.items():
            values.setdefault(key, []).append(value)
        if row in picks:
            kept[row] = rgb.clamp(0.0, 1.0)
    means = {key: float(torch.tensor(v, dtype=torch.float64).nanmean()) for key, v in values.items()}
    return {"name": name, **means, "worst_psnr_db": min(values["psnr_db"]), "pictures": tuple(kept[i] for i in picks)}


def _surfaces(frames: Frames, dataset: Dataset) -> Surfaces:
    """Joint values of some test configurations, and points on the surface as MuJoCo's kinematics place it."""
    positions, link = dataset.surface
    some = torch.linspace(0, len(positions) - 1, min(CHAMFER_POINTS, len(positions))).long()
    positions, link = positions[some], link[some]
    Ts_world_link = dataset.link_poses("test", limit=len(frames))
    step = dataset.plan.test_views
    rows = range(0, len(frames), step * max(1, len(frames) // step // CHAMFER_CONFIGURATIONS))
    found = []
    for row in rows:
        T = Ts_world_link[row, link]
        found.append((frames.q[row].float(), (T[:, :3, :3] @ positions[..., None])[..., 0] + T[:, :3, 3]))
    return found


def _chamfer(model: Renderable, surfaces: Surfaces) -> float | None:
    """Mean over configurations [mm^2]."""
    if not isinstance(model, Posable):
        return None
    device = _device_of(model)
    found = [chamfer(model.posed(q.to(device)).means, surface) for q, surface in surfaces]
    return 1e6 * sum(found) / len(found)


def _device_of(model: Any) -> torch.device:
    """Where a model renders: where its splats are."""
    parameters = getattr(getattr(model, "model", model), "parameters", None)
    return torch.device("cpu") if parameters is None else parameters.means.device


def _refuse_other_robots(models: Mapping[str, Renderable], dataset: Dataset) -> None:
    joints = list(dataset.manifest["joint_names"])
    for name, model in models.items():
        if isinstance(model, SelfModel) and list(model.tree.joint_names) != joints:
            raise InputError(
                f"model {name} has the joints {', '.join(model.tree.joint_names)}; "
                f"the images in {dataset.directory} are of {dataset.manifest['robot']} with {', '.join(joints)}"
            )


def _cell(key: str, value: float | None) -> str:
    return "" if value is None else UNITS[key][1].format(value)
