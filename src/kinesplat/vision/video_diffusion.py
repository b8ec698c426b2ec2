"""Video models that continue a picture as a sentence asks: Stable Video Diffusion steered by text, or any of diffusers.

Stable Video Diffusion sees its first frame twice: as latents beside the noise, and as a CLIP embedding that its
cross-attention reads. Liu et al. 2024, appendix A.3, put the embedding of a sentence by the same CLIP in place of the
latter and fine-tune; `kinesplat.vision.finetuning` does that, this module loads and runs the result.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.errors import InputError
from kinesplat.files import folder_written_whole, written_whole
from kinesplat.vision.loading import library, pretrained
from kinesplat.vision.video_pipelines import INDEX, SVD_FILES, SVD_XT, PipelineVideo, Sampling, pipeline_class, resized

OPEN_CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
LORA_FOLDER = "unet_lora"
STABLE_PIPELINE = "StableVideoDiffusionPipeline"
TRAINED_AT = "_trained_at"
TEXT_MODEL = "_text_encoder"
"""Entries of the index that diffusers passes over, as all that begin with an underscore."""
PARTS = ("unet", "vae", "scheduler", "text_encoder", "tokenizer")


STABLE = Sampling(steps=25, guidance=3.0, fps=7.0, motion=127, noise=0.02)
STABLE_SIZE = Sampling(height=576, width=1024)
"""What Stable Video Diffusion was trained at; its files name a square."""
KEPT = ("frames", "height", "width", "steps", "guidance", "fps", "motion", "noise")
"""Fields of `Sampling` that a model is written with."""


@dataclass(frozen=True, eq=False)
class TextSteeredVideo:
    """Stable Video Diffusion whose image embedding is replaced by that of a sentence.

    Attributes:
        unet: ``diffusers.UNetSpatioTemporalConditionModel``.
        vae: ``diffusers.AutoencoderKLTemporalDecoder``.
        scheduler: ``diffusers.EulerDiscreteScheduler`` with v-prediction and continuous time steps.
        text_encoder: ``transformers.CLIPTextModelWithProjection``.
        tokenizer: its ``CLIPTokenizer``.
        sampling: how `generate` draws; what is None there is 25 steps, guidance 3, 7 frames per second, motion 127,
            noise 0.02, and the size that the video model's files name.
        text_source: name or folder that the text model was read from; a LoRA is written with it.
    """

    unet: Any
    vae: Any
    scheduler: Any
    text_encoder: Any
    tokenizer: Any
    sampling: Sampling = field(default_factory=Sampling)
    text_source: str = ""

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = SVD_XT,
        text_encoder: str | Path | None = None,
        *,
        sampling: Sampling | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "TextSteeredVideo":
        """Load the parts; a LoRA that `finetune` wrote is merged into the model it was trained on.

        Args:
            source: folder written by `save_pretrained` or `finetune`, or the name of an image-to-video model of the
                Stable Video Diffusion family on the Hugging Face hub.
            text_encoder: folder or name of a CLIP text model; default: the one that a LoRA was trained with, the
                folder's own, else OpenCLIP ViT-H/14, whose image embedding Stable Video Diffusion was trained with.
            sampling: how to draw; what is None in it is as the model was trained.
            device: where to compute.
            dtype: of the weights; float16 reads the fp16 files of the hub.

        Raises:
            BackendError: diffusers, transformers or the weights are absent; says how to get them.
            InputError: a folder does not hold such a model, or text and video model do not fit together.
        """
        diffusers, transformers = library("diffusers"), library("transformers")
        lora = Path(source) / LORA_FOLDER
        base = _base_of(lora) if lora.is_dir() else source
        own = Path(base) / "text_encoder"
        index = _index(source)
        text = str(text_encoder or index.get(TEXT_MODEL) or (base if own.is_dir() else OPEN_CLIP_H))
        inside = Path(text) / "text_encoder"
        parts = {"subfolder": "text_encoder"} if inside.is_dir() else {}
        tokens = {"subfolder": "tokenizer"} if inside.is_dir() else {}
        options = {"torch_dtype": dtype, "files": SVD_FILES}
        variant = {"variant": "fp16"} if dtype == torch.float16 and not Path(base).is_dir() else {}
        unet_kind, vae_kind = diffusers.UNetSpatioTemporalConditionModel, diffusers.AutoencoderKLTemporalDecoder
        unet = pretrained(unet_kind, base, subfolder="unet", **options, **variant)
        if lora.is_dir():
            unet = pretrained(_adapter(unet), lora).merge_and_unload()
        vae = pretrained(vae_kind, base, subfolder="vae", **options, **variant)
        found = cls(
            unet.to(device).eval(),
            vae.to(device).eval(),
            pretrained(diffusers.EulerDiscreteScheduler, base, subfolder="scheduler", files=SVD_FILES),
            pretrained(transformers.CLIPTextModelWithProjection, text, dtype=dtype, **parts).to(device).eval(),
            pretrained(transformers.CLIPTokenizer, text, **tokens),
            (sampling or Sampling()).over(_trained_at(index, source, base)),
            findable(text),
        )
        found.check()
        return found

    @property
    def fps(self) -> float:
        """Frames per second of the videos."""
        fps = self.sampling.over(STABLE).fps
        assert fps is not None
        return fps

    def check(self) -> None:
        """Refuse parts that do not fit together.

        Raises:
            InputError: the embedding's size is not what the video model reads, or the scheduler is another kind.
        """
        dimension, read = self.text_encoder.config.projection_dim, self.unet.config.cross_attention_dim
        if read != dimension:
            raise InputError(f"the text model gives {dimension} numbers, the video model reads {read}")
        kind = self.scheduler.config.prediction_type, self.scheduler.config.timestep_type
        if kind != ("v_prediction", "continuous"):
            raise InputError(f"the scheduler is {kind}; Stable Video Diffusion has ('v_prediction', 'continuous')")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write all parts into a folder, beside what else it holds; the index, which names the pipeline, last.

        Raises:
            InputError: it cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in PARTS:
            with folder_written_whole(folder / name) as temporary:
                getattr(self, name).save_pretrained(str(temporary))
        write_index(folder, self.sampling)

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Float[Tensor, "n 1 k"]:
        """Embeddings of sentences, in the form in which the cross-attention reads them.

        Raises:
            InputError: a sentence is empty or longer than the text model reads.
        """
        longest = int(self.text_encoder.config.max_position_embeddings)
        for prompt in prompts:
            count = len(self.tokenizer(prompt).input_ids)
            if not prompt.strip() or count > longest:
                raise InputError(
                    f"prompt {prompt[:60]!r} has {count} tokens; expected some words and at most {longest}"
                )
        tokens = self.tokenizer(list(prompts), padding="max_length", max_length=longest, return_tensors="pt")
        device = next(self.text_encoder.parameters()).device
        out = self.text_encoder(tokens.input_ids.to(device), attention_mask=tokens.attention_mask.to(device))
        return out.text_embeds[:, None]

    @torch.no_grad()
    def encode(self, frames: Float[Tensor, "n height width 3"]) -> Float[Tensor, "n c h w"]:
        """Latents of pictures in [0, 1], not scaled; a batch at a time is the caller's business."""
        pixels = 2.0 * frames.movedim(-1, -3) - 1.0
        return self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist.mode()

    def generate(
        self, image: Float[Tensor, "height width 3"], prompt: str, *, seed: int = 0
    ) -> Float[Tensor, "frames h w 3"]:
        """A video that begins with `image` and does what `prompt` says, in [0, 1].

        Args:
            image: ``(height, width, 3)`` in [0, 1].
            prompt: the sentence.
            seed: of the noise.

        Raises:
            InputError: the prompt is empty or too long.
        """
        want, scale = self.sampling.over(STABLE), 2 ** (len(self.vae.config.block_out_channels) - 1)
        side = self.unet.config.sample_size
        own = (side, side) if isinstance(side, int) else tuple(side)
        height, width = want.height or own[0] * scale, want.width or own[1] * scale
        pipeline = _steered(self.embed([prompt]))(self.vae, self.text_encoder, self.unet, self.scheduler, None)
        pipeline.set_progress_bar_config(disable=not want.progress)
        frames = pipeline(
            resized(image, height, width).movedim(-1, 0)[None],
            height=height,
            width=width,
            num_frames=want.frames,
            num_inference_steps=want.steps,
            max_guidance_scale=want.guidance,
            fps=want.fps,
            motion_bucket_id=want.motion,
            noise_aug_strength=want.noise,
            decode_chunk_size=want.decoded_at_once,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
        ).frames
        return frames[0].movedim(1, -1).float().cpu()


def load_video_model(
    source: str | Path,
    text_encoder: str | Path | None = None,
    *,
    sampling: Sampling | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TextSteeredVideo | PipelineVideo:
    """The model in a folder or of a name: steered by text where it is of the Stable Video Diffusion family.

    Args:
        source: folder, or name on the Hugging Face hub, fetched before.
        text_encoder: of `TextSteeredVideo`.
        sampling: how to draw.
        device: where to compute.
        dtype: of the weights.

    Raises:
        BackendError: a library or the weights are absent; says how to get them.
        InputError: the folder holds no video model.
    """
    steered = (Path(source) / LORA_FOLDER).is_dir() or pipeline_class(source) == STABLE_PIPELINE
    if steered:
        return TextSteeredVideo.from_pretrained(source, text_encoder, sampling=sampling, device=device, dtype=dtype)
    return PipelineVideo.from_pretrained(source, sampling=sampling, device=device, dtype=dtype)


def write_index(folder: Path, sampling: Sampling, text_source: str = "") -> None:
    """Write that a folder is for Stable Video Diffusion, and what the model in it was trained at.

    Args:
        folder: where.
        sampling: what it was trained at.
        text_source: the text model, where the folder has none.

    Raises:
        InputError: it cannot be written.
    """
    kept = {name: getattr(sampling, name) for name in KEPT}
    index = {"_class_name": STABLE_PIPELINE, TRAINED_AT: kept}
    index |= {TEXT_MODEL: text_source} if text_source else {}
    with written_whole(folder / INDEX) as temporary:
        temporary.write_text(json.dumps(index, indent=1) + "\n")


def findable(source: str | Path) -> str:
    """A name as it is; a folder by the path that finds it from everywhere."""
    return str(Path(source).resolve()) if Path(source).is_dir() else str(source)


def _index(source: str | Path) -> dict[str, Any]:
    """The index of a folder; empty where it has none."""
    path = Path(source) / INDEX
    if not path.is_file():
        return {}
    try:
        index = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    if not isinstance(index, dict):
        raise InputError(f"{path}: is no index of a model")
    return index


def _trained_at(index: Mapping[str, Any], source: str | Path, base: str | Path) -> Sampling:
    """What the index of a folder says about the training; for the published models their size."""
    published = STABLE_SIZE if str(base).startswith("stabilityai/stable-video-diffusion") else Sampling()
    try:
        values = index.get(TRAINED_AT, {})
        return Sampling(**{name: values[name] for name in KEPT if name in values}).over(published)
    except TypeError as error:
        raise InputError(f"{Path(source) / INDEX}: cannot be read ({error})") from error


def _steered(embedding: Float[Tensor, "1 1 k"]) -> Any:
    """Diffusers' own pipeline, which reads a given embedding where it would embed the picture."""
    diffusers = library("diffusers")

    class SteeredPipeline(diffusers.StableVideoDiffusionPipeline):
        def _encode_image(self, image: Any, device: Any, num_videos_per_prompt: int, guided: bool) -> Tensor:
            values = embedding.to(device).repeat(num_videos_per_prompt, 1, 1)
            return torch.cat([torch.zeros_like(values), values]) if guided else values

    return SteeredPipeline


def _adapter(unet: Any) -> Any:
    """What loads a LoRA onto `unet`."""
    peft = library("peft")

    def load(folder: str, **options: Any) -> Any:
        return peft.PeftModel.from_pretrained(unet, folder, **options)

    return SimpleNamespace(from_pretrained=load, __name__="LoRA")


def _base_of(lora: Path) -> str:
    try:
        return str(json.loads((lora / "adapter_config.json").read_text())["base_model_name_or_path"])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{lora}: holds no LoRA written by finetune ({error})") from error
