"""Words to joint values: known answers, gradients against finite differences, the command."""

import io
import json
import math
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from rich.progress import Progress
from test_clip import save_clip
from torch import Tensor

import kinesplat as ks
from kinesplat.cli import main
from kinesplat.errors import InputError
from kinesplat.files import read_image
from kinesplat.inverse import text
from kinesplat.inverse.augmentation import Augmentation
from kinesplat.inverse.priors import Priors
from kinesplat.inverse.text import TextObjective, Words, starting, text_to_q
from kinesplat.inverse.text_result import spread_of, verdict
from kinesplat.skinning import SkinningField
from kinesplat.vision.clip import ClipEncoder

STILL = Augmentation(copies=2, crop=1.0, turn=0.0, perspective=0.0, colour=0.0, backdrop=0.0)


@dataclass(frozen=True)
class Looks:
    """An encoder with a known answer: a picture is its own embedding, blurred; a sentence is a picture shown to it."""

    shown: dict[str, Tensor]
    logit_scale: float = 20.0

    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        return torch.cat([self.embed_images(self.shown[prompt]) for prompt in prompts])

    def embed_images(self, rgb: Tensor) -> Tensor:
        small = torch.nn.functional.adaptive_avg_pool2d(rgb.permute(0, 3, 1, 2), 12)
        kernel = torch.ones(3, 1, 5, 5).to(small) / 25.0
        blurred = torch.nn.functional.conv2d(small, kernel, padding=2, groups=3)
        flat = (1.0 - small).flatten(1), (1.0 - blurred).flatten(1)
        return torch.nn.functional.normalize(torch.cat(flat, dim=1), dim=-1)


@pytest.fixture(scope="module")
def arm(kinearm: ks.SelfModel) -> ks.SelfModel:
    return kinearm.subsample(800)


@pytest.fixture(scope="module")
def views(arm: ks.SelfModel) -> ks.Camera:
    points = arm.posed(arm.tree.q_canonical.float()).means
    return ks.Camera.framing(points, torch.tensor([[0.3, 1.0, 0.3], [1.0, 0.7, 0.5]]), width=48, height=48)


def picture(model: ks.SelfModel, q: Tensor, camera: ks.Camera) -> Tensor:
    rgb = model.render(q[None], camera).rgb
    assert rgb is not None
    return rgb


@pytest.fixture(scope="module")
def goals(arm: ks.SelfModel) -> dict[str, Tensor]:
    bent = torch.tensor([0.6, -0.5, 0.7, 0.0, 0.4, 0.0, 0.0])
    return {"bent": bent, "turned": torch.tensor([-0.9, 0.3, -0.5, 0.0, -0.5, 0.0, 0.0])}


def encoder_of(arm: ks.SelfModel, goals: dict[str, Tensor], camera: ks.Camera) -> Looks:
    """One view's picture stands for each word, so tests with it use that view alone."""
    return Looks({name: picture(arm, q, camera) for name, q in goals.items()})


def one(camera: ks.Camera) -> ks.Camera:
    return replace(camera, K=camera.K[:1] if camera.K.ndim == 3 else camera.K, T_cam_world=camera.T_cam_world[:1])


def test_the_configuration_behind_the_words_is_found(
    arm: ks.SelfModel, views: ks.Camera, goals: dict[str, Tensor]
) -> None:
    camera = one(views)
    encoder = encoder_of(arm, goals, camera)
    fit = text_to_q(
        arm, ["bent"], camera, encoder=encoder, q_init=torch.zeros(7), starts=4, iterations=80, augmentation=None
    )
    seen = [0, 1, 2]  # the wrist and the rolls hardly show
    start, end = (float((q - goals["bent"])[seen].abs().mean()) for q in (torch.zeros(7), fit.q))
    assert end < 0.03 < 0.5 < start
    assert fit.cosine > 0.99
    assert fit.verdict == "converged"
    assert fit.loss == pytest.approx(-fit.cosine, abs=0.01)


def test_negatives_push_away_from_the_other_words(
    arm: ks.SelfModel, views: ks.Camera, goals: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "TEMPLATES", ("{}",))
    camera, between = one(views), 0.5 * (goals["bent"] + goals["turned"])
    encoder = encoder_of(arm, goals, camera)
    fit = text_to_q(
        arm, "turned", camera, encoder=encoder, negatives=["bent"], q_init=between, starts=4, iterations=60,
        augmentation=STILL,
    )  # fmt: skip
    before, after = (float((q - goals["turned"])[:3].abs().mean()) for q in (between, fit.q))
    assert after < 0.5 * before
    assert fit.evidence["probability"] > 0.8
    assert fit.evidence["among"] == ["turned", "bent"]
    words = Words.of(encoder, "turned", ["bent"])
    objective = TextObjective(arm, camera, encoder, words, None, None)
    cosines = objective.cosines(fit.q[None])
    expected = -torch.log_softmax(20.0 * cosines, dim=1)[0, 0]
    torch.testing.assert_close(objective.loss_of(cosines)[0], expected)


def tiny(folder: Path, dtype: torch.dtype) -> ClipEncoder:
    torch.manual_seed(5)
    save_clip(folder)
    return ClipEncoder.load(folder, dtype=dtype)


@pytest.mark.parametrize(("negatives", "varied"), [((), Augmentation(copies=2)), (("a fist",), None)])
def test_the_gradient_is_the_derivative_of_the_loss(
    kinearm: ks.SelfModel, negatives: tuple[str, ...], varied: Augmentation | None, tmp_path: Path
) -> None:
    """From joints through the rasteriser, the variations and a CLIP of transformers, in float64."""
    model = kinearm.subsample(120).to(dtype=torch.float64)
    encoder = tiny(tmp_path, torch.float64)
    q = torch.stack([torch.tensor([0.3, -0.4, 0.5, 0.2, 0.3, -0.2, 0.01]), folded(kinearm)]).double()
    camera = ks.Camera.framing(model.posed(q[0]).means, torch.tensor([[1.0, 0.5, 0.4]]), width=24, height=24)
    camera = camera.to(dtype=torch.float64)
    words = Words.of(encoder, "thumbs up", negatives)
    objective = TextObjective(model, camera, encoder, words, varied, Priors.of(kinearm, 0.5))
    loss, gradient = objective.slope(q, torch.Generator().manual_seed(4))
    step = 1e-8  # so small that no splat comes upon or leaves a pixel between the two ends
    for _ in range(3):
        way = torch.randn_like(q)
        high, low = (objective.slope(q + s * step * way, torch.Generator().manual_seed(4))[0] for s in (1, -1))
        torch.testing.assert_close((gradient * way).sum(dim=1), (high - low) / (2 * step), rtol=1e-5, atol=2e-7)
    assert loss.shape == (2,)
    assert gradient.abs().amax(dim=1).min() > 1e-3
    assert objective.overlap(q).loss.tolist()[1] > 0.01


def test_configurations_are_treated_alike_whatever_their_number(
    arm: ks.SelfModel, views: ks.Camera, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = tiny(tmp_path, torch.float32)
    words = Words.of(encoder, "thumbs up", ())
    q = starting(arm.tree, None, 5, torch.Generator().manual_seed(0))

    def both() -> tuple[Tensor, Tensor, Tensor]:
        objective = TextObjective(arm, views, encoder, words, None, None)
        varied = replace(objective, augmentation=Augmentation())
        return (*objective.slope(q, torch.Generator()), varied.judged(q))

    together = both()
    monkeypatch.setattr(text, "IMAGES_AT_ONCE", 1)
    for some, all_ in zip(both(), together, strict=True):
        torch.testing.assert_close(some, all_, rtol=1e-3, atol=1e-5)


def test_a_random_clip_climbs_and_stays_within_the_limits(arm: ks.SelfModel, views: ks.Camera, tmp_path: Path) -> None:
    encoder = tiny(tmp_path, torch.float32)
    fit = text_to_q(arm, "thumbs up", views, encoder=encoder, starts=3, iterations=15, seed=2)
    again = text_to_q(arm, "thumbs up", views, encoder=encoder, starts=3, iterations=15, seed=2)
    assert torch.equal(fit.q_history, again.q_history)
    plain = text_to_q(
        arm, "thumbs up", views, encoder=encoder, starts=3, iterations=15, augmentation=None, self_collision=0.0
    )
    assert plain.cosine > plain.evidence["start_cosines"][-1]
    assert len(fit.q_history) == 16
    assert len(fit.loss_history) == 15
    assert ((fit.q_history >= arm.tree.q_lower - 1e-6) & (fit.q_history <= arm.tree.q_upper + 1e-6)).all()
    assert fit.camera.batch_shape == (2,)
    losses = [h.loss for h in fit.hypotheses]
    assert losses == sorted(losses)
    torch.testing.assert_close(fit.hypotheses[0].q, fit.q)
    assert "thumbs up" in fit.report()
    assert json.loads(json.dumps(fit.to_json(), allow_nan=False))["evidence"]["prompt"] == "thumbs up"


def test_of_many_views_a_step_draws_four_and_the_judge_sees_all(arm: ks.SelfModel, goals: dict[str, Tensor]) -> None:
    points = arm.posed(arm.tree.q_canonical.float()).means
    camera = ks.Camera.framing(points, torch.randn(9, 3) + torch.tensor([0.0, 0.0, 1.0]), width=16, height=16)
    seen: list[int] = []

    class Counts(Looks):
        def embed_images(self, rgb: Tensor) -> Tensor:
            seen.append(len(rgb))
            return super().embed_images(rgb)

    encoder = Counts({"bent": picture(arm, goals["bent"], camera)})
    objective = TextObjective(arm, camera, encoder, Words.of(encoder, ["bent"], ()), None, None)
    q, generator = goals["bent"].expand(3, -1), torch.Generator().manual_seed(0)
    seen.clear()
    first, second = (objective.slope(q, generator)[0] for _ in range(2))
    assert seen == [12, 12]
    assert (first != second).any()
    judged = objective.judged(q)
    assert seen[2:] == [27]
    each = [replace(objective, camera=replace(camera, T_cam_world=T[None])).judged(q) for T in camera.T_cam_world]
    torch.testing.assert_close(judged, torch.stack(each).mean(dim=0))


def test_the_worse_starts_are_given_up_and_the_answer_is_a_start_that_went_on(
    arm: ks.SelfModel, views: ks.Camera, goals: dict[str, Tensor]
) -> None:
    camera = one(views)
    encoder = encoder_of(arm, goals, camera)
    objective = TextObjective(arm, camera, encoder, Words.of(encoder, ["bent"], ()), None, None)
    q = starting(arm.tree, None, 8, torch.Generator().manual_seed(0))
    path, losses = text.ascend(objective, q, 12, torch.Generator(), Progress(disable=True))
    moved = (path[1:] != path[:-1]).any(dim=2)
    assert moved.sum(dim=1).tolist() == [8] * 4 + [4] * 4 + [2] * 4
    assert torch.equal(moved, losses.isfinite())
    worst_kept, best_dropped = losses[:4].mean(dim=0)[moved[4]].max(), losses[:4].mean(dim=0)[~moved[4]].min()
    assert worst_kept <= best_dropped
    single, _ = text.ascend(objective, q[:1], 12, torch.Generator(), Progress(disable=True))
    assert (single[1:] != single[:-1]).any(dim=2).all()


def test_a_single_step_is_enough_for_an_answer(arm: ks.SelfModel, views: ks.Camera, goals: dict[str, Tensor]) -> None:
    """With the many starts of the default: nothing is given up before a loss is known."""
    camera = one(views)
    encoder = encoder_of(arm, goals, camera)
    for iterations in (1, 2):
        fit = text_to_q(arm, ["bent"], camera, encoder=encoder, iterations=iterations, augmentation=None)
        assert len(fit.q_history) == iterations + 1
        assert len(fit.hypotheses) > 1


def test_self_collision_is_kept_away(arm: ks.SelfModel, views: ks.Camera) -> None:
    """The words want an arm folded into itself; only where that is allowed do they get it."""
    camera, start = one(views), folded(arm)
    encoder = encoder_of(arm, {"folded": start}, camera)
    found = [
        text_to_q(
            arm, ["folded"], camera, encoder=encoder, q_init=start, starts=1, iterations=25, augmentation=None,
            self_collision=cost,
        )
        for cost in (0.0, 1.0)
    ]  # fmt: skip
    allowed, kept = (float(overlap(arm, fit.q)) for fit in found)
    assert kept < 0.3 * allowed
    assert found[0].cosine > 0.99


def folded(arm: ks.SelfModel) -> Tensor:
    """A configuration in which links pass through each other."""
    draws = starting(arm.tree, None, 400, torch.Generator().manual_seed(1))
    return next(q for q in draws if float(overlap(arm, q)) > 0.02)


def overlap(arm: ks.SelfModel, q: Tensor) -> Tensor:
    nothing = TextObjective(arm, ks.Camera(torch.eye(3), torch.eye(4), 1, 1), Looks({}), NO_WORDS, None, None)
    return replace(nothing, priors=Priors.of(arm, 0.01)).overlap(q[None]).loss[0]


NO_WORDS = Words(torch.ones(1, 1), ("",))


def test_self_collision_knows_models_with_a_skinning_field(arm: ks.SelfModel) -> None:
    """Their splats are stored in the world, in the canonical configuration."""
    world = arm.posed(arm.tree.q_canonical.float()).means
    field = SkinningField(len(arm.tree.link_names))
    skinned = replace(arm, parameters=replace(arm.parameters, means=world), skinning=field)
    found, expected = (Priors.of(text._in_link_frames(model), 1.0) for model in (skinned, arm))
    torch.testing.assert_close(found.centres, expected.centres, rtol=0.0, atol=1e-5)
    assert len(found.pairs) == len(expected.pairs)


def test_an_encoder_that_answers_no_number_is_refused(arm: ks.SelfModel, views: ks.Camera) -> None:
    class Broken(Looks):
        def embed_images(self, rgb: Tensor) -> Tensor:
            return super().embed_images(rgb) * math.nan

    encoder = Looks({"bent": torch.rand(1, 48, 48, 3)})
    words = Words.of(encoder, ["bent"], [])
    objective = TextObjective(arm, one(views), Broken({}), words, None, None)
    with pytest.raises(InputError, match="not finite in step 0"):
        text.ascend(objective, torch.zeros(1, 7), 2, torch.Generator(), Progress(disable=True))


def test_templates_are_averaged_and_lists_taken_as_they_are() -> None:
    class Counts(Looks):
        def embed_text(self, prompts: Sequence[str]) -> Tensor:
            read.append(list(prompts))
            return torch.nn.functional.one_hot(torch.arange(len(prompts)), 8).float()

    read: list[list[str]] = []
    words = Words.of(Counts({}), "a fist", ["an open hand"])
    assert read == [[t.format("a fist") for t in text.TEMPLATES], [t.format("an open hand") for t in text.TEMPLATES]]
    assert words.names == ("a fist", "an open hand")
    count = len(text.TEMPLATES)
    torch.testing.assert_close(words.wanted[0, :count], torch.full((count,), 1.0 / math.sqrt(count)))
    Words.of(Counts({}), ["one", "two"], [])
    assert read[-1] == ["one", "two"]


def test_spread_is_that_of_the_better_half_about_the_answer() -> None:
    q = torch.tensor([[0.0, 0.0], [1.0, 0.0], [9.0, 9.0], [1.0, 2.0], [9.0, 9.0]])
    spread = spread_of(q, torch.tensor([0.0, 0.1, 5.0, 0.2, 6.0]))
    others = torch.tensor([[1.0, 0.0], [1.0, 2.0], [9.0, 9.0]])
    torch.testing.assert_close(spread, others.mT @ others / 3)
    assert torch.isinf(spread_of(q[:1], torch.zeros(1)).diagonal()).all()


def test_verdicts() -> None:
    evidence = {"start_losses": [-0.2, -0.1], "rival_share": 0.5, "most_like": "a fist"}
    assert verdict(evidence, "a fist", -0.4) == "converged"
    assert verdict({**evidence, "rival_share": 0.99}, "a fist", -0.4) == "ambiguous"
    assert verdict(evidence, "a fist", -0.2) == "failed"
    assert verdict(evidence, "thumbs up", -0.4) == "failed"


@pytest.mark.usefixtures("unchecked_types")
def test_bad_input_is_refused(arm: ks.SelfModel, views: ks.Camera, goals: dict[str, Tensor]) -> None:
    encoder = encoder_of(arm, goals, one(views))
    inside = ks.Camera.look_at((0.0, 0.0, 0.05), (1.0, 0.0, 0.05))
    for changes, message in (
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": []}, "prompt is empty"),
        ({"starts": 0}, "starts is 0"),
        ({"iterations": 0}, "iterations 0"),
        ({"q_init": torch.zeros(3)}, "expected 7"),
        ({"q_init": torch.full((7,), math.nan)}, "finite"),
        ({"camera": inside}, "robot"),
        ({"camera": ks.Camera(torch.eye(3), torch.eye(4).repeat(2, 2, 1, 1), 8, 8)}, "batch"),
        ({"self_collision": -1.0}, "self_collision"),
        ({"negatives": "a fist"}, "expected a list"),
        ({"encoder": "./nowhere"}, "no such folder"),
    ):
        arguments = {
            "prompt": ["bent"],
            "camera": one(views),
            "encoder": encoder,
            "iterations": 1,
            "starts": 1,
        } | changes
        with pytest.raises(InputError, match=message):
            text_to_q(arm, arguments.pop("prompt"), **arguments)


def command(*arguments: str | Path) -> tuple[int, str, str]:
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(stdout), redirect_stderr(stderr):
        patch.setattr(sys, "argv", ["kinesplat", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return code, stdout.getvalue(), stderr.getvalue()


def test_the_command_writes_answers_film_and_json(views: ks.Camera, tmp_path: Path) -> None:
    torch.manual_seed(5)
    save_clip(tmp_path / "clip")
    cameras = [{**one(views).to_json(), "K": views.K.tolist(), "T_cam_world": T} for T in views.T_cam_world.tolist()]
    if views.K.ndim == 3:
        cameras = [{**c, "K": K} for c, K in zip(cameras, views.K.tolist(), strict=True)]
    (tmp_path / "camera.json").write_text(json.dumps(cameras))
    code, stdout, stderr = command(
        "text", "kinearm", "thumbs up", "--encoder", tmp_path / "clip", "--camera", tmp_path / "camera.json",
        "--starts", "2", "--iterations", "8", "--copies", "1", "--negative", "a fist", "-o", tmp_path / "out",
        "--json", tmp_path / "said.json", "--device", "cpu", "--seed", "3",
    )  # fmt: skip
    said = json.loads((tmp_path / "said.json").read_text())
    assert code == {"failed": 1}.get(said["verdict"], 0), stderr
    assert "wrote" in stdout
    assert said == json.loads((tmp_path / "out" / "fit.json").read_text())
    assert len(said["q"]) == 7
    sheet = read_image(tmp_path / "out" / "answers.png")
    assert sheet.shape[1] == 96
    assert sheet.shape[0] % (48 + 18) == 0
    assert (tmp_path / "out" / "film.gif").stat().st_size > 1000


def test_the_command_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    code, _, stderr = command("text", "kinearm", "thumbs up", "-o", tmp_path / "out")
    assert code == 2
    assert "hf download openai/clip-vit-base-patch32" in stderr
    code, _, stderr = command("text", "kinearm", "-o", tmp_path / "out")
    assert code == 2
