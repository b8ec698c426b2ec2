"""Video models that continue a picture as a sentence asks: Stable Video Diffusion steered by text, or any of diffusers.

Stable Video Diffusion sees its first frame twice: as latents beside the noise, and as a CLIP embedding that its
cross-attention reads. Liu et al. 2024, appendix A.3, put the embedding of a sentence by the same CLIP in place of the
latter and fine-tune; `kinesplat.vision.finetuning` does that, this module loads and runs the result.
"""

import inspect
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from kinesplat.errors import InputError
from kinesplat.files import folder_written_whole, written_whole
from kinesplat.vision.loading import library, pretrained

SVD_XT = "stabilityai/stable-video-diffusion-img2vid-xt"
OPEN_CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
SVD_FILES = ("model_index.json", "unet/*", "vae/*", "scheduler/*")
LORA_FOLDER = "unet_lora"
INDEX = "model_index.json"
STABLE_PIPELINE = "StableVideoDiffusionPipeline"
TRAINED_AT = "_trained_at"
"""Entry of the index that diffusers passes over, as all that begin with an underscore."""
SCALES = ("scale_factor_spatial", "spatial_compression_ratio", "scale_factor")
"""How diffusers' pipelines call their autoencoder's factor."""
PARTS = ("unet", "vae", "scheduler", "text_encoder", "tokenizer")


@runtime_checkable
class VideoModel(Protocol):
    """What turns a picture and a sentence into a video."""

    def generate(
        self, image: Float[Tensor, "height width 3"], prompt: str, *, seed: int = 0
    ) -> Float[Tensor, "frames h w 3"]:
        """A video that begins with the picture, in [0, 1]; its size is the model's own."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How a video is drawn; None leaves it to the model, to what it was trained at where that is known.

    Attributes:
        frames: number of frames.
        height: of the video [px].
        width: of the video [px].
        steps: of the sampler.
        guidance: strength of classifier-free guidance in the last frame (Ho and Salimans 2021); it grows from 1 in the
            first frame where the model is Stable Video Diffusion.
        fps: frames per second that the model is told.
        motion: motion bucket that Stable Video Diffusion is told, 0 to 255.
        noise: standard deviation of the noise on the first frame, of pixels in [-1, 1].
        decoded_at_once: frames; fewer need less memory, but see less of each other. None decodes all.
        progress: show the sampler's steps on the terminal.
    """

    frames: int | None = None
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance: float | None = None
    fps: int | None = None
    motion: int | None = None
    noise: float | None = None
    decoded_at_once: int | None = None
    progress: bool = False

    def over(self, other: "Sampling") -> "Sampling":
        """These wishes where there are any, else those of `other`."""
        return replace(other, **{name: value for name, value in asdict(self).items() if value is not None})


STABLE = Sampling(steps=25, guidance=3.0, fps=7, motion=127, noise=0.02)
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
    """

    unet: Any
    vae: Any
    scheduler: Any
    text_encoder: Any
    tokenizer: Any
    sampling: Sampling = Sampling()

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
            text_encoder: folder or name of a CLIP text model; default: the folder's own, else OpenCLIP ViT-H/14, whose
                image embedding Stable Video Diffusion was trained with.
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
        text = text_encoder or (str(base) if own.is_dir() else OPEN_CLIP_H)
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
            (sampling or Sampling()).over(_trained_at(source, base)),
        )
        found.check()
        return found

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


@dataclass(frozen=True, eq=False)
class PipelineVideo:
    """Any image-to-video pipeline of diffusers that takes a prompt: Wan 2.2 TI2V, CogVideoX, LTX, ...

    Attributes:
        pipeline: the pipeline.
        sampling: how `generate` draws; what the pipeline does not take is left out.
    """

    pipeline: Any
    sampling: Sampling = Sampling()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        sampling: Sampling | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "PipelineVideo":
        """Load a pipeline; of a text-to-video one (``WanPipeline``) its image-to-video sister.

        Args:
            source: folder, or name on the Hugging Face hub ("Wan-AI/Wan2.2-TI2V-5B-Diffusers").
            sampling: how to draw.
            device: where to compute.
            dtype: of the weights.

        Raises:
            BackendError: diffusers or the weights are absent; says how to get them.
            InputError: the pipeline takes no picture or no prompt.
        """
        diffusers = library("diffusers")
        kind = _image_to_video(diffusers, pipeline_class(source))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".torch_dtype. is deprecated")  # its new name is new in 0.42
            pipeline = pretrained(kind, source, torch_dtype=dtype)
        return cls(pipeline.to(device), sampling or Sampling())

    def generate(
        self, image: Float[Tensor, "height width 3"], prompt: str, *, seed: int = 0
    ) -> Float[Tensor, "frames h w 3"]:
        """A video that begins with `image`, in [0, 1].

        Args:
            image: ``(height, width, 3)`` in [0, 1].
            prompt: the sentence.
            seed: of the noise.

        The video is as large as asked for, or as the picture, rounded down to what the pipeline's patches divide.

        Raises:
            InputError: the pipeline refuses picture, size or prompt.
        """
        want = self.sampling
        divisor = _divisor(self.pipeline)
        sides = (want.height or image.shape[0], want.width or image.shape[1])
        height, width = (max(divisor, side // divisor * divisor) for side in sides)
        pixels = (resized(image, height, width).clamp(0, 1) * 255.0).round().to(torch.uint8).cpu().numpy()
        wishes = {
            "height": height,
            "width": width,
            "num_frames": want.frames,
            "num_inference_steps": want.steps,
            "guidance_scale": want.guidance,
        }
        taken = inspect.signature(self.pipeline.__call__).parameters
        given = {name: value for name, value in wishes.items() if value is not None and name in taken}
        self.pipeline.set_progress_bar_config(disable=not want.progress)
        try:
            out = self.pipeline(
                image=Image.fromarray(pixels),
                prompt=prompt,
                generator=torch.Generator().manual_seed(seed),
                output_type="np",
                **given,
            )
        except ValueError as error:
            name, reason = type(self.pipeline).__name__, " ".join(str(error).split())[:300]
            raise InputError(f"{name} refuses {width} x {height} px or the prompt {prompt[:60]!r}: {reason}") from error
        return torch.as_tensor(out.frames[0]).float().cpu().clamp(0.0, 1.0)


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


def pipeline_class(source: str | Path) -> str:
    """Name of the pipeline class that a folder or repository says it is for.

    Raises:
        BackendError: the repository has not been fetched.
        InputError: the folder holds no pipeline.
    """
    loader = SimpleNamespace(from_pretrained=_index, __name__=INDEX)
    files = SVD_FILES if str(source) == SVD_XT else ()
    return str(pretrained(loader, source, files=files).get("_class_name"))


def write_index(folder: Path, sampling: Sampling) -> None:
    """Write that a folder is for Stable Video Diffusion, and what the model in it was trained at.

    Raises:
        InputError: it cannot be written.
    """
    kept = {name: getattr(sampling, name) for name in KEPT}
    index = {"_class_name": STABLE_PIPELINE, TRAINED_AT: kept}
    with written_whole(folder / INDEX) as temporary:
        temporary.write_text(json.dumps(index, indent=1) + "\n")


def resized(image: Float[Tensor, "height width 3"], height: int, width: int) -> Float[Tensor, "h w 3"]:
    """A picture at another size."""
    if tuple(image.shape[:2]) == (height, width):
        return image.float()
    planes = image.float().movedim(-1, 0)[None]
    size = torch.nn.functional.interpolate(planes, (height, width), mode="bilinear", antialias=True)
    return size[0].movedim(0, -1)


def _trained_at(source: str | Path, base: str | Path) -> Sampling:
    """What the index of a folder says about the training; for the published models their size."""
    published = STABLE_SIZE if str(base).startswith("stabilityai/stable-video-diffusion") else Sampling()
    path = Path(source) / INDEX
    if not path.is_file():
        return published
    try:
        values = json.loads(path.read_text()).get(TRAINED_AT, {})
        return Sampling(**{name: values[name] for name in KEPT if name in values}).over(published)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error


def _index(source: str, local_files_only: bool) -> dict[str, Any]:
    """The index of a folder, or of a repository in the cache."""
    folder = Path(source)
    fetch = library("huggingface_hub").hf_hub_download
    path = folder / INDEX if folder.is_dir() else fetch(source, INDEX, local_files_only=local_files_only)
    return json.loads(Path(path).read_text())


def _steered(embedding: Float[Tensor, "1 1 k"]) -> Any:
    """Diffusers' own pipeline, which reads a given embedding where it would embed the picture."""
    diffusers = library("diffusers")

    class SteeredPipeline(diffusers.StableVideoDiffusionPipeline):
        def _encode_image(self, image: Any, device: Any, num_videos_per_prompt: int, guided: bool) -> Tensor:
            values = embedding.to(device).repeat(num_videos_per_prompt, 1, 1)
            return torch.cat([torch.zeros_like(values), values]) if guided else values

    return SteeredPipeline


def _image_to_video(diffusers: Any, name: str) -> Any:
    """The pipeline class of a name, or its image-to-video sister, if it takes a picture and a prompt."""
    for candidate in (name, name.replace("Pipeline", "ImageToVideoPipeline")):
        kind = getattr(diffusers, candidate, None)
        if kind is not None and {"image", "prompt"} <= set(inspect.signature(kind.__call__).parameters):
            return kind
    raise InputError(f"{name} of diffusers makes no video from a picture and a prompt")


def _divisor(pipeline: Any) -> int:
    """What height and width must be multiples of: the autoencoder's factor, times the size of a patch."""
    scale: Any = next((getattr(pipeline, f"vae_{kind}") for kind in SCALES if hasattr(pipeline, f"vae_{kind}")), 8)
    network = getattr(pipeline, "transformer", None)
    patch = network.config.get("patch_size") or 1 if network is not None else 1
    return int(scale) * int(patch[-1] if isinstance(patch, list | tuple) else patch)


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
