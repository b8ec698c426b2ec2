"""Encoders of transformers, built tiny from their config classes, saved, and read by the real from_pretrained path."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kinesplat.errors import BackendError, InputError
from kinesplat.vision.clip import ClipEncoder
from kinesplat.vision.preprocessing import Preprocessing, patched_size

transformers = pytest.importorskip("transformers", reason='needs pip install "kinesplat[models]"')
SENTENCES = ["a fist", "thumbs up", "an open hand, seen from the left", "a photo of a robot."]
LAYERS: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def processor_of(kind: str) -> Any:
    """The class with the PIL backend, which transformers 4 calls by the plain name."""
    return getattr(transformers, f"{kind}Pil", None) or getattr(transformers, kind)


def save_clip(folder: Path) -> None:
    tokenizer = transformers.CLIPTokenizer().train_new_from_iterator(SENTENCES, vocab_size=320, show_progress=False)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    text = {**LAYERS, "vocab_size": len(tokenizer), "max_position_embeddings": 32, **ids}
    vision = {**LAYERS, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    processor = processor_of("CLIPImageProcessor")(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, resample=3
    )
    for part in (transformers.CLIPModel(config), tokenizer, processor):
        part.save_pretrained(folder)


def save_siglip(folder: Path) -> None:
    """SigLIP 2 of a fixed resolution has the classes of SigLIP and a tokenizer of Gemma's kind."""
    tokenizer = gemma_tokenizer()
    text = {**LAYERS, "vocab_size": len(tokenizer), "max_position_embeddings": 32}
    vision = {**LAYERS, "image_size": 32, "patch_size": 8}
    processor = processor_of("SiglipImageProcessor")(size={"height": 32, "width": 32}, resample=2)
    model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)


def save_naflex(folder: Path) -> None:
    """SigLIP 2 NaFlex takes a list of patches, as many as the aspect asks for."""
    tokenizer = gemma_tokenizer()
    text = {**LAYERS, "vocab_size": len(tokenizer), "max_position_embeddings": 32}
    vision = {**LAYERS, "num_patches": 16, "patch_size": 8}
    processor = processor_of("Siglip2ImageProcessor")(patch_size=8, max_num_patches=16)
    model = transformers.Siglip2Model(transformers.Siglip2Config(text_config=text, vision_config=vision))
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)


def gemma_tokenizer() -> Any:
    return transformers.Siglip2Tokenizer().train_new_from_iterator(SENTENCES, vocab_size=320, show_progress=False)


SAVERS = {"clip": save_clip, "siglip": save_siglip, "naflex": save_naflex}


@pytest.fixture(scope="module", params=SAVERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp(request.param)
    SAVERS[request.param](path)
    return path


def test_text_and_pictures_become_unit_vectors_of_one_space(folder: Path) -> None:
    encoder = ClipEncoder.load(folder)
    words, pictures = encoder.embed_text(SENTENCES), encoder.embed_images(torch.rand(3, 40, 40, 3))
    assert words.shape[1] == pictures.shape[1]
    torch.testing.assert_close(words.norm(dim=1), torch.ones(len(SENTENCES)))
    torch.testing.assert_close(pictures.norm(dim=1), torch.ones(3))
    assert encoder.logit_scale > 0.0


def test_embeddings_are_those_of_the_model_with_its_own_processor(folder: Path) -> None:
    """The processor reads 8-bit pictures and rounds after resizing; that is all the difference there may be."""
    encoder = ClipEncoder.load(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 5, 5), (48, 48), mode="bicubic").clamp(0.0, 1.0)
    array = (smooth[0].permute(1, 2, 0) * 255.0).round().to(torch.uint8).numpy()
    theirs = processor(images=Image.fromarray(array), return_tensors="pt")
    ours = encoder.preprocessing(torch.from_numpy(array.astype(np.float32) / 255.0)[None])
    assert set(theirs) == set(ours)
    for name in theirs:
        assert theirs[name].shape == ours[name].shape
    std = float(encoder.preprocessing.std.min())
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"].float(), rtol=0.0, atol=1.5 / 255.0 / std)
    with torch.no_grad():
        output = encoder.network.get_image_features(**theirs)
    expected = output if isinstance(output, torch.Tensor) else output.pooler_output
    found = encoder.embed_images(torch.from_numpy(array.astype(np.float32) / 255.0)[None])
    assert torch.nn.functional.cosine_similarity(expected, found).item() > 0.999


def test_gradients_reach_the_pixels_and_are_those_of_finite_differences(folder: Path) -> None:
    encoder = ClipEncoder.load(folder, dtype=torch.float64)
    picture = torch.rand(1, 36, 44, 3, dtype=torch.float64) * 0.6 + 0.2
    words = encoder.embed_text(["thumbs up"])
    direction = torch.randn_like(picture)

    def score(step: float) -> torch.Tensor:
        return (encoder.embed_images(picture + step * direction) * words).sum()

    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    score(step).backward()  # pyright: ignore[reportArgumentType]
    numeric = (score(1e-5) - score(-1e-5)) / 2e-5
    assert abs(numeric.item()) > 1e-6
    torch.testing.assert_close(step.grad, numeric, rtol=1e-5, atol=1e-9)


def test_weights_get_no_gradient(folder: Path) -> None:
    encoder = ClipEncoder.load(folder)
    assert not any(parameter.requires_grad for parameter in encoder.network.parameters())
    assert not encoder.network.training


def test_capitals_make_no_difference(folder: Path) -> None:
    encoder = ClipEncoder.load(folder)
    torch.testing.assert_close(encoder.embed_text(["Thumbs UP"]), encoder.embed_text(["thumbs up"]))


def test_a_sentence_means_the_same_alone_and_among_others(folder: Path) -> None:
    encoder = ClipEncoder.load(folder)
    together = encoder.embed_text(SENTENCES)
    for row, sentence in zip(together, SENTENCES, strict=True):
        torch.testing.assert_close(encoder.embed_text([sentence])[0], row, rtol=1e-4, atol=1e-5)


def test_siglip_reads_the_padding_as_it_was_trained_to(folder: Path) -> None:
    """CLIP looks at what the sentence's end sees, and SigLIP at the last of all tokens, padding included."""
    encoder, tokenizer = ClipEncoder.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(["thumbs up"], padding="max_length", max_length=32, return_tensors="pt")
    if "siglip" in encoder.network.config.model_type:
        tokens = {"input_ids": tokens["input_ids"]}
    with torch.no_grad():
        output = encoder.network.get_text_features(**tokens)
    expected = output if isinstance(output, torch.Tensor) else output.pooler_output
    torch.testing.assert_close(encoder.embed_text(["thumbs up"]), torch.nn.functional.normalize(expected, dim=-1))


def test_prompts_that_are_empty_or_too_long_are_refused(folder: Path) -> None:
    encoder = ClipEncoder.load(folder)
    for prompts in ([], [" "]):
        with pytest.raises(InputError, match="empty"):
            encoder.embed_text(prompts)
    with pytest.raises(InputError, match=r"tokens; .* reads 32"):
        encoder.embed_text(["a fist " * 40])


def test_models_without_text_and_broken_folders_are_refused(tmp_path: Path) -> None:
    vision = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**LAYERS, image_size=16, patch_size=8))
    vision.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="does not encode both"):
        ClipEncoder.load(tmp_path)
    save_clip(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(InputError, match="that can be read"):
        ClipEncoder.load(tmp_path)


def test_absent_weights_are_named_with_their_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BackendError, match="hf download google/siglip2-base-patch16-224"):
        ClipEncoder.load("google/siglip2-base-patch16-224")


def test_resampling_without_a_gradient_is_refused(folder: Path) -> None:
    path = folder / "preprocessor_config.json"
    said = json.loads(path.read_text())
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    processor.resample = 0
    with pytest.raises(InputError, match="filter 0"):
        Preprocessing.of(processor)
    assert json.loads(path.read_text()) == said


def test_a_processor_that_does_not_resize_is_taken_at_its_word(folder: Path) -> None:
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    processor.do_resize = False
    if "max_num_patches" in processor.to_dict():
        with pytest.raises(InputError, match="expected do_resize"):
            Preprocessing.of(processor)
        return
    array = (255.0 * torch.rand(44, 52, 3)).to(torch.uint8)
    theirs = processor(images=Image.fromarray(array.numpy()), return_tensors="pt")["pixel_values"].float()
    ours = Preprocessing.of(processor)(array[None].float() / 255.0)["pixel_values"]
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(100, 100), (64, 200), (333, 50), (8, 8)])
def test_patched_sizes_keep_the_aspect_and_the_bound(height: int, width: int) -> None:
    tall, wide = patched_size(height, width, 8, 64)
    assert tall % 8 == wide % 8 == 0
    assert 8 * 8 <= tall * wide <= 64 * 8 * 8
    assert abs(np.log(tall / wide) - np.log(height / width)) < 0.5


def test_pictures_of_any_aspect_are_cropped_or_padded_as_the_processor_does(folder: Path) -> None:
    encoder = ClipEncoder.load(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    for height, width in ((24, 60), (61, 33)):
        array = np.full((height, width, 3), 128, dtype=np.uint8)
        theirs = processor(images=Image.fromarray(array), return_tensors="pt")["pixel_values"]
        ours = encoder.preprocessing(torch.full((1, height, width, 3), 128 / 255.0))["pixel_values"]
        torch.testing.assert_close(ours, theirs.float(), rtol=0.0, atol=1e-2)
