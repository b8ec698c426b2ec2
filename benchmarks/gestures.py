"""The hand, its six gestures and pictures of them, on which `text_gestures.py` trains two networks."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import kinesplat as ks
from kinesplat.inverse.augmentation import Augmentation
from kinesplat.inverse.text import TEMPLATES
from kinesplat.rasterizer.spherical_harmonics import SH_C0

PX = 56
BRIGHTER = 3.5
SPLATS = 5_000
CENTRE = (0.34, 0.0, 0.0)
NAMES = ("a fist", "an open hand", "a pointing finger", "a victory sign", "thumbs up", "an OK sign")
NO_GESTURE = "a hand"
FINGERS = {"FF": "index finger", "MF": "middle finger", "RF": "ring finger", "LF": "little finger"}
BENT = {"straight": 0.0, "half bent": 0.45, "rolled in": 0.9}
THUMB = {"sticks out": 4, "is spread": 1, "is folded in": 0, "meets the index finger": 5}
STOCKED, FIRST, PLAIN = 8_000, 2_000, 0.25
VARIED = Augmentation(copies=1, crop=0.85, backdrop=0.0)


def gestures(tree: ks.KinematicTree) -> Tensor:
    """The six configurations ``(6, dof)`` [rad], in the order of `NAMES`."""
    wrapped = {"THJ5": 0.2, "THJ4": 1.15, "THJ2": 0.4, "THJ1": 0.6}
    victory = {**fingers(0, 0, 0.93, 0.93), "FFJ4": -0.3, "MFJ4": 0.3, **wrapped}
    ring = {"FFJ4": 0.0, "FFJ3": 0.9, "FFJ2": 1.0, "FFJ1": 0.6, "THJ5": 0.35, "THJ4": 1.15, "THJ2": 0.35, "THJ1": 0.6}
    aside = {"THJ5": -0.6, "THJ4": 0.3, "THJ2": -0.3, "THJ1": -0.1}
    values = [
        {**fingers(0.93, 0.93, 0.93, 0.93), **wrapped},
        {**fingers(0, 0, 0, 0, 0.3), **aside},
        {**fingers(0, 0.93, 0.93, 0.93), **wrapped},
        victory,
        {**fingers(0.93, 0.93, 0.93, 0.93), "THJ5": -0.9, "THJ4": 0.2, "THJ2": -0.6, "THJ1": -0.2},
        {**fingers(0, 0, 0, 0, 0.3), **ring},
    ]
    q = torch.zeros(len(values), tree.dof)
    for row, joints in enumerate(values):
        for name, value in joints.items():
            q[row, tree.joint_names.index(f"rh_{name}")] = value
    return tree.clamp(q)


def fingers(ff: float, mf: float, rf: float, lf: float, spread: float = 0.0) -> dict[str, float]:
    """Joints of four fingers, each between straight (0) and rolled in (1)."""
    joints = {}
    for finger, curl, side in zip(FINGERS, (ff, mf, rf, lf), (-1.0, -0.3, -0.3, -1.0), strict=True):
        joints |= {f"{finger}J4": spread * side, f"{finger}J3": 1.5 * curl}
        joints |= {f"{finger}J2": 1.5 * curl, f"{finger}J1": 1.1 * curl}
    return joints


@dataclass(frozen=True)
class World:
    """The hand, its gestures, and pictures of it."""

    model: ks.SelfModel
    q: Tensor

    @classmethod
    def create(cls, splats: int = SPLATS) -> "World":
        """With the packaged model, coarser and exposed longer: the pictures are small and the hand is nearly black."""
        model = ks.zoo.load("shadow_hand").subsample(splats)
        sh = BRIGHTER * model.parameters.sh
        sh[:, 0] += (BRIGHTER - 1.0) * 0.5 / SH_C0
        model = replace(model, parameters=replace(model.parameters, sh=sh))
        return cls(model, gestures(model.tree))

    @property
    def limits(self) -> tuple[Tensor, Tensor]:
        """Of the joints ``(dof,)`` [rad]."""
        return self.model.tree.q_lower.float(), self.model.tree.q_upper.float()

    def random(self, count: int, generator: torch.Generator) -> Tensor:
        """Configurations anywhere within the limits ``(count, dof)``."""
        lower, upper = self.limits
        return lower + torch.rand(count, len(lower), generator=generator) * (upper - lower)

    def distances(self, q: Tensor) -> Tensor:
        """To every gesture ``(n, 6)``: root mean square over joints, of their range; the wrist counts a fifth."""
        lower, upper = self.limits
        weight = torch.tensor([0.2 if "WRJ" in name else 1.0 for name in self.model.tree.joint_names])
        away = ((q[:, None] - self.q) / (upper - lower)).square()
        return ((weight * away).sum(dim=-1) / weight.sum()).sqrt()

    def between(self, count: int, generator: torch.Generator, jitter: float = 0.05) -> Tensor:
        """Gestures on their way to anything: all fingers by one share, or each by its own; and shaken."""

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator)

        own = self.q[torch.randint(6, (count,), generator=generator)]
        other = self.q[torch.randint(6, (count,), generator=generator)]
        target = torch.where(uniform(count, 1) < 0.3, other, self.random(count, generator))
        one = torch.where(uniform(count, 1) < 0.3, 0.0, uniform(count, 1))
        each = (1.4 * uniform(count, len(GROUPS)) - 0.2).clamp(0.0, 1.0)
        share = torch.where(uniform(count, 1) < 0.5, one, each)
        share = share[:, group_of(self.model.tree)]
        lower, upper = self.limits
        noise = 2.0 * jitter * uniform(count, 1) * (upper - lower) * torch.randn(count, len(lower), generator=generator)
        return self.model.tree.clamp(own + share * (target - own) + noise)

    def pictures(self, q: Tensor, camera: ks.Camera, generator: torch.Generator, varied: Augmentation) -> Tensor:
        """Varied pictures ``(n, PX, PX, 3)``, one camera each."""
        out = self.model.render(q, camera, (0.0, 0.0, 0.0))
        assert out.rgb is not None
        assert out.alpha is not None
        return varied(out.rgb, out.alpha, generator)


@dataclass
class Stock:
    """The last few thousand pictures, each of its own configuration and camera; every use varies them anew."""

    world: World
    varied: Augmentation

    def __post_init__(self) -> None:
        self.q = torch.zeros(STOCKED, self.world.model.tree.dof)
        self.rgba = torch.zeros(STOCKED, PX, PX, 4)
        self.added = 0

    @torch.no_grad()
    def add(self, q: Tensor, generator: torch.Generator) -> None:
        """Render configurations from random cameras, in the places of the oldest."""
        out = self.world.model.render(q, cameras(len(q), generator), (0.0, 0.0, 0.0))
        assert out.rgb is not None
        assert out.alpha is not None
        places = (self.added + torch.arange(len(q))) % STOCKED
        self.q[places], self.rgba[places] = q, torch.cat([out.rgb, out.alpha[..., None]], dim=-1)
        self.added += len(q)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Configurations ``(count, dof)`` and their pictures ``(count, PX, PX, 3)``."""
        drawn = torch.randint(min(self.added, STOCKED), (count,), generator=generator)
        rgba = self.rgba[drawn]
        pictures = self.varied(rgba[..., :3], rgba[..., 3], generator)
        plain = int(PLAIN * count)  # as sharp as they were rendered, before white
        pictures[:plain] = rgba[:plain, ..., :3] + (1.0 - rgba[:plain, ..., 3:])
        return self.q[drawn], pictures


GROUPS = ("WR", *FINGERS, "TH")


def group_of(tree: ks.KinematicTree) -> Tensor:
    """The finger (or the wrist) that every joint belongs to ``(dof,)``."""
    return torch.tensor([GROUPS.index(name[3:5]) for name in tree.joint_names])


def cameras(count: int, generator: torch.Generator, px: int = PX, spread: bool = False) -> ks.Camera:
    """Views of the palm, 50 degrees to either side, fingers up; `spread` takes one from each of `count` sectors."""
    place = torch.rand(count, generator=generator)
    place = (torch.arange(count) + place) / count if spread else place
    azimuth = math.radians(50.0) * (2.0 * place - 1.0)
    rise = 0.6 * torch.rand(count, generator=generator) - 0.3
    flat = rise.cos()
    direction = torch.stack([rise.sin(), flat * azimuth.sin(), flat * azimuth.cos()], dim=-1)
    target = torch.tensor(CENTRE) + 0.012 * torch.randn(count, 3, generator=generator)
    distance = 0.3 + 0.08 * torch.rand(count, 1, generator=generator)
    return ks.Camera.look_at(target + distance * direction, target, 0.785, px, px, up=(1.0, 0.0, 0.0))


def fingertips(world: World, q: Tensor) -> Tensor:
    """Where the last links of all fingers are ``(n, 15)``, in units of 5 cm from the middle of the hand."""
    tree = world.model.tree
    last = [index for index, name in enumerate(tree.link_names) if name.endswith("distal")]
    return ((tree.forward_kinematics(q)[:, last, :3, 3] - torch.tensor(CENTRE)) / 0.05).flatten(1)


def sentences() -> list[str]:
    """Everything that the encoder reads in training."""
    fingers = [f"the {words} is {state}" for words in FINGERS.values() for state in BENT]
    thumb = [f"the thumb {state}" for state in THUMB]
    return [*(t.format(name) for name in (*NAMES, NO_GESTURE) for t in TEMPLATES), *fingers, *thumb]
