"""From words to joint values: the configuration whose picture a vision-language model finds most like a sentence."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from rich.progress import Progress
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.errors import InputError
from kinesplat.inverse.augmentation import Augmentation
from kinesplat.inverse.levenberg_marquardt import Linearization
from kinesplat.inverse.objective import Configurations
from kinesplat.inverse.priors import Priors
from kinesplat.inverse.result import Hypothesis
from kinesplat.inverse.search import best_distinct, joint_influence, joint_scale, one_turn
from kinesplat.inverse.text_result import TextResult, evidence_of, spread_of, verdict
from kinesplat.kinematics import KinematicTree
from kinesplat.self_model import SelfModel
from kinesplat.vision.clip import DEFAULT, ClipEncoder

TEMPLATES = ("{}", "a photo of {}.", "a 3D rendering of {}.", "a picture of a robot: {}.", "{}, white background.")
VIEWS = ((1.0, 0.7, 0.5), (1.0, -0.7, 0.5), (-1.0, 0.7, 0.5), (-1.0, -0.7, 0.5))
VIEW_PX = 224
VIEWS_AT_ONCE = 4
RATE, LAST_RATE = 0.08, 0.1
HALVED_AT = (1 / 3, 2 / 3)
FEWEST = 2
RECENT = 10
NEAR = 0.3
IMAGES_AT_ONCE = 128
JUDGE_PICTURES = 16
JUDGE_SEED = 1
APART = 0.25
VARIED = Augmentation()


@runtime_checkable
class Encoder(Protocol):
    """What `text_to_q` asks of a vision-language model; `ClipEncoder` is one."""

    @property
    def logit_scale(self) -> float:
        """What cosines are multiplied with before a softmax over sentences."""
        ...

    def embed_text(self, prompts: Sequence[str]) -> Float[Tensor, "n k"]:
        """One unit vector per sentence."""
        ...

    def embed_images(self, rgb: Float[Tensor, "n height width 3"]) -> Float[Tensor, "n k"]:
        """One unit vector per picture in [0, 1], differentiable."""
        ...


def text_to_q(
    model: SelfModel,
    prompt: str | Sequence[str],
    camera: Camera | None = None,
    *,
    encoder: str | Path | Encoder = DEFAULT,
    negatives: Sequence[str] = (),
    q_init: Float[Tensor, " dof"] | None = None,
    starts: int = 16,
    iterations: int = 150,
    augmentation: Augmentation | None = VARIED,
    self_collision: float = 0.01,
    seed: int = 0,
    progress: bool = False,
) -> TextResult:
    """Find joint values whose pictures look like a sentence (Liu et al. 2024, eq. 9).

    Maximises the cosine similarity between the encoder's embeddings of the rendered pictures and of the prompt. (The
    paper writes that the dot product is minimised; that is a slip of the sign.) Many random starts climb at once by
    Adam within the joint limits, every step on new random variations of the pictures, whose mean holds an encoder's
    quirks at bay; on the way the worse starts are given up. The ends are judged on the same plain and varied pictures;
    the best one is the answer.

    Args:
        model: self-model of the robot.
        prompt: a sentence, which is put into several templates whose embeddings are averaged; or a list of sentences,
            taken as they are and averaged.
        camera: one camera, or a batch of views ``(n,)`` over which the similarity is averaged; of more than four every
            step draws four. Default: four views from all round.
        encoder: a model that `kinesplat.vision.clip.ClipEncoder.load` reads, or anything with its three methods.
        negatives: sentences that the pictures must look less like: instead of the cosine, the probability of the prompt
            among all sentences is maximised.
        q_init: ``(dof,)`` [rad]/[m] around which the starts lie; default: anywhere within the limits.
        starts: number of starts.
        iterations: steps of Adam.
        augmentation: how pictures are varied; None: not at all.
        self_collision: cost of links that pass 1 cm through each other, in units of the cosine (of the negative log
            probability with `negatives`); 0: allowed.
        seed: of starts and variations.
        progress: show a progress bar on the terminal.

    Raises:
        InputError: wrong shapes or values, an empty prompt, a camera inside the robot, a file that holds no encoder.
        BackendError: transformers or the weights are not there; says the command that brings them.
    """
    began, tree = time.perf_counter(), model.tree
    if starts < 1 or iterations < 1:
        raise InputError(f"starts is {starts}, iterations {iterations}; expected at least 1 of each")
    device = model.parameters.means.device
    camera = views_of(model, camera).to(device, model.parameters.means.dtype)
    if isinstance(encoder, str | Path):
        encoder = ClipEncoder.load(encoder, device)
    words = Words.of(encoder, prompt, negatives)
    priors = Priors.of(_in_link_frames(model.to("cpu")), self_collision) if self_collision else None
    objective = TextObjective(model, camera, encoder, words, augmentation, priors)
    generator = torch.Generator().manual_seed(seed)
    q = starting(tree, q_init, starts, generator).to(camera.K)
    with Progress(disable=not progress, transient=True) as bar:
        path, losses = ascend(objective, q, iterations, generator, bar)
    return _result(objective, prompt, path, losses, began)


@dataclass(frozen=True)
class Words:
    """Embedded sentences.

    Attributes:
        wanted: ``(1 + m, k)`` unit vectors: the prompt, then the negatives.
        names: what they stand for.
    """

    wanted: Float[Tensor, "m k"]
    names: tuple[str, ...]

    @classmethod
    def of(cls, encoder: Encoder, prompt: str | Sequence[str], negatives: Sequence[str]) -> "Words":
        """Means of the unit vectors of every sentence in all templates, or of the sentences that were listed."""
        if not prompt or not all(sentence.strip() for sentence in ([prompt] if isinstance(prompt, str) else prompt)):
            raise InputError("the prompt is empty; say what the robot should show")
        if isinstance(negatives, str):
            raise InputError(f"negatives is the sentence {negatives!r}; expected a list of sentences")
        groups = [_filled(prompt) if isinstance(prompt, str) else list(prompt), *(_filled(n) for n in negatives)]
        means = [encoder.embed_text(group).mean(dim=0) for group in groups]
        names = (prompt if isinstance(prompt, str) else prompt[0], *negatives)
        return cls(torch.nn.functional.normalize(torch.stack(means), dim=-1), names)


@dataclass(frozen=True)
class TextObjective:
    """Minus the similarity of rendered pictures and words, and the cost of self-collision.

    Attributes:
        model: what is rendered.
        camera: batch ``(views,)``.
        encoder: of pictures.
        words: what they should look like.
        augmentation: how pictures are varied; None: not at all.
        priors: against self-collision; None: allowed.
    """

    model: SelfModel
    camera: Camera
    encoder: Encoder
    words: Words
    augmentation: Augmentation | None
    priors: Priors | None

    def cosines(
        self, q: Float[Tensor, "batch dof"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch m"]:
        """Mean cosine over all pictures of every configuration with every sentence; differentiable in q.

        Args:
            q: configurations [rad]/[m].
            generator: of the variations; without it the pictures are plain, before white.
        """
        background = (1.0, 1.0, 1.0) if generator is None else (0.0, 0.0, 0.0)
        out = self.model.render(q[:, None], self.camera, background, outputs=("rgb", "alpha"))
        assert out.rgb is not None
        assert out.alpha is not None
        pictures = out.rgb.flatten(0, 1)
        if generator is not None and self.augmentation is not None:
            pictures = self.augmentation(pictures, out.alpha.flatten(0, 1), generator)
        embedded = self.encoder.embed_images(pictures).to(q)
        return (embedded @ self.words.wanted.to(q).mT).unflatten(0, (len(q), -1)).mean(dim=1)

    def loss_of(self, cosines: Float[Tensor, "batch m"]) -> Float[Tensor, " batch"]:
        """Minus the cosine with the prompt; with negatives minus the logarithm of the prompt's probability."""
        if cosines.shape[1] == 1:
            return -cosines[:, 0]
        return -(self.encoder.logit_scale * cosines).log_softmax(dim=1)[:, 0]

    def slope(
        self, q: Float[Tensor, "batch dof"], generator: torch.Generator
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch dof"]]:
        """Loss of every configuration on new variations, and its gradient."""
        some, losses, gradients = self.some_views(generator), [], []
        for part in q.split(some.at_once):
            part = part.detach().requires_grad_(True)
            loss = self.loss_of(some.cosines(part, None if self.augmentation is None else generator))
            (gradient,) = torch.autograd.grad(loss.sum(), part)
            losses.append(loss.detach())
            gradients.append(gradient)
        loss, gradient = torch.cat(losses), torch.cat(gradients)
        if self.priors is None:
            return loss, gradient
        overlap = self.overlap(q.detach())
        return loss + overlap.loss.to(loss), gradient + 2.0 * overlap.gradient.to(gradient)

    def some_views(self, generator: torch.Generator) -> "TextObjective":
        """The same with at most four of its views, drawn at random."""
        count = self.camera.batch_shape[0]
        if count <= VIEWS_AT_ONCE:
            return self
        drawn = torch.randperm(count, generator=generator)[:VIEWS_AT_ONCE].to(self.camera.K.device)
        camera = replace(self.camera, K=self.camera.K[drawn], T_cam_world=self.camera.T_cam_world[drawn])
        return replace(self, camera=camera)

    @torch.no_grad()
    def judged(self, q: Float[Tensor, "batch dof"]) -> Float[Tensor, "batch m"]:
        """Mean cosines over the plain pictures and the same few variations of every configuration's."""
        parts = []
        for part in q.split(self.at_once):
            cosines = self.cosines(part)
            if self.augmentation is not None:
                copies = max(1, JUDGE_PICTURES // self.camera.batch_shape[0])
                varied = replace(self, augmentation=replace(self.augmentation, copies=copies))
                rows = [varied.cosines(row[None], torch.Generator().manual_seed(JUDGE_SEED)) for row in part]
                cosines = 0.5 * (cosines + torch.cat(rows))
            parts.append(cosines)
        return torch.cat(parts)

    def overlap(self, q: Float[Tensor, "batch dof"]) -> Linearization:
        """Cost of self-collision and half its gradient."""
        n, dof, q = len(q), q.shape[1], q.cpu()
        nothing = Linearization(q.new_zeros(n), q.new_zeros(n, dof), q.new_zeros(n, dof, dof))
        return nothing if self.priors is None else self.priors.added_to(nothing, self.model.tree, q)

    @cached_property
    def at_once(self) -> int:
        """Configurations that are rendered and encoded together, so that memory has a bound."""
        copies = 1 if self.augmentation is None else max(self.augmentation.copies, 2)
        return max(1, IMAGES_AT_ONCE // (copies * self.camera.batch_shape[0]))


def ascend(
    objective: TextObjective,
    q: Float[Tensor, "batch dof"],
    iterations: int,
    generator: torch.Generator,
    bar: Progress,
) -> tuple[Float[Tensor, "steps batch dof"], Float[Tensor, "iterations batch"]]:
    """Adam from every start, with a step that shrinks along a cosine; every step ends within the joint limits.

    After one and after two thirds of the iterations the worse half stays where it is, and costs nothing any more.

    Returns:
        The configurations, the starts first, and the losses on the variations of every step; NaN of those that stay.
    """
    tree = objective.model.tree
    scale = joint_scale(tree).to(q)
    units = (q / scale).requires_grad_(True)
    optimizer = torch.optim.Adam([units], lr=RATE, betas=(0.9, 0.99))
    path, losses, alive = [q], [], torch.arange(len(q))
    task = bar.add_task("climbing", total=iterations)
    for step in range(iterations):
        if step and step in [round(share * iterations) for share in HALVED_AT] and len(alive) >= 2 * FEWEST:
            recent = torch.stack(losses[-RECENT:]).cpu()[:, alive].mean(dim=0)
            alive = alive[recent.argsort()[: (len(alive) + 1) // 2]].sort().values
        share = 0.5 * (1.0 + math.cos(math.pi * step / iterations))
        optimizer.param_groups[0]["lr"] = RATE * (LAST_RATE + (1.0 - LAST_RATE) * share)
        loss, gradient = objective.slope(path[-1][alive], generator)
        if not (torch.isfinite(loss).all() and torch.isfinite(gradient).all()):
            raise InputError(f"the encoder's answer is not finite in step {step}; load it in float32")
        units.grad = torch.zeros_like(q).index_copy(0, alive.to(q.device), gradient * scale)
        optimizer.step()
        with torch.no_grad():
            path.append(path[-1].clone())
            path[-1][alive] = tree.clamp(units[alive] * scale)
            units.copy_(path[-1] / scale)
        losses.append(torch.full((len(q),), math.nan).to(q).index_copy(0, alive.to(q.device), loss))
        bar.update(task, advance=1, description=f"climbing, loss {float(loss.min()):.3f}")
    return torch.stack(path), torch.stack(losses)


def _in_link_frames(model: SelfModel) -> SelfModel:
    """The model as `Priors` reads it: splats that follow a skinning field lie in the world, not in their links."""
    if model.skinning is None:
        return model
    Ts_link_world = torch.linalg.inv(model.tree.forward_kinematics(model.tree.q_canonical.to(model.parameters.means)))
    T = Ts_link_world[model.link_index]
    means = (T[:, :3, :3] @ model.parameters.means[..., None])[..., 0] + T[:, :3, 3]
    return replace(model, parameters=replace(model.parameters, means=means), skinning=None, appearance=None)


def starting(
    tree: KinematicTree, q_init: Tensor | None, count: int, generator: torch.Generator
) -> Float[Tensor, "count dof"]:
    """Starts within the joint limits: anywhere, or around a configuration, which is then the first.

    Raises:
        InputError: `q_init` has another number of joints, or is not finite.
    """
    if q_init is None:
        lower, upper = one_turn(tree)
        return lower + torch.rand(count, tree.dof, generator=generator) * (upper - lower)
    q_init = torch.as_tensor(q_init, dtype=torch.float32).cpu()
    if q_init.shape != (tree.dof,) or not torch.isfinite(q_init).all():
        raise InputError(f"q_init has shape {tuple(q_init.shape)}; expected {tree.dof} finite values")
    away = NEAR * joint_scale(tree) * torch.randn(count, tree.dof, generator=generator)
    away[0] = 0.0
    return tree.clamp(q_init + away)


def views_of(model: SelfModel, camera: Camera | None) -> Camera:
    """The camera as a batch of views; four around the robot where none is given.

    Raises:
        InputError: more than one batch dimension, or a camera inside the robot.
    """
    q = model.tree.q_canonical.to(model.parameters.means)
    if camera is None:
        with torch.no_grad():
            points = model.posed(q).means.cpu()
        return Camera.framing(points, torch.tensor(VIEWS), width=VIEW_PX, height=VIEW_PX)
    if len(camera.batch_shape) > 1:
        raise InputError(f"camera is a batch {camera.batch_shape}; expected one camera, or a batch of views (n,)")
    model.check_camera(q, camera)
    views = camera.batch_shape or (1,)
    return replace(camera, K=camera.K.expand(*views, 3, 3), T_cam_world=camera.T_cam_world.expand(*views, 4, 4))


def _filled(sentence: str) -> list[str]:
    return [template.format(sentence) for template in TEMPLATES]


def _result(
    objective: TextObjective,
    prompt: str | Sequence[str],
    path: Float[Tensor, "steps batch dof"],
    losses: Float[Tensor, "iterations batch"],
    began: float,
) -> TextResult:
    """The ends, judged, as an answer and its rivals."""
    model, camera, ends = objective.model, objective.camera, path[-1]
    words, scale = objective.words, objective.encoder.logit_scale
    first, last = (objective.judged(q).cpu() for q in (path[0], ends))
    loss, start_loss = (objective.loss_of(c) + objective.overlap(q).loss for c, q in ((last, ends), (first, path[0])))
    state = Configurations(model.tree, ends.cpu(), camera.T_cam_world.cpu().expand(len(ends), -1, 4, 4), False)
    order = best_distinct(state, loss, len(ends), APART, joint_influence(model.to("cpu"))).tolist()
    best, ranked = order[0], [float(loss[i]) for i in order]
    evidence = evidence_of(words.names, last[best], first, ranked, start_loss, scale)
    return TextResult(
        q=state.q[best],
        camera=camera.to("cpu"),
        loss_history=tuple(losses[:, best][losses[:, best].isfinite()].tolist()),
        level_starts=(0,),
        q_history=path[:, best].cpu(),
        covariance=spread_of(state.q, loss),
        variable_names=model.tree.joint_names,
        hypotheses=tuple(Hypothesis(state.q[i], camera.to("cpu"), float(loss[i])) for i in order),
        verdict=verdict(evidence, words.names[0], ranked[0]),
        seconds=time.perf_counter() - began,
        evidence={"prompt": prompt if isinstance(prompt, str) else list(prompt), **evidence},
    )
