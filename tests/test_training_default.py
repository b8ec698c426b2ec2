"""The default recipe: laws of density control, and training on a small data set of the packaged arm."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kinesplat.camera import Camera
from kinesplat.dataset.frames import Frames
from kinesplat.errors import ModelFileError, TrainingError
from kinesplat.gaussians import PARAMETERS, Gaussians, Parameters
from kinesplat.rasterizer import rasterize_links
from kinesplat.rasterizer.projection import quats_to_rotations
from kinesplat.self_model import SelfModel
from kinesplat.training import default
from kinesplat.training.default import DefaultFit, DefaultSettings, fit_splats, validate
from kinesplat.training.density import Worth, choose, halves, worth_of
from kinesplat.training.loop import Budget

SMALL = DefaultSettings(start=300, gaussians=400, rounds=2, pictures=4, validate_every=5, densify_from=0.3)


@pytest.fixture(scope="module")
def model(kinearm: SelfModel) -> SelfModel:
    return kinearm.subsample(300)


@pytest.fixture(scope="module")
def frames(kinearm: SelfModel) -> Frames:
    """Pictures of the full model, darkened so that there is something to learn."""
    torch.manual_seed(1)
    tree, size = kinearm.tree, 48
    q = tree.q_lower + torch.rand(12, tree.dof, dtype=torch.float64) * (tree.q_upper - tree.q_lower)
    views = [Camera.framing(kinearm.posed(row.float()).means, width=size, height=size) for row in q]
    camera = Camera(torch.stack([v.K for v in views]), torch.stack([v.T_cam_world for v in views]), size, size)
    with torch.no_grad():
        out = kinearm.render(q.float(), camera)
    assert out.rgb is not None
    assert out.alpha is not None
    rgb = 0.8 * out.rgb + 0.2 * (1.0 - out.alpha[..., None])
    return Frames(q, camera, (rgb.clamp(0, 1) * 255).to(torch.uint8), (out.alpha * 255).to(torch.uint8))


def equal(a: SelfModel, b: SelfModel) -> bool:
    same = all(
        torch.equal(x, y) for x, y in zip(a.parameters.tensors().values(), b.parameters.tensors().values(), strict=True)
    )
    return same and torch.equal(a.link_index, b.link_index)


def test_training_brings_the_pictures_nearer(model: SelfModel, frames: Frames) -> None:
    before = validate(model, frames)
    trained = fit_splats(model, frames, frames, Budget(steps=60), SMALL)
    assert validate(trained, frames) > before + 2.0
    assert 300 < len(trained.parameters) <= 400
    assert trained.parameters.sh_direction == model.parameters.sh_direction
    assert trained.provenance["steps"] == 60
    assert trained.provenance["validation_psnr_db"] == pytest.approx(validate(trained, frames), abs=0.01)


def test_the_same_seed_gives_the_same_model(model: SelfModel, frames: Frames) -> None:
    one, two, other = (fit_splats(model, frames, frames, Budget(steps=12), SMALL, seed=s) for s in (3, 3, 4))
    assert equal(one, two)
    assert not equal(one, other)


@pytest.mark.parametrize("killed_at", [1, 4, 7, 11])
def test_a_killed_run_resumes_as_if_nothing_had_happened(
    model: SelfModel, frames: Frames, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    whole = fit_splats(model, frames, frames, Budget(steps=14), SMALL, folder=tmp_path / "whole")
    monkeypatch.setattr(default, "CHECKPOINT_SECONDS", 0.0)
    step = DefaultFit.step

    def dies(self: DefaultFit, number: int, share: float) -> dict:
        if number == killed_at:
            raise KeyboardInterrupt
        return dict(step(self, number, share))

    monkeypatch.setattr(DefaultFit, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        fit_splats(model, frames, frames, Budget(steps=14), SMALL, folder=tmp_path / "cut")
    monkeypatch.setattr(DefaultFit, "step", step)
    resumed = fit_splats(model, frames, frames, Budget(steps=14), SMALL, folder=tmp_path / "cut", resume=True)
    assert equal(resumed, whole)
    assert (tmp_path / "cut" / "log.csv").read_text() == (tmp_path / "whole" / "log.csv").read_text()


def test_resuming_without_a_checkpoint_says_so(model: SelfModel, frames: Frames, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no such model file"):
        fit_splats(model, frames, frames, Budget(steps=2), SMALL, folder=tmp_path, resume=True)


def test_rates_that_blow_up_stop_with_the_step_named(model: SelfModel, frames: Frames, tmp_path: Path) -> None:
    wild = replace(SMALL, rates=replace(SMALL.rates, log_scales=1e30))
    with pytest.raises(TrainingError, match="step 1: "):
        fit_splats(model, frames, frames, Budget(steps=5), wild, folder=tmp_path)


def test_training_stops_when_validation_improves_no_more(model: SelfModel, frames: Frames) -> None:
    still = replace(SMALL, rates=default.Rates(0.0, 0.0, 0.0, 0.0, 0.0), patience=2, rounds=0)
    trained = fit_splats(model, frames, frames, Budget(steps=1000), still)
    assert trained.provenance["steps"] == 15  # the first look is the best, and two more


def test_densification_is_spread_over_its_share_of_the_budget() -> None:
    settings = DefaultSettings(start=100, gaussians=400, rounds=4, densify_from=0.2, densify_until=0.8)
    rounds = [default.round_of(share, settings) for share in (0.0, 0.19, 0.2, 0.39, 0.41, 0.61, 0.81, 1.0)]
    assert rounds == [0, 0, 1, 1, 2, 3, 4, 4]
    assert [default.splats_after(r, settings) for r in range(5)] == [100, 141, 200, 283, 400]


def test_the_error_of_a_picture_falls_to_the_splats_that_made_it(model: SelfModel, frames: Frames) -> None:
    """Its sum over the splats is the error of the picture where the robot covers it."""
    one = frames.select([3])
    Ts = default.link_poses(model, one)
    worth = worth_of(model.parameters, model.link_index, Ts, one, eps2d=0.05)
    out = rasterize_links(
        model.parameters.activate(),
        model.link_index,
        Ts,
        one.camera,
        eps2d=0.05,
        outputs=("rgb", "alpha", "contribution"),
    )
    assert out.rgb is not None
    assert out.alpha is not None
    assert out.contribution is not None
    wrong = (out.rgb.clamp(0, 1) - one.rgb / 255.0).abs().mean(-1)
    assert worth.error.sum() == pytest.approx((wrong * out.alpha).sum().item(), rel=1e-3)
    assert torch.allclose(worth.contribution, out.contribution[0])
    assert not worth.error[worth.contribution == 0].any()


def test_unseen_splats_go_and_the_worst_are_cut() -> None:
    worth = Worth(torch.tensor([0.0, 5.0, 5.0, 5.0, 0.1]), torch.tensor([9.0, 1.0, 3.0, 2.0, 0.5]))
    keep, cut = choose(worth, wanted=6, least_contribution=0.05, most_share=1.0)
    assert keep.tolist() == [False, True, True, True, True]
    assert cut.tolist() == [2, 3]
    assert choose(worth, wanted=6, least_contribution=0.05, most_share=0.2)[1].tolist() == [2]
    assert choose(worth, wanted=2, least_contribution=0.05, most_share=1.0)[1].tolist() == []


def test_halves_stand_side_by_side_along_the_longest_axis() -> None:
    n = 50
    parents = Parameters(torch.randn(n, 3), torch.randn(n, 4), torch.randn(n, 3), torch.randn(n), torch.randn(n, 4, 3))
    both = halves(parents)
    first, second = both.select(torch.arange(n)), both.select(torch.arange(n, 2 * n))
    assert torch.allclose(0.5 * (first.means + second.means), parents.means, atol=1e-5)
    gaussians = parents.activate()
    longest = gaussians.scales.amax(-1)
    assert torch.allclose((first.means - second.means).norm(dim=-1), longest, rtol=1e-4)
    turned = replace(gaussians, means=torch.zeros(n, 3))
    covariance = covariances(turned)
    direction = first.means - second.means
    along = torch.einsum("ni,nij,nj->n", direction, covariance, direction) / direction.square().sum(-1)
    assert torch.allclose(along, longest.square(), rtol=1e-3)
    assert torch.allclose(
        both.log_scales.amin(-1), parents.log_scales.amin(-1).repeat(2).minimum(both.log_scales.amin(-1))
    )
    for name in set(PARAMETERS) - {"means", "log_scales"}:
        assert torch.equal(getattr(first, name), getattr(parents, name))


def covariances(gaussians: Gaussians) -> torch.Tensor:
    axes = quats_to_rotations(gaussians.quats) * gaussians.scales[:, None, :]
    return axes @ axes.mT
