"""The photometric objective of a calibration: joints known, cameras (joint offsets, focal lengths) wanted."""

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.inverse.levenberg_marquardt import Linearization
from kinesplat.inverse.objective import CPU, over
from kinesplat.inverse.observation import Observation
from kinesplat.inverse.robust import geman_mcclure
from kinesplat.kinematics import KinematicTree
from kinesplat.rasterizer import normal_equations
from kinesplat.rasterizer.gauss_newton import NormalEquations
from kinesplat.self_model import SelfModel
from kinesplat.twists import adjoint, exp_twist

TWIST_NAMES = ("vx", "vy", "vz", "wx", "wy", "wz")
SPREAD_GROUPS = 10
FOCAL_STEP = 1e-3


@dataclass(frozen=True)
class Level:
    """One stage from coarse to fine.

    Attributes:
        px: longer image side [px].
        splats: size of the model that is rendered.
        iterations: Levenberg-Marquardt steps at most.
        robust: scale of the robust loss (`CalibrationObjective.robust`).
    """

    px: int
    splats: int
    iterations: int
    robust: float | None = None


@dataclass(frozen=True)
class Rig:
    """What a calibration takes for known.

    Attributes:
        tree: the robot.
        q: ``(images, dof)`` joint readings [rad]/[m].
        camera_of_image: ``(images,)`` which camera took each image.
        mount: the link that carries the cameras; None: they stand in the world.
        offsets_free: whether one offset for each joint reading is a variable.
        focal_free: whether the focal length of each camera is a variable.
        pivot: ``(3,)`` the point of the world, or of the link that carries the cameras, about which a camera's twist
            turns, near the middle of the robot [m]. About the camera's own centre a turn looks like a shift, which
            damped steps suffer from.
    """

    tree: KinematicTree
    q: Float[Tensor, "images dof"]
    camera_of_image: Int64[Tensor, " images"]
    mount: int | None = None
    offsets_free: bool = False
    focal_free: bool = False
    pivot: Float[Tensor, "3"] = field(default_factory=lambda: torch.zeros(3))

    @property
    def cameras(self) -> int:
        """Number of cameras."""
        return int(self.camera_of_image.max()) + 1

    @property
    def variable_names(self) -> tuple[str, ...]:
        """Twist of every camera about `pivot` [m], [rad]; joint offsets [rad]/[m]; logarithms of the focal lengths."""
        cameras = range(self.cameras)
        names = [f"camera{c}.{axis}" for c in cameras for axis in TWIST_NAMES]
        names += [f"{name}.offset" for name in self.tree.joint_names] if self.offsets_free else []
        return (*names, *(f"camera{c}.log_focal" for c in cameras if self.focal_free))

    @cached_property
    def Ts_world_mount(self) -> Float[Tensor, "images 4 4"]:
        """Where the cameras' carrier is, by the joint readings."""
        if self.mount is None:
            return torch.eye(4).to(self.q).expand(len(self.q), 4, 4)
        return self.tree.forward_kinematics(self.q)[:, self.mount]

    def to(self, device: torch.device) -> "Rig":
        """The same on another device; the tree goes along with q."""
        moved = {name: getattr(self, name).to(device) for name in ("q", "camera_of_image", "pivot")}
        return replace(self, **moved)

    def select(self, rows: Tensor) -> "Rig":
        """Some of the images."""
        return replace(self, q=self.q[rows], camera_of_image=self.camera_of_image[rows])


@dataclass(frozen=True)
class CameraGuesses:
    """A batch of candidate calibrations, which Levenberg-Marquardt moves.

    Attributes:
        rig: what is known.
        T_cam_mount: ``(batch, cams, 4, 4)`` from the world, or the link that carries the cameras, to the cameras.
        K: ``(batch, cams, 3, 3)`` [px] at the size of the images that the user gave.
        q_offset: ``(batch, dof)`` to be added to the readings [rad]/[m].
    """

    rig: Rig
    T_cam_mount: Float[Tensor, "batch cams 4 4"]
    K: Float[Tensor, "batch cams 3 3"]
    q_offset: Float[Tensor, "batch dof"]

    @classmethod
    def start(
        cls, rig: Rig, T_cam_mount: Float[Tensor, "batch cams 4 4"], K: Float[Tensor, "cams 3 3"]
    ) -> "CameraGuesses":
        """Guesses of the transforms alone: readings without offset, focal lengths as given."""
        batch = len(T_cam_mount)
        return cls(rig, T_cam_mount, K.expand(batch, *K.shape), torch.zeros(batch, rig.tree.dof))

    def retract(self, step: Float[Tensor, "batch p"]) -> "CameraGuesses":
        """The guesses after `step`, in the order of `Rig.variable_names`."""
        cams, dof = self.rig.cameras, self.rig.tree.dof * self.rig.offsets_free
        twists, offsets, logs = step.split([6 * cams, dof, step.shape[1] - 6 * cams - dof], dim=1)
        at_camera = (self.from_pivot() @ twists.unflatten(1, (cams, 6))[..., None])[..., 0]
        T_cam_mount = exp_twist(at_camera) @ self.T_cam_mount
        q_offset = self.q_offset + offsets if dof else self.q_offset
        K = _scaled_focal(self.K, logs.exp()) if logs.shape[1] else self.K
        return replace(self, T_cam_mount=T_cam_mount, q_offset=q_offset, K=K)

    def at_bound(self, gradient: Float[Tensor, "batch p"]) -> Bool[Tensor, "batch p"]:
        """Nothing is bounded."""
        return torch.zeros_like(gradient, dtype=torch.bool)

    def where(self, accepted: Bool[Tensor, " batch"], other: "CameraGuesses") -> "CameraGuesses":
        """`other` where accepted, self elsewhere."""
        pick = accepted[:, None]
        return replace(
            self,
            T_cam_mount=torch.where(pick[..., None, None], other.T_cam_mount, self.T_cam_mount),
            K=torch.where(pick[..., None, None], other.K, self.K),
            q_offset=torch.where(pick, other.q_offset, self.q_offset),
        )

    def to(self, device: torch.device) -> "CameraGuesses":
        """The same on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("rig", "T_cam_mount", "K", "q_offset")}
        return replace(self, **moved)

    def select(self, index: Tensor) -> "CameraGuesses":
        """Some of the batch, by index or mask."""
        return replace(self, T_cam_mount=self.T_cam_mount[index], K=self.K[index], q_offset=self.q_offset[index])

    def from_pivot(self) -> Float[Tensor, "batch cams 6 6"]:
        """Twists about the camera's centre, on the left of `T_cam_mount`, from twists about the pivot."""
        arm = (self.T_cam_mount[..., :3, :3] @ self.rig.pivot[:, None])[..., 0] + self.T_cam_mount[..., :3, 3]
        shift = torch.eye(4).to(arm).repeat(*arm.shape[:-1], 1, 1)
        shift[..., :3, 3] = arm
        return adjoint(shift)

    @property
    def q(self) -> Float[Tensor, "batch images dof"]:
        """Readings with offsets [rad]/[m]."""
        return self.rig.q + self.q_offset[:, None]

    def camera(self, given: Camera, width: int, height: int) -> Camera:
        """The camera of every image, batch ``(batch, images)``, for pictures of ``width x height``.

        Args:
            given: any camera of the size that `K` refers to.
        """
        rig, which = self.rig, self.rig.camera_of_image
        if rig.mount is None:
            T_mount_world = torch.eye(4).to(self.q)
        else:
            Ts = (
                rig.Ts_world_mount
                if not rig.offsets_free
                else rig.tree.forward_kinematics(self.q)[..., rig.mount, :, :]
            )
            T_mount_world = torch.linalg.inv(Ts)
        T_cam_world = self.T_cam_mount[:, which] @ T_mount_world
        return Camera(self.K[:, which], T_cam_world, given.width, given.height).resized(width, height)


@dataclass(frozen=True)
class CalibrationObjective:
    """Rendered minus observed pixels of many images with known joints, averaged over all pixels.

    Attributes:
        model: what is rendered.
        observation: the images, one "view" each; its camera's transforms mean nothing.
        full: any camera of the size that the user gave.
        colour_weight: weight of the squared RGB differences.
        robust: residual of alpha beyond which a pixel counts less (`geman_mcclure`); None: least squares.
        device: where pixels are rendered and compared; guesses, and all but images of what comes back, stay on theirs.
    """

    model: SelfModel
    observation: Observation
    full: Camera
    colour_weight: float = 0.1
    robust: float | None = None
    device: torch.device = CPU

    @cached_property
    def _there(self) -> tuple[SelfModel, Observation]:
        return self.model.to(self.device), self.observation.to(self.device)

    @property
    def pixels(self) -> int:
        """Number of pixels of all images."""
        return self.observation.rgb[..., 0].numel()

    @property
    def residual_count(self) -> int:
        """Number of residuals."""
        return self.pixels * (3 if self.observation.mask is None else 4)

    @property
    def empty_loss(self) -> float:
        """The loss of pictures without a robot: the yardstick for what a fit explains."""
        seen = self._there[1]
        nothing = seen.behind().expand(seen.rgb.shape)
        return self.losses(nothing, torch.zeros_like(nothing[..., 0]))[0].mean().item()

    def select(self, rows: Tensor) -> "CalibrationObjective":
        """The objective of some of the images."""
        seen = self.observation
        mask, backdrop = (None if t is None else t[rows] for t in (seen.mask, seen.backdrop))
        return replace(self, observation=replace(seen, rgb=seen.rgb[rows], mask=mask, backdrop=backdrop))

    def camera(self, at: CameraGuesses) -> Camera:
        """Cameras of every image at the observation's size."""
        return at.camera(self.full, self.observation.camera.width, self.observation.camera.height)

    def render(self, at: CameraGuesses) -> tuple[Tensor, Tensor]:
        """``(batch, images, height, width, 3)`` colours over the background, and alpha."""
        (model, seen), at = self._there, at.to(self.device)
        out = model.render(at.q, self.camera(at), seen.background, outputs=("rgb", "alpha"))
        assert out.rgb is not None
        assert out.alpha is not None
        return over(out.rgb, out.alpha, seen, seen.backdrop), out.alpha

    def losses(self, rgb: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Loss of every image ``(batch, images)`` and the weights of colours and alpha, per pixel."""
        seen = self._there[1]
        scale = None if self.robust is None else self.robust * 3.0**0.5
        colour, colour_weight = geman_mcclure((rgb - seen.rgb).square().sum(dim=-1), scale)
        loss, alpha_weight = self.colour_weight * colour.mean(dim=(-2, -1)), None
        if seen.mask is not None:
            shape, alpha_weight = geman_mcclure((alpha - seen.mask).square(), self.robust)
            loss = loss + shape.mean(dim=(-2, -1))
        return loss, self.colour_weight * colour_weight, alpha_weight

    def loss(self, at: CameraGuesses) -> Float[Tensor, "batch images"]:
        """Loss of every image on its own; their mean is what is minimised."""
        return self.losses(*self.render(at))[0].to(at.T_cam_mount.device)

    def linearize(self, at: CameraGuesses) -> Linearization:
        """Loss, gradient and Gauss-Newton Hessian in the order of `Rig.variable_names`."""
        given, at, seen = at.T_cam_mount, at.to(self.device), self._there[1]
        rgb, alpha = self.render(at)
        loss, *weights = self.losses(rgb, alpha)
        twists = self.twists(at)
        equations = self._equations(at, seen.rgb, seen.mask, weights).contract(twists)
        gradient, hessian = equations.gradient.sum(dim=1), equations.hessian.sum(dim=1)
        if at.rig.focal_free:
            gradient, hessian = self._with_focal(at, (rgb, alpha), weights, twists, gradient, hessian)
        return Linearization(
            loss.mean(dim=1).to(given), (gradient / self.pixels).to(given), (hessian / self.pixels).to(given)
        )

    def _equations(
        self, at: CameraGuesses, rgb: Tensor, mask: Tensor | None, weights: list[Tensor | None]
    ) -> NormalEquations:
        """Normal equations of every image in its link twists; all inputs may have a batch."""
        batch = (len(at.T_cam_mount), len(at.rig.q))
        (model, seen), (colour_weight, alpha_weight) = self._there, weights
        return normal_equations(
            model.parameters.activate(),
            model.link_index,
            at.rig.tree.forward_kinematics(at.q),
            self.camera(at),
            rgb.expand(*batch, *rgb.shape[-3:]),
            alpha=mask,
            rgb_weight=colour_weight,
            alpha_weight=alpha_weight,
            background=seen.background,
            backdrop=seen.backdrop,
            eps2d=self.model.eps2d,
        )

    def twists(self, at: CameraGuesses) -> Float[Tensor, "batch images links6 p"]:
        """Camera-frame twist of every link for a unit of every variable but the focal lengths."""
        rig, links = at.rig, len(at.rig.tree.link_names)
        own = torch.nn.functional.one_hot(rig.camera_of_image, rig.cameras).to(at.q)
        cameras = torch.einsum("ic,ncab->niacb", own, at.from_pivot().repeat(1, 1, links, 1)).flatten(3)
        if not rig.offsets_free:
            return cameras
        joints = rig.tree.link_jacobian(at.q)
        if rig.mount is not None:
            joints = joints - joints[..., rig.mount : rig.mount + 1, :, :]
        moved = adjoint(self.camera(at).T_cam_world)[:, :, None] @ joints
        return torch.cat([cameras, moved.flatten(2, 3)], dim=-1)

    def _with_focal(
        self,
        at: CameraGuesses,
        images: tuple[Tensor, Tensor],
        weights: list[Tensor | None],
        twists: Tensor,
        gradient: Tensor,
        hessian: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The system with the logarithms of the focal lengths appended.

        Focal lengths move no link, so their columns are central differences of whole images. Their products with the
        columns of the twists are the gradient ``J^T W r`` of a target that lies one column below the rendered image.
        """
        seen, rig = self._there[1], at.rig
        factors = torch.tensor([1.0 + FOCAL_STEP, 1.0 - FOCAL_STEP]).to(at.K)
        above, below = (self.render(replace(at, K=_scaled_focal(at.K, f.expand(1, rig.cameras)))) for f in factors)
        columns = [(a - b) / (2.0 * FOCAL_STEP) for a, b in zip(above, below, strict=True)]
        target = [image - column for image, column in zip(images, columns, strict=True)]
        mixed = self._equations(at, target[0], None if seen.mask is None else target[1], weights).contract(twists)
        own = torch.nn.functional.one_hot(rig.camera_of_image, rig.cameras).to(mixed.gradient)
        cross = torch.einsum("bip,ic->bpc", mixed.gradient, own)
        slope, square = self._products(images, columns, weights)
        corner = torch.diag_embed(square.double() @ own)
        gradient = torch.cat([gradient, slope.double() @ own], dim=1)
        top, bottom = torch.cat([hessian, cross], dim=2), torch.cat([cross.mT, corner], dim=2)
        return gradient, torch.cat([top, bottom], dim=1)

    def _products(
        self, images: tuple[Tensor, Tensor], columns: list[Tensor], weights: list[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        """Weighted products of every image's column with its residual and with itself, ``(batch, images)``."""
        seen = self._there[1]
        parts = [(columns[0], images[0] - seen.rgb, weights[0])]
        if seen.mask is not None:
            parts.append((columns[1][..., None], (images[1] - seen.mask)[..., None], weights[1]))
        slope, square = torch.zeros(()), torch.zeros(())
        for column, residual, weight in parts:
            assert weight is not None
            slope = slope + (weight * (column * residual).sum(dim=-1)).sum(dim=(-2, -1))
            square = square + (weight * column.square().sum(dim=-1)).sum(dim=(-2, -1))
        return slope, square


def at_level(objective: CalibrationObjective, level: Level) -> CalibrationObjective:
    """The objective with smaller images and a smaller model."""
    return replace(
        objective,
        model=objective.model.subsample(level.splats),
        observation=objective.observation.resized(level.px),
        robust=level.robust,
    )


def spread_groups(rig: Rig) -> list[Tensor]:
    """Groups of images that are left out in turn; every camera keeps at least one image without each of them."""
    count = len(rig.q)
    groups = [torch.arange(count)[g::SPREAD_GROUPS] for g in range(min(count, SPREAD_GROUPS))]
    kept = [torch.bincount(rig.camera_of_image[others(g, count)], minlength=rig.cameras) for g in groups]
    return [g for g, k in zip(groups, kept, strict=True) if int(k.min()) > 0]


def others(rows: Tensor, count: int) -> Tensor:
    """The indices below `count` that are not in `rows`."""
    keep = torch.ones(count, dtype=torch.bool)
    keep[rows] = False
    return torch.nonzero(keep)[:, 0]


def base_in_world(tree: KinematicTree) -> Float[Tensor, "4 4"]:
    """Where the robot's first link stands in the world."""
    return tree.forward_kinematics(tree.q_canonical)[0].float()


def _scaled_focal(K: Float[Tensor, "batch cams 3 3"], factor: Float[Tensor, "#batch cams"]) -> Tensor:
    """K with fx, fy (and skew) times `factor`; the principal point stays."""
    scale = torch.ones(*factor.shape, 3, 3).to(K)
    scale[..., :2, :2] = factor[..., None, None]
    return K * scale
