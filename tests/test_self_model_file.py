"""Model files: exact round trip, refusal of anything broken, and inference without MuJoCo."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kinesplat import zoo
from kinesplat.camera import Camera
from kinesplat.description import load_description
from kinesplat.errors import InputError, ModelFileError
from kinesplat.model_file import read_model_file, write_model_file
from kinesplat.self_model import SelfModel


@pytest.fixture(scope="module")
def model() -> SelfModel:
    return SelfModel.from_description(load_description("kinearm"), n=300)


@pytest.fixture
def path(model: SelfModel, tmp_path: Path) -> Path:
    model.save(tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def header_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def rewrite(path: Path, changes: dict[str, object]) -> None:
    header = json.loads(header_of(path)["kinesplat"]) | changes
    save_file(load_file(path), path, metadata={"kinesplat": json.dumps(header)})


def test_round_trip_is_exact(model: SelfModel, path: Path) -> None:
    again = SelfModel.load(path)
    for name, value in model.parameters.tensors().items():
        assert torch.equal(getattr(again.parameters, name), value)
    assert again.parameters.sh_direction == model.parameters.sh_direction == "axis"
    assert torch.equal(again.link_index, model.link_index)
    assert again.eps2d == model.eps2d
    assert again.provenance == model.provenance
    assert again.tree.joint_names == model.tree.joint_names
    q = torch.rand(3, model.tree.dof, dtype=torch.float64)
    assert torch.equal(again.tree.forward_kinematics(q), model.tree.forward_kinematics(q))


def test_half_precision_costs_nothing_visible(model: SelfModel, tmp_path: Path, path: Path) -> None:
    half = tmp_path / "half.safetensors"
    model.save(half, half=True)
    again = SelfModel.load(half)
    assert again.parameters.sh.dtype == torch.float32
    assert half.stat().st_size < 0.7 * path.stat().st_size
    camera = Camera.look_at((0.9, -0.5, 0.6), (0.0, 0.0, 0.25), width=96, height=96)
    q = model.tree.q_canonical.float()
    with torch.no_grad():
        a, b = model.render(q, camera), again.render(q, camera)
    assert (a.rgb - b.rgb).abs().mean() < 2e-4
    assert (a.rgb - b.rgb).abs().max() < 0.03


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_cut_short(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ModelFileError, match="cut short"):
        SelfModel.load(path)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_flipped_bit(path: Path, share: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(share * len(data))] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(ModelFileError, match=r"corrupt|cut short"):
        SelfModel.load(path)


def test_newer_and_unknown_versions(path: Path) -> None:
    rewrite(path, {"format_version": 99})
    with pytest.raises(ModelFileError, match="format version 99, this kinesplat reads 1 to 2; update kinesplat"):
        SelfModel.load(path)
    rewrite(path, {"format_version": 0})
    with pytest.raises(ModelFileError, match="build the model again"):
        SelfModel.load(path)


def test_edited_header(path: Path) -> None:
    rewrite(path, {"eps2d": 0.5})
    with pytest.raises(ModelFileError, match="checksum"):
        SelfModel.load(path)


def test_other_files(tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(3)}, other)
    with pytest.raises(ModelFileError, match="not a Kinesplat self-model"):
        SelfModel.load(other)
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ModelFileError, match="no safetensors file"):
        SelfModel.load(tmp_path / "text.safetensors")
    with pytest.raises(ModelFileError, match="no such model file"):
        SelfModel.load(tmp_path / "missing.safetensors")
    with pytest.raises(ModelFileError, match="no such model file"):
        SelfModel.load(tmp_path)


@pytest.mark.parametrize("name", ["sh", "link_index", "tree.node_parent"])
def test_missing_array(path: Path, name: str) -> None:
    tensors, header = read_model_file(path)
    del tensors[name]
    write_model_file(path, tensors, {k: v for k, v in header.items() if k != "format_version"})
    with pytest.raises(ModelFileError, match=f"{name.removeprefix('tree.')}.* is missing"):
        SelfModel.load(path)


@pytest.mark.parametrize("damage", ["short", "nan", "link"])
def test_inconsistent_arrays(path: Path, damage: str, unchecked_types: None) -> None:
    tensors, header = read_model_file(path)
    if damage == "short":
        tensors["means"] = tensors["means"][:-1]
    elif damage == "nan":
        tensors["means"][3, 1] = float("nan")
    else:
        tensors["link_index"][5] = 99
    write_model_file(path, tensors, {k: v for k, v in header.items() if k != "format_version"})
    expected = {"short": "splats", "nan": "NaN", "link": "outside 0 to"}[damage]
    with pytest.raises(ModelFileError, match=expected):
        SelfModel.load(path)


def test_failed_save_leaves_the_old_file(model: SelfModel, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kinesplat.model_file.save_file", full_disk)
    with pytest.raises(InputError, match="No space left"):
        model.save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_missing_folder(model: SelfModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write"):
        model.save(tmp_path / "nowhere" / "model.safetensors")


BLOCKED = """
import sys
for name in ("mujoco", "mujoco_warp", "trimesh", "warp"):
    sys.modules[name] = None
import torch, kinesplat as ks
model = ks.SelfModel.load(sys.argv[1])
q = model.tree.q_canonical.float().requires_grad_()
out = model.render(q, ks.Camera.look_at((0.9, -0.5, 0.6), (0.0, 0.0, 0.25), width=32, height=32))
out.rgb.sum().backward()
model.subsample(50), model.posed(q), ks.zoo.load("kinearm")
assert out.alpha.max() > 0.9 and q.grad.abs().max() > 0
"""


def test_inference_needs_neither_mujoco_nor_meshes(path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", BLOCKED, str(path)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_every_packaged_model_loads_and_names_its_licence() -> None:
    assert {"franka_emika_panda", "kinearm", "ufactory_xarm7"} <= set(zoo.names())
    for name in zoo.names():
        file = zoo.FOLDER / f"{name}.safetensors"
        model, card = zoo.load(name), zoo.card(name)
        assert file.stat().st_size <= 3_000_000
        assert card["dof"] == model.tree.dof
        assert card["gaussians"] == len(model.parameters)
        assert card["licence"].split(":")[0] in ("Apache-2.0", "BSD-3-Clause")
        assert (zoo.FOLDER / f"{name}.LICENSE").stat().st_size > 200


def test_unknown_packaged_model() -> None:
    with pytest.raises(InputError, match="unknown packaged model 'kinarm': did you mean 'kinearm'"):
        zoo.load("kinarm")
