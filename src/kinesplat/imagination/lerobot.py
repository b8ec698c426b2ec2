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
from kinesplat.vision.finetuning import Clip
from kinesplat.vision.loading import library
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

    def clip(self, frames: int, height: int, width: int) -> Clip:
        """All of it in a few frames, evenly chosen, the first and the last among them."""
        rows = torch.linspace(0, len(self.frames) - 1, frames).round().long()
        pictures = [resized(self.frames[row].float(), height, width) for row in rows]
        return Clip(torch.stack(pictures).round().clamp(0, 255).to(torch.uint8), self.instruction)


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
    try:
        info = json.loads((folder / "meta" / "info.json").read_text())
        version, features, count = info["codebase_version"], info["features"], info["total_episodes"]
    except (OSError, ValueError, KeyError) as error:
        raise DatasetError(f"{folder} is no LeRobot data set: meta/info.json cannot be read ({error})") from error
    if version not in VERSIONS:
        raise DatasetError(f"{folder}: {unknown('LeRobot version', version, VERSIONS)}")
    key = _camera_key(folder, features, camera)
    rows = _rows_v3(folder, info, key) if version == "v3.0" else _rows_v2(folder, info, key, count)
    for table, instruction, frames in rows:
        state = table.get(STATE)
        values = None if state is None else torch.tensor(np.stack(state), dtype=torch.float32).reshape(len(state), -1)
        pictures = torch.stack([_picture(cell) for cell in table[key]]) if frames is None else frames
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


def _rows_v2(
    folder: Path, info: Mapping[str, Any], key: str, count: int
) -> Iterator[tuple[dict[str, list], str, Tensor | None]]:
    tasks = {row["task_index"]: row["task"] for row in _json_lines(folder / "meta" / "tasks.jsonl")}
    video = info["features"][key]["dtype"] == "video"
    for index in range(count):
        names = {"episode_chunk": index // info["chunks_size"], "episode_index": index, "video_key": key}
        table = _table(folder / info["data_path"].format(**names))
        frames = read_clip(folder / info["video_path"].format(**names), 0.0, len(table["index"])) if video else None
        yield table, _task(folder, tasks, table), frames


def _rows_v3(folder: Path, info: Mapping[str, Any], key: str) -> Iterator[tuple[dict[str, list], str, Tensor | None]]:
    named = _table(folder / "meta" / "tasks.parquet")
    sentences = next((values for name, values in named.items() if name != "task_index"), [])
    tasks = dict(zip(named["task_index"], sentences, strict=True))
    video = info["features"][key]["dtype"] == "video"
    for file in sorted((folder / "meta" / "episodes").glob("chunk-*/file-*.parquet")):
        listed = _table(file)
        for i, index in enumerate(listed["episode_index"]):
            places = {"chunk_index": listed["data/chunk_index"][i], "file_index": listed["data/file_index"][i]}
            table = _table(folder / info["data_path"].format(**places), [("episode_index", "==", index)])
            frames = None
            if video:
                part = {n: listed[f"videos/{key}/{n}"][i] for n in ("chunk_index", "file_index", "from_timestamp")}
                path = folder / info["video_path"].format(video_key=key, **part)
                frames = read_clip(path, part["from_timestamp"], len(table["index"]))
            yield table, _task(folder, tasks, table), frames


def _camera_key(folder: Path, features: Mapping[str, Any], camera: str | None) -> str:
    keys = [name for name, feature in features.items() if feature["dtype"] in ("image", "video")]
    if camera is None and len(keys) == 1:
        return keys[0]
    if camera not in keys:
        raise DatasetError(f"{folder}: {unknown('camera', camera or '(none given)', keys)}")
    return camera


def _table(path: Path, filters: Sequence[Any] | None = None) -> dict[str, list]:
    arrow, parquet = library("pyarrow"), library("pyarrow.parquet")
    try:
        return parquet.read_table(str(path), filters=filters).to_pydict()
    except (OSError, arrow.ArrowInvalid) as error:
        raise DatasetError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from error


def _task(folder: Path, tasks: Mapping[int, str], table: Mapping[str, list]) -> str:
    sentences = [tasks[number] for number in table["task_index"][:1] if number in tasks]
    if not sentences:
        raise DatasetError(f"{folder}: an episode is empty, or its task has no sentence in meta")
    return sentences[0]


def _json_lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: cannot be read ({error})") from error


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
