"""Episodes in LeRobot's format, versions 2.0 to 3.0: Open X-Embodiment data such as ASU TableTop, and our own.

Version 2 keeps an episode a file, ``data/chunk-000/episode_000000.parquet`` with a video beside it; version 3 keeps
many in one, ``data/chunk-000/file-000.parquet``, and says in ``meta/episodes`` where each begins. Pictures are videos,
or PNGs in the table.
"""

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from kinesplat.errors import DatasetError, InputError, unknown
from kinesplat.files import folder_written_whole
from kinesplat.video import read_clip
from kinesplat.vision.loading import library
from kinesplat.vision.video_clips import Clip
from kinesplat.vision.video_pipelines import resized

VERSIONS = ("v2.0", "v2.1", "v3.0")
PICTURE, STATE = "observation.images.image", "observation.state"
DATA_PATH = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
CHUNK = 1000


@dataclass(frozen=True)
class Episode:
    """One recording.

    Attributes:
        frames: ``(frames, height, width, 3)``.
        instruction: what was asked for.
        state: ``(frames, k)`` what the robot reported, or None.
        fps: frames per second.
    """

    frames: UInt8[Tensor, "frames height width 3"]
    instruction: str
    state: Float[Tensor, "frames k"] | None
    fps: float

    def clip(self, frames: int, height: int, width: int, fps: float | None = None) -> Clip:
        """Some frames of it.

        Args:
            frames: how many.
            height: of the frames [px].
            width: of the frames [px].
            fps: frames per second, from the first frame on: a shorter episode stands still at its end, a longer one is
                cut off. Default: such that the last frame is the episode's; episodes of unlike length then give clips
                of unlike rates, which `finetune` refuses.

        Raises:
            InputError: fewer than two frames, or a rate that is none.
        """
        if frames < 2 or len(self.frames) < 2:
            raise InputError(f"a clip of {frames} frames from an episode of {len(self.frames)}; both need two or more")
        rate = (frames - 1) * self.fps / (len(self.frames) - 1) if fps is None else fps
        if not rate > 0.0:
            raise InputError(f"{rate} frames per second; expected a positive number")
        rows = (torch.arange(frames) * (self.fps / rate)).round().long().clamp(max=len(self.frames) - 1)
        pictures = [resized(self.frames[row].float(), height, width) for row in rows]
        return Clip(torch.stack(pictures).round().clamp(0, 255).to(torch.uint8), self.instruction, rate)


def longest_episode(folder: str | Path) -> float:
    """Time from the first to the last frame of a data set's longest episode [s].

    Raises:
        DatasetError: as `read_episodes`, or no episode has two frames.
    """
    folder = Path(folder)
    info = _read_info(folder)
    if info["codebase_version"] == "v3.0":
        lengths = [n for path in _episode_files(folder) for n in _columns(path, ("length",))["length"]]
    else:
        lengths = [row["length"] for row in _json_lines(folder / "meta" / "episodes.jsonl", ("length",))]
    if max(lengths, default=0) < 2:
        raise DatasetError(f"{folder}: no episode has two frames or more")
    return (max(lengths) - 1) / float(info["fps"])


def read_episodes(folder: str | Path, camera: str | None = None) -> Iterator[Episode]:
    """Episodes of a data set, one after the other.

    Args:
        folder: the data set, with ``meta/info.json``.
        camera: name of the feature with the pictures (``observation.images.image``); needed where there are several.

    Raises:
        DatasetError: it is missing, broken, of an unknown version, or has no such pictures.
        BackendError: pyarrow is absent, or PyAV where pictures are videos.
    """
    folder = Path(folder)
    info = _read_info(folder)
    key = _camera_key(folder, info["features"], camera)
    rows = _rows_v3(folder, info, key) if info["codebase_version"] == "v3.0" else _rows_v2(folder, info, key)
    for table, instruction, frames in rows:
        state = table.get(STATE)
        values = None if state is None else _values(folder, state)
        pictures = _pictures(table[key]) if frames is None else frames
        if values is not None and len(values) != len(pictures):
            raise DatasetError(f"{folder}: an episode has {len(values)} rows, but {len(pictures)} pictures")
        yield Episode(pictures, instruction, values, float(info["fps"]))


def write_episodes(folder: str | Path, episodes: Iterable[Episode], robot: str) -> int:
    """Write a data set of version 2.1 with lossless pictures, whole or not at all; gives the number of episodes.

    Raises:
        InputError: it cannot be written, or there is no episode.
        BackendError: pyarrow is absent.
    """
    arrow, parquet = library("pyarrow"), library("pyarrow.parquet")
    tasks: dict[str, int] = {}
    listed, total, last = [], 0, None
    with folder_written_whole(folder) as temporary:
        for index, episode in enumerate(episodes):
            path = temporary / DATA_PATH.format(episode_chunk=index // CHUNK, episode_index=index)
            path.parent.mkdir(parents=True, exist_ok=True)
            task, count = tasks.setdefault(episode.instruction, len(tasks)), len(episode.frames)
            columns = {
                PICTURE: [{"bytes": _png(frame), "path": None} for frame in episode.frames],
                "timestamp": [i / episode.fps for i in range(count)],
                "frame_index": list(range(count)),
                "episode_index": [index] * count,
                "index": list(range(total, total + count)),
                "task_index": [task] * count,
            }
            if episode.state is not None:
                columns[STATE] = episode.state.tolist()
            parquet.write_table(arrow.table(columns), str(path))
            listed.append({"episode_index": index, "tasks": [episode.instruction], "length": count})
            total, last = total + count, episode
        if last is None:
            raise InputError("there is no episode to write")
        _write_meta(temporary / "meta", _info(last, robot, len(listed), total, len(tasks)), tasks, listed)
    return len(listed)


def _read_info(folder: Path) -> dict[str, Any]:
    """What the data set says about itself, once everything that reading needs is in it."""
    path = folder / "meta" / "info.json"
    try:
        info = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DatasetError(f"{folder} is no LeRobot data set: meta/info.json cannot be read ({error})") from error
    if not isinstance(info, dict):
        raise DatasetError(f"{path}: is no dictionary")
    version = _entries(path, info, ("codebase_version",))["codebase_version"]
    if version not in VERSIONS:
        raise DatasetError(f"{folder}: {unknown('LeRobot version', version, VERSIONS)}")
    count = () if version == "v3.0" else ("total_episodes", "chunks_size")
    _entries(path, info, ("features", "fps", "data_path", *count))
    bad = [name for name in ("fps", *count) if not isinstance(info[name], int | float) or not info[name] > 0]
    if bad:
        raise DatasetError(f"{path}: {bad[0]} is {info[bad[0]]!r}; expected a positive number")
    features = info["features"]
    if not isinstance(features, dict) or not all(isinstance(f, dict) and "dtype" in f for f in features.values()):
        raise DatasetError(f"{path}: features must be a dictionary of dictionaries with a dtype")
    return info


def _rows_v2(folder: Path, info: Mapping[str, Any], key: str) -> Iterator[tuple[dict[str, list], str, Tensor | None]]:
    rows = _json_lines(folder / "meta" / "tasks.jsonl", ("task_index", "task"))
    tasks = {row["task_index"]: row["task"] for row in rows}
    video = info["features"][key]["dtype"] == "video"
    for index in range(info["total_episodes"]):
        names = {"episode_chunk": index // info["chunks_size"], "episode_index": index, "video_key": key}
        table = _columns(_path(folder, info, "data_path", names), ("task_index", *(() if video else (key,))))
        path = _path(folder, info, "video_path", names) if video else None
        frames = None if path is None else read_clip(path, 0.0, len(table["task_index"]))
        yield table, _task(folder, tasks, table), frames


def _rows_v3(folder: Path, info: Mapping[str, Any], key: str) -> Iterator[tuple[dict[str, list], str, Tensor | None]]:
    named = _columns(folder / "meta" / "tasks.parquet", ("task_index",))
    sentences = next((values for name, values in named.items() if name != "task_index"), [])
    tasks = dict(zip(named["task_index"], sentences, strict=False))
    video = info["features"][key]["dtype"] == "video"
    parts = {name: f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")} if video else {}
    places = {name: f"data/{name}" for name in ("chunk_index", "file_index")}
    for file in _episode_files(folder):
        listed = _columns(file, ("episode_index", *places.values(), *parts.values()))
        for i, index in enumerate(listed["episode_index"]):
            path = _path(folder, info, "data_path", {name: listed[column][i] for name, column in places.items()})
            wanted = ("task_index", *(() if video else (key,)))
            table, frames = _columns(path, wanted, [("episode_index", "==", index)]), None
            if video:
                part = {name: listed[column][i] for name, column in parts.items()}
                path = _path(folder, info, "video_path", {"video_key": key, **part})
                frames = read_clip(path, part["from_timestamp"], len(table["task_index"]))
            yield table, _task(folder, tasks, table), frames


def _episode_files(folder: Path) -> list[Path]:
    found = sorted((folder / "meta" / "episodes").glob("chunk-*/file-*.parquet"))
    if not found:
        raise DatasetError(f"{folder}: meta/episodes holds no chunk-*/file-*.parquet; is it complete?")
    return found


def _camera_key(folder: Path, features: Mapping[str, Any], camera: str | None) -> str:
    keys = [name for name, feature in features.items() if feature["dtype"] in ("image", "video")]
    if camera is None and len(keys) == 1:
        return keys[0]
    if camera not in keys:
        raise DatasetError(f"{folder}: {unknown('camera', camera or '(none given)', keys)}")
    return camera


def _path(folder: Path, info: Mapping[str, Any], kind: str, names: Mapping[str, Any]) -> Path:
    """A file of the data set by the pattern that its info has for it."""
    try:
        return folder / info[kind].format(**names)
    except (KeyError, AttributeError, ValueError, IndexError) as error:
        given, valid = info.get(kind), ", ".join(names)
        raise DatasetError(f"{folder}: {kind} in meta/info.json is {given!r}; expected a pattern of {valid}") from error


def _entries(where: Path, values: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The values, once it is sure that they have these entries."""
    missing = [name for name in names if name not in values]
    if missing:
        raise DatasetError(f"{where}: has no {missing[0]!r}; it has {', '.join(sorted(values)) or 'nothing'}")
    return values


def _columns(path: Path, names: Sequence[str], filters: Sequence[Any] | None = None) -> dict[str, list]:
    """A table with at least these columns."""
    arrow, parquet = library("pyarrow"), library("pyarrow.parquet")
    try:
        return _entries(path, parquet.read_table(str(path), filters=filters).to_pydict(), names)
    except (OSError, arrow.ArrowException) as error:
        raise DatasetError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from error


def _task(folder: Path, tasks: Mapping[int, str], table: Mapping[str, list]) -> str:
    sentences = [tasks[number] for number in table["task_index"][:1] if number in tasks]
    if not sentences:
        raise DatasetError(f"{folder}: an episode is empty, or its task has no sentence in meta")
    return str(sentences[0])


def _json_lines(path: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Lines with at least these entries."""
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: cannot be read ({error})") from error
    return [_entries(path, row if isinstance(row, dict) else {}, names) for row in rows]


def _values(folder: Path, state: Sequence[Any]) -> Float[Tensor, "frames k"]:
    """What the robot reported, one row a frame."""
    try:
        return torch.tensor(np.stack(state), dtype=torch.float32).reshape(len(state), -1)
    except (ValueError, TypeError) as error:
        raise DatasetError(f"{folder}: {STATE} has rows of several lengths, or no numbers ({error})") from error


def _pictures(cells: Sequence[Any]) -> UInt8[Tensor, "frames height width 3"]:
    pictures = [_picture(cell) for cell in cells]
    sizes = {tuple(picture.shape[:2]) for picture in pictures}
    if len(sizes) > 1:
        raise DatasetError(f"pictures of an episode have the sizes {sorted(sizes)[:3]} (height, width)")
    return torch.stack(pictures)


def _picture(cell: Mapping[str, Any]) -> UInt8[Tensor, "height width 3"]:
    try:
        with Image.open(io.BytesIO(cell["bytes"])) as image:
            return torch.from_numpy(np.array(image.convert("RGB")))
    except (OSError, KeyError, TypeError, SyntaxError) as error:
        raise DatasetError(f"a picture of an episode cannot be read ({error})") from error


def _png(frame: UInt8[Tensor, "height width 3"]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(frame.numpy()).save(stream, format="PNG")
    return stream.getvalue()


def _info(episode: Episode, robot: str, episodes: int, frames: int, tasks: int) -> dict[str, Any]:
    def scalar(kind: str) -> dict[str, Any]:
        return {"dtype": kind, "shape": [1], "names": None}

    picture = {"dtype": "image", "shape": list(episode.frames.shape[1:]), "names": ["height", "width", "channel"]}
    features = {PICTURE: picture, "timestamp": scalar("float32")}
    features |= {name: scalar("int64") for name in ("frame_index", "episode_index", "index", "task_index")}
    if episode.state is not None:
        features[STATE] = {"dtype": "float32", "shape": [episode.state.shape[1]], "names": None}
    return {
        "codebase_version": "v2.1",
        "robot_type": robot,
        "total_episodes": episodes,
        "total_frames": frames,
        "total_tasks": tasks,
        "total_videos": 0,
        "total_chunks": -(-episodes // CHUNK),
        "chunks_size": CHUNK,
        "fps": episode.fps,
        "splits": {"train": f"0:{episodes}"},
        "data_path": DATA_PATH,
        "video_path": None,
        "features": features,
    }


def _write_meta(
    folder: Path, info: Mapping[str, Any], tasks: Mapping[str, int], listed: Sequence[Mapping[str, Any]]
) -> None:
    folder.mkdir()
    (folder / "info.json").write_text(json.dumps(info, indent=1) + "\n")
    named = [{"task_index": number, "task": task} for task, number in tasks.items()]
    for name, rows in (("tasks", named), ("episodes", listed)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
