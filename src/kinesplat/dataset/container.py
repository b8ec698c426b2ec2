"""A data set on disk: a folder with `dataset.json`, `surface.npz` and the shards. See `docs/dataset.md`."""

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kinesplat.dataset.frames import Frames
from kinesplat.dataset.plan import Plan, Shard, Split
from kinesplat.dataset.shards import read_array, read_shard, read_shard_header
from kinesplat.errors import DatasetError, InputError, unknown

FORMAT_VERSION = 1
MANIFEST = "dataset.json"
SURFACE = "surface.npz"
VALIDATION_STEP = 20
"""Every so many-th training configuration is kept for validation."""

Part = Literal["canonical", "train", "validation", "test"]


@dataclass(frozen=True, eq=False)
class Dataset:
    """A finished or growing data set.

    Attributes:
        directory: the folder.
        plan: what it holds or is going to hold.
        manifest: the rest of `dataset.json`: robot, licence, joint and link names, collisions, versions.
        skip_corrupt: leave shards out that cannot be read, instead of raising.
    """

    directory: Path
    plan: Plan
    manifest: dict[str, Any]
    skip_corrupt: bool = False

    @classmethod
    def open(cls, directory: str | Path, skip_corrupt: bool = False) -> "Dataset":
        """Open a folder that `kinesplat dataset` wrote.

        Raises:
            DatasetError: it is no data set, or of another format version.
        """
        directory = Path(directory)
        try:
            manifest = json.loads((directory / MANIFEST).read_text())
            version = int(manifest["format_version"])
            if version != FORMAT_VERSION:
                advice = "update kinesplat" if version > FORMAT_VERSION else "make it again"
                raise DatasetError(f"{directory}: format version {version}, this kinesplat reads 1; {advice}")
            return cls(directory, Plan.from_json(manifest["plan"]), manifest, skip_corrupt)
        except FileNotFoundError as error:
            raise DatasetError(f"{directory}: no data set, {MANIFEST} is missing") from error
        except OSError as error:
            raise DatasetError(f"{directory}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, InputError) as error:
            raise DatasetError(f"{directory / MANIFEST}: broken ({error})") from error

    @property
    def robot_source(self) -> str:
        """What `kinesplat.load_description` takes to load the robot of the images."""
        return self.plan.robot

    @cached_property
    def canonical(self) -> Frames:
        """Images of the canonical configuration from all round."""
        return self.frames("canonical")

    def frames(self, part: Part, *, limit: int | None = None, geometry: bool = True) -> Frames:
        """All images of a part, or its first ones, in memory.

        Args:
            part: "canonical", "train", "validation" (every 20th training configuration, which "train" leaves out) or
                "test".
            limit: stop after so many images.
            geometry: also read depth and link ids, which take two thirds of the memory.

        Raises:
            InputError: unknown part, or it holds no image.
            DatasetError: a shard is missing or corrupt; says which.
        """
        found: list[Frames] = []
        for frames in self.iterate(part, geometry=geometry):
            found.append(frames)
            if limit is not None and sum(map(len, found)) >= limit:
                break
        if not found:
            raise InputError(f"{self.directory}: part {part!r} holds no image")
        joined = Frames.concatenate(found)
        return joined if limit is None else joined.select(slice(0, limit))

    def iterate(self, part: Part, *, geometry: bool = True) -> Iterator[Frames]:
        """The images of a part, shard after shard, for sets that do not fit into memory.

        Raises:
            InputError: unknown part.
            DatasetError: a shard is missing or corrupt; says which.
        """
        if part not in get_args(Part):
            raise InputError(unknown("part of a data set", part, get_args(Part)))
        split: Split = "train" if part == "validation" else part
        missing = [s for s in self.plan.shards(split) if not (self.directory / s.file_name).is_file()]
        if missing and not self.skip_corrupt:
            raise DatasetError(
                f"{self.directory}: unfinished, {len(missing)} {split} shard(s) are missing "
                f"({missing[0].file_name}, ...); run the same kinesplat dataset command again to go on"
            )
        for shard in self.plan.shards(split):
            rows = self._rows(shard, part)
            frames = self._read(shard, geometry) if len(rows) else None
            if frames is not None:
                yield frames if len(rows) == len(frames) else frames.select(rows)

    @cached_property
    def surface(self) -> tuple[Float[Tensor, "n 3"], Int[Tensor, " n"]]:
        """Points spread evenly over the surface that can be seen from outside, in link frames [m], and their links.

        Raises:
            DatasetError: the file is missing or corrupt.
        """
        path = self.directory / SURFACE
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return torch.from_numpy(arrays["positions"]), torch.from_numpy(arrays["link"]).long()
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DatasetError(f"{path}: missing or corrupt ({error})") from error

    def link_poses(self, part: Part, *, limit: int | None = None) -> Float[Tensor, "n links 4 4"]:
        """``Ts_world_link`` of every image of a part by MuJoCo's own kinematics, in the order of `frames` [m]."""
        split: Split = "train" if part == "validation" else part
        found = []
        for shard in self.plan.shards(split):
            try:
                Ts_world_link = torch.from_numpy(read_array(self.directory / shard.file_name, "Ts_world_link"))
            except DatasetError:
                if not self.skip_corrupt:
                    raise
                continue
            found.append(Ts_world_link[self._rows(shard, part)])
            if limit is not None and sum(map(len, found)) >= limit:
                break
        return torch.cat(found)[:limit]

    def rejected(self) -> int:
        """How many configurations were thrown away because the robot collided with itself."""
        return sum(int(read_shard_header(self.directory / s.file_name)["rejected"]) for s in self.plan.shards())

    def _rows(self, shard: Shard, part: Part) -> Int[Tensor, " rows"]:
        """Which images of a shard belong to a part."""
        rows = torch.arange(shard.images)
        if shard.split != "train":
            return rows
        step = len(self.plan.shards("train")) and self.plan.shards("train")[0].configurations
        configuration = shard.index * step + rows // shard.views
        kept_back = configuration % VALIDATION_STEP == VALIDATION_STEP - 1
        return rows[kept_back if part == "validation" else ~kept_back]

    def _read(self, shard: Shard, geometry: bool) -> Frames | None:
        try:
            frames, _ = read_shard(self.directory / shard.file_name, geometry)
        except DatasetError:
            if self.skip_corrupt:
                return None
            raise
        if len(frames) != shard.images:
            raise DatasetError(f"{self.directory / shard.file_name}: {len(frames)} images, expected {shard.images}")
        return frames
