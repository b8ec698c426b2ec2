"""SAM 2 at tiny size: gradients, folders, prompt points of a self-model."""

import json
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from kinesplat import cli
from kinesplat.camera import Camera
from kinesplat.errors import BackendError, InputError
from kinesplat.files import write_png
from kinesplat.imagination.masks import POINTS, prompt_points, robot_mask
from kinesplat.self_model import SelfModel
from kinesplat.vision.segment import SAM_2, Segmenter

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    torch.manual_seed(0)
    backbone = transformers.Sam2HieraDetConfig(
        hidden_size=8,
        image_size=[128, 128],
        embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 1, 1, 1],
        blocks_per_stage=[1, 1, 2, 1],
        window_size_per_stage=[8, 4, 4, 2],
        global_attention_blocks=[3],
        window_positional_embedding_background_size=[4, 4],
    )
    vision = transformers.Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[64, 32, 16, 8],
        backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]],
        fpn_hidden_size=32,
    )
    config = transformers.Sam2Config(
        vision_config=vision,
        prompt_encoder_config=transformers.Sam2PromptEncoderConfig(
            hidden_size=32, image_size=128, mask_input_channels=4
        ),
        mask_decoder_config=transformers.Sam2MaskDecoderConfig(
            hidden_size=32, mlp_dim=16, num_attention_heads=2, iou_head_hidden_dim=8, iou_head_depth=2
        ),
    )
    model = transformers.Sam2Model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # as it is initialised, points hardly matter
    return Segmenter(model)


def test_masks_have_the_size_of_the_picture_and_depend_on_the_points(segmenter: Segmenter) -> None:
    image = torch.rand(40, 56, 3)
    points, on = torch.tensor([[20.0, 10.0], [50.0, 30.0]]), torch.tensor([True, False])
    mask = segmenter.mask(image, points, on)
    assert mask.shape == (40, 56)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    logits = segmenter.logits(image, points, on)
    assert torch.equal(mask, (logits > 0).float())
    other = segmenter.logits(image, points.flip(0), on)
    assert (logits - other).abs().max() > 1e-6


def test_gradients_reach_picture_and_weights(segmenter: Segmenter) -> None:
    image = torch.rand(32, 32, 3, requires_grad=True)
    segmenter.logits(image, torch.tensor([[16.0, 16.0]]), torch.tensor([True])).square().mean().backward()
    assert image.grad is not None
    assert image.grad.abs().max() > 0
    moved = [p.grad is not None and bool(p.grad.abs().max() > 0) for p in segmenter.model.parameters()]
    segmenter.model.zero_grad(set_to_none=True)
    assert sum(moved) > 0.5 * len(moved)


@pytest.mark.usefixtures("no_hub")
def test_points_reach_the_model_where_they_are(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its prompt encoder embeds is the point in the model's own picture, the middle of a pixel at +0.5."""
    seen: list[torch.Tensor] = []
    embed = type(segmenter.model.prompt_encoder.shared_embedding).forward
    monkeypatch.setattr(
        type(segmenter.model.prompt_encoder.shared_embedding),
        "forward",
        lambda self, points, shape=None: seen.append(points) or embed(self, points, shape),
    )
    segmenter.mask(torch.rand(64, 32, 3), torch.tensor([[8.0, 16.0], [1.0, 63.0]]), torch.tensor([True, False]))
    prompts = next(points for points in seen if points.shape[-2:] == (3, 2))  # and one that is none
    torch.testing.assert_close(prompts[0, 0, :2], torch.tensor([[32.0, 32.0], [4.0, 126.0]]))


@pytest.mark.usefixtures("no_hub")
def test_written_and_read(segmenter: Segmenter, tmp_path: Path) -> None:
    segmenter.model.save_pretrained(str(tmp_path / "sam"))
    image, points, on = torch.rand(32, 32, 3), torch.tensor([[16.0, 16.0]]), torch.tensor([True])
    read = Segmenter.from_pretrained(tmp_path / "sam")
    torch.testing.assert_close(read.logits(image, points, on), segmenter.logits(image, points, on))
    with pytest.raises(BackendError, match=f"hf download {SAM_2}"):
        Segmenter.from_pretrained()
    with pytest.raises(InputError, match="inside the picture"):
        read.mask(image, torch.tensor([[33.0, 3.0]]), on)
    with pytest.raises(InputError, match="0 of 1 points"):
        read.mask(image, points, ~on)


def test_points_lie_on_the_robot_and_beside_it(kinearm: SelfModel, segmenter: Segmenter) -> None:
    q = kinearm.tree.q_canonical.float()
    camera = Camera.look_at((0.9, 0.7, 0.6), (0.1, 0.0, 0.25), width=96, height=80)
    points, on = prompt_points(kinearm, q, camera)
    out = kinearm.render(q, camera, outputs=("alpha", "link_id"))
    assert out.alpha is not None
    assert out.link_id is not None
    x, y = points.long().T
    assert (out.alpha[y[on], x[on]] > 0.5).all()
    assert (out.alpha[y[~on], x[~on]] < 0.01).all()
    assert int(on.sum()) == int((~on).sum()) == POINTS
    assert len(out.link_id[y[on], x[on]].unique()) >= 4
    behind = Camera.look_at((5.0, 0.0, 0.2), (6.0, 0.0, 0.2), width=96, height=80)
    with pytest.raises(InputError, match="does not see the robot"):
        prompt_points(kinearm, q, behind)


def test_a_mask_that_is_not_the_robot_s_is_refused(
    kinearm: SelfModel, segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    q = kinearm.tree.q_canonical.float()
    camera = Camera.look_at((0.9, 0.7, 0.6), (0.1, 0.0, 0.25), width=96, height=80)
    alpha = kinearm.render(q, camera, outputs=("alpha",)).alpha
    assert alpha is not None
    arm, holed, cable = alpha.detach() > 0.5, alpha.detach() > 0.5, torch.zeros(80, 96, dtype=torch.bool)
    cable[:4, :48] = True
    holed[arm.nonzero()[:, 0].float().quantile(0.5).int() :, 48] = False
    finger = arm & (torch.arange(80)[:, None] < arm.nonzero()[:, 0].float().quantile(0.1))
    masks = iter([holed | cable, finger, torch.ones(80, 96, dtype=torch.bool), ~arm])
    monkeypatch.setattr(Segmenter, "mask", lambda *_: next(masks).float())
    picture = torch.rand(80, 96, 3)
    assert torch.equal(robot_mask(segmenter, kinearm, picture, q, camera) > 0.5, arm | cable)
    for words in (r"covers \d% of the", "100% of .* times its area", "covers 0% of"):
        with pytest.raises(InputError, match=f"not the robot's: .*{words}"):
            robot_mask(segmenter, kinearm, picture, q, camera)


def test_the_command_takes_what_the_segmenter_masks_out_of_the_backdrop(
    kinearm: SelfModel,
    segmenter: Segmenter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """A red cable beside the arm, which the self-model does not know, but the mask does."""
    camera = Camera.look_at((0.9, 0.7, 0.6), (0.1, 0.0, 0.25), width=48, height=40)
    q = kinearm.tree.q_canonical.float()
    out = kinearm.render(q, camera, (0.5, 0.5, 0.5), outputs=("rgb", "alpha"))
    assert out.rgb is not None
    assert out.alpha is not None
    picture, cable = out.rgb.clamp(0.0, 1.0), torch.zeros(40, 48, dtype=torch.bool)
    cable[4:8, 2:40] = True
    picture[cable] = torch.tensor([1.0, 0.0, 0.0])
    alpha, seen = out.alpha, []

    def masked(self: Segmenter, image: torch.Tensor, points: torch.Tensor, on: torch.Tensor) -> torch.Tensor:
        x, y = points.long().T
        assert (alpha[y[on], x[on]] > 0.5).all()
        torch.testing.assert_close(image, picture, atol=1 / 255, rtol=0)
        return ((alpha > 0.1) | cable).float()

    def imagined(*given: object, backdrop: torch.Tensor, **named: object) -> None:
        seen.append(backdrop)
        raise InputError("the backdrop was seen")

    monkeypatch.setattr(Segmenter, "mask", masked)
    monkeypatch.setattr("kinesplat.commands.imagine.imagine_motion", imagined)
    segmenter.model.save_pretrained(str(tmp_path / "sam"))
    write_png(tmp_path / "now.png", picture)
    (tmp_path / "camera.json").write_text(json.dumps(camera.to_json()))
    words = ["kinesplat", "imagine", "kinearm", str(tmp_path / "now.png"), "wave", "-o", str(tmp_path / "out")]
    words += ["--camera", str(tmp_path / "camera.json"), "--video", str(tmp_path)]
    words += ["--segmenter", str(tmp_path / "sam")]
    for more, said in (
        ([], "--segmenter needs --q-init"),
        (["--q-init", *map(str, q.tolist())], "the backdrop was seen"),
    ):
        with patch("sys.argv", [*words, *more]), pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2
        assert said in capsys.readouterr().err
    (backdrop,) = seen
    assert backdrop.shape == (40, 48, 3)
    torch.testing.assert_close(backdrop, torch.full_like(backdrop, 0.5), atol=0.03, rtol=0)
