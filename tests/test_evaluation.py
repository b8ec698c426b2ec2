"""Metrics against closed forms and scikit-image; the table's rows against what they must be."""

import json
import math
import sys
import types
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("mujoco_warp", reason="needs mujoco_warp (pip install kinesplat[render])")

from kinesplat import zoo
from kinesplat.appearance.field import AppearanceField
from kinesplat.camera import Camera
from kinesplat.dataset.container import Dataset
from kinesplat.dataset.generate import write_dataset
from kinesplat.dataset.lights import WORLD_LIGHT
from kinesplat.dataset.plan import Plan
from kinesplat.description import load_description
from kinesplat.errors import InputError
from kinesplat.evaluation.baselines import nearest_images, nearest_inputs, random_images, without_appearance
from kinesplat.evaluation.figure import TITLE_PX, figure
from kinesplat.evaluation.lpips import BACKBONE, lpips_distance
from kinesplat.evaluation.metrics import chamfer, mask_iou, psnr, ssim
from kinesplat.evaluation.table import Evaluation, evaluate
from kinesplat.rasterizer import Render
from kinesplat.self_model import SelfModel
from kinesplat.skinning import SkinningField
from kinesplat.training.default import DefaultSettings, prepared

SIZE = 48
LIGHT = torch.tensor(WORLD_LIGHT)
PLAN = Plan(
    robot="kinearm",
    configurations=12,
    views=2,
    test_configurations=3,
    test_views=2,
    canonical_views=1,
    size=SIZE,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data") / "kinearm", PLAN)


@pytest.fixture(scope="module")
def model() -> SelfModel:
    return zoo.load("kinearm")


@dataclass
class Known:
    """Answers with the truth of the configuration and camera that it is asked for."""

    data: Dataset

    def render(self, q: Tensor, camera: Camera) -> Render:
        test = self.data.frames("test", geometry=False)
        row = (test.camera.T_cam_world - camera.T_cam_world).abs().flatten(1).amax(1).argmin()
        assert torch.allclose(test.q[row].float(), q)
        return Render(test.rgb[row] / 255.0, test.alpha[row] / 255.0, None, None, None)


@pytest.fixture(scope="module")
def evaluation(data: Dataset, model: SelfModel) -> Evaluation:
    return evaluate({"ours": model, "known": Known(data)}, data, pictures=2)


def pair(seed: int, size: int = 60) -> tuple[Tensor, Tensor]:
    """Two different smooth pictures with a common border of 12 px."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(2, 3, 8, 8, generator=generator)
    images = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1).permute(0, 2, 3, 1)
    images[1] = (0.7 * images[1] + 0.3 * images[0]).clamp(0, 1)
    inside = torch.zeros(size, size, dtype=torch.bool)
    inside[12:-12, 12:-12] = True
    images[1] = torch.where(inside[..., None], images[1], images[0])
    return images[0], images[1]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ssim_and_psnr_are_those_of_scikit_image(seed: int) -> None:
    metrics = pytest.importorskip("skimage.metrics", reason="needs scikit-image")
    a, b = pair(seed)
    expected = metrics.structural_similarity(
        a.double().numpy(),
        b.double().numpy(),
        channel_axis=-1,
        data_range=1.0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )[1].mean()  # over all pixels: near the border both are 1, since the pictures agree there
    assert 0.1 < expected < 0.95
    assert float(ssim(a, b)) == pytest.approx(expected, abs=2e-5)
    assert float(psnr(a, b)) == pytest.approx(
        metrics.peak_signal_noise_ratio(b.numpy(), a.numpy(), data_range=1.0), abs=1e-3
    )


def test_psnr_in_closed_form() -> None:
    truth = torch.full((4, 10, 10, 3), 0.5)
    rendered = truth + torch.tensor([0.1, 0.01, 0.0, 2.0])[:, None, None, None]
    assert torch.allclose(
        psnr(rendered, truth), torch.tensor([20.0, 40.0, 120.0, 10 * math.log10(4.0)]).double(), atol=1e-4
    )


def test_foreground_psnr_counts_only_the_foreground() -> None:
    truth, where = torch.zeros(8, 8, 3), torch.zeros(8, 8, dtype=torch.bool)
    where[:2] = True
    rendered = truth.clone()
    rendered[:2] += 0.1
    rendered[2:] += 0.9
    assert float(psnr(rendered, truth, where)) == pytest.approx(20.0, abs=1e-4)
    assert float(psnr(rendered, truth)) < 3.0


def test_mask_iou_in_closed_form() -> None:
    a, b = torch.zeros(10, 10), torch.zeros(10, 10)
    a[:6], b[4:] = 1.0, 0.5
    assert float(mask_iou(a, b)) == pytest.approx(2 / 10)
    assert float(mask_iou(a, 0.49 * b)) == 0.0
    assert float(mask_iou(torch.zeros(4, 4), torch.zeros(4, 4))) == 1.0


def test_chamfer_in_closed_form() -> None:
    grid = torch.cartesian_prod(torch.arange(5.0), torch.arange(5.0), torch.zeros(1))
    assert chamfer(grid, grid) == 0.0
    assert chamfer(grid + torch.tensor([0.0, 0.0, 0.3]), grid) == pytest.approx(2 * 0.09)
    assert chamfer(torch.zeros(1, 3), torch.tensor([[0.0, 0.0, 2.0], [0.0, 0.0, 1.0]])) == pytest.approx(1.0 + 2.5)
    with pytest.raises(InputError, match="0 and 25 points"):
        chamfer(torch.zeros(0, 3), grid)


def test_chamfer_of_even_samples_is_what_their_density_allows() -> None:
    """The floor that the docstring states: A / (pi n) + A / (pi m) for independent samples of one surface."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.cat([torch.rand(n, 2, generator=generator), torch.zeros(n, 1)], dim=1) for n in (4000, 9000))
    assert chamfer(a, b) == pytest.approx((1 / 4000 + 1 / 9000) / math.pi, rel=0.1)


def test_rows_of_the_table(evaluation: Evaluation) -> None:
    rows = {row.name: row for row in evaluation.rows}
    assert list(rows) == [
        "ours",
        "known",
        "ours: never moves (canonical splats)",
        "nearest of 24 images",
        "nearest of 24 by input (prev)",
        "random image",
    ]
    ours, known = rows["ours"], rows["known"]
    assert known.psnr_db == pytest.approx(120.0)
    assert known.ssim == pytest.approx(1.0)
    assert known.mask_iou == 1.0
    assert known.chamfer_mm2 is None
    assert 22.0 < ours.psnr_db < 45.0
    assert ours.worst_psnr_db <= ours.psnr_db
    assert ours.foreground_psnr_db < ours.psnr_db
    assert ours.mask_iou > 0.9
    assert 0.0 < ours.chamfer_mm2 < 100.0


def test_the_model_beats_every_baseline_and_the_oracle_the_weaker_look_ups(evaluation: Evaluation) -> None:
    rows = list(evaluation.rows)
    assert all(rows[0].psnr_db > row.psnr_db + 3.0 for row in rows[2:])
    nearest, by_input, chance = rows[-3:]
    assert nearest.psnr_db >= by_input.psnr_db
    assert nearest.psnr_db >= chance.psnr_db
    moved = rows[2]
    assert moved.chamfer_mm2 > 20.0 * rows[0].chamfer_mm2


def test_written_forms_hold_every_row(evaluation: Evaluation) -> None:
    data = json.loads(json.dumps(evaluation.to_json(), allow_nan=False))
    assert data["data"]["images"] == 6
    assert data["data"]["configurations"] == 3
    assert [row["name"] for row in data["rows"]] == [row.name for row in evaluation.rows]
    text = evaluation.to_markdown()
    assert all(f"| {row.name} |" in text for row in evaluation.rows)
    assert f"{evaluation.rows[0].psnr_db:.2f}" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_figure_shows_truth_rows_and_error(evaluation: Evaluation) -> None:
    picture = figure(evaluation)
    columns = 2 + len(evaluation.rows)
    assert picture.shape == (TITLE_PX + 2 * SIZE, columns * SIZE, 3)
    cells = picture[TITLE_PX:].reshape(2, SIZE, columns, SIZE, 3)
    assert torch.equal(cells[0, :, 0], evaluation.truth[0])
    assert torch.equal(cells[1, :, 2], evaluation.truth[1])  # the row that knows the truth
    expected = 1.0 - 4.0 * (evaluation.rows[0].pictures[0] - evaluation.truth[0]).abs().mean(-1)
    assert torch.allclose(cells[0, :, -1, :, 0], expected.clamp(0, 1), atol=1e-6)


def test_few_images_and_no_baselines(data: Dataset, model: SelfModel) -> None:
    short = evaluate({"ours": model}, data, limit=3, baselines=False)
    assert [row.name for row in short.rows] == ["ours"]
    assert short.facts["images"] == 3


def test_model_of_another_robot_is_refused(data: Dataset) -> None:
    with pytest.raises(InputError, match=r"model panda has the joints joint1.*the images in kinearm are of kinearm"):
        evaluate({"panda": zoo.load("franka_emika_panda")}, replace(data, directory=Path("kinearm")))


def test_look_ups_find_what_is_in_the_library(data: Dataset, model: SelfModel) -> None:
    library = data.frames("train")
    some = library.select([7, 0, 3])
    assert nearest_images(library, some).tolist() == [7, 0, 3]
    assert nearest_inputs(library, some, model.tree).tolist() == [7, 0, 3]
    assert len(set(random_images(library, 500, 0).tolist())) == len(library)


def test_no_deform_is_the_model_without_its_appearance_field(data: Dataset, model: SelfModel) -> None:
    assert without_appearance(model) is None
    shaded = with_fields(model.subsample(500))
    rows = {row.name: row for row in evaluate({"paper": shaded}, data, limit=2).rows}
    plain = rows["paper: no deform (field off)"]
    assert (
        plain.psnr_db
        == evaluate({"x": replace(shaded, appearance=None)}, data, limit=2, baselines=False).rows[0].psnr_db
    )
    assert plain.psnr_db != rows["paper"].psnr_db
    assert plain.chamfer_mm2 == pytest.approx(rows["paper"].chamfer_mm2)  # looks change, places do not


def with_fields(model: SelfModel) -> SelfModel:
    """The splats in the canonical configuration, with untrained skinning and some appearance field."""
    posed, small = model.posed(model.tree.q_canonical.float()), {"layers": 2, "width": 16, "frequencies": 4}
    parameters = replace(model.parameters, means=posed.means, quats=posed.quats, sh=posed.sh)
    appearance = AppearanceField.around(posed.means, model.tree, posed.sh.shape[1], **small)
    torch.nn.init.normal_(appearance.network.last.bias, std=0.3)
    skinning = SkinningField.around(posed.means, len(model.tree.link_names), **small)
    return replace(model, parameters=parameters, skinning=skinning, appearance=appearance)


def test_lpips_says_why_it_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    assert lpips_distance() == (None, "the lpips package is not installed")
    monkeypatch.setitem(sys.modules, "lpips", types.ModuleType("lpips"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    distance, reason = lpips_distance()
    assert distance is None
    assert BACKBONE in reason


def test_lpips_gets_images_as_it_expects_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In [-1, 1], channels first, one image a batch."""
    seen: list[Tensor] = []

    class Network(torch.nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()
            assert net == "alex"

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            seen.extend([a, b])
            return (a - b).abs().mean()[None, None, None, None]

    package = types.ModuleType("lpips")
    package.LPIPS = Network
    monkeypatch.setitem(sys.modules, "lpips", package)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / BACKBONE).write_bytes(b"")
    distance, reason = lpips_distance()
    assert reason == ""
    assert distance(torch.zeros(6, 5, 3), torch.ones(6, 5, 3)) == pytest.approx(2.0)
    assert seen[0].shape == (1, 3, 6, 5)
    assert (float(seen[0].min()), float(seen[1].max())) == (-1.0, 1.0)


def test_command_line_writes_all_three_files(
    data: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kinesplat.cli import main

    out = tmp_path / "table"
    options = ["evaluate", "kinearm", "--dataset", str(data.directory), "-o", str(out), "--images", "2"]
    monkeypatch.setattr(sys, "argv", ["kinesplat", *options, "--json", str(tmp_path / "x.json")])
    main()
    assert {p.name for p in out.iterdir()} == {"evaluation.json", "evaluation.md", "figure.png"}
    assert (out / "evaluation.json").read_text() == (tmp_path / "x.json").read_text()
    assert "| kinearm |" in capsys.readouterr().out
    assert np.isfinite([row["psnr_db"] for row in json.loads((tmp_path / "x.json").read_text())["rows"]]).all()


def test_models_are_shown_under_the_lights_of_the_pictures(model: SelfModel, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "lights", replace(PLAN, configurations=1, views=1, light="random"))
    world = prepared(SelfModel.from_description(load_description("kinearm"), n=1500), DefaultSettings(), LIGHT)
    under, fixed = evaluate({"under": world}, data, baselines=False).rows[0].psnr_db, table_without_lights(world, data)
    assert under > fixed + 1.0
    headlight = evaluate({"headlight": model}, data, baselines=False)  # cannot be relit, and is shown as it is
    assert headlight.rows[0].psnr_db < under


def table_without_lights(model: SelfModel, data: Dataset) -> float:
    """The PSNR of a model that keeps its own light."""

    @dataclass
    class Fixed:
        def render(self, q: Tensor, camera: Camera) -> Render:
            return model.render(q, camera)

    return evaluate({"fixed": Fixed()}, data, baselines=False).rows[0].psnr_db
