"""Data sets on disk: what is written comes back, equal plans give equal files, and nothing broken passes unnoticed."""

import json
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mujoco_warp", reason="needs mujoco_warp (pip install kinesplat[render])")

from kinesplat.cli import main
from kinesplat.dataset.capture import Capture, capture_frames
from kinesplat.dataset.collision import SelfCollision
from kinesplat.dataset.container import Dataset
from kinesplat.dataset.frames import Frames
from kinesplat.dataset.generate import load_robot, write_dataset
from kinesplat.dataset.plan import Plan, Shard
from kinesplat.dataset.shards import read_shard, write_shard
from kinesplat.description import load_description
from kinesplat.errors import BackendError, DatasetError, InputError
from kinesplat.self_model import SelfModel
from kinesplat.zoo import load as load_model

PLAN = Plan(
    robot="kinearm",
    configurations=40,
    views=2,
    test_configurations=3,
    test_views=2,
    canonical_views=4,
    size=24,
    samples=2,
)


# Three links in a chain; the third can reach the first.
CHAIN = """<mujoco><compiler angle="radian"/><worldbody><geom type="plane" size="2 2 1"/>
  <body name="a"><joint name="ja" axis="0 1 0" range="-3 3" limited="true"/>
    <geom type="capsule" fromto="0 0 0 0.3 0 0" size="0.04"/>
    <body name="b" pos="0.3 0 0"><joint name="jb" axis="0 1 0" range="-3 3" limited="true"/>
      <geom type="capsule" fromto="0 0 0 0.3 0 0" size="0.04"/>
      <body name="c" pos="0.3 0 0"><joint name="jc" axis="0 0 1" range="-3 3" limited="true"/>
        <geom type="box" pos="0.15 0 0" size="0.15 0.03 0.02"/></body></body></body></worldbody></mujoco>"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data") / "kinearm", PLAN)


def copy_of(made: Dataset, folder: Path) -> Path:
    folder.mkdir()
    for path in made.directory.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_counts_of_every_part(made: Dataset) -> None:
    canonical, train, validation, test = (made.frames(p) for p in ("canonical", "train", "validation", "test"))
    assert (len(canonical), len(train), len(validation), len(test)) == (4, 38 * 2, 2 * 2, 3 * 2)
    assert train.rgb.shape[1:] == (24, 24, 3)
    assert torch.equal(canonical.q, load_robot(PLAN).tree.q_canonical.expand(4, -1))
    assert torch.equal(made.canonical.rgb, canonical.rgb)


def test_no_configuration_is_in_two_parts(made: Dataset) -> None:
    parts = [{tuple(q) for q in made.frames(p).q.tolist()} for p in ("train", "validation", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 43


def test_cameras_are_distinct_outside_the_robot_and_see_it(made: Dataset) -> None:
    frames = Frames.concatenate([made.frames(p) for p in ("canonical", "train", "validation", "test")])
    assert len(torch.unique(frames.camera.T_cam_world.flatten(1), dim=0)) == len(frames)
    assert (frames.alpha > 0).flatten(1).any(dim=1).all()
    model = load_model("kinearm")
    for row in range(0, len(frames), 7):
        view = frames.select([row]).camera
        model.check_camera(frames.q[row].float(), replace(view, K=view.K[0], T_cam_world=view.T_cam_world[0]))


def test_images_belong_to_their_joints_and_cameras(made: Dataset) -> None:
    test = made.frames("test")
    again = capture_frames(Capture(load_robot(PLAN), samples=2), test.q, test.camera)
    for name in ("rgb", "alpha", "link_id"):
        assert torch.equal(getattr(test, name), getattr(again, name)), name
    farthest = again.depth.flatten(1).amax(dim=1)[:, None, None]
    assert ((test.depth - again.depth).abs() <= farthest / 131_000).all()
    assert torch.equal(test.depth > 0, again.depth > 0)


def test_link_poses_are_those_of_the_tree(made: Dataset) -> None:
    test = made.frames("test")
    expected = load_robot(PLAN).tree.forward_kinematics(test.q)
    assert (made.link_poses("test") - expected).abs().max() < 1e-9
    assert len(made.link_poses("train")) == len(made.frames("train"))
    assert len(made.link_poses("test", limit=2)) == 2


def test_surface_points_lie_on_the_robot(made: Dataset) -> None:
    positions, link = made.surface
    model: SelfModel = load_model("kinearm")
    assert len(positions) == len(link) == 20_000
    for index in torch.unique(link).tolist():
        splats = model.parameters.means[model.link_index == index].double()
        assert torch.cdist(positions[link == index], splats).amin(dim=1).quantile(0.99) < 0.03


def test_geometry_and_limit_are_options(made: Dataset) -> None:
    few = made.frames("train", limit=5, geometry=False)
    assert len(few) == 5
    assert few.depth is None
    assert few.link_id is None
    assert torch.equal(few.rgb, made.frames("train").rgb[:5])
    assert sum(map(len, made.iterate("train"))) == 76


def test_equal_plans_give_equal_files_in_any_number_of_processes(made: Dataset, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "again", PLAN, processes=2)
    assert contents(other.directory) == contents(made.directory)


def test_another_seed_gives_other_images(made: Dataset, tmp_path: Path) -> None:
    plan = replace(PLAN, seed=1, configurations=1, test_configurations=0, canonical_views=1)
    other = write_dataset(tmp_path / "other", plan)
    assert not torch.equal(other.frames("train").q, made.frames("train").q[:2])
    with pytest.raises(InputError, match="'test' holds no image"):
        other.frames("test")


def test_killed_run_goes_on_to_the_same_files(made: Dataset, tmp_path: Path) -> None:
    folder, plan = tmp_path / "killed", PLAN
    options = f"kinearm -o {folder} --configurations {plan.configurations} --views 2 --test-configurations 3 --size 24"
    command = f"from kinesplat.cli import main; import sys; sys.argv[1:] = {options.split()!r}; main()".replace(
        "sys.argv[1:] = [", "sys.argv[1:] = ['dataset', '--canonical-views', '4', '--samples', '2', "
    )
    process = subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while not list(folder.glob("[!.]*.zip")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(list(folder.glob("[!.]*.zip"))) < len(plan.shards())
    (folder / ".train-00000.half.zip").write_bytes(b"half")
    counts: list[int] = []
    write_dataset(folder, plan, report=counts.append)
    assert 0 < counts[0] < 90
    assert sum(counts) == 90
    assert contents(folder) == contents(made.directory)


def test_finished_set_is_left_alone(made: Dataset) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.directory.iterdir()}
    counts: list[int] = []
    write_dataset(made.directory, PLAN, report=counts.append)
    assert counts == [90]
    assert before == {path: path.stat().st_mtime_ns for path in made.directory.iterdir()}


def test_folder_of_another_set_is_refused(made: Dataset, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"views 2 \(now 3\), size 24 \(now 32\); choose another folder"):
        write_dataset(made.directory, replace(PLAN, views=3, size=32))
    folder = copy_of(made, tmp_path / "lost")
    (folder / "dataset.json").unlink()
    with pytest.raises(DatasetError, match=r"holds canonical-00000.zip but no dataset.json"):
        write_dataset(folder, PLAN)
    manifest = json.loads((made.directory / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**manifest, "fingerprint": "another"}))
    with pytest.raises(InputError, match="another version of the robot's description"):
        write_dataset(folder, PLAN)


@pytest.mark.parametrize(
    "member", ["rgb/010.png", "alpha/000.png", "depth/005.png", "link_id/003.png", "q.npy", "K.npy"]
)
def test_corrupt_shard_is_named_and_skipped_on_request_only(made: Dataset, tmp_path: Path, member: str) -> None:
    folder = copy_of(made, tmp_path / "broken")
    shard = folder / "train-00001.zip"
    data = bytearray(shard.read_bytes())
    with zipfile.ZipFile(shard) as archive:
        info = archive.getinfo(member)
    data[info.header_offset + 30 + len(member) + info.file_size // 2] ^= 0x10  # one bit of what is stored
    shard.write_bytes(data)
    with pytest.raises(DatasetError, match=r"train-00001.zip: corrupt shard"):
        Dataset.open(folder).frames("train")
    kept = Dataset.open(folder, skip_corrupt=True).frames("train")
    assert torch.equal(kept.rgb, made.frames("train").rgb[: len(kept)])
    assert len(kept) == 46  # 24 configurations of the first shard, less one for validation


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.999])
def test_shard_cut_short_is_corrupt(made: Dataset, tmp_path: Path, keep: float) -> None:
    folder = copy_of(made, tmp_path / "cut")
    shard = folder / "test-00000.zip"
    data = shard.read_bytes()
    shard.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(DatasetError, match=r"test-00000.zip: corrupt shard"):
        Dataset.open(folder).frames("test")
    with pytest.raises(DatasetError, match=r"test-00000.zip: corrupt shard"):
        Dataset.open(folder).link_poses("test")


def test_unfinished_set_says_how_to_go_on(made: Dataset, tmp_path: Path) -> None:
    folder = copy_of(made, tmp_path / "part")
    (folder / "train-00001.zip").unlink()
    with pytest.raises(DatasetError, match=r"1 train shard\(s\) are missing \(train-00001.zip"):
        Dataset.open(folder).frames("train")
    assert len(Dataset.open(folder).frames("test")) == 6
    assert len(Dataset.open(folder, skip_corrupt=True).frames("train")) == 46


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "broken"),
        ("{}", "broken"),
        ('{"format_version": 9}', "format version 9.*update kinesplat"),
        ('{"format_version": 1, "plan": {"robot": "x"}}', "broken"),
    ],
)
def test_broken_manifest_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(DatasetError, match=message):
        Dataset.open(tmp_path)


def test_folder_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no data set"):
        Dataset.open(tmp_path)


def test_missing_surface_and_unknown_part_are_named(made: Dataset, tmp_path: Path, unchecked_types: None) -> None:
    folder = copy_of(made, tmp_path / "bare")
    (folder / "surface.npz").unlink()
    with pytest.raises(DatasetError, match=r"surface.npz: missing or corrupt"):
        _ = Dataset.open(folder).surface
    with pytest.raises(InputError, match="unknown part of a data set 'tests': did you mean 'test'"):
        made.frames("tests")


def test_shard_is_readable_with_standard_tools(made: Dataset) -> None:
    with zipfile.ZipFile(made.directory / "test-00000.zip") as archive:
        assert archive.testzip() is None
        names = set(archive.namelist())
        with archive.open("K.npy") as member:
            assert np.load(member).shape == (6, 3, 3)
    assert {"shard.json", "q.npy", "T_cam_world.npy", "rgb/005.png", "alpha/000.png", "depth/000.png"} <= names


def test_depth_and_links_at_their_extremes(made: Dataset, tmp_path: Path) -> None:
    """Nothing in view, thousands of metres away, and more links than a byte counts."""
    frames = made.frames("test")
    depth, link_id = torch.zeros(len(frames), 24, 24), torch.full((len(frames), 24, 24), -1, dtype=torch.int16)
    depth[1], depth[2, 0, 0], depth[2, 0, 1] = 5000.0, 0.02, 900.0
    link_id[1], link_id[2] = 300, 255
    light = torch.rand(len(frames), 7, dtype=torch.float64)
    strange = replace(frames, depth=depth, link_id=link_id, light=light)
    write_shard(tmp_path / "x.zip", strange, {}, {})
    back, header = read_shard(tmp_path / "x.zip")
    assert header["images"] == len(frames)
    assert torch.equal(back.link_id, link_id)
    assert torch.equal(back.light, light)
    assert torch.equal(back.depth > 0, depth > 0)
    assert ((back.depth - depth).abs().flatten(1).amax(1) <= depth.flatten(1).amax(1) / 65_000).all()


def test_lights_are_kept_with_their_images(tmp_path: Path) -> None:
    plan = replace(PLAN, configurations=2, test_configurations=0, canonical_views=1, light="random")
    frames = write_dataset(tmp_path / "lit", plan).frames("train")
    assert len(torch.unique(frames.light, dim=0)) == 4
    again = capture_frames(Capture(load_robot(plan), samples=2, light="random"), frames.q, frames.camera, frames.light)
    assert torch.equal(again.rgb, frames.rgb)


def test_plans_that_make_no_sense_are_refused() -> None:
    for wrong in ({"configurations": 0}, {"views": 0}, {"size": 4}, {"canonical_views": 0}, {"samples": 0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            replace(PLAN, **wrong)
    with pytest.raises(InputError, match="span is"):
        replace(PLAN, span=(1.0, 0.5))
    with pytest.raises(InputError, match="near is 2"):
        replace(PLAN, near=2.0)


def test_processes_and_device_are_checked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="processes is 0"):
        write_dataset(tmp_path / "x", PLAN, processes=0)
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="finds no CUDA device"):
            write_dataset(tmp_path / "y", PLAN, device="cuda")


def test_gl_renderer_is_the_one_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--configurations", "1", "--size", "8", "--samples", "2", "--renderer", "gl"]
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, "kinearm", "-o", tmp_path / "x", *options)
    assert end.value.code == 2  # only the gl renderer minds that 2 is no square number
    assert Dataset.open(tmp_path / "x").plan.renderer == "gl"


def test_plan_covers_every_configuration_once() -> None:
    plan = Plan(robot="kinearm", configurations=10_000, views=12)
    shards = plan.shards("train")
    assert sum(s.configurations for s in shards) == 10_000
    assert sum(s.images for s in shards) == 120_000
    assert len({s.file_name for s in plan.shards()}) == len(plan.shards())
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    seeds = {plan.generator(s).initial_seed() for s in [*shards, Shard("test", 0, 4, 12)]}
    assert len(seeds) == len(shards) + 1


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["kinesplat", "dataset", *map(str, arguments)])
    main()


def test_command_line_takes_every_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--configurations 2 --views 1 --test-configurations 1 --test-views 2 --canonical-views 1 --size 16"
    more = "--light world --samples 1 --span 0.4 0.6 --near 0 --seed 7 --processes 1 --device cpu --package a=b"
    command(monkeypatch, "kinearm", "-o", tmp_path / "x", *f"{options} {more}".split(), "--json", tmp_path / "x.json")
    expected = Plan(
        robot="kinearm",
        packages=(("a", "b"),),
        configurations=2,
        views=1,
        test_configurations=1,
        test_views=2,
        canonical_views=1,
        size=16,
        light="world",
        samples=1,
        span=(0.4, 0.6),
        near=0.0,
        seed=7,
    )
    assert Dataset.open(tmp_path / "x").plan == expected
    result = json.loads((tmp_path / "x.json").read_text())
    assert (result["images"], result["configurations"], result["shards"], result["rejected"]) == (5, 4, 3, 0)
    assert result["bytes"] == sum(path.stat().st_size for path in (tmp_path / "x").glob("*.zip"))
    said = capsys.readouterr().out
    assert "5 images of 4 configurations" in said
    assert "the description has no shapes that can collide" in said


def test_command_line_tells_of_collisions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "chain.xml").write_text(CHAIN)
    options = ["--configurations", "30", "--views", "1", "--canonical-views", "1", "--size", "8", "--samples", "1"]
    command(monkeypatch, tmp_path / "chain.xml", "-o", tmp_path / "free", *options)
    data, robot = Dataset.open(tmp_path / "free"), load_description(tmp_path / "chain.xml")
    assert f"{data.rejected()} configurations rejected (1 pairs" in capsys.readouterr().out
    assert data.rejected() > 0
    assert data.plan.test_configurations == 3
    collision = SelfCollision(robot)
    assert all(collision.free(data.frames(part).q).all() for part in ("train", "test"))
    command(monkeypatch, tmp_path / "chain.xml", "-o", tmp_path / "all", "--allow-collisions", *options)
    assert "not looked for, as asked" in capsys.readouterr().out
    assert not collision.free(Dataset.open(tmp_path / "all").frames("train").q).all()


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot create the folder"):
        write_dataset(tmp_path / "file" / "data", PLAN)
