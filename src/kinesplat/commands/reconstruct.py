"""From pictures to joint values: reconstruct."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from kinesplat.camera import Camera
from kinesplat.commands.common import (
    DEFAULTS,
    EXIT_FAILED,
    CommonOptions,
    Model,
    Output,
    device_of,
    err,
    load_model,
    make_folder,
    out,
    same_size,
    write_json,
)
from kinesplat.errors import InputError
from kinesplat.files import read_image, read_mask
from kinesplat.inverse import reconstruct as reconstruct_q
from kinesplat.inverse.initializer import Initializer
from kinesplat.inverse.priors import Priors
from kinesplat.report import write_fit_pictures
from kinesplat.self_model import SelfModel


@dataclass(frozen=True)
class Terms:
    """Weights of the terms of the loss."""

    colour_weight: float = 1.0
    """Of the colours against the mask; 0.1 for photographs whose light is not a headlight."""
    self_collision: float = 0.0
    """Keep links from passing through each other; 1e-4 is a firm hint."""
    soft_limits: float = 0.0
    """Keep joints off their limits, which hold in any case; 1e-5 is a hint."""

    def priors(self, model: SelfModel) -> Priors | None:
        """The terms beside the pixels, where there are any."""
        if self.self_collision == self.soft_limits == 0.0:
            return None
        return Priors.of(model, self.self_collision, self.soft_limits)


TermOptions = Annotated[Terms, tyro.conf.OmitArgPrefixes]
NO_TERMS = Terms()


def reconstruct(
    model: Model,
    images: Annotated[tuple[Path, ...], tyro.conf.Positional],
    camera: Path | None = None,
    intrinsics: tuple[float, float, float, float] | None = None,
    mask: tuple[Path, ...] = (),
    q_init: tuple[float, ...] | None = None,
    optimize_camera: bool = False,
    starts: int | None = None,
    terms: TermOptions = NO_TERMS,
    initializer: Path | None = None,
    output: Output = Path("reconstruct"),
    *,
    common: CommonOptions = DEFAULTS,
) -> None:
    """Recover joint values (and the camera) from one picture, or several views of ONE configuration.

    Writes fit.json, overlay pictures and a film into the output folder. Exits with 1 when the fit failed.

    Args:
        model: model file, or the name of a packaged model.
        images: picture files.
        camera: JSON file with K, T_cam_world, width, height, or a list of such, one per picture.
        intrinsics: FX FY CX CY [px] where no more is known of the camera: joints and camera are searched together.
        mask: one mask per picture, white on the robot; before one colour they are not needed, before anything else the
            camera must be known without them.
        q_init: joint values to start from, right within about 0.3 rad; default: search all configurations.
        optimize_camera: also move the camera, starting from the given one.
        starts: number of starts that are optimised; default 32, or 48 without q_init.
        terms: weights of the terms of the loss.
        initializer: learned start made by `kinesplat initializer train`; default: the packaged one, if any.
        output: folder for the results; created if needed.
    """
    device = device_of(common)
    loaded = load_model(model)
    if not images:
        raise InputError("no picture given: kinesplat reconstruct MODEL IMAGE... --camera FILE")
    if (camera is None) == (intrinsics is None):
        raise InputError("give either --camera FILE, or --intrinsics FX FY CX CY where nothing else is known")
    pictures = torch.stack(same_size([read_image(p) for p in images], images))
    masks = torch.stack(same_size([read_mask(p) for p in mask], mask)) if mask else None
    make_folder(output)
    with err.status("looking for joints"):
        fit = reconstruct_q(
            loaded.to(device),
            pictures,
            None if camera is None else Camera.from_json(camera),
            K=None if intrinsics is None else matrix_of(*intrinsics),
            masks=masks,
            optimize_camera=optimize_camera or camera is None,
            starts=starts,
            colour_weight=terms.colour_weight,
            priors=terms.priors(loaded),
            initializer=None if initializer is None else Initializer.load(initializer),
            q_init=None if q_init is None else torch.tensor(q_init),
            seed=common.seed,
        )
    for view, path in enumerate(images):
        write_fit_pictures(loaded, pictures[view], fit, output, f"{view}_{path.stem}", view)
    write_json(output / "fit.json", fit.to_json())
    out.print(fit.report())
    out.print(f"wrote {output / 'fit.json'} and pictures in {output}")
    write_json(common.json, fit.to_json())
    if fit.verdict == "failed":
        sys.exit(EXIT_FAILED)


def matrix_of(fx: float, fy: float, cx: float, cy: float) -> torch.Tensor:
    """``(3, 3)`` intrinsics [px]."""
    return torch.tensor([[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]])
