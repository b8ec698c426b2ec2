"""Clips that a video model learns from, as pictures and as the model sees them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from kinesplat.errors import InputError
from kinesplat.vision.video_diffusion import STABLE, TextSteeredVideo
from kinesplat.vision.video_pipelines import Sampling

ENCODED_AT_ONCE = 8
SAME_RATE = 1e-3
"""Share by which the rates of two clips of one training may differ."""


@dataclass(frozen=True)
class Clip:
    """A video and what happens in it.

    Attributes:
        frames: ``(frames, height, width, 3)``; all clips of a training have one size.
        prompt: the sentence.
        fps: frames per second at which it plays as fast as it happened; all clips of a training have one rate.
    """

    frames: UInt8[Tensor, "frames height width 3"]
    prompt: str
    fps: float


@dataclass(frozen=True, eq=False)
class EncodedClips:
    """Clips as the video model sees them.

    Attributes:
        latents: ``(clips, frames, c, h, w)`` scaled.
        first: ``(clips, height, width, 3)`` the first frames.
        prompts: ``(clips, 1, k)`` embeddings of the sentences.
    """

    latents: Float[Tensor, "clips frames c h w"]
    first: UInt8[Tensor, "clips height width 3"]
    prompts: Float[Tensor, "clips 1 k"]

    @classmethod
    def of(cls, model: TextSteeredVideo, clips: Sequence[Clip]) -> "EncodedClips":
        """Encode every frame once."""
        scale, latents = model.vae.config.scaling_factor, []
        for clip in clips:
            parts = [model.encode(part.float() / 255.0) for part in clip.frames.split(ENCODED_AT_ONCE)]
            latents.append(scale * torch.cat(parts).float().cpu())
        sentences = sorted({clip.prompt for clip in clips})
        embedded = dict(zip(sentences, model.embed(sentences).float().cpu(), strict=True))
        first = torch.stack([clip.frames[0] for clip in clips])
        return cls(torch.stack(latents), first, torch.stack([embedded[clip.prompt] for clip in clips]))

    def draw(
        self,
        model: TextSteeredVideo,
        count: int,
        dropout: float,
        log_sigma: tuple[float, float],
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Arguments of `edm_loss` for random clips, on the CPU.

        Args:
            model: what encoded the clips.
            count: of clips.
            dropout: share of clips without sentence, as many without first frame, as many without both.
            log_sigma: mean and standard deviation of the logarithm of the noise.
            generator: of everything that is drawn.
        """
        rows = torch.randint(len(self.latents), (count,), generator=generator)
        latents = self.latents[rows]
        mean, deviation = log_sigma
        sigma = (mean + deviation * torch.randn(count, generator=generator)).exp()
        noise = torch.randn(latents.shape, generator=generator)
        lot = torch.rand(count, generator=generator)
        mute = (lot < dropout) | ((lot >= 2 * dropout) & (lot < 3 * dropout))
        blind = (lot >= dropout) & (lot < 3 * dropout)
        first = self._first_latents(model, rows, generator) * ~blind[:, None, None, None]
        prompts = self.prompts[rows] * ~mute[:, None, None]
        return latents, noise, sigma, first, prompts, torch.tensor([told(model.sampling)]).expand(count, 3)

    def _first_latents(
        self, model: TextSteeredVideo, rows: Int64[Tensor, " b"], generator: torch.Generator
    ) -> Float[Tensor, "b c h w"]:
        """Latents of the first frames as the model is given them: with noise on the pixels, not scaled."""
        noise = told(model.sampling)[2]
        if noise == 0.0:
            return self.latents[rows, 0] / model.vae.config.scaling_factor
        pixels = self.first[rows].float() / 255.0
        return model.encode(pixels + 0.5 * noise * torch.randn(pixels.shape, generator=generator)).cpu()


def told(sampling: Sampling) -> tuple[float, float, float]:
    """What the video model is told beside the sentence: frames per second less one, motion, noise of the picture."""
    want = sampling.over(STABLE)
    assert want.fps is not None
    assert want.motion is not None
    assert want.noise is not None
    return want.fps - 1.0, float(want.motion), want.noise


def refuse_unlike(clips: Sequence[Clip]) -> None:
    """Refuse clips that are no training.

    Raises:
        InputError: there is none, or they have several sizes or rates.
    """
    if not clips:
        raise InputError("there is no clip to learn from")
    sizes = {tuple(clip.frames.shape) for clip in clips}
    if len(sizes) > 1:
        raise InputError(f"clips have the sizes {sorted(sizes)[:3]} (frames, height, width, 3); they need one")
    slow, fast = min(clip.fps for clip in clips), max(clip.fps for clip in clips)
    if not 0.0 < slow <= fast <= (1.0 + SAME_RATE) * slow:
        raise InputError(f"clips have {slow:g} to {fast:g} frames per second; they need one rate above 0")
