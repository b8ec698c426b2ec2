"""Text-steered video diffusion: diffusers' own pipeline as oracle, folders written and read, other pipelines."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_video_models import FRAMES, SIZE, svd_scheduler, tiny_model, tiny_text_model

from kinesplat.errors import BackendError, InputError
from kinesplat.vision import video_diffusion
from kinesplat.vision.finetuning import edm_loss
from kinesplat.vision.video_diffusion import (
    OPEN_CLIP_H,
    TextSteeredVideo,
    load_video_model,
)
from kinesplat.vision.video_pipelines import SVD_XT, PipelineVideo, Sampling, VideoModel

pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")  # theirs


@pytest.fixture(scope="module")
def model() -> TextSteeredVideo:
    return tiny_model()


def test_a_video_begins_at_the_size_of_the_model_and_depends_on_sentence_and_seed(model: TextSteeredVideo) -> None:
    image = torch.rand(20, 24, 3)
    video = model.generate(image, "wave")
    assert video.shape == (FRAMES, SIZE, SIZE, 3)
    assert 0.0 <= video.min() <= video.max() <= 1.0
    torch.testing.assert_close(model.generate(image, "wave"), video)
    assert (model.generate(image, "wave", seed=1) - video).abs().max() > 1e-3
    assert (model.generate(image, "grasp") - video).abs().max() > 1e-5
    assert isinstance(model, VideoModel)


def test_without_guidance_it_is_the_stock_pipeline_with_another_embedding(model: TextSteeredVideo) -> None:
    """Sampling by hand with the scheduler's own steps, as the paper's model would be run."""
    model = replace(model, sampling=Sampling(steps=3, guidance=1.0, noise=0.0))
    image = torch.rand(SIZE, SIZE, 3)
    scheduler = svd_scheduler()
    scheduler.set_timesteps(3)
    generator = torch.Generator().manual_seed(5)
    torch.randn(1, 3, SIZE, SIZE, generator=generator)  # what noise augmentation draws
    latents = scheduler.init_noise_sigma * torch.randn(1, FRAMES, 4, SIZE // 2, SIZE // 2, generator=generator)
    beside = model.encode(image[None])[:, None].expand(-1, FRAMES, -1, -1, -1)
    told = torch.tensor([[6.0, 127.0, 0.0]])
    with torch.no_grad():
        for t in scheduler.timesteps:
            noisy = torch.cat([scheduler.scale_model_input(latents, t), beside], dim=2)
            predicted = model.unet(noisy, t, model.embed(["wave"]), told).sample
            latents = scheduler.step(predicted, t, latents).prev_sample
        pixels = model.vae.decode(latents[0] / model.vae.config.scaling_factor, num_frames=FRAMES).sample
    expected = (0.5 * pixels + 0.5).clamp(0, 1).movedim(1, -1)
    torch.testing.assert_close(model.generate(image, "wave", seed=5), expected, atol=1e-5, rtol=1e-4)


def test_the_loss_is_of_the_scheduler_s_own_denoised_video(model: TextSteeredVideo) -> None:
    scheduler = svd_scheduler()
    scheduler.set_timesteps(4)
    latents, noise = torch.randn(2, 1, FRAMES, 4, 8, 8)
    first, embedding, told = torch.randn(1, 4, 8, 8), model.embed(["wave"]), torch.tensor([[6.0, 127.0, 0.02]])
    for i in (1, 3):
        sigma, t = scheduler.sigmas[i].float(), scheduler.timesteps[i]
        scheduler._step_index = i
        noisy = latents + sigma * noise
        beside = first[:, None].expand(-1, FRAMES, -1, -1, -1)
        with torch.no_grad():
            seen = torch.cat([noisy / (sigma**2 + 1.0).sqrt(), beside], dim=2)
            predicted = model.unet(seen, t, embedding, told).sample
        denoised = scheduler.step(predicted, t, noisy).pred_original_sample
        expected = ((denoised - latents).square() * (1.0 + sigma**2) / sigma**2).mean()
        loss = edm_loss(model.unet, latents, noise, sigma[None], first, embedding, told)
        torch.testing.assert_close(loss, expected, rtol=2e-4, atol=1e-6)


def test_gradients_reach_every_weight(model: TextSteeredVideo) -> None:
    latents, noise = torch.randn(2, 2, FRAMES, 4, 8, 8)
    embedding = model.embed(["wave", "grasp"])
    loss = edm_loss(
        model.unet, latents, noise, torch.tensor([0.5, 3.0]), torch.randn(2, 4, 8, 8), embedding, torch.rand(2, 3)
    )
    loss.backward()
    without = {n for n, p in model.unet.named_parameters() if p.grad is None or not p.grad.isfinite().all()}
    model.unet.zero_grad(set_to_none=True)
    assert not without


def test_written_and_read_it_makes_the_same_video(model: TextSteeredVideo, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "m")
    read = load_video_model(tmp_path / "m", sampling=model.sampling)
    assert isinstance(read, TextSteeredVideo)
    image = torch.rand(SIZE, SIZE, 3)
    torch.testing.assert_close(read.generate(image, "wave"), model.generate(image, "wave"))
    assert not list(tmp_path.glob(".*"))


def test_a_text_model_of_another_folder(model: TextSteeredVideo, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "m")
    encoder, tokenizer = tiny_text_model(dimension=8)
    encoder.save_pretrained(str(tmp_path / "clip"))
    tokenizer.save_pretrained(str(tmp_path / "clip"))
    with pytest.raises(InputError, match="gives 8 numbers, the video model reads 16"):
        TextSteeredVideo.from_pretrained(tmp_path / "m", tmp_path / "clip")
    tiny_text_model()[0].save_pretrained(str(tmp_path / "clip"))
    TextSteeredVideo.from_pretrained(tmp_path / "m", tmp_path / "clip")


@pytest.mark.usefixtures("no_hub")
@pytest.mark.usefixtures("no_hub")
def test_absent_weights_and_broken_folders(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=f"hf download {SVD_XT} --include"):
        load_video_model(SVD_XT)
    with pytest.raises(InputError, match="no such folder"):
        load_video_model("./nothing")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(InputError, match="makes no video from a picture and a prompt"):
        load_video_model(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableVideoDiffusionPipeline"}))
    with pytest.raises(InputError, match="holds no UNetSpatioTemporalConditionModel"):
        load_video_model(tmp_path)
    assert OPEN_CLIP_H.startswith("laion/CLIP-ViT-H-14")


def test_the_published_model_draws_at_the_size_it_was_trained_at(
    model: TextSteeredVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files name 96 latents, a square; a pipeline of diffusers draws 576 x 1024 px."""
    parts = {"CLIPTextModelWithProjection": model.text_encoder, "CLIPTokenizer": model.tokenizer}
    parts |= {"UNetSpatioTemporalConditionModel": model.unet, "AutoencoderKLTemporalDecoder": model.vae}
    monkeypatch.setattr(video_diffusion, "pretrained", lambda kind, *_, **__: parts.get(kind.__name__, svd_scheduler()))
    sampling = TextSteeredVideo.from_pretrained(SVD_XT, sampling=Sampling(steps=2)).sampling
    assert (sampling.height, sampling.width, sampling.steps) == (576, 1024, 2)
    assert TextSteeredVideo.from_pretrained("someone/else").sampling == Sampling()


def test_prompts_that_cannot_be_read(model: TextSteeredVideo) -> None:
    for prompt in ("", " ", "far too many words for a text model of thirty two letters"):
        with pytest.raises(InputError, match="prompt"):
            model.generate(torch.rand(SIZE, SIZE, 3), prompt)


def test_wan_s_text_to_video_folder_is_run_as_image_to_video(tmp_path: Path) -> None:
    """Wan 2.2 TI2V is published as WanPipeline; with a picture it is WanImageToVideoPipeline."""
    _tiny_wan(tmp_path)
    video = load_video_model(tmp_path, sampling=Sampling(frames=5, steps=2))
    assert isinstance(video, PipelineVideo)
    assert type(video.pipeline).__name__ == "WanImageToVideoPipeline"
    frames = video.generate(torch.rand(32, 32, 3), "reach the red block", seed=3)
    assert frames.shape == (5, 32, 32, 3)
    assert 0.0 <= frames.min() <= frames.max() <= 1.0
    assert video.generate(torch.rand(39, 50, 3), "reach", seed=3).shape == (5, 32, 48, 3)

    def refusing(**_: object) -> None:
        raise ValueError("no such\nsize")

    refusing.set_progress_bar_config = lambda **_: None  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"refuses 32 x 32 px .*: no such size"):
        replace(video, pipeline=refusing).generate(torch.rand(32, 32, 3), "reach")


def _tiny_wan(folder: Path) -> None:
    import diffusers
    import tokenizers
    import transformers

    torch.manual_seed(0)
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "reach", "the", "red", "block"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    config = transformers.UMT5Config(
        vocab_size=len(words), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    diffusers.WanPipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.UMT5EncoderModel(config).eval(),
        vae=diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval(),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        ),
        transformer=diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=16,
            freq_dim=16,
            ffn_dim=32,
            num_layers=1,
            cross_attn_norm=True,
            rope_max_seq_len=32,
        ),
        expand_timesteps=True,
    ).save_pretrained(str(folder))
