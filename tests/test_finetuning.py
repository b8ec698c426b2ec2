"""Fine-tuning of video models: it learns, it resumes as if it had never stopped, a LoRA is read back onto its base."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from tiny_video_models import FRAMES, SIZE, tiny_model

from kinesplat.errors import InputError, ModelFileError, TrainingError
from kinesplat.vision import finetuning
from kinesplat.vision.finetuning import CHECKPOINT, LOG, FinetuneSettings, edm_loss, finetune, steps_done
from kinesplat.vision.video_clips import Clip
from kinesplat.vision.video_diffusion import TextSteeredVideo, load_video_model
from kinesplat.vision.video_pipelines import Sampling

pytest.importorskip("accelerate")
pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")  # theirs
FULL = FinetuneSettings(steps=4, batch=2, learning_rate=2e-3, lora_rank=None, ema=0.5, save_every=2)


def clips(count: int = 3) -> list[Clip]:
    generator = torch.Generator().manual_seed(0)
    shape = (FRAMES, SIZE, SIZE, 3)
    frames = [torch.randint(256, shape, dtype=torch.uint8, generator=generator) for _ in range(count)]
    return [Clip(f, f"clip {'abc'[i]}", 7.0) for i, f in enumerate(frames)]


def weights(model: object) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.unet.parameters()])  # type: ignore[attr-defined]


def log_of(folder: Path) -> list[dict[str, str]]:
    with (folder / LOG).open() as file:
        return list(csv.DictReader(file))


def test_a_stopped_training_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    whole = finetune(tiny_model(), clips(), tmp_path / "a", FULL)
    half = FinetuneSettings(**{**FULL.__dict__, "steps": 2})
    finetune(tiny_model(), clips(), tmp_path / "b", half)
    resumed = finetune(tiny_model(), clips(), tmp_path / "b", FULL, resume=True)
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=1e-6)
    assert (weights(resumed) - weights(tiny_model())).abs().max() > 1e-4
    assert [row["step"] for row in log_of(tmp_path / "b")] == ["2", "4"]
    read = load_video_model(tmp_path / "b")
    torch.testing.assert_close(weights(read), weights(resumed))


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    settings = FinetuneSettings(steps=1, batch=1, accumulation=2, learning_rate=2e-3, lora_rank=None, ema=0.0)
    drawn: list[torch.Tensor] = []

    def plain(unet: object, *batch: torch.Tensor) -> torch.Tensor:
        loss = edm_loss(unet, *batch)
        drawn.append(loss.detach())
        return loss

    with patch.object(finetuning, "edm_loss", plain):
        finetune(tiny_model(), clips(), tmp_path, settings)
    assert len(drawn) == 2
    assert float(log_of(tmp_path)[0]["loss"]) == pytest.approx(float(sum(drawn)) / 2, rel=1e-3)
    checkpoint = load_file(str(tmp_path / CHECKPOINT))
    assert {float(value) for name, value in checkpoint.items() if name.startswith("step:")} == {1.0}


def test_saving_memory_changes_nothing_else(tmp_path: Path) -> None:
    settings = FinetuneSettings(**{**FULL.__dict__, "steps": 2})
    plain = finetune(tiny_model(), clips(), tmp_path / "a", settings)
    sparing = FinetuneSettings(**{**settings.__dict__, "save_memory": True})
    spared = finetune(tiny_model(), clips(), tmp_path / "b", sparing)
    assert spared.unet.is_gradient_checkpointing
    torch.testing.assert_close(weights(spared), weights(plain), rtol=1e-4, atol=1e-6)


def test_one_clip_is_learnt(tmp_path: Path) -> None:
    settings = FinetuneSettings(
        steps=24, batch=1, learning_rate=3e-3, lora_rank=None, dropout=0.0, log_sigma=(0.0, 0.1), save_every=4
    )
    finetune(tiny_model(), clips(1), tmp_path, settings)
    losses = [float(row["loss"]) for row in log_of(tmp_path)]
    assert losses[-1] < 0.7 * losses[0]


def test_a_lora_changes_attention_alone_and_is_read_onto_its_base(tmp_path: Path) -> None:
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    before = {name: p.detach().clone() for name, p in base.unet.named_parameters()}
    settings = FinetuneSettings(steps=3, learning_rate=1e-1, lora_rank=2)
    tuned = finetune(base, clips(), tmp_path / "lora", settings, base=str(tmp_path / "base"))
    changed = {name for name, p in tuned.unet.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all("attn" in name for name in changed)
    read = load_video_model(tmp_path / "lora", sampling=Sampling(steps=2))
    torch.testing.assert_close(weights(read), weights(tuned), rtol=1e-5, atol=1e-6)
    assert not (tmp_path / "lora" / "unet").exists()


@pytest.mark.parametrize("rank", [None, 2])
def test_a_model_draws_at_what_it_was_trained_at(tmp_path: Path, rank: int | None) -> None:
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    base = replace(base, sampling=Sampling(steps=2, fps=4.0, noise=0.0, guidance=1.0))
    odd = [Clip(torch.randint(256, (2, 24, 32, 3), dtype=torch.uint8), "wave", 2.5)]
    settings = FinetuneSettings(steps=1, lora_rank=rank)
    tuned = finetune(base, odd, tmp_path / "tuned", settings, base=str(tmp_path / "base"))
    read = load_video_model(tmp_path / "tuned")
    assert read.sampling == tuned.sampling == Sampling(2, 24, 32, 2, 1.0, 2.5, 127, 0.0)
    assert read.fps == 2.5  # of the clips, whatever the model was told before
    if rank is None:
        assert read.generate(torch.rand(16, 16, 3), "wave").shape == (2, 24, 32, 3)
    other = load_video_model(tmp_path / "tuned", sampling=Sampling(frames=3, width=16))
    assert other.sampling == replace(read.sampling, frames=3, width=16)


@pytest.mark.parametrize("rank", [None, 2])
def test_a_stop_after_minutes_leaves_the_model_as_it_stands_and_goes_on(tmp_path: Path, rank: int | None) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    settings = replace(FULL, lora_rank=rank)
    short, base = replace(settings, minutes=0.0), str(tmp_path / "base")
    assert steps_done(tmp_path / "out") == 0
    for done in (1, 2):
        stopped = finetune(tiny_model(), clips(), tmp_path / "out", short, base=base, resume=True)
        assert steps_done(tmp_path / "out") == done
        torch.testing.assert_close(weights(load_video_model(tmp_path / "out")), weights(stopped), rtol=1e-5, atol=1e-6)
    ended = finetune(tiny_model(), clips(), tmp_path / "out", settings, base=base, resume=True)
    never_stopped = finetune(tiny_model(), clips(), tmp_path / "other", settings, base=base)
    torch.testing.assert_close(weights(ended), weights(never_stopped), rtol=0, atol=1e-6)
    assert steps_done(tmp_path / "out") == FULL.steps


def test_all_processes_stop_by_one_clock(tmp_path: Path) -> None:
    def told_by_another(late: list[bool]) -> None:
        assert late == [False]
        late[0] = True

    with patch("accelerate.utils.broadcast_object_list", told_by_another):
        finetune(tiny_model(), clips(), tmp_path, replace(FULL, minutes=1e6))
    assert steps_done(tmp_path) == 1


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that stopped after its first step."""
    folder = tmp_path_factory.mktemp("begun")
    finetune(tiny_model(), clips(), folder, replace(FULL, minutes=0.0))
    return folder


@pytest.mark.parametrize(
    ("settings", "data", "seed", "words"),
    [
        ({"accumulation": 3}, clips(), 0, "accumulation 1, not 3"),
        ({"learning_rate": 0.2}, clips(), 0, "learning_rate 0.002, not 0.2"),
        ({"dropout": 0.0}, clips(), 0, "dropout 0.1, not 0.0"),
        ({"log_sigma": (0.0, 1.0)}, clips(), 0, "log_sigma .*, not .0.0, 1.0."),
        ({}, [replace(clip, fps=2.0) for clip in clips()], 0, "fps 7.0, not 2.0"),
        ({}, [replace(clip, frames=clip.frames[:2]) for clip in clips()], 0, r"size .3, .*, not .2, "),
        ({}, [replace(clip, prompt="other") for clip in clips()], 0, "data "),
        ({}, [replace(clip, frames=255 - clip.frames) for clip in clips()], 0, "data "),
        ({}, clips(), 1, "base "),
    ],
)
def test_another_training_does_not_go_on(
    begun: Path, settings: dict[str, Any], data: list[Clip], seed: int, words: str
) -> None:
    with pytest.raises(InputError, match=f"another training: .*{words}"):
        finetune(tiny_model(seed=seed), data, begun, replace(FULL, **settings), resume=True)
    assert steps_done(begun) == 1


def test_the_scale_of_half_precision_is_kept(tmp_path: Path) -> None:
    runs = [finetuning._Run.start(tiny_model(), clips(), tmp_path, FULL, 0) for _ in range(2)]
    for run, scale in zip(runs, (1024.0, 2.0), strict=True):
        run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    runs[0].save(1, 0.5, 1.0)
    assert runs[1].load() == 1
    assert runs[1].accelerator.scaler.get_scale() == 1024.0


def test_a_lora_is_read_with_the_text_model_that_it_was_trained_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    other = tiny_model(seed=1)
    for part in ("text_encoder", "tokenizer"):
        getattr(other, part).save_pretrained(tmp_path / "words" / part)
    monkeypatch.chdir(tmp_path)
    base = TextSteeredVideo.from_pretrained("base", "words")
    finetune(base, clips(), "lora", FinetuneSettings(steps=1, lora_rank=2), base="base")
    monkeypatch.chdir(tmp_path / "words")
    read = load_video_model(tmp_path / "lora")
    assert isinstance(read, TextSteeredVideo)
    torch.testing.assert_close(read.embed(["wave"]), other.embed(["wave"]))
    assert (read.embed(["wave"]) - tiny_model().embed(["wave"])).abs().max() > 1e-3
    given = load_video_model(tmp_path / "lora", tmp_path / "base")
    assert isinstance(given, TextSteeredVideo)
    torch.testing.assert_close(given.embed(["wave"]), tiny_model().embed(["wave"]))


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no clip"):
        finetune(tiny_model(), [], tmp_path, FULL)
    with pytest.raises(InputError, match="one"):
        finetune(
            tiny_model(), [*clips(1), Clip(torch.zeros(FRAMES, 8, 8, 3, dtype=torch.uint8), "x", 7.0)], tmp_path, FULL
        )
    with pytest.raises(InputError, match="7 to 8 frames per second"):
        finetune(tiny_model(), [*clips(1), replace(clips(1)[0], fps=8.0)], tmp_path, FULL)
    with pytest.raises(InputError, match="base="):
        finetune(tiny_model(), clips(), tmp_path)
    (tmp_path / CHECKPOINT).write_bytes(b"half a file")
    with pytest.raises(ModelFileError, match="broken checkpoint"):
        finetune(tiny_model(), clips(), tmp_path, FULL, resume=True)
    finetune(tiny_model(), clips(), tmp_path / "other", FinetuneSettings(**{**FULL.__dict__, "steps": 1}))
    with pytest.raises(InputError, match="another training"):
        finetune(tiny_model(), clips(2), tmp_path / "other", FULL, resume=True)


def test_a_loss_that_is_no_number_stops_the_training(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.unet.conv_out.bias.fill_(torch.nan)
    with pytest.raises(TrainingError, match="step 0"):
        finetune(model, clips(), tmp_path, FULL)
    assert not (tmp_path / CHECKPOINT).exists()
