"""The two networks of `text_gestures.py`: a small CLIP that reads words and pictures of the hand, and a judge."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from gestures import (
    BENT,
    FINGERS,
    FIRST,
    NAMES,
    NO_GESTURE,
    PX,
    THUMB,
    VARIED,
    Stock,
    World,
    cameras,
    fingertips,
    sentences,
)
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTokenizer, ResNetConfig, VisionTextDualEncoderConfig

from kinesplat.files import written_whole
from kinesplat.inverse.augmentation import Augmentation
from kinesplat.inverse.text import TEMPLATES
from kinesplat.vision.clip import ClipEncoder
from kinesplat.vision.preprocessing import Preprocessing

SIGMA = 0.12
NOTHING_AT = 0.25
SLOPES = (1.0, 6.0)
WIDTHS = (0.18, 0.45)
COSINE, JOINTS = 30.0, 10.0
THRESHOLD = 0.16
GREY_ZONE = 0.05
CLIMBERS, CLIMB_STEPS, CLIMB_EVERY, CLIMB_FROM, CLIMBED_VIEWS = 32, 6, 10, 300, 2
STARTED_ANEW = 0.06
SHAKEN = 0.08
DECAY_FROM = 0.6
PROCESSOR = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
MAPS = (32, 64, 96, 128)


class Clip(transformers.VisionTextDualEncoderModel):
    """A ResNet and CLIP's text tower with two projections, all of transformers; the last map is read as it is."""

    def __init__(self, config: VisionTextDualEncoderConfig) -> None:
        super().__init__(config)
        self.vision_model.pooler = torch.nn.Flatten()


def saved(network: Clip, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """The encoder with its tokenizer and its image processor."""
    size = {"height": PX, "width": PX}
    processor = PROCESSOR(size={"shortest_edge": PX}, crop_size=size)
    for part in (network, tokenizer, processor):
        part.save_pretrained(folder)


def loaded(folder: Path) -> ClipEncoder:
    """The encoder in a folder."""
    network = Clip.from_pretrained(folder).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    preprocessing = Preprocessing.of(PROCESSOR.from_pretrained(folder))
    return ClipEncoder(network, CLIPTokenizer.from_pretrained(folder), preprocessing, folder.name)


def fresh_encoder(folder: Path) -> ClipEncoder:
    """A small CLIP with random weights, saved and read back."""
    learnt = CLIPTokenizer().train_new_from_iterator(sentences(), vocab_size=400, show_progress=False)
    learnt.model_max_length = 24
    ids = {"bos_token_id": learnt.bos_token_id, "eos_token_id": learnt.eos_token_id, "pad_token_id": 0}
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"vocab_size": len(learnt), "max_position_embeddings": 24, **ids}
    vision = {"embedding_size": MAPS[0], "hidden_sizes": list(MAPS), "depths": [1] * len(MAPS)}
    vision |= {"layer_type": "basic", "hidden_act": "gelu", "hidden_size": MAPS[-1] * math.ceil(PX / 32) ** 2}
    towers = (ResNetConfig(**vision).to_dict(), CLIPTextConfig(**text).to_dict())
    config = VisionTextDualEncoderConfig(vision_config=towers[0], text_config=towers[1], projection_dim=64)
    saved(Clip(config), learnt, folder)
    return loaded(folder)


def finger_captions(world: World, q: Tensor) -> list[tuple[list[str], Tensor]]:
    """Groups of sentences about single fingers, and how well each fits every configuration (logits ``(n, m)``)."""
    names, (lower, upper) = world.model.tree.joint_names, world.limits
    groups = []
    for finger, words in FINGERS.items():
        curl = torch.stack([q[:, names.index(f"rh_{finger}{j}")] for j in ("J3", "J2", "J1")]).mean(dim=0) / 1.571
        away = (curl[:, None] - torch.tensor(list(BENT.values()))) / 0.15
        groups.append(([f"the {words} is {state}" for state in BENT], -0.5 * away.square()))
    thumb = [names.index(f"rh_THJ{j}") for j in (5, 4, 2, 1)]
    away = (q[:, None, thumb] - world.q[list(THUMB.values())][:, thumb]) / (0.2 * (upper - lower)[thumb])
    groups.append(([f"the thumb {state}" for state in THUMB], -0.5 * away.square().mean(dim=-1)))
    return groups


def closeness(distance: Tensor) -> Tensor:
    """The cosine that a picture should have with a gesture at a distance: a peak on a hill that reaches everywhere."""
    return torch.stack([torch.exp(-((distance / width) ** 2)) for width in WIDTHS]).mean(dim=0)


def features_of(encoder: ClipEncoder, pictures: Tensor) -> Tensor:
    """What the vision tower sees in pictures, before the projection ``(n, k)``; computed in half the bits."""
    with torch.autocast("cpu", torch.bfloat16):
        return encoder.network.vision_model(**encoder.preprocessing(pictures)).pooler_output.float()


def encoder_loss(
    world: World, encoder: ClipEncoder, head: torch.nn.Module, q: Tensor, pictures: Tensor, template: str
) -> Tensor:
    """CLIP's contrastive loss, the cosines as such, and the joints, which a head that is thrown away reads."""
    network, features = encoder.network, features_of(encoder, pictures)
    own = [sentence for sentences, _ in finger_captions(world, q) for sentence in sentences]
    said = [template.format(name) for name in (*NAMES, NO_GESTURE)] + own
    tokens = encoder.tokenizer(said, padding=True, return_tensors="pt")
    words = F.normalize(network.get_text_features(**tokens).pooler_output, dim=-1)
    cosines = F.normalize(network.visual_projection(features), dim=-1) @ words.mT
    away = cosines[:, : len(NAMES)] - closeness(world.distances(q))
    lower, upper = world.limits
    seen = torch.cat([2.0 * (q - lower) / (upper - lower) - 1.0, fingertips(world, q)], dim=1)
    joints = (head(features) - seen).square().mean()
    contrast = contrastive_loss(world, network.logit_scale.exp() * cosines, q)
    return contrast + COSINE * away.square().mean() + JOINTS * joints


def contrastive_loss(world: World, logits: Tensor, q: Tensor) -> Tensor:
    """CLIP's two cross entropies, with soft targets that fall off with the squared distance to a gesture.

    Both are taken at two temperatures, so that far configurations have a slope as well. Captions of single fingers
    teach the same embedding.
    """
    wanted = torch.cat([-(world.distances(q) / SIGMA).square() / 2.0, torch.full((len(q), 1), nothing())], dim=1)
    loss, first = torch.zeros(()), len(NAMES) + 1
    for slope in SLOPES:
        for dim, columns in ((1, len(NAMES) + 1), (0, len(NAMES))):  # which sentence; which picture, of every gesture
            loss = loss + divergence(wanted[:, :columns] / slope, logits[:, :columns] / slope, dim)
    for said, fits in finger_captions(world, q):
        loss = loss + divergence(fits, logits[:, first : first + len(said)], 1)
        first += len(said)
    return loss


def divergence(wanted: Tensor, logits: Tensor, dim: int) -> Tensor:
    """Kullback-Leibler divergence of two softmaxes along `dim`, averaged over the other axis."""
    target, said = wanted.log_softmax(dim=dim), logits.log_softmax(dim=dim)
    return (target.exp() * (target - said)).sum(dim=dim).mean()


def nothing() -> float:
    """Logit of no gesture."""
    return -0.5 * (NOTHING_AT / SIGMA) ** 2


class Climbers:
    """Configurations that climb towards gestures on the encoder as it is now: it must learn what they really show.

    They keep climbing between calls, so that they come as far as `text_to_q` does; a few start anew every time.
    """

    def __init__(self, world: World, generator: torch.Generator) -> None:
        self.world, self.q = world, world.random(CLIMBERS, generator)
        self.names = torch.randint(len(NAMES), (CLIMBERS,), generator=generator)
        self.pushed = torch.zeros_like(self.q)

    def climb(self, encoder: ClipEncoder, generator: torch.Generator) -> Tensor:
        """A few steps along the signs of an average of slopes; the configurations after it ``(n, dof)``."""
        anew = torch.rand(CLIMBERS, 1, generator=generator) < STARTED_ANEW
        self.q = torch.where(anew, self.world.random(CLIMBERS, generator), self.q)
        training = encoder.network.training
        encoder.network.eval()
        words = F.normalize(
            torch.stack([encoder.embed_text([n, TEMPLATES[1].format(n)]).mean(0) for n in NAMES]), dim=-1
        )
        lower, upper = self.world.limits
        size = 0.03 * torch.rand(CLIMBERS, 1, generator=generator) * (upper - lower)
        for _ in range(CLIMB_STEPS):
            q = self.q.requires_grad_(True)
            pictures = self.world.pictures(q, cameras(CLIMBERS, generator), generator, VARIED)
            (slope,) = torch.autograd.grad((encoder.embed_images(pictures) * words[self.names]).sum(), q)
            slope = slope / slope.norm(dim=1, keepdim=True).clamp(min=1e-9)
            self.pushed = 0.8 * self.pushed + 0.2 * slope
            with torch.no_grad():
                step = self.pushed / self.pushed.abs().mean(dim=1, keepdim=True).clamp(min=1e-9)
                self.q = self.world.model.tree.clamp(self.q.detach() + size * step.clamp(-1.0, 1.0))
        encoder.network.train(training)
        return self.q.detach()


def train(
    parts: torch.nn.Module,
    loss_of: Callable[[torch.Generator, int], Tensor],
    steps: int,
    rate: float,
    path: Path,
    seed: int,
) -> None:
    """Adam with warm-up and a rate that falls at the end; a killed run goes on from a checkpoint, one in 250 steps."""
    optimizer = torch.optim.AdamW(parts.parameters(), lr=rate, weight_decay=0.02)
    first = 0
    if path.is_file():
        kept = torch.load(path, weights_only=True)
        parts.load_state_dict(kept["network"])
        optimizer.load_state_dict(kept["optimizer"])
        first = kept["step"]
    began, recent = time.process_time(), []
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        falling = min(1.0, (1.0 - step / steps) / (1.0 - DECAY_FROM))
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 30) * falling
        loss = loss_of(generator, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        optimizer.step()
        recent.append(loss.item())
        if (step + 1) % 250 == 0 or step + 1 == steps:
            mean, seconds = sum(recent) / len(recent), time.process_time() - began
            print(f"{path.stem} {step + 1}/{steps}: loss {mean:.3f}, {seconds:.0f} processor seconds", flush=True)
            recent = []
            state = {"network": parts.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            with written_whole(path) as temporary:
                torch.save(state, temporary)


def trained_encoder(world: World, folder: Path, steps: int, batch: int) -> ClipEncoder:
    """The encoder after training; read from its folder where it is there."""
    if (folder / "trained").is_dir():
        return loaded(folder / "trained")
    torch.manual_seed(0)
    encoder = fresh_encoder(folder / "untrained")
    network = encoder.network.requires_grad_(True).train()
    head = torch.nn.Linear(network.vision_embed_dim, world.model.tree.dof + 3 * (len(FINGERS) + 1))
    stock, climbers = Stock(world, VARIED), Climbers(world, torch.Generator().manual_seed(3))

    def loss_of(generator: torch.Generator, step: int) -> Tensor:
        count = batch // 3 if stock.added else FIRST
        near, far = count - count // 4, count // 4
        stock.add(torch.cat([world.between(near, generator, SHAKEN), world.random(far, generator)]), generator)
        if step >= CLIMB_FROM and step % CLIMB_EVERY == 0:
            stock.add(climbers.climb(encoder, generator).repeat(CLIMBED_VIEWS, 1), generator)
        q, pictures = stock.draw(batch, generator)
        template = TEMPLATES[int(torch.randint(len(TEMPLATES), (1,), generator=generator))]
        return encoder_loss(world, encoder, head, q, pictures, template)

    train(torch.nn.ModuleList([network, head]), loss_of, steps, 2e-3, folder / "encoder.pt", seed=1)
    saved(network.eval(), encoder.tokenizer, folder / "trained.partial")
    (folder / "trained.partial").rename(folder / "trained")
    return loaded(folder / "trained")


def classifier() -> torch.nn.Module:
    """A convolutional network: pictures ``(n, 3, PX, PX)`` to seven logits, the last one for no gesture."""
    layers: list[torch.nn.Module] = []
    for before, after in ((3, 24), (24, 48), (48, 96), (96, 128)):
        layers += [
            torch.nn.Conv2d(before, after, 3, stride=2, padding=1),
            torch.nn.GroupNorm(8, after),
            torch.nn.GELU(),
        ]
    return torch.nn.Sequential(
        *layers, torch.nn.Flatten(), torch.nn.Dropout(0.2), torch.nn.Linear(128 * 16, len(NAMES) + 1)
    )


def trained_classifier(world: World, folder: Path, steps: int, batch: int) -> torch.nn.Module:
    """The judge: no residuals, hard labels, and other seeds and variations than the encoder."""
    torch.manual_seed(77)
    network, varied = classifier(), Augmentation(copies=1, crop=0.9, turn=0.05, colour=0.08)

    stock = Stock(world, varied)

    def loss_of(generator: torch.Generator, step: int) -> Tensor:
        count = batch // 4 if stock.added else FIRST
        which = torch.randint(6, (count,), generator=generator)
        lower, upper = world.limits
        noise = (upper - lower) * torch.randn(count, len(lower), generator=generator)
        near = world.model.tree.clamp(world.q[which] + 0.1 * torch.rand(count, 1, generator=generator) * noise)
        q = torch.cat([near, world.between(count, generator), world.random(count // 4, generator)])
        distance = world.distances(q).amin(dim=1)
        stock.add(q[(distance - THRESHOLD).abs() > 0.5 * GREY_ZONE], generator)
        q, pictures = stock.draw(batch, generator)
        distance, label = world.distances(q).min(dim=1)
        return F.cross_entropy(network(pictures.permute(0, 3, 1, 2)), torch.where(distance < THRESHOLD, label, 6))

    train(network, loss_of, steps, 1e-3, folder / "classifier.pt", seed=2)
    return network.eval()
