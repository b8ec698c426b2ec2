"""The network behind both fields of Liu et al. 2024: a multilayer perceptron on random Fourier features."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

LAYERS = 4
WIDTH = 256
FREQUENCIES = 64


class FourierMlp(torch.nn.Module):
    """Hidden layers with ReLU, and a linear one, on features of some inputs and on others as they are.

    A position x becomes ``[x, sin(2 pi B x), cos(2 pi B x)]``, B drawn once from a normal distribution (Tancik et al.
    2020, "Fourier features let networks learn high frequency functions"). The last layer starts at zero, so the
    network answers zero before it has learnt anything.

    Attributes:
        frequencies: B, ``(frequencies, positions)`` [cycles per unit of x].
        low_precision: whether the layers compute in bfloat16, to train twice as fast; not stored.
    """

    frequencies: Tensor
    low_precision: bool = False

    def __init__(
        self,
        positions: int,
        others: int,
        outputs: int,
        *,
        layers: int = LAYERS,
        width: int = WIDTH,
        frequencies: int = FREQUENCIES,
        bandwidth: float = 2.0,
        seed: int = 0,
    ) -> None:
        """A network that answers zero everywhere.

        Args:
            positions: size of x, whose features are taken; values of about -1 to 1.
            others: size of the inputs that enter as they are.
            outputs: size of the answer.
            layers: number of hidden layers.
            width: of the hidden layers.
            frequencies: rows of B.
            bandwidth: standard deviation of B [cycles per unit of x].
            seed: of B and of the weights.
        """
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        B = bandwidth * torch.randn(frequencies, positions, generator=generator)
        self.register_buffer("frequencies", B)
        sizes = [positions + 2 * frequencies + others, *[width] * layers]
        hidden = [torch.nn.Linear(a, b) for a, b in pairwise(sizes)]
        self.hidden = torch.nn.ModuleList(hidden)
        self.last = torch.nn.Linear(width, outputs)
        for layer in hidden:
            bound = math.sqrt(6.0 / layer.in_features)  # He et al. 2015
            torch.nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            torch.nn.init.zeros_(layer.bias)
        torch.nn.init.zeros_(self.last.weight)
        torch.nn.init.zeros_(self.last.bias)

    def forward(
        self, positions: Float[Tensor, "*batch positions"], others: Float[Tensor, "*batch others"] | None = None
    ) -> Float[Tensor, "*batch outputs"]:
        """Answers in the dtype of `positions`."""
        angles = 2.0 * math.pi * positions @ self.frequencies.to(positions).T
        parts = [positions, angles.sin(), angles.cos()]
        x = torch.cat(parts if others is None else [*parts, others], dim=-1)
        with torch.autocast(positions.device.type, torch.bfloat16, enabled=self.low_precision):
            for layer in self.hidden:
                x = torch.nn.functional.relu(layer(x))
            x = self.last(x)
        return x.to(positions.dtype)

    @contextmanager
    def in_low_precision(self) -> Iterator[None]:
        """Layers compute in bfloat16 inside the block."""
        self.low_precision = True
        try:
            yield
        finally:
            self.low_precision = False

    @classmethod
    def like(cls, state: dict[str, Tensor], prefix: str = "") -> "FourierMlp":
        """A network of the sizes that a saved state has; load the state into it.

        Raises:
            KeyError: `state` holds no such network.
        """
        B, last = state[f"{prefix}frequencies"], state[f"{prefix}last.weight"]
        layers = sum(name.startswith(f"{prefix}hidden.") and name.endswith(".weight") for name in state)
        first = state[f"{prefix}hidden.0.weight"]
        others = first.shape[1] - B.shape[1] - 2 * len(B)
        return cls(B.shape[1], others, len(last), layers=layers, width=len(first), frequencies=len(B))
