"""The paper's first stage: splats of the canonical configuration, from points on the meshes (Kerbl et al. 2023)."""

import math

import numpy as np
import torch
from jaxtyping import Float
from scipy.spatial import cKDTree
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.dataset.frames import Frames
from kinesplat.description import Robot
from kinesplat.errors import InputError
from kinesplat.gaussians import Parameters
from kinesplat.rasterizer import rasterize
from kinesplat.rasterizer.spherical_harmonics import SH_C0
from kinesplat.surface.meshes import sample_meshes
from kinesplat.training.adaptive_control import ScreenGradients, Thresholds, densify_and_prune
from kinesplat.training.loop import Budget, batch_rows, decayed, run
from kinesplat.training.skinning import LinkCloud
from kinesplat.training.splat_optimizer import Rates, SplatOptimizer

OPACITY = 0.1
WHITE = (1.0, 1.0, 1.0)


def mesh_cloud(robot: Robot, n: int, seed: int = 0) -> tuple[LinkCloud, Float[Tensor, "n 3"]]:
    """`n` random points on the visual meshes in proportion to area, and their colours in [0, 1].

    Raises:
        InputError: the robot has no visual surface.
    """
    rng = np.random.default_rng(seed)
    points = sample_meshes(robot.link_meshes, 2 * n, rng)  # twice: every mesh gets its least, then a fair draw
    points = points.select(rng.choice(len(points), n, replace=False, p=points.area / points.area.sum()))
    cloud = LinkCloud(torch.from_numpy(points.positions).float(), torch.from_numpy(points.link).long())
    return cloud, torch.from_numpy(points.albedo).float()


def round_splats(points: Float[Tensor, "n 3"], colours: Float[Tensor, "n 3"]) -> Parameters:
    """One sphere per point, as large as its three nearest neighbours are far; faint, of degree 2, of one colour.

    Raises:
        InputError: fewer than four points.
    """
    if len(points) < 4:
        raise InputError(f"{len(points)} surface points; splats need at least 4")
    distances = np.asarray(cKDTree(points.cpu().numpy()).query(points.cpu().numpy(), k=4)[0])[:, 1:]
    size = torch.from_numpy(np.sqrt((distances**2).mean(axis=1))).to(points).clamp(min=1e-7)
    sh = points.new_zeros(len(points), 9, 3)
    sh[:, 0] = (colours - 0.5) / SH_C0
    return Parameters(
        means=points.clone(),
        quats=points.new_tensor([1.0, 0.0, 0.0, 0.0]).repeat(len(points), 1),
        log_scales=size.log()[:, None].repeat(1, 3),
        logit_opacities=points.new_full((len(points),), math.log(OPACITY / (1.0 - OPACITY))),
        sh=sh,
    )


def scene_size(camera: Camera) -> float:
    """1.1 x the distance of the farthest camera from the middle of all [m] (Kerbl et al. 2023)."""
    centres = camera.T_world_cam[..., :3, 3].reshape(-1, 3)
    return float(1.1 * (centres - centres.mean(0)).norm(dim=-1).amax())


def fit_canonical(
    parameters: Parameters,
    frames: Frames,
    *,
    steps: int = 2000,
    eps2d: float = 0.3,
    rates: Rates | None = None,
    thresholds: Thresholds | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Parameters:
    """Splats that explain pictures of one configuration: L1, one picture a step, adaptive density control.

    Splats come and go every 5 % of the steps, from a quarter of the way to three quarters.

    Args:
        parameters: splats in the world to begin with.
        frames: pictures of the canonical configuration.
        steps: how many.
        eps2d: screen dilation [px^2].
        rates: of Adam; the means' decays to a hundredth.
        thresholds: of the adaptive control.
        seed: of the order of pictures and the places of split splats.
        progress: show a bar.

    Raises:
        TrainingError: the loss became NaN; names the step.
    """
    size, thresholds = scene_size(frames.camera), thresholds or Thresholds()
    splats = SplatOptimizer(parameters, rates or Rates(), size)
    generator = torch.Generator().manual_seed(seed)
    device = parameters.means.device
    gradients = ScreenGradients(len(parameters), device)

    def step(number: int, share: float) -> dict[str, Tensor]:
        """One picture: L1, a step of Adam, and the gradients on the screen noted for the density control."""
        (row,) = batch_rows(len(frames), 1, number, seed).tolist()
        view, leaves = frames.select([row]), splats.parameters
        camera = Camera(view.camera.K[0], view.camera.T_cam_world[0], view.camera.width, view.camera.height)
        camera = camera.to(device, leaves.means.dtype)
        rgb = rasterize(leaves.activate(), camera, WHITE, eps2d=eps2d, outputs=("rgb",)).rgb
        assert rgb is not None
        loss = (rgb - view.rgb[0].to(device) / 255.0).abs().mean()  # eq. 7 in the canonical configuration
        loss.backward()
        assert leaves.means.grad is not None
        gradients.add(leaves.means, leaves.means.grad, camera)
        splats.step({"means": decayed(1.0, 0.01, share)})
        return {"l1": loss.detach()}

    for tick in run(step, Budget(steps=steps), progress=progress, title="canonical splats"):
        if tick.step % max(1, steps // 20) == 0 and 0.25 <= tick.share <= 0.75:
            densify_and_prune(splats, gradients, thresholds, size, generator)
            gradients = ScreenGradients(len(splats.parameters), device)
    return splats.detached()
