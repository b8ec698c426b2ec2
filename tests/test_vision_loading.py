"""Absent libraries and weights: the error holds the command that brings them."""

from pathlib import Path
from typing import Any

import pytest

from kinesplat.errors import BackendError, InputError
from kinesplat.vision.loading import fetching, library, pretrained

transformers = pytest.importorskip("transformers", reason='needs pip install "kinesplat[models]"')
TINY: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def save_tiny(folder: Path) -> Any:
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TINY, image_size=16, patch_size=8))
    model.save_pretrained(folder)
    return model


def test_an_absent_library_is_named_with_the_command_that_installs_it() -> None:
    with pytest.raises(BackendError, match=r'no_such_library: not .* pip install "kinesplat\[models\]"'):
        library("no_such_library.part")


def test_a_library_that_is_there_is_imported() -> None:
    assert library("transformers").CLIPModel is transformers.CLIPModel


@pytest.mark.usefixtures("no_hub")
def test_absent_weights_are_named_with_the_command_that_fetches_them() -> None:
    with pytest.raises(BackendError, match=r"hf download openai/clip-vit-base-patch32$"):
        pretrained(transformers.CLIPVisionModel, "openai/clip-vit-base-patch32")
    with pytest.raises(BackendError, match=r'hf download a/b --include "\*.json" --include "unet/\*"$'):
        pretrained(transformers.CLIPVisionModel, "a/b", files=("*.json", "unet/*"))


def test_the_fetching_command_without_patterns_takes_everything() -> None:
    assert fetching("a/b") == "hf download a/b"


@pytest.mark.usefixtures("no_hub")
def test_fetched_weights_are_read_from_the_cache_without_asking_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--owner--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    saved = save_tiny(repository / "snapshots" / ("0" * 40))

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr("socket.socket.connect", refused)
    loaded = pretrained(transformers.AutoModel, "owner/tiny")
    assert all((loaded.state_dict()[name] == value).all() for name, value in saved.state_dict().items())
    (repository / "snapshots" / ("0" * 40) / "model.safetensors").unlink()
    with pytest.raises(BackendError, match=r"a complete AutoModel of owner/tiny .* hf download owner/tiny"):
        pretrained(transformers.AutoModel, "owner/tiny")


def test_a_saved_model_comes_back(tmp_path: Path) -> None:
    saved = save_tiny(tmp_path)
    loaded = pretrained(transformers.CLIPVisionModel, tmp_path)
    for name, value in saved.state_dict().items():
        assert (loaded.state_dict()[name] == value).all()


def test_folders_without_a_model_or_with_a_broken_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        pretrained(transformers.CLIPVisionModel, tmp_path / "none")
    with pytest.raises(InputError, match="holds no CLIPVisionModel"):
        pretrained(transformers.CLIPVisionModel, tmp_path)
    save_tiny(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="holds no CLIPVisionModel that can be read"):
        pretrained(transformers.CLIPVisionModel, tmp_path)
