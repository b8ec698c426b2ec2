"""LeRobot's format: what is written is read, and both layouts as the library itself writes them."""

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from kinesplat.errors import DatasetError, InputError
from kinesplat.imagination.lerobot import (
    PICTURE,
    STATE,
    Episode,
    _picture,
    longest_episode,
    read_episodes,
    write_episodes,
)
from kinesplat.video import read_clip, write_video

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
FPS = 10.0


def episodes(count: int = 3, size: int = 8) -> list[Episode]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        frames = torch.randint(256, (4 + i, size, size, 3), dtype=torch.uint8, generator=generator)
        made.append(Episode(frames, f"task {i % 2}", torch.rand(4 + i, 7, generator=generator), FPS))
    return made


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert write_episodes(tmp_path / "d", episodes(), "arm") == 3
    for read, made in zip(read_episodes(tmp_path / "d"), episodes(), strict=True):
        assert torch.equal(read.frames, made.frames)
        assert read.state is not None
        torch.testing.assert_close(read.state, made.state)
        assert (read.instruction, read.fps) == (made.instruction, made.fps)
    info = json.loads((tmp_path / "d" / "meta" / "info.json").read_text())
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (3, 15, 2)
    with pytest.raises(InputError, match="no episode"):
        write_episodes(tmp_path / "e", [], "arm")
    assert not (tmp_path / "e").exists()


def moving_square(count: int, size: int = 32, first: int = 0) -> list[torch.Tensor]:
    """A square that goes right; a video codec keeps where it is."""
    frames = torch.zeros(count, size, size, 3)
    for i in range(count):
        frames[i, 8:16, 2 * (first + i) : 2 * (first + i) + 8] = 1.0
    return list(frames)


def table(index: int, count: int, start: int, task: int) -> dict[str, list]:
    return {
        STATE: [[float(index), 1.0]] * count,
        "frame_index": list(range(count)),
        "episode_index": [index] * count,
        "index": list(range(start, start + count)),
        "task_index": [task] * count,
    }


def info(version: str, **paths: str) -> dict:
    """As lerobot/asu_table_top and its kind have it, cut down."""
    names = ["height", "width", "channel"]
    features = {
        PICTURE: {"dtype": "video", "shape": [32, 32, 3], "names": names},
        "observation.images.wrist": {"dtype": "video", "shape": [32, 32, 3], "names": names},
        STATE: {"dtype": "float32", "shape": [2], "names": {"motors": ["a", "b"]}},
    }
    return {
        "codebase_version": version,
        "fps": FPS,
        "total_episodes": 2,
        "chunks_size": 1000,
        "features": features,
        **paths,
    }


def test_version_2_with_videos(tmp_path: Path) -> None:
    pytest.importorskip("av")
    meta = tmp_path / "meta"
    meta.mkdir()
    data = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    video = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    (meta / "info.json").write_text(json.dumps(info("v2.1", data_path=data, video_path=video)))
    (meta / "tasks.jsonl").write_text('{"task_index": 0, "task": "pick"}\n{"task_index": 1, "task": "place"}\n')
    (meta / "episodes.jsonl").write_text('{"episode_index": 0, "length": 5}\n{"episode_index": 1, "length": 5}\n')
    for index in range(2):
        place = {"episode_chunk": 0, "episode_index": index, "video_key": PICTURE}
        for path in (data, video):
            (tmp_path / path.format(**place)).parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pa.table(table(index, 5, 5 * index, index)), tmp_path / data.format(**place))
        write_video(tmp_path / video.format(**place), moving_square(5, first=index), FPS)
    read = list(read_episodes(tmp_path, PICTURE))
    assert longest_episode(tmp_path) == pytest.approx(0.4)
    assert [episode.instruction for episode in read] == ["pick", "place"]
    for index, episode in enumerate(read):
        expected = torch.stack(moving_square(5, first=index))
        assert (episode.frames / 255.0 - expected).abs().mean() < 0.02
    with pytest.raises(DatasetError, match=r"unknown camera '\(none given\)'"):
        next(read_episodes(tmp_path))


def test_videos_as_lerobot_encodes_them(tmp_path: Path) -> None:
    """AV1 with a key frame at every other frame, at the rate of ASU TableTop."""
    av = pytest.importorskip("av")
    if "libsvtav1" not in av.codecs_available:
        pytest.skip("this PyAV has no encoder of AV1")
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("libsvtav1", rate=Fraction(25, 2))
        stream.width = stream.height = 64
        stream.pix_fmt, stream.options = "yuv420p", {"g": "2", "crf": "30"}
        for picture in moving_square(11, size=64):
            frame = av.VideoFrame.from_ndarray((255 * picture).byte().numpy(), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    read = read_clip(tmp_path / "v.mp4", 4 / 12.5, 5)
    assert (read / 255.0 - torch.stack(moving_square(5, size=64, first=4))).abs().mean() < 0.01


def test_version_3_with_many_episodes_in_a_file(tmp_path: Path) -> None:
    pytest.importorskip("av")
    data = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    video = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    place = {"chunk_index": 0, "file_index": 0, "video_key": PICTURE}
    for path in (data, video, "meta/episodes/chunk-000/file-000.parquet"):
        (tmp_path / path.format(**place)).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "meta" / "info.json").write_text(json.dumps(info("v3.0", data_path=data, video_path=video)))
    tasks = pa.table({"task_index": [0, 1], "__index_level_0__": ["pick", "place"]})  # as pandas writes an index
    parquet.write_table(tasks, tmp_path / "meta" / "tasks.parquet")
    listed: dict[str, list] = {
        "episode_index": [0, 1],
        "length": [4, 6],
        "data/chunk_index": [0, 0],
        "data/file_index": [0, 0],
        f"videos/{PICTURE}/chunk_index": [0, 0],
        f"videos/{PICTURE}/file_index": [0, 0],
        f"videos/{PICTURE}/from_timestamp": [0.0, 0.4],
    }
    parquet.write_table(pa.table(listed), tmp_path / "meta/episodes/chunk-000/file-000.parquet")
    both = {name: [*a, *table(1, 6, 4, 1)[name]] for name, a in table(0, 4, 0, 0).items()}
    parquet.write_table(pa.table(both), tmp_path / data.format(**place))
    write_video(tmp_path / video.format(**place), moving_square(10), FPS)
    read = list(read_episodes(tmp_path, PICTURE))
    assert [(episode.instruction, len(episode.frames)) for episode in read] == [("pick", 4), ("place", 6)]
    whole = torch.stack(moving_square(10))
    for episode, expected in zip(read, (whole[:4], whole[4:]), strict=True):
        assert (episode.frames / 255.0 - expected).abs().mean() < 0.02
    assert read[1].state is not None
    assert (read[1].state[:, 0] == 1.0).all()
    assert longest_episode(tmp_path) == pytest.approx(0.5)
    with pytest.raises(InputError, match=r"has 2 frames from 0\.8 s on, expected 3"):
        read_clip(tmp_path / video.format(**place), 0.8, 3)


def test_a_clip_keeps_its_rate() -> None:
    frames = torch.arange(11, dtype=torch.uint8)[:, None, None, None].expand(11, 4, 4, 3).contiguous()
    episode = Episode(frames, "place", None, 10.0)  # one second, frame n shows n
    whole = episode.clip(6, 4, 4)
    assert whole.frames[:, 0, 0, 0].tolist() == [0, 2, 4, 6, 8, 10]
    assert (whole.prompt, whole.fps) == ("place", 5.0)
    slow, fast = episode.clip(4, 4, 4, fps=2.0), episode.clip(4, 2, 2, fps=20.0)
    assert slow.frames[:, 0, 0, 0].tolist() == [0, 5, 10, 10]  # over after a second: it stands still
    assert fast.frames[:, 0, 0, 0].tolist() in ([0, 0, 1, 2], [0, 1, 1, 2])
    assert (slow.fps, fast.fps, tuple(fast.frames.shape)) == (2.0, 20.0, (4, 2, 2, 3))
    for count, fps in ((1, None), (3, 0.0), (3, -1.0)):
        with pytest.raises(InputError, match=r"two or more|expected a positive number"):
            episode.clip(count, 4, 4, fps)


def test_data_sets_of_another_form_are_told_what_is_missing(tmp_path: Path) -> None:
    made = episodes(1)
    write_episodes(tmp_path, made, "arm")
    path, data = tmp_path / "meta" / "info.json", next((tmp_path / "data").rglob("*.parquet"))
    info, rows = json.loads(path.read_text()), parquet.read_table(data)
    without = {name: {k: v for k, v in info.items() if k != name} for name in info}
    for broken, words in (
        ([], "is no dictionary"),
        (without["codebase_version"], "has no 'codebase_version'; it has chunks_size, data_path"),
        (without["features"], "has no 'features'"),
        (without["fps"], "has no 'fps'"),
        (without["chunks_size"], "has no 'chunks_size'"),
        ({**info, "fps": 0}, "fps is 0; expected a positive number"),
        ({**info, "total_episodes": None}, "total_episodes is None"),
        ({**info, "features": {PICTURE: "image"}}, "features must be"),
        ({**info, "data_path": "data/{file}.parquet"}, "a pattern of episode_chunk, episode_index"),
        ({**info, "features": {PICTURE: {"dtype": "video"}}}, "video_path in meta/info.json is None"),
        ({**info, "codebase_version": "v3.0"}, r"tasks\.parquet: cannot be read"),
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(DatasetError, match=words):
            next(read_episodes(tmp_path))
    path.write_text(json.dumps(info))
    for name in (PICTURE, "task_index"):
        parquet.write_table(rows.drop_columns([name]), data)
        with pytest.raises(DatasetError, match=f"has no '{name}'; it has episode_index"):
            next(read_episodes(tmp_path))
    ragged = rows.set_column(rows.column_names.index(STATE), STATE, pa.array([[1.0], [1.0, 2.0]] * 2))
    parquet.write_table(ragged, data)
    with pytest.raises(DatasetError, match="rows of several lengths"):
        next(read_episodes(tmp_path))
    (tmp_path / "meta" / "episodes.jsonl").write_text('{"episode_index": 0}\n')
    with pytest.raises(DatasetError, match="has no 'length'; it has episode_index"):
        longest_episode(tmp_path)
    (tmp_path / "meta" / "tasks.jsonl").write_text('{"task": "wave"}\n')
    with pytest.raises(DatasetError, match="has no 'task_index'; it has task"):
        next(read_episodes(tmp_path))


def test_broken_data_sets(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"meta/info\.json cannot be read"):
        next(read_episodes(tmp_path))
    write_episodes(tmp_path / "d", episodes(1), "arm")
    meta = tmp_path / "d" / "meta" / "info.json"
    good = meta.read_text()
    meta.write_text(good.replace("v2.1", "v1.6"))
    with pytest.raises(DatasetError, match=r"unknown LeRobot version 'v1\.6'"):
        next(read_episodes(tmp_path / "d"))
    meta.write_text(good)
    (tmp_path / "d" / "meta" / "tasks.jsonl").write_text("")
    with pytest.raises(DatasetError, match="no sentence"):
        next(read_episodes(tmp_path / "d"))
    for cell in ({"bytes": b"half a PNG"}, {"bytes": None}, {"path": "x"}):
        with pytest.raises(DatasetError, match="a picture of an episode cannot be read"):
            _picture(cell)
    next((tmp_path / "d" / "data").rglob("*.parquet")).write_bytes(b"PAR1")
    with pytest.raises(DatasetError, match="cannot be read"):
        next(read_episodes(tmp_path / "d"))
