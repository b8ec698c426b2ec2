"""`kinesplat train` and `ks.train`: from a data set or a robot to a model file; every flag."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_cli import kinesplat, one_line

import kinesplat as ks
from kinesplat.dataset.container import Dataset
from kinesplat.dataset.generate import write_dataset
from kinesplat.dataset.plan import Plan
from kinesplat.errors import InputError
from kinesplat.self_model import SelfModel
from kinesplat.training import default, recipes
from kinesplat.training.default import DefaultSettings
from kinesplat.training.recipes import TrainingOptions, work_folder
from kinesplat.training.splat_optimizer import Rates

SMALL = DefaultSettings(start=300, gaussians=350, rounds=1, pictures=2, validate_every=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of the packaged arm: 20 small pictures to train on, of which one configuration is for validation."""
    pytest.importorskip("mujoco_warp")
    folder = tmp_path_factory.mktemp("data") / "kinearm"
    write_dataset(
        folder, Plan("kinearm", configurations=20, views=1, test_configurations=1, canonical_views=1, size=48)
    )
    return folder


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "DefaultSettings", lambda: SMALL)


def test_a_data_set_becomes_a_model(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    flags = ("--steps", 8, "--seed", 5, "--device", "cpu", "--json", tmp_path / "r.json")
    result = kinesplat("train", data, "-o", out, *flags)
    assert result.returncode == 0, result.stderr
    assert f"wrote {out}: " in result.stdout
    report = json.loads((tmp_path / "r.json").read_text())
    model = SelfModel.load(out)
    assert report["steps"] == model.provenance["steps"] == 8
    assert report["gaussians"] == len(model.parameters) == model.provenance["gaussians"]
    assert (report["recipe"], report["seed"], report["light"], report["images"]) == ("default", 5, "headlight", 20)
    assert {"checkpoint.safetensors", "log.csv"} <= {p.name for p in work_folder(out).iterdir()}
    frames = Dataset.open(data).frames("validation", geometry=False)
    assert default.validate(model, frames) == pytest.approx(report["validation_psnr_db"], abs=0.02)


def test_as_many_splats_as_asked_for(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    assert kinesplat("train", data, "-o", out, "--steps", 2, "--gaussians", 400, "--degree", 1).returncode == 0
    parameters = SelfModel.load(out).parameters
    assert 350 < len(parameters) <= 400
    assert parameters.sh.shape[1:] == (4, 3)
    paper = kinesplat("train", data, "-o", out, "--recipe", "paper", "--steps", 2, "--degree", 2)
    assert "--gaussians and --degree are for recipe default" in one_line(paper)
    assert "--gaussians is 0" in one_line(kinesplat("train", data, "-o", out, "--gaussians", 0))


def test_resume_goes_on_where_the_run_was(data: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    for steps, out in ((12, whole), (6, cut)):
        assert kinesplat("train", data, "-o", out, "--steps", steps).returncode == 0
    assert kinesplat("train", data, "-o", cut, "--steps", 12, "--resume").returncode == 0
    assert SelfModel.load(cut).provenance["steps"] == 12
    steps = [row.split(",")[0] for row in (work_folder(cut) / "log.csv").read_text().splitlines()[1:]]
    assert steps[0] == "4"
    assert steps[-1] == "12"
    fresh = tmp_path / "fresh.safetensors"
    assert kinesplat("train", data, "-o", fresh, "--steps", 12, "--resume").returncode == 0
    assert torch.equal(SelfModel.load(fresh).parameters.means, SelfModel.load(whole).parameters.means)


def test_minutes_end_a_run(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patient = replace(SMALL, patience=10**6)  # ten looks at validation pictures that improve no more end it sooner
    monkeypatch.setattr(recipes, "DefaultSettings", lambda: patient)
    result = kinesplat("train", data, "-o", tmp_path / "m.safetensors", "--minutes", 0.02)
    assert result.returncode == 0
    made = SelfModel.load(tmp_path / "m.safetensors").provenance
    assert made["budget"] == {"steps": None, "minutes": 0.02}
    assert 1.2 <= made["training_seconds"] < 60.0


def test_pictures_that_improve_no_more_end_a_run(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    still = replace(SMALL, rates=Rates(*(0.0,) * 5), rounds=0, patience=3)
    monkeypatch.setattr(recipes, "DefaultSettings", lambda: still)
    assert kinesplat("train", data, "-o", tmp_path / "m.safetensors", "--minutes", 5).returncode == 0
    assert SelfModel.load(tmp_path / "m.safetensors").provenance["steps"] == 4 * (1 + 3)  # the first look is the best


def test_a_robot_is_rendered_first(tmp_path: Path) -> None:
    pytest.importorskip("mujoco_warp")
    out = tmp_path / "arm.safetensors"
    result = kinesplat("train", "kinearm", "-o", out, "--steps", 4, "--configurations", 20, "--views", 1)
    assert result.returncode == 0, result.stderr
    images = Dataset.open(work_folder(out) / "images")
    assert (images.plan.configurations, images.plan.views, images.plan.size) == (20, 1, 256)
    assert SelfModel.load(out).provenance["robot"] == "kinearm"


def test_the_paper_recipe_gets_what_it_needs(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def paper(robot: ks.Robot, *given: object, **more: object) -> SelfModel:
        seen.update(more, **dict(zip(("canonical", "frames", "validation", "budget"), given, strict=False)))
        return SelfModel.from_description(robot, n=100)

    monkeypatch.setattr(recipes, "train_paper", paper)
    result = kinesplat("train", data, "-o", tmp_path / "m.safetensors", "--recipe", "paper", "--steps", 3, "--seed", 2)
    assert result.returncode == 0, result.stderr
    assert (len(seen["canonical"]), len(seen["frames"]), len(seen["validation"])) == (1, 19, 1)
    assert (seen["budget"].steps, seen["seed"], seen["folder"]) == (3, 2, work_folder(tmp_path / "m.safetensors"))
    assert SelfModel.load(tmp_path / "m.safetensors").provenance["recipe"] == "paper"


def test_a_skinning_field_on_request(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    result = kinesplat("train", data, "-o", out, "--steps", 2, "--skinning", "field", "--json", tmp_path / "r.json")
    assert result.returncode == 0, result.stderr
    model = SelfModel.load(out)
    assert model.skinning is not None
    assert model.provenance["skinning"] == "field"
    assert json.loads((tmp_path / "r.json").read_text())["steps"] == 2
    message = one_line(kinesplat("train", data, "-o", out, "--recipe", "paper", "--skinning", "links"))
    assert "knows no skinning 'links'" in message


def test_train_without_a_file_leaves_nothing(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = ks.train(data, options=TrainingOptions(steps=4, default=SMALL))
    assert isinstance(model, ks.SelfModel)
    assert not list(tmp_path.iterdir())


def test_mistakes_cost_one_line(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    assert "steps is 0" in one_line(kinesplat("train", data, "-o", out, "--steps", 0))
    assert "minutes is -1" in one_line(kinesplat("train", data, "-o", out, "--minutes", -1))
    assert "it is a folder" in one_line(kinesplat("train", data, "-o", tmp_path, "--steps", 1))
    assert "cannot create the folder" in one_line(kinesplat("train", data, "-o", tmp_path / "no" / "m.safetensors"))
    assert "without dataset.json" in one_line(kinesplat("train", tmp_path, "-o", out))
    assert "unknown robot" in one_line(kinesplat("train", "nobody", "-o", out))
    assert "NAME=FOLDER" in one_line(kinesplat("train", data, "-o", out, "--package", "x"))
    broken = tmp_path / "broken"
    shutil.copytree(data, broken)
    next(iter(sorted(broken.glob("train-*")))).write_bytes(b"x")
    assert "train-00000" in one_line(kinesplat("train", broken, "-o", out))


@pytest.mark.usefixtures("unchecked_types")
def test_wrong_arguments_are_named(data: Path) -> None:
    with pytest.raises(InputError, match="resume needs out"):
        ks.train(data, resume=True)
    with pytest.raises(InputError, match="unknown recipe 'papr': did you mean 'paper'"):
        ks.train(data, recipe="papr")  # type: ignore[arg-type]
