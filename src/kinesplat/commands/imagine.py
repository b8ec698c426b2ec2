"""From a picture and a sentence to motion: imagine, finetune_video."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import mujoco
import torch
import tyro

from kinesplat.camera import Camera
from kinesplat.commands.common import (
    DEFAULTS,
    EXIT_FAILED,
    CommonOptions,
    Model,
    Output,
    device_of,
    err,
    load_model,
    make_folder,
    out,
    write_json,
)
from kinesplat.commands.track import overlays, write_table
from kinesplat.description import Robot, load_description
from kinesplat.errors import InputError
from kinesplat.files import read_image
from kinesplat.imagination.behind import RIM_SHARE, uncovered
from kinesplat.imagination.imagine import imagine as imagine_motion
from kinesplat.imagination.joints import place
from kinesplat.imagination.lerobot import longest_episode, read_episodes
from kinesplat.imagination.masks import robot_mask
from kinesplat.self_model import SelfModel
from kinesplat.video import frame_rate, read_frames, write_video
from kinesplat.vision.finetuning import FinetuneSettings, finetune, steps_done
from kinesplat.vision.segment import Segmenter
from kinesplat.vision.video_diffusion import TextSteeredVideo, load_video_model
from kinesplat.vision.video_pipelines import SVD_XT, Sampling


@dataclass(frozen=True)
class Maker:
    """The video model of `imagine`."""

    video_model: str = SVD_XT
    """Folder made by kinesplat finetune-video; or a folder or name on the Hugging Face hub of an image-to-video
    pipeline of diffusers, such as Wan-AI/Wan2.2-TI2V-5B-Diffusers."""
    text_encoder: str | None = None
    """CLIP text model of Stable Video Diffusion where the folder has none; default: OpenCLIP ViT-H/14."""
    frames: int | None = None
    """How many to generate; default: as many as the model was made for."""
    height: int | None = None
    """Of the video [px]; default: as the model was trained."""
    width: int | None = None
    """Of the video [px]; default: as the model was trained."""
    steps: int | None = None
    """Of the sampler; default: the model's own, 25 for Stable Video Diffusion."""
    guidance: float | None = None
    """Strength of classifier-free guidance; default: the model's own, 3 for Stable Video Diffusion."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the model's weights; the half-sized ones are for GPUs."""
    decoded_at_once: int | None = None
    """Frames; fewer need less memory, but see less of each other."""


@dataclass(frozen=True)
class Stage:
    """Where the motion of `imagine` is checked and executed."""

    robot: str | None = None
    """Description of the robot as in kinesplat build; then limits, speeds and collisions are checked."""
    scene: Path | None = None
    """MJCF file of the robot in its scene with position actuators; then the motion is executed in MuJoCo."""
    fps: float | None = None
    """Frames per second of the motion; default: of the --video file, or of the clips that the video model was
    fine-tuned on, else 7."""
    segmenter: str | None = None
    """SAM 2 model (facebook/sam2.1-hiera-tiny) that says where the robot is in the picture, with cables and tools that
    the self-model does not know; needs --q-init."""


@dataclass(frozen=True)
class Clips:
    """The clips of `finetune_video`."""

    camera: str | None = None
    """Which pictures, where the data set has several cameras."""
    frames: int = 25
    """Of every clip."""
    height: int = 320
    """Of the clips [px], a multiple of 64."""
    width: int = 512
    """Of the clips [px], a multiple of 64."""
    fps: float | None = None
    """Frames per second of the clips; default: such that the longest episode just fits. A shorter one stands still at
    its end, a longer one is cut off."""


@dataclass(frozen=True)
class Training:
    """How `finetune_video` trains."""

    steps: int = 10_000
    """Optimiser steps."""
    batch: int = 1
    """Clips a step and GPU."""
    accumulation: int = 1
    """Batches a step, whose gradients are averaged."""
    learning_rate: float = 1e-4
    """Of AdamW."""
    train: Literal["lora", "all"] = "lora"
    """lora changes low-rank parts of the attention layers; all changes every weight."""
    rank: int = 16
    """Of the LoRA."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Of the computation."""
    save_memory: bool = False
    """Compute activations twice instead of keeping them."""
    minutes: float | None = None
    """Stop after this time, with the model as it then is; --resume goes on."""


MakerOptions = Annotated[Maker, tyro.conf.OmitArgPrefixes]
StageOptions = Annotated[Stage, tyro.conf.OmitArgPrefixes]
ClipOptions = Annotated[Clips, tyro.conf.OmitArgPrefixes]
TrainingOptions = Annotated[Training, tyro.conf.OmitArgPrefixes]
MAKER, STAGE, CLIPS, TRAINING = Maker(), Stage(), Clips(), Training()


def imagine(
    model: Model,
    image: Annotated[Path, tyro.conf.Positional],
    prompt: Annotated[str, tyro.conf.Positional],
    camera: Path,
    output: Output = Path("imagined"),
    video: Path | None = None,
    q_init: tuple[float, ...] | None = None,
    backdrop: Path | None = None,
    *,
    maker: MakerOptions = MAKER,
    stage: StageOptions = STAGE,
    common: CommonOptions = DEFAULTS,
) -> None:
    """Let a video model show how a sentence is carried out, and find the joints that do it.

    Needs kinesplat[models] and the model's weights, or --video. Stable Video Diffusion must have been fine-tuned by
    kinesplat finetune-video to follow sentences. Writes OUTPUT/imagined.gif, overlay.gif (the robot laid over it),
    track.csv and imagine.json. Exits with 1 when most frames were lost.

    Args:
        model: model file, or the name of a packaged model.
        image: picture of the scene now.
        prompt: what the robot should do, one sentence.
        camera: JSON file with K, T_cam_world, width, height of the picture.
        output: folder to write to.
        video: file, GIF or folder of pictures to follow instead of a model's video.
        q_init: joint values in the picture; default: search.
        backdrop: picture of the scene without the robot.
    """
    device = device_of(common)
    loaded, picture, view = load_model(model), read_image(image), Camera.from_json(camera)
    if stage.scene is not None and stage.robot is None:
        raise InputError("--scene needs --robot, which says which of the scene's joints are the robot's")
    robot = None if stage.robot is None else load_description(stage.robot)
    make_folder(output)
    source = SVD_XT
    if video is None:
        dtype = getattr(torch, maker.dtype)
        source = load_video_model(
            maker.video_model, maker.text_encoder, sampling=_sampling(maker), device=device, dtype=dtype
        )
    result = imagine_motion(
        loaded.to(device),
        picture,
        prompt,
        view,
        video_model=source,
        video=None if video is None else read_frames(video),
        q_init=None if q_init is None else torch.tensor(q_init),
        backdrop=_backdrop(loaded, picture, view, q_init, backdrop, stage.segmenter, device),
        robot=robot,
        state=None if stage.scene is None or robot is None else _state(stage.scene, robot, q_init),
        fps=_rate(video) if stage.fps is None else stage.fps,
        seed=common.seed,
    )
    fps = 1.0 / result.seconds
    write_table(output / "track.csv", result.track, fps)
    write_video(output / "imagined.gif", result.video, fps)
    write_video(output / "overlay.gif", overlays(loaded, iter(result.video), result.track), fps)
    written = {**result.to_json(), "fps": fps}
    write_json(output / "imagine.json", written)
    write_json(common.json, written)
    out.print(result.report())
    out.print(f"wrote imagined.gif, overlay.gif, track.csv and imagine.json to {output}")
    if result.track.verdict == "failed":
        sys.exit(EXIT_FAILED)


def finetune_video(
    dataset: Annotated[Path, tyro.conf.Positional],
    output: Output,
    base: str = SVD_XT,
    text_encoder: str | None = None,
    resume: bool = False,
    *,
    clips: ClipOptions = CLIPS,
    training: TrainingOptions = TRAINING,
    common: CommonOptions = DEFAULTS,
) -> None:
    """Fine-tune Stable Video Diffusion to follow sentences, on a robot's episodes in LeRobot's format.

    The embedding of the sentence takes the place of the embedding of the picture (Liu et al. 2024, appendix A.3).
    OUTPUT gets log.csv, a checkpoint, and in the end, after --minutes as well, what kinesplat imagine --video-model
    reads. On several GPUs, run it as accelerate launch --no-python kinesplat finetune-video ...

    Args:
        dataset: folder of a LeRobot data set (versions 2.0 to 3.0), such as lerobot/asu_table_top, fetched with
            hf download --repo-type dataset.
        output: folder to write to.
        base: folder or name of the model to start from.
        text_encoder: CLIP text model; default: the base's own, else OpenCLIP ViT-H/14.
        resume: go on from the checkpoint in OUTPUT, with the same clips, base and settings; only --steps, --minutes and
            --save-memory may differ.
    """
    device = device_of(common)
    size = (clips.frames, clips.height, clips.width)
    model = TextSteeredVideo.from_pretrained(base, text_encoder, sampling=Sampling(*size), device=device)
    fps = (clips.frames - 1) / longest_episode(dataset) if clips.fps is None else clips.fps
    data = [episode.clip(*size, fps) for episode in read_episodes(dataset, clips.camera)]
    settings = FinetuneSettings(
        steps=training.steps,
        batch=training.batch,
        accumulation=training.accumulation,
        learning_rate=training.learning_rate,
        lora_rank=training.rank if training.train == "lora" else None,
        precision=training.precision,
        save_memory=training.save_memory,
        minutes=training.minutes,
    )
    make_folder(output)
    finetune(model, data, output, settings, base=base, seed=common.seed, resume=resume, progress=err.is_terminal)
    done = steps_done(output)
    more = "" if done >= training.steps else f" of {training.steps}; --resume goes on"
    out.print(f"{len(data)} clips of {clips.frames} frames, {fps:.3g} per second")
    out.print(f"wrote the model, log and checkpoint after {done} steps{more}: {output}")
    write_json(common.json, {"output": str(output), "clips": len(data), "fps": fps, "steps": done})


def _sampling(maker: Maker) -> Sampling:
    """What the options ask for."""
    size, at_once = (maker.frames, maker.height, maker.width), maker.decoded_at_once
    return Sampling(*size, maker.steps, maker.guidance, decoded_at_once=at_once, progress=err.is_terminal)


def _rate(video: Path | None) -> float | None:
    """Frames per second that a file tells; a folder of pictures tells none."""
    return None if video is None or not video.is_file() else frame_rate(video)


def _backdrop(
    model: SelfModel,
    picture: torch.Tensor,
    camera: Camera,
    q_init: tuple[float, ...] | None,
    path: Path | None,
    segmenter: str | None,
    device: torch.device | str,
) -> torch.Tensor | None:
    """The scene without the robot, where a file or a segmenter tells it."""
    if path is not None or segmenter is None:
        return None if path is None else read_image(path)
    if q_init is None:
        raise InputError("--segmenter needs --q-init: the self-model at these joints says which points are the robot's")
    mask = robot_mask(Segmenter.from_pretrained(segmenter, device=device), model, picture, torch.tensor(q_init), camera)
    rim = 2 * max(1, round(RIM_SHARE * max(mask.shape))) + 1
    wide = torch.nn.functional.max_pool2d(mask[None, None], rim, stride=1, padding=rim // 2)[0]
    return uncovered(picture[None], wide < 0.5)


def _state(path: Path, robot: Robot, q_init: tuple[float, ...] | None) -> mujoco.MjData:
    """The scene of a file as it says, with the robot at q_init where that is known."""
    try:
        data = mujoco.MjData(mujoco.MjModel.from_xml_path(str(path)))
    except ValueError as error:
        raise InputError(f"{path}: MuJoCo cannot read this scene ({' '.join(str(error).split())[:300]})") from error
    if q_init is not None:
        place(robot, data, torch.tensor(q_init, dtype=torch.float64))
    mujoco.mj_forward(data.model, data)
    return data
