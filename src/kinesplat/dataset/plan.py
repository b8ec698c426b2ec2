"""What a data set is to hold: decided before the first image, written down, and compared when a run is resumed."""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from kinesplat.dataset.device import Renderer
from kinesplat.dataset.lights import LightSetting
from kinesplat.errors import InputError

Split = Literal["canonical", "train", "test"]
SPLITS: tuple[Split, ...] = ("canonical", "train", "test")
IMAGES_PER_SHARD = 48


@dataclass(frozen=True)
class Shard:
    """Some configurations of one split, with all their views; one file.

    Attributes:
        split: "train", "test" or "canonical".
        index: of the shard in its split, from 0.
        configurations: how many it holds.
        views: pictures of each.
    """

    split: Split
    index: int
    configurations: int
    views: int

    @property
    def file_name(self) -> str:
        """Name of its file in the data set's folder."""
        return f"{self.split}-{self.index:05d}.zip"

    @property
    def images(self) -> int:
        """How many pictures it holds."""
        return self.configurations * self.views


@dataclass(frozen=True)
class Plan:
    """A data set before it is made; equal plans give equal data, image by image.

    Attributes:
        robot: what `kinesplat.load_description` takes: a path or a name.
        packages: names and folders of ROS packages that package:// refers to.
        configurations: number of training configurations.
        views: cameras of each training configuration.
        test_configurations: number of test configurations.
        test_views: cameras of each test configuration.
        canonical_views: cameras of the canonical configuration.
        size: image width and height [px].
        light: light setting, see `kinesplat.dataset.lights`.
        samples: rays a pixel.
        span: share of the frame that the robot spans, from and to.
        near: share of the cameras that are nearer than that.
        collisions: whether configurations that collide with themselves are kept.
        renderer: "warp" (ray traced, no GL) or "gl" (MuJoCo's own).
        seed: of everything random.
    """

    robot: str
    packages: tuple[tuple[str, str], ...] = ()
    configurations: int = 500
    views: int = 3
    test_configurations: int = 50
    test_views: int = 4
    canonical_views: int = 48
    size: int = 256
    light: LightSetting = "headlight"
    samples: int = 4
    span: tuple[float, float] = (0.5, 1.0)
    near: float = 0.1
    collisions: bool = False
    renderer: Renderer = "warp"
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"configurations": 1, "views": 1, "test_configurations": 0, "test_views": 1, "canonical_views": 1}
        for name, value in {**least, "size": 8, "samples": 1}.items():
            if getattr(self, name) < value:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least {value}")
        if not 0.0 < self.span[0] <= self.span[1] <= 2.0:
            raise InputError(f"span is {self.span}; expected two rising shares of the frame within 0 to 2")
        if not 0.0 <= self.near <= 1.0:
            raise InputError(f"near is {self.near}; expected a share of the cameras within 0 to 1")

    def shards(self, split: Split | None = None) -> list[Shard]:
        """The files that the data set, or one split of it, consists of."""
        sizes: dict[Split, tuple[int, int]] = {
            "canonical": (1, self.canonical_views),
            "train": (self.configurations, self.views),
            "test": (self.test_configurations, self.test_views),
        }
        found = []
        for name in SPLITS if split is None else (split,):
            count, views = sizes[name]
            step = max(1, IMAGES_PER_SHARD // views)
            found += [
                Shard(name, index, min(step, count - first), views) for index, first in enumerate(range(0, count, step))
            ]
        return found

    def generator(self, shard: Shard) -> torch.Generator:
        """The shard's own source of randomness, so that shards may be made in any order, by any process."""
        text = f"{self.seed} {shard.split} {shard.index}"
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary, the inverse of `from_json`."""
        return {**asdict(self), "packages": dict(self.packages), "span": list(self.span)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Plan":
        """The plan that `to_json` wrote."""
        packages = tuple(sorted(data["packages"].items()))
        return cls(**{**data, "packages": packages, "span": (data["span"][0], data["span"][1])})
