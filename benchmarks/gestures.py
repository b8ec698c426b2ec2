"""The hand, its six gestures, and the two networks that `text_gestures.py` trains on pictures of them."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

import kinesplat as ks
from kinesplat.files import written_whole
from kinesplat.inverse.augmentation import Augmentation
from kinesplat.inverse.text import TEMPLATES
from kinesplat.rasterizer.spherical_harmonics import SH_C0
from kinesplat.vision.clip import ClipEncoder

PX = 56
BRIGHTER = 2.0
CENTRE = (0.34, 0.0, 0.0)
NAMES = ("a fist", "an open hand", "a pointing finger", "a victory sign", "thumbs up", "an OK sign")
NO_GESTURE = "a hand"
FINGERS = {"FF": "index finger", "MF": "middle finger", "RF": "ring finger", "LF": "little finger"}
BENT = {"straight": 0.0, "half bent": 0.45, "rolled in": 0.9}
THUMB = {"sticks out": 4, "is spread": 1, "is folded in": 0, "meets the index finger": 5}
SIGMA = 0.12
NOTHING_AT = 0.25
SLOPES = (1.0, 6.0)
THRESHOLD = 0.16
GREY_ZONE = 0.05
STOCKED, FIRST = 4_000, 512
CLIMBERS, CLIMB_STEPS, CLIMBED_VIEWS = 16, 15, 6
CLIMB_FROM, CLIMB_EVERY = 150, 30
VARIED = Augmentation(copies=1, crop=0.85, backdrop=0.0)


def gestures(tree: ks.KinematicTree) -> Tensor:
    """The six configurations ``(6, dof)`` [rad], in the order of `NAMES`."""
    wrapped = {"THJ5": 0.2, "THJ4": 1.15, "THJ2": 0.4, "THJ1": 0.6}
    victory = {**fingers(0, 0, 0.93, 0.93), "FFJ4": -0.3, "MFJ4": 0.3, **wrapped}
    ring = {"FFJ4": 0.0, "FFJ3": 0.9, "FFJ2": 1.0, "FFJ1": 0.6, "THJ5": 0.35, "THJ4": 1.15, "THJ2": 0.35, "THJ1": 0.6}
    aside = {"THJ5": -0.6, "THJ4": 0.3, "THJ2": -0.3, "THJ1": -0.1}
    values = [
        {**fingers(0.93, 0.93, 0.93, 0.93), **wrapped},
        {**fingers(0, 0, 0, 0, 0.3), **aside},
        {**fingers(0, 0.93, 0.93, 0.93), **wrapped},
        victory,
        {**fingers(0.93, 0.93, 0.93, 0.93), "THJ5": -0.9, "THJ4": 0.2, "THJ2": -0.6, "THJ1": -0.2},
        {**fingers(0, 0, 0, 0, 0.3), **ring},
    ]
    q = torch.zeros(len(values), tree.dof)
    for row, joints in enumerate(values):
        for name, value in joints.items():
            q[row, tree.joint_names.index(f"rh_{name}")] = value
    return tree.clamp(q)


def fingers(ff: float, mf: float, rf: float, lf: float, spread: float = 0.0) -> dict[str, float]:
    """Joints of four fingers, each between straight (0) and rolled in (1)."""
    joints = {}
    for finger, curl, side in zip(FINGERS, (ff, mf, rf, lf), (-1.0, -0.3, -0.3, -1.0), strict=True):
        joints |= {f"{finger}J4": spread * side, f"{finger}J3": 1.5 * curl}
        joints |= {f"{finger}J2": 1.5 * curl, f"{finger}J1": 1.1 * curl}
    return joints


@dataclass(frozen=True)
class World:
    """The hand, its gestures, and pictures of it."""

    model: ks.SelfModel
    q: Tensor

    @classmethod
    def create(cls) -> "World":
        """With the packaged model, its colours times two: the hand is nearly black."""
        model = ks.zoo.load("shadow_hand")
        sh = BRIGHTER * model.parameters.sh
        sh[:, 0] += (BRIGHTER - 1.0) * 0.5 / SH_C0
        model = replace(model, parameters=replace(model.parameters, sh=sh))
        return cls(model, gestures(model.tree))

    @property
    def limits(self) -> tuple[Tensor, Tensor]:
        """Of the joints ``(dof,)`` [rad]."""
        return self.model.tree.q_lower.float(), self.model.tree.q_upper.float()

    def random(self, count: int, generator: torch.Generator) -> Tensor:
        """Configurations anywhere within the limits ``(count, dof)``."""
        lower, upper = self.limits
        return lower + torch.rand(count, len(lower), generator=generator) * (upper - lower)

    def distances(self, q: Tensor) -> Tensor:
        """To every gesture ``(n, 6)``: root mean square over joints, of their range; the wrist counts a fifth."""
        lower, upper = self.limits
        weight = torch.tensor([0.2 if "WRJ" in name else 1.0 for name in self.model.tree.joint_names])
        away = ((q[:, None] - self.q) / (upper - lower)).square()
        return ((weight * away).sum(dim=-1) / weight.sum()).sqrt()

    def between(self, count: int, generator: torch.Generator, jitter: float = 0.05) -> Tensor:
        """Gestures on their way to anything: all fingers by one share, or each by its own."""

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator)

        own = self.q[torch.randint(6, (count,), generator=generator)]
        other = self.q[torch.randint(6, (count,), generator=generator)]
        target = torch.where(uniform(count, 1) < 0.3, other, self.random(count, generator))
        one = torch.where(uniform(count, 1) < 0.3, 0.0, uniform(count, 1))
        each = (1.4 * uniform(count, len(GROUPS)) - 0.2).clamp(0.0, 1.0)
        share = torch.where(uniform(count, 1) < 0.5, one, each)
        share = share[:, group_of(self.model.tree)]
        lower, upper = self.limits
        noise = jitter * (upper - lower) * torch.randn(count, len(lower), generator=generator)
        return self.model.tree.clamp(own + share * (target - own) + noise)

    def pictures(self, q: Tensor, camera: ks.Camera, generator: torch.Generator, varied: Augmentation) -> Tensor:
        """Varied pictures ``(n, PX, PX, 3)``, one camera each."""
        out = self.model.render(q, camera, (0.0, 0.0, 0.0))
        assert out.rgb is not None
        assert out.alpha is not None
        return varied(out.rgb, out.alpha, generator)


@dataclass
class Stock:
    """The last few thousand pictures, each of its own configuration and camera; every use varies them anew."""

    world: World
    varied: Augmentation
    q: Tensor | None = None
    rgb: Tensor | None = None
    alpha: Tensor | None = None

    @torch.no_grad()
    def add(self, q: Tensor, generator: torch.Generator) -> None:
        """Render configurations from random cameras."""
        out = self.world.model.render(q, cameras(len(q), generator), (0.0, 0.0, 0.0))
        assert out.rgb is not None
        assert out.alpha is not None
        for name, new in (("q", q), ("rgb", out.rgb), ("alpha", out.alpha)):
            old = getattr(self, name)
            setattr(self, name, new if old is None else torch.cat([old, new])[-STOCKED:])

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Configurations ``(count, dof)`` and their pictures ``(count, PX, PX, 3)``."""
        assert self.q is not None
        assert self.rgb is not None
        assert self.alpha is not None
        drawn = torch.randint(len(self.q), (count,), generator=generator)
        return self.q[drawn], self.varied(self.rgb[drawn], self.alpha[drawn], generator)


PROCESSOR = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
GROUPS = ("WR", *FINGERS, "TH")


def group_of(tree: ks.KinematicTree) -> Tensor:
    """The finger (or the wrist) that every joint belongs to ``(dof,)``."""
    return torch.tensor([GROUPS.index(name[3:5]) for name in tree.joint_names])


def cameras(count: int, generator: torch.Generator, px: int = PX, spread: bool = False) -> ks.Camera:
    """Views of the palm, 50 degrees to either side, fingers up; `spread` takes one from each of `count` sectors."""
    place = torch.rand(count, generator=generator)
    place = (torch.arange(count) + place) / count if spread else place
    azimuth = math.radians(50.0) * (2.0 * place - 1.0)
    rise = 0.6 * torch.rand(count, generator=generator) - 0.3
    flat = rise.cos()
    direction = torch.stack([rise.sin(), flat * azimuth.sin(), flat * azimuth.cos()], dim=-1)
    target = torch.tensor(CENTRE) + 0.012 * torch.randn(count, 3, generator=generator)
    distance = 0.3 + 0.08 * torch.rand(count, 1, generator=generator)
    return ks.Camera.look_at(target + distance * direction, target, 0.785, px, px, up=(1.0, 0.0, 0.0))


def sentences() -> list[str]:
    """Everything that the encoder reads in training."""
    fingers = [f"the {words} is {state}" for words in FINGERS.values() for state in BENT]
    thumb = [f"the thumb {state}" for state in THUMB]
    return [*(t.format(name) for name in (*NAMES, NO_GESTURE) for t in TEMPLATES), *fingers, *thumb]


def fresh_encoder(folder: Path) -> ClipEncoder:
    """A small CLIP with random weights, saved and read back the way every other encoder is."""
    learnt = CLIPTokenizer().train_new_from_iterator(sentences(), vocab_size=400, show_progress=False)
    learnt.model_max_length = 24
    ids = {"bos_token_id": learnt.bos_token_id, "eos_token_id": learnt.eos_token_id, "pad_token_id": 0}
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"vocab_size": len(learnt), "max_position_embeddings": 24, **ids}
    vision = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision |= {"image_size": PX, "patch_size": 8}
    network = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))
    size = {"height": PX, "width": PX}
    processor = PROCESSOR(size={"shortest_edge": PX}, crop_size=size)
    for part in (network, learnt, processor):
        part.save_pretrained(folder)
    return ClipEncoder.load(folder)


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


def contrastive_loss(world: World, encoder: ClipEncoder, q: Tensor, pictures: Tensor, template: str) -> Tensor:
    """CLIP's two cross entropies, with soft targets that fall off with the squared distance to a gesture.

    Both are taken at two temperatures, so that far configurations have a slope as well. Captions of single fingers
    teach the same embedding.
    """
    captions = finger_captions(world, q)
    own = [sentence for sentences, _ in captions for sentence in sentences]
    wanted = torch.cat([-(world.distances(q) / SIGMA).square() / 2.0, torch.full((len(q), 1), nothing())], dim=1)
    sentences = [template.format(name) for name in (*NAMES, NO_GESTURE)] + own
    tokens = encoder.tokenizer(sentences, padding=True, return_tensors="pt")
    words = F.normalize(encoder.network.get_text_features(**tokens).pooler_output, dim=-1)
    logits = encoder.network.logit_scale.exp() * encoder.embed_images(pictures) @ words.mT
    loss, first = torch.zeros(()), len(NAMES) + 1
    for slope in SLOPES:
        for dim, columns in ((1, len(NAMES) + 1), (0, len(NAMES))):  # which sentence; which picture, of every gesture
            loss = loss + divergence(wanted[:, :columns] / slope, logits[:, :columns] / slope, dim)
    for sentences, fits in captions:
        loss = loss + divergence(fits, logits[:, first : first + len(sentences)], 1)
        first += len(sentences)
    return loss


def divergence(wanted: Tensor, logits: Tensor, dim: int) -> Tensor:
    """Kullback-Leibler divergence of two softmaxes along `dim`, averaged over the other axis."""
    target, said = wanted.log_softmax(dim=dim), logits.log_softmax(dim=dim)
    return (target.exp() * (target - said)).sum(dim=dim).mean()


def nothing() -> float:
    """Logit of no gesture."""
    return -0.5 * (NOTHING_AT / SIGMA) ** 2


def climbed(world: World, encoder: ClipEncoder, generator: torch.Generator) -> Tensor:
    """Configurations ``(n, dof)`` that the encoder, as it is now, is led to: it must learn what they really show."""
    names = torch.randint(len(NAMES), (CLIMBERS,), generator=generator)
    with torch.no_grad():
        words = encoder.embed_text(NAMES)[names]
    units, path = world.random(CLIMBERS, generator).requires_grad_(True), []
    optimizer = torch.optim.Adam([units], lr=0.08)
    for step in range(CLIMB_STEPS):
        pictures = world.pictures(units, cameras(CLIMBERS, generator), generator, VARIED)
        loss = -(encoder.embed_images(pictures) * words).sum()
        (units.grad,) = torch.autograd.grad(loss, units)
        optimizer.step()
        with torch.no_grad():
            units.copy_(world.model.tree.clamp(units))
        if step >= CLIMB_STEPS // 2 and step % 2 == 0:
            path.append(units.detach().clone())
    return torch.cat(path)


def train(
    network: torch.nn.Module,
    loss_of: Callable[[torch.Generator, int], Tensor],
    steps: int,
    rate: float,
    path: Path,
    seed: int,
) -> None:
    """Adam with warm-up and cosine; a checkpoint every 50 steps, from which a killed run goes on."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.02)
    first = 0
    if path.is_file():
        saved = torch.load(path, weights_only=True)
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    began, recent = time.perf_counter(), []
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        optimizer.param_groups[0]["lr"] = (
            rate * min(1.0, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * step / steps))
        )
        loss = loss_of(generator, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        recent.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == steps:
            mean, seconds = sum(recent) / len(recent), time.perf_counter() - began
            print(f"{path.stem} {step + 1}/{steps}: loss {mean:.3f}, {seconds:.0f} s", flush=True)
            recent = []
            with written_whole(path) as temporary:
                torch.save(
                    {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, temporary
                )


def trained_encoder(world: World, folder: Path, steps: int, batch: int) -> ClipEncoder:
    """The encoder after training; read from its folder where it is there."""
    if (folder / "trained").is_dir():
        return ClipEncoder.load(folder / "trained")
    torch.manual_seed(0)
    encoder = fresh_encoder(folder / "untrained")
    encoder.network.requires_grad_(True).train()

    stock = Stock(world, VARIED)

    def loss_of(generator: torch.Generator, step: int) -> Tensor:
        count = FIRST if stock.q is None else batch // 3
        stock.add(
            torch.cat([world.between(count - count // 6, generator), world.random(count // 6, generator)]), generator
        )
        if step >= CLIMB_FROM and step % CLIMB_EVERY == 0:
            led = climbed(world, encoder, generator)
            for _ in range(CLIMBED_VIEWS):
                stock.add(led, generator)
        q, pictures = stock.draw(batch, generator)
        template = TEMPLATES[int(torch.randint(len(TEMPLATES), (1,), generator=generator))]
        return contrastive_loss(world, encoder, q, pictures, template)

    train(encoder.network, loss_of, steps, 2e-3, folder / "encoder.pt", seed=1)
    for part in (encoder.network.eval().requires_grad_(False), encoder.tokenizer):
        part.save_pretrained(folder / "trained.partial")
    PROCESSOR.from_pretrained(folder / "untrained").save_pretrained(folder / "trained.partial")
    (folder / "trained.partial").rename(folder / "trained")
    return ClipEncoder.load(folder / "trained")


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
    """The judge: of another architecture, with hard labels, from other seeds and other variations than the encoder."""
    torch.manual_seed(77)
    network, varied = classifier(), Augmentation(copies=1, crop=0.9, turn=0.05, colour=0.08)

    stock = Stock(world, varied)

    def loss_of(generator: torch.Generator, step: int) -> Tensor:
        count = FIRST if stock.q is None else batch // 4
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
