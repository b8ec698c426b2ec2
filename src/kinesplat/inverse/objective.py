"""The photometric objective: rendered minus observed pixels, linearised in joints and camera (paper, eq. 8)."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.inverse.levenberg_marquardt import Linearization
from kinesplat.inverse.lighting import Light
from kinesplat.inverse.observation import Observation
from kinesplat.inverse.priors import Priors
from kinesplat.inverse.robust import geman_mcclure
from kinesplat.kinematics import KinematicTree
from kinesplat.rasterizer import Render, normal_equations, rasterize_links
from kinesplat.self_model import SelfModel
from kinesplat.twists import adjoint, exp_twist

CPU = torch.device("cpu")


COVERED = 0.95


@dataclass(frozen=True)
class Configurations:
    """A batch of candidate answers: joints, and one camera transform per view.

    Attributes:
        tree: whose limits hold.
        q: ``(batch, dof)`` [rad]/[m].
        T_cam_world: ``(batch, views, 4, 4)``.
        camera_free: whether the cameras are variables too. A step is ``(dof [+ 6 views])``: joint increments, then per
            view a twist [v; w] [m], [rad] applied on the left, ``T <- exp(twist^) T``.
    """

    tree: KinematicTree
    q: Float[Tensor, "batch dof"]
    T_cam_world: Float[Tensor, "batch views 4 4"]
    camera_free: bool

    def retract(self, step: Float[Tensor, "batch p"]) -> "Configurations":
        """The configurations after `step`, joints clamped to their limits."""
        dof = self.tree.dof
        q = self.tree.clamp(self.q + step[:, :dof])
        if not self.camera_free:
            return replace(self, q=q)
        twists = step[:, dof:].unflatten(-1, (-1, 6))
        return replace(self, q=q, T_cam_world=exp_twist(twists) @ self.T_cam_world)

    def at_bound(self, gradient: Float[Tensor, "batch p"]) -> Bool[Tensor, "batch p"]:
        """Joints on a limit that a descent step would leave."""
        dof, limited = self.tree.dof, self.tree.q_limited
        lower, upper = self.tree.q_lower.to(self.q), self.tree.q_upper.to(self.q)
        slope = gradient[:, :dof]
        held = limited & (((self.q <= lower) & (slope > 0)) | ((self.q >= upper) & (slope < 0)))
        return torch.nn.functional.pad(held, (0, gradient.shape[1] - dof))

    def where(self, accepted: Bool[Tensor, " batch"], other: "Configurations") -> "Configurations":
        """`other` where accepted, self elsewhere."""
        return replace(
            self,
            q=torch.where(accepted[:, None], other.q, self.q),
            T_cam_world=torch.where(accepted[:, None, None, None], other.T_cam_world, self.T_cam_world),
        )

    def to(self, device: torch.device) -> "Configurations":
        """The same on another device; the tree goes along with q."""
        return replace(self, q=self.q.to(device), T_cam_world=self.T_cam_world.to(device))

    def select(self, index: Tensor) -> "Configurations":
        """Some of the batch, by index or mask."""
        return replace(self, q=self.q[index], T_cam_world=self.T_cam_world[index])


@dataclass(frozen=True)
class PhotometricObjective:
    """Weighted squared difference between the rendered and the observed pixels, per pixel averaged over all views.

    Attributes:
        model: what is rendered.
        observation: what was seen.
        colour_weight: weight of the squared RGB differences.
        alpha_weight: weight of the squared difference between alpha and mask; unused without masks.
        robust: residual beyond which a pixel counts less (`geman_mcclure`), for things that hide the robot or that the
            mask lacks; None: least squares. `linearize` alone knows it.
        light: the light of a photograph, in place of the headlight that the model's colours are made under.
        device: where pixels are rendered and compared; configurations, and all but images of what comes back, stay on
            theirs.
        priors: soft terms that `linearize` adds.
    """

    model: SelfModel
    observation: Observation
    colour_weight: float = 1.0
    alpha_weight: float = 1.0
    robust: float | None = None
    light: Light | None = None
    device: torch.device = CPU
    priors: Priors | None = None

    @cached_property
    def _there(self) -> tuple[SelfModel, Observation]:
        return self.model.to(self.device), self.observation.to(self.device)

    @property
    def _backdrop(self) -> Tensor | None:
        """What is behind the robot; with a light and masks the picture itself: colours then have no say about shape."""
        seen = self._there[1]
        return seen.backdrop if self.light is None or seen.mask is None else seen.rgb

    @property
    def residual_count(self) -> int:
        """Number of residuals of one batch element."""
        channels = 3 if self.observation.mask is None else 4
        return self.observation.rgb[..., 0].numel() * channels

    @property
    def empty_loss(self) -> float:
        """The loss of a picture without a robot: the yardstick for what a fit explains."""
        seen = self.observation
        loss = self.colour_weight * ((seen.rgb - seen.behind()) ** 2).sum(dim=-1).mean()
        if seen.mask is not None:
            loss = loss + self.alpha_weight * (seen.mask**2).mean()
        return loss.item()

    def difference(self, at: Configurations) -> Float[Tensor, "batch views height width c"]:
        """Weighted differences of RGB and, where there is a mask, alpha; squared and averaged they are the loss."""
        (model, seen), at = self._there, at.to(self.device)
        camera = Camera(seen.camera.K, at.T_cam_world, seen.camera.width, seen.camera.height)
        outputs = ("rgb",) if seen.mask is None and seen.backdrop is None else ("rgb", "alpha")
        out = self._render(model, at.q[:, None], camera, outputs)
        assert out.rgb is not None
        rgb = over(out.rgb, out.alpha, seen, self._backdrop) - seen.rgb
        rgb = rgb * math.sqrt(self.colour_weight)
        if self.light is not None and seen.mask is not None:
            rgb = rgb * (seen.mask > COVERED)[..., None]
        if out.alpha is None or seen.mask is None:
            return rgb
        alpha = (out.alpha - seen.mask)[..., None] * math.sqrt(self.alpha_weight)
        return torch.cat([rgb, alpha], dim=-1)

    def _render(self, model: SelfModel, q: Tensor, camera: Camera, outputs: tuple[str, ...]) -> Render:
        if self.light is None:
            return model.render(q, camera, self._there[1].background, outputs=outputs)
        Ts = model.tree.forward_kinematics(q)
        splats = self.light.shine_on(model.parameters.activate(), model.link_index, Ts)
        background = self._there[1].background
        return rasterize_links(splats, model.link_index, Ts, camera, background, eps2d=model.eps2d, outputs=outputs)

    def residuals(self, at: Configurations) -> Float[Tensor, "batch m"]:
        """``(batch, residual_count)`` weighted differences; their sum of squares is the loss."""
        return self.difference(at).flatten(1) / math.sqrt(self.observation.rgb[..., 0].numel())

    def linearize(self, at: Configurations) -> Linearization:
        """Loss, gradient and Gauss-Newton Hessian of the pixels and the priors."""
        pixels = self._linearized_pixels(at)
        return pixels if self.priors is None else self.priors.added_to(pixels, at.tree, at.q)

    def _linearized_pixels(self, at: Configurations) -> Linearization:
        """Loss, gradient and Gauss-Newton Hessian, without a dense Jacobian: exact.

        Splats of a model with a skinning field ride on several links at once; those take `linearize_by_differences`.
        """
        if self.model.skinning is not None:
            return self.linearize_by_differences(at)
        (model, seen), given, at = self._there, at, at.to(self.device)
        splats, tree = model.parameters.activate(), at.tree
        Ts_world_link = tree.forward_kinematics(at.q)[:, None]
        if self.light is not None:  # colours that turn with the surface count as constant in the Jacobian
            splats = self.light.shine_on(splats, model.link_index, Ts_world_link)
        camera = Camera(seen.camera.K, at.T_cam_world, seen.camera.width, seen.camera.height)
        loss, rgb_weight, alpha_weight = self._weights(at)
        batch = rgb_weight.shape[:-2]  # a batch of its own where the loss is robust
        equations = normal_equations(
            splats,
            model.link_index,
            Ts_world_link,
            camera,
            seen.rgb.expand(*batch, -1, -1, -1),
            alpha=seen.mask,
            rgb_weight=rgb_weight,
            alpha_weight=alpha_weight,
            background=seen.background,
            backdrop=self._backdrop,
            eps2d=self.model.eps2d,
        ).contract(self._twists_per_variable(at))
        pixels = seen.rgb[..., 0].numel()
        return Linearization(
            (equations.loss.sum(dim=1) / pixels if loss is None else loss).to(given.q),
            (equations.gradient.sum(dim=1) / pixels).to(given.q),
            (equations.hessian.sum(dim=1) / pixels).to(given.q),
        )

    def _weights(self, at: Configurations) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Robust loss, and the weights of every pixel's colour and alpha; without a robust loss None and constants."""
        seen, weights = self._there[1], (self.colour_weight, self.alpha_weight)
        if self.robust is None:
            mask = None if seen.mask is None else torch.full_like(seen.mask, weights[1])
            colour = torch.full_like(seen.rgb[..., 0], weights[0])
            if self.light is not None and seen.mask is not None:
                colour = colour * (seen.mask > COVERED)
            return None, colour, mask
        difference = replace(self, colour_weight=1.0, alpha_weight=1.0).difference(at)
        squares = [difference[..., :3].square().sum(dim=-1), difference[..., 3:].square().sum(dim=-1)]
        colour, share = geman_mcclure(squares[0], self.robust * math.sqrt(3.0))
        loss = weights[0] * colour.mean(dim=(1, 2, 3))
        if seen.mask is None:
            return loss, weights[0] * share, None
        share = share * (seen.mask > COVERED) if self.light is not None else share
        shape, covered = geman_mcclure(squares[1], self.robust)
        return loss + weights[1] * shape.mean(dim=(1, 2, 3)), weights[0] * share, weights[1] * covered

    def _twists_per_variable(self, at: Configurations) -> Float[Tensor, "batch views links6 p"]:
        """Camera-frame twist of every link for a unit of every variable, link by link along the third axis."""
        joints = adjoint(at.T_cam_world)[:, :, None] @ at.tree.link_jacobian(at.q)[:, None]
        batch, views, links = joints.shape[:3]
        joints = joints.flatten(2, 3)
        if not at.camera_free:
            return joints
        own = torch.eye(views)[:, :, None, None] * torch.eye(6).repeat(links, 1)[None, None]
        cameras = own.permute(0, 2, 1, 3).reshape(views, links * 6, views * 6).to(joints)
        return torch.cat([joints, cameras.expand(batch, -1, -1, -1)], dim=-1)

    def linearize_by_differences(self, at: Configurations, h: float = 1e-3) -> Linearization:
        """The same by central differences of the rendered images, ``2 p + 1`` per view; `h` is the step [rad]/[m].

        Independent of `normal_equations`, so it serves as its oracle.
        """
        p = at.tree.dof + (6 * at.T_cam_world.shape[1] if at.camera_free else 0)
        steps = torch.eye(p, dtype=at.q.dtype, device=at.q.device) * h
        batch = at.q.shape[0]
        stepped = self.residuals(_unclamped_steps(at, torch.cat([steps, -steps, torch.zeros_like(steps[:1])])))
        stepped = stepped.unflatten(0, (batch, 2 * p + 1))
        residual, jacobian = stepped[:, -1], (stepped[:, :p] - stepped[:, p : 2 * p]) / (2.0 * h)
        gradient = (jacobian @ residual[..., None])[..., 0]
        loss, hessian = (residual**2).sum(dim=1), jacobian @ jacobian.mT
        return Linearization(*(value.to(at.q.device) for value in (loss, gradient, hessian)))


def over(rgb: Tensor, alpha: Tensor | None, seen: Observation, backdrop: Tensor | None) -> Tensor:
    """Colours rendered over the plain background, over the backdrop instead, where there is one."""
    if backdrop is None or alpha is None:
        return rgb
    return rgb + (1.0 - alpha[..., None]) * (backdrop - seen.background)


def _unclamped_steps(at: Configurations, steps: Float[Tensor, "s p"]) -> Configurations:
    """Every configuration of the batch after every step, batch-major ``(batch * s)``."""
    count, dof = len(steps), at.tree.dof
    q = (at.q[:, None] + steps[:, :dof]).flatten(0, 1)
    T = at.T_cam_world[:, None].expand(-1, count, -1, -1, -1)
    if at.camera_free:
        T = exp_twist(steps[:, dof:].unflatten(-1, (-1, 6))) @ T
    return replace(at, q=q, T_cam_world=T.flatten(0, 1))
