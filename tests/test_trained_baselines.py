"""No deform and K-planes trained by `kinesplat evaluate --train-baselines`: rows, figure, and runs that go on."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_cli import kinesplat

pytest.importorskip("mujoco_warp", reason="needs mujoco_warp (pip install kinesplat[render])")

from kinesplat.dataset.container import Dataset
from kinesplat.dataset.generate import write_dataset
from kinesplat.dataset.plan import Plan
from kinesplat.errors import ModelFileError
from kinesplat.evaluation import trained
from kinesplat.evaluation.kplanes import KPlanesModel
from kinesplat.evaluation.trained import K_PLANES, NO_DEFORM, train_baselines
from kinesplat.files import read_image
from kinesplat.training import paper
from kinesplat.training.checkpoint import read_checkpoint, write_checkpoint
from kinesplat.training.loop import Budget
from kinesplat.training.paper import CHECKPOINT, PaperSettings

SIZE = 40
RATES = {"planes": 1e-3, "decoder": 1e-3}
SMALL = PaperSettings(gaussians=300, canonical_steps=20, skinning_steps=5, layers=2, width=16)
SMALL = replace(SMALL, joint=replace(SMALL.joint, validate_every=2))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    plan = Plan("kinearm", configurations=20, views=1, test_configurations=2, canonical_views=4, size=SIZE)
    return write_dataset(tmp_path_factory.mktemp("data") / "kinearm", plan)


def test_evaluate_trains_the_baselines_once(data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained, "PaperSettings", lambda: SMALL)
    flags = ("kinearm", "--dataset", data.directory, "-o", tmp_path / "out", "--train-baselines", 3)
    assert kinesplat("evaluate", *flags).returncode == 0
    first = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    names = [row["name"] for row in first["rows"]]
    assert names[:4] == ["kinearm", NO_DEFORM, K_PLANES, "kinearm: never moves (canonical splats)"]
    assert read_image(tmp_path / "out" / "figure.png").shape[1] == (2 + min(6, len(names))) * SIZE

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    for module, name in ((paper, "fit_canonical"), (paper, "fit_by_chamfer")):
        monkeypatch.setattr(module, name, refuse)
    assert kinesplat("evaluate", *flags).returncode == 0
    again = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [row["psnr_db"] for row in again["rows"]] == [row["psnr_db"] for row in first["rows"]]


def test_a_killed_run_of_kplanes_ends_where_an_unbroken_one_does(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trained, "kplanes_settings", lambda _: replace(SMALL.joint, network_rates=RATES))
    whole = train_baselines(data, Budget(steps=4), tmp_path / "a", settings=SMALL)[K_PLANES]

    def write_and_die(path: Path, state: dict) -> None:
        write_checkpoint(path, state)
        if path.parent.name == "k_planes":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trained, "write_checkpoint", write_and_die)
        with pytest.raises(KeyboardInterrupt):
            train_baselines(data, Budget(steps=4), tmp_path / "b", settings=SMALL)
    assert read_checkpoint(tmp_path / "b" / "k_planes" / CHECKPOINT)["step"] == 2
    resumed = train_baselines(data, Budget(steps=4), tmp_path / "b", settings=SMALL)[K_PLANES]
    assert torch.equal(whole.parameters.means, resumed.parameters.means)
    assert isinstance(whole, KPlanesModel)
    assert isinstance(resumed, KPlanesModel)
    assert torch.equal(whole.planes.space, resumed.planes.space)


def test_a_checkpoint_of_something_else_is_no_kplanes(data: Dataset, tmp_path: Path) -> None:
    train_baselines(data, Budget(steps=2), tmp_path, settings=SMALL)
    write_checkpoint(tmp_path / "k_planes" / CHECKPOINT, {"canonical": {}})
    with pytest.raises(ModelFileError, match="no checkpoint of K-planes"):
        train_baselines(data, Budget(steps=2), tmp_path, settings=SMALL)
