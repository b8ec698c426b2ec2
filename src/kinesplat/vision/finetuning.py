"""Fine-tuning Stable Video Diffusion on a robot's videos, steered by sentences (Liu et al. 2024, appendix A.3)."""

import csv
import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from jaxtyping import Float
from rich.progress import Progress
from torch import Tensor

from kinesplat.errors import InputError, ModelFileError, TrainingError
from kinesplat.files import folder_written_whole, written_whole
from kinesplat.vision.loading import library
from kinesplat.vision.video_clips import Clip, EncodedClips, refuse_unlike
from kinesplat.vision.video_diffusion import LORA_FOLDER, STABLE, TextSteeredVideo, findable, write_index

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""Layers of the video model that a LoRA changes."""
CHECKPOINT = "checkpoint.safetensors"
LOG = "log.csv"
FREE = ("steps", "save_memory", "save_every", "minutes")
"""Settings that may change when a training goes on."""


@dataclass(frozen=True)
class FinetuneSettings:
    """How to fine-tune.

    Attributes:
        steps: optimiser steps in all.
        batch: clips a step and process.
        accumulation: batches a step, whose gradients are averaged.
        learning_rate: of AdamW, after 100 steps of warming up.
        lora_rank: rank of the low-rank update of the attention layers (Hu et al. 2022); None trains all weights.
        dropout: share of clips without sentence, as many without first frame, as many without both, for guidance.
        log_sigma: mean and standard deviation of the logarithm of the noise; those of Stable Video Diffusion.
        ema: decay of the running mean of the weights, which is what is kept in the end; 0 keeps the last.
        precision: "no", "bf16" or "fp16", as accelerate has it.
        save_memory: compute activations twice instead of keeping them (gradient checkpointing).
        save_every: steps from one checkpoint to the next.
        minutes: stop after this wall clock (the main process's), checkpoint and model written; `resume` goes on. None
            does not.
    """

    steps: int = 10_000
    batch: int = 1
    accumulation: int = 1
    learning_rate: float = 1e-4
    lora_rank: int | None = 16
    dropout: float = 0.1
    log_sigma: tuple[float, float] = (0.7, 1.6)
    ema: float = 0.0
    precision: str = "no"
    save_memory: bool = False
    save_every: int = 250
    minutes: float | None = None


def edm_loss(
    unet: Any,
    latents: Float[Tensor, "b frames c h w"],
    noise: Float[Tensor, "b frames c h w"],
    sigma: Float[Tensor, " b"],
    first: Float[Tensor, "b c h w"],
    embedding: Float[Tensor, "b 1 k"],
    told: Float[Tensor, "b 3"],
) -> Float[Tensor, ""]:
    """Weighted squared error of the denoised video (Karras et al. 2022, eq. 7 and 8; v-prediction as in SVD).

    Args:
        unet: the video model.
        latents: scaled latents of the video.
        noise: standard normal.
        sigma: standard deviation of the noise that is added.
        first: latents of the first frame, unscaled, as the model is given them beside the noise.
        embedding: of the sentence.
        told: frames per second less one, motion bucket, noise of the first frame.
    """
    s = sigma[:, None, None, None, None]
    noisy, norm = latents + s * noise, (s.square() + 1.0).rsqrt()
    beside = first[:, None].expand(-1, latents.shape[1], -1, -1, -1)
    predicted = unet(torch.cat([norm * noisy, beside], dim=2), 0.25 * sigma.log(), embedding, told).sample
    denoised = norm.square() * noisy - s * norm * predicted
    return ((denoised - latents).square() * (1.0 + s.square()) / s.square()).mean()


def finetune(
    model: TextSteeredVideo,
    clips: Sequence[Clip],
    folder: str | Path,
    settings: FinetuneSettings | None = None,
    *,
    base: str = "",
    seed: int = 0,
    resume: bool = False,
    progress: bool = False,
) -> TextSteeredVideo:
    """Train the video model on clips, on its device; text model and autoencoder stay.

    Runs under ``accelerate launch`` as well, with the model on the GPU. The folder gets the checkpoint and log.csv on
    the way, and in the end (after `minutes` as well) the model as it then is: all of it, or the LoRA alone with the
    names of its base and of the text model; either way with size and rate of the clips, at which it then draws. Every
    step draws from a generator of its own, so a resumed run goes the way of a run that was never stopped; `steps_done`
    tells how far it is. Only the same training goes on: same clips, base, number of processes and settings but for
    `FREE`.

    Args:
        model: what to start from; its video model is changed.
        clips: what to learn.
        folder: where results go.
        settings: how; the defaults suit a LoRA of SVD-XT.
        base: name or folder of `model`, which a LoRA is written with.
        seed: of noise, order and dropout.
        resume: go on from the folder's checkpoint, where there is one.
        progress: show a progress bar on the terminal.

    Raises:
        InputError: no clip, clips of different sizes or rates, a LoRA without `base`, or a checkpoint of another
            training.
        BackendError: accelerate or peft is absent.
        TrainingError: the loss is no number; the last checkpoint before it is kept.
    """
    settings, folder = settings or FinetuneSettings(), Path(folder)
    _refuse(clips, settings, base)
    folder.mkdir(parents=True, exist_ok=True)
    frames, height, width = clips[0].frames.shape[:3]
    own = replace(model.sampling, frames=frames, height=height, width=width, fps=clips[0].fps)
    model = replace(model, sampling=own.over(STABLE))
    run = _Run.start(model, clips, folder, settings, seed)
    done = run.load() if resume and (folder / CHECKPOINT).is_file() else 0
    run.train(done, progress)
    run.save_model(base)
    return replace(model, unet=run.plain_unet())


@dataclass(eq=False)
class _Run:
    """One process of a training."""

    model: TextSteeredVideo
    accelerator: Any
    unet: Any
    optimizer: Any
    data: EncodedClips
    folder: Path
    settings: FinetuneSettings
    seed: int
    mean: list[Tensor]
    origin: dict[str, Any]

    @classmethod
    def start(
        cls, model: TextSteeredVideo, clips: Sequence[Clip], folder: Path, settings: FinetuneSettings, seed: int
    ) -> "_Run":
        """Model, optimiser and encoded clips where the model lies, before the first step."""
        on_cpu = next(model.unet.parameters()).device.type == "cpu"
        accelerator = library("accelerate").Accelerator(cpu=on_cpu, mixed_precision=settings.precision)
        torch.manual_seed(seed)
        origin = _origin(model, clips)
        if settings.save_memory:
            model.unet.enable_gradient_checkpointing()
        unet = model.unet if settings.lora_rank is None else _with_lora(model.unet, settings.lora_rank)
        unet.train()
        optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=settings.learning_rate)
        model.vae.to(accelerator.device)
        model.text_encoder.to(accelerator.device)
        data = EncodedClips.of(model, clips)
        unet, optimizer = accelerator.prepare(unet, optimizer)
        trained = [p for p in accelerator.unwrap_model(unet).parameters() if p.requires_grad]
        mean = [p.detach().clone() for p in trained]
        return cls(model, accelerator, unet, optimizer, data, folder, settings, seed, mean, origin)

    @property
    def trained(self) -> dict[str, Tensor]:
        """The parameters that move, by name."""
        plain = self.accelerator.unwrap_model(self.unet)
        return {name: p for name, p in plain.named_parameters() if p.requires_grad}

    def train(self, done: int, progress: bool) -> None:
        """All steps that are left, or as many as the minutes allow."""
        settings, began, losses = self.settings, time.perf_counter(), []
        main = self.accelerator.is_main_process
        late = [False]
        with Progress(disable=not (progress and main), transient=True) as bar:
            task = bar.add_task("fine-tuning", total=settings.steps, completed=done)
            for step in range(done, settings.steps):
                losses.append(self.step(step))
                bar.advance(task)
                if settings.minutes is not None:  # by one clock: a process that stops alone leaves the others waiting
                    late = [time.perf_counter() - began > 60.0 * settings.minutes]
                    library("accelerate.utils").broadcast_object_list(late)
                if (step + 1) % settings.save_every == 0 or late[0] or step + 1 == settings.steps:
                    self.save(step + 1, sum(losses) / len(losses), time.perf_counter() - began)
                    losses.clear()
                if late[0]:
                    break

    def step(self, step: int) -> float:
        """One step of the optimiser, by the gradients of one batch or of several added up; gives their mean loss."""
        settings, device = self.settings, self.accelerator.device
        process = self.accelerator.process_index
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) * 1_009 + process)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, (step + 1) / 100)
        total = 0.0
        for part in range(settings.accumulation):
            last = part + 1 == settings.accumulation
            drawn = self.data.draw(self.model, settings.batch, settings.dropout, settings.log_sigma, generator)
            batch = [part.to(device) for part in drawn]
            with nullcontext() if last else self.accelerator.no_sync(self.unet):
                with self.accelerator.autocast():
                    loss = edm_loss(self.unet, *batch) / settings.accumulation
                if not torch.isfinite(loss):
                    raise TrainingError(f"step {step}: the loss is {loss.item()}; the last checkpoint is kept")
                self.accelerator.backward(loss)
            total += loss.item()
        self.accelerator.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            decay = min(settings.ema, (1 + step) / (10 + step))
            for mean, now in zip(self.mean, self.trained.values(), strict=True):
                mean.lerp_(now.to(mean.device), 1.0 - decay)
        return total

    def save(self, step: int, loss: float, seconds: float) -> None:
        """Checkpoint and a line of the log."""
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        tensors = {}
        moments = self.optimizer.state
        for (name, p), mean in zip(self.trained.items(), self.mean, strict=True):
            state = moments.get(p, {})
            parts = {"now": p.detach(), "mean": mean, **{k: v for k, v in state.items() if torch.is_tensor(v)}}
            tensors |= {f"{part}:{name}": value.contiguous().cpu().clone() for part, value in parts.items()}
        scaler = {} if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()
        header = {"state": json.dumps({"step": step, "scaler": scaler, **self.identity})}
        with written_whole(self.folder / CHECKPOINT) as temporary:
            library("safetensors.torch").save_file(tensors, str(temporary), metadata=header)
        new = not (self.folder / LOG).is_file()
        with (self.folder / LOG).open("a", newline="") as file:
            rows = [["step", "loss", "seconds"]] if new else []
            csv.writer(file).writerows([*rows, [step, f"{loss:.5f}", f"{seconds:.1f}"]])

    def load(self) -> int:
        """Take up the checkpoint; the step that it was written after."""
        path = self.folder / CHECKPOINT
        state, tensors = _read(path)
        step, scaler, own = state.pop("step"), state.pop("scaler", {}), json.loads(json.dumps(self.identity))
        keys = [key for key in own | state if state.get(key) != own.get(key)]
        if keys:
            unlike = "; ".join(f"{key} {state.get(key)}, not {own.get(key)}" for key in keys)
            raise InputError(f"{path} is of another training: {unlike}")
        if scaler and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(scaler)
        with torch.no_grad():
            for (name, p), mean in zip(self.trained.items(), self.mean, strict=True):
                p.copy_(tensors[f"now:{name}"])
                mean.copy_(tensors[f"mean:{name}"])
                parts = {part: tensors.get(f"{part}:{name}") for part in ("step", "exp_avg", "exp_avg_sq")}
                if parts["step"] is not None:
                    kept = {k: v.to(p.device) if k != "step" else v for k, v in parts.items() if v is not None}
                    self.optimizer.state[p] = kept
        return int(step)

    @property
    def identity(self) -> dict[str, Any]:
        """What two runs must have in common, for one to go on with the other's checkpoint."""
        count = sum(p.numel() for p in self.trained.values())
        settings = {key: value for key, value in asdict(self.settings).items() if key not in FREE}
        processes = self.accelerator.num_processes
        return {"trained": count, "seed": self.seed, "processes": processes, **settings, **self.origin}

    def plain_unet(self) -> Any:
        """The trained video model, with the mean of the weights, without adapters."""
        plain = self.accelerator.unwrap_model(self.unet)
        with torch.no_grad():
            for p, mean in zip(self.trained.values(), self.mean, strict=True):
                p.copy_(mean)
        plain = plain.merge_and_unload() if self.settings.lora_rank is not None else plain
        return plain.eval()

    def save_model(self, base: str) -> None:
        """Write the result beside the checkpoint."""
        if not self.accelerator.is_main_process:
            return
        now = {name: p.detach().clone() for name, p in self.trained.items()}
        with torch.no_grad():
            for p, mean in zip(self.trained.values(), self.mean, strict=True):
                p.copy_(mean)
            if self.settings.lora_rank is None:
                replace(self.model, unet=self.accelerator.unwrap_model(self.unet)).save_pretrained(self.folder)
            else:
                self._save_lora(base)
            for name, p in self.trained.items():
                p.copy_(now[name])

    def _save_lora(self, base: str) -> None:
        plain = self.accelerator.unwrap_model(self.unet)
        plain.peft_config["default"].base_model_name_or_path = findable(base)
        with folder_written_whole(self.folder / LORA_FOLDER) as temporary:
            plain.save_pretrained(str(temporary), save_embedding_layers=False)
        write_index(self.folder, self.model.sampling, self.model.text_source)


def steps_done(folder: str | Path) -> int:
    """After how many steps the checkpoint in a folder was written; 0 where there is none.

    Raises:
        ModelFileError: the checkpoint is broken.
    """
    path = Path(folder) / CHECKPOINT
    return int(_read(path, tensors=False)[0]["step"]) if path.is_file() else 0


def _read(path: Path, tensors: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """State and tensors of a checkpoint, or the state alone."""
    safetensors = library("safetensors")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            state = json.loads(file.metadata()["state"])
            return state, {name: file.get_tensor(name) for name in (file.keys() if tensors else ())}
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise ModelFileError(f"{path}: a broken checkpoint ({error}); train without resume") from error


def _origin(model: TextSteeredVideo, clips: Sequence[Clip]) -> dict[str, Any]:
    """What a training starts from: size, rate and checksums of the clips, checksums of a sample of the weights."""
    checksum = 0
    for clip in clips:
        checksum = crc32(clip.frames.cpu().numpy().tobytes(), crc32(clip.prompt.encode(), checksum))
    parts = {"base": model.unet, "vae": model.vae, "text_model": model.text_encoder}
    size = list(clips[0].frames.shape[:3])
    weights = {part: _weights_checksum(module) for part, module in parts.items()}
    return {"clips": len(clips), "size": size, "fps": round(clips[0].fps, 6), "data": checksum, **weights}


def _weights_checksum(module: torch.nn.Module) -> int:
    """Of the sizes of all weights, and of a few values of each."""
    checksum = 0
    for name, p in module.named_parameters():
        few = p.detach().flatten()[:: max(1, p.numel() // 8)].float().cpu()
        checksum = crc32(few.numpy().tobytes(), crc32(f"{name} {tuple(p.shape)}".encode(), checksum))
    return checksum


def _with_lora(unet: Any, rank: int) -> Any:
    peft = library("peft")
    unet.requires_grad_(False)
    return peft.get_peft_model(unet, peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(ATTENTION)))


def _refuse(clips: Sequence[Clip], settings: FinetuneSettings, base: str) -> None:
    refuse_unlike(clips)
    if settings.lora_rank is not None and not base:
        raise InputError("a LoRA is written with the name of its base: give base=, or lora_rank=None")
    if not 0.0 <= settings.dropout <= 1 / 3:
        raise InputError(f"dropout is {settings.dropout}; three shares of it fit into at most 1")
