"""Encoders that put pictures and sentences into one space: CLIP, SigLIP, SigLIP 2 and what else transformers has."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.errors import InputError
from kinesplat.vision.loading import library, pretrained
from kinesplat.vision.preprocessing import Preprocessing

DEFAULT = "openai/clip-vit-base-patch32"


@dataclass(frozen=True)
class ClipEncoder:
    """A CLIP-like model of transformers that answers in unit vectors; differentiable in the pictures.

    Attributes:
        network: the model, frozen.
        tokenizer: its own.
        preprocessing: its image processor's, differentiable.
        name: where it came from.
    """

    network: Any
    tokenizer: Any
    preprocessing: Preprocessing
    name: str

    @classmethod
    def load(
        cls, source: str | Path = DEFAULT, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> "ClipEncoder":
        """A model of the Hugging Face hub that was fetched before, or a folder made by ``save_pretrained``.

        Args:
            source: "openai/clip-vit-base-patch32", "google/siglip2-base-patch16-224",
                "google/siglip2-base-patch16-naflex", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", ... : any whose class
                in transformers has `get_image_features` and `get_text_features`.
            device: where to compute.
            dtype: of its weights; pictures are cast to it.

        Raises:
            BackendError: transformers is not installed, or the weights were not fetched; says the command.
            InputError: it is no such model.
        """
        transformers = library("transformers")
        network = pretrained(transformers.AutoModel, source, dtype=dtype)
        if not (hasattr(network, "get_image_features") and hasattr(network, "get_text_features")):
            raise InputError(f"{source} is a {type(network).__name__}, which does not encode both pictures and text")
        tokenizer = pretrained(transformers.AutoTokenizer, source)
        processor = pretrained(transformers.AutoImageProcessor, source)
        network = network.to(device).eval().requires_grad_(False)
        return cls(network, tokenizer, Preprocessing.of(processor), str(source))

    @property
    def logit_scale(self) -> float:
        """What cosines are multiplied with before a softmax."""
        return float(self.network.logit_scale.detach().exp())

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.network.parameters()).device

    @torch.no_grad()
    def embed_text(self, prompts: Sequence[str]) -> Float[Tensor, "n k"]:
        """One unit vector per prompt; in lower case, as these models were trained.

        Raises:
            InputError: no prompt, an empty one, or one that is longer than the model reads.
        """
        if not prompts or not all(prompt.strip() for prompt in prompts):
            raise InputError("no prompt, or an empty one; say what the robot should show")
        words, most = [prompt.lower() for prompt in prompts], self._longest
        for prompt in words:
            count = len(self.tokenizer(prompt)["input_ids"])
            if count > most:
                raise InputError(f"the prompt {prompt[:40]!r}... has {count} tokens; {self.name} reads {most}")
        tokens = self.tokenizer(words, padding="max_length", max_length=most, return_tensors="pt").to(self.device)
        if self.network.config.model_type.startswith("siglip"):
            tokens.pop("attention_mask", None)  # SigLIP was trained to read the padding, too
        return _unit(_features(self.network.get_text_features(**tokens)))

    def embed_images(self, rgb: Float[Tensor, "n height width 3"]) -> Float[Tensor, "n k"]:
        """One unit vector per picture in [0, 1]; gradients flow back to the pixels."""
        arguments = self.preprocessing(rgb.to(self.device))
        arguments["pixel_values"] = arguments["pixel_values"].to(self.network.dtype)
        return _unit(_features(self.network.get_image_features(**arguments)))

    @property
    def _longest(self) -> int:
        """Tokens that the text encoder reads; sentences are padded to that, as SigLIP was trained."""
        return int(self.network.config.text_config.max_position_embeddings)


def _features(output: Any) -> Tensor:
    """Transformers 5 answers with an object whose pooled output is the embedding, transformers 4 with the embedding."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features, dim=-1)
