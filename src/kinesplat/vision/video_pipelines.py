"""Any image-to-video pipeline of diffusers behind one small interface, and how its videos are drawn."""

import inspect
import json
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from kinesplat.errors import InputError
from kinesplat.vision.loading import library, pretrained

SVD_XT = "stabilityai/stable-video-diffusion-img2vid-xt"
SVD_FILES = ("model_index.json", "unet/*", "vae/*", "scheduler/*")
INDEX = "model_index.json"
SCALES = ("scale_factor_spatial", "spatial_compression_ratio", "scale_factor")
"""How diffusers' pipelines call their autoencoder's factor."""


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
        fps: frames per second of the video, which Stable Video Diffusion is told.
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
    fps: float | None = None
    motion: int | None = None
    noise: float | None = None
    decoded_at_once: int | None = None
    progress: bool = False

    def over(self, other: "Sampling") -> "Sampling":
        """These wishes where there are any, else those of `other`."""
        return replace(other, **{name: value for name, value in asdict(self).items() if value is not None})


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

    @property
    def fps(self) -> float | None:
        """Frames per second of the videos, where the caller knows them: a pipeline does not tell."""
        return self.sampling.fps

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


def pipeline_class(source: str | Path) -> str:
    """Name of the pipeline class that a folder or repository says it is for.

    Raises:
        BackendError: the repository has not been fetched.
        InputError: the folder holds no pipeline.
    """
    loader = SimpleNamespace(from_pretrained=_index, __name__=INDEX)
    files = SVD_FILES if str(source) == SVD_XT else ()
    return str(pretrained(loader, source, files=files).get("_class_name"))


def resized(image: Float[Tensor, "height width 3"], height: int, width: int) -> Float[Tensor, "h w 3"]:
    """A picture at another size."""
    if tuple(image.shape[:2]) == (height, width):
        return image.float()
    planes = image.float().movedim(-1, 0)[None]
    size = torch.nn.functional.interpolate(planes, (height, width), mode="bilinear", antialias=True)
    return size[0].movedim(0, -1)


def _index(source: str, local_files_only: bool) -> dict[str, Any]:
    """The index of a folder, or of a repository in the cache."""
    folder = Path(source)
    fetch = library("huggingface_hub").hf_hub_download
    path = folder / INDEX if folder.is_dir() else fetch(source, INDEX, local_files_only=local_files_only)
    return json.loads(Path(path).read_text())


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
