"""Adam on a set of splats that may grow and shrink while it is optimised."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from kinesplat.gaussians import Parameters


@dataclass(frozen=True)
class Rates:
    """Learning rates of Adam; the last three train the shapes and looks of a splat, whatever the scene's size.

    Attributes:
        means: relative to the size of the scene.
        quats: rotations.
        log_scales: logarithms of the scales.
        logit_opacities: logits of the opacities.
        sh: spherical harmonics.
    """

    means: float = 1.6e-4
    quats: float = 1e-3
    log_scales: float = 5e-3
    logit_opacities: float = 5e-2
    sh: float = 2.5e-3


class SplatOptimizer:
    """Splats as leaves of the graph, one Adam over them, and rows that come and go with their moments.

    Attributes:
        parameters: the leaves.
    """

    parameters: Parameters

    def __init__(self, parameters: Parameters, rates: Rates, scene_size: float) -> None:
        """Leaves with the values of `parameters`; `scene_size` scales the rate of the means [m]."""
        leaves = {name: _leaf(value) for name, value in parameters.tensors().items()}
        self.parameters = replace(parameters, **leaves)
        self.rates = {f.name: getattr(rates, f.name) for f in fields(Rates)}
        self.rates["means"] *= scene_size
        groups = [{"params": [getattr(self.parameters, name)], "name": name} for name in self.rates]
        self._adam = torch.optim.Adam(groups, lr=0.0, eps=1e-15, fused=True)

    def step(self, decay: Mapping[str, float] | float) -> None:
        """One step of Adam at the rates times `decay` (by name, or one for all); gradients are then dropped."""
        for group in self._adam.param_groups:
            name = group["name"]
            group["lr"] = self.rates[name] * (decay if isinstance(decay, float) else decay.get(name, 1.0))
        self._adam.step()
        self._adam.zero_grad()

    def rearrange(self, keep: Bool[Tensor, " n"], new: Parameters | None = None) -> None:
        """Keep some rows with their moments, and append `new` ones without a past."""
        changed = {}
        for group in self._adam.param_groups:
            name, (old,) = group["name"], group["params"]
            rows = [old.detach()[keep], *([] if new is None else [getattr(new, name).detach().to(old)])]
            leaf = _leaf(torch.cat(rows))
            state = self._adam.state.pop(old, {})
            if state:
                fresh = torch.zeros_like(leaf[int(keep.sum()) :])
                moments = {key: torch.cat([state[key][keep], fresh]) for key in ("exp_avg", "exp_avg_sq")}
                self._adam.state[leaf] = {**state, **moments}
            group["params"] = [leaf]
            changed[name] = leaf
        self.parameters = replace(self.parameters, **changed)

    def detached(self) -> Parameters:
        """The splats, without a graph."""
        return replace(self.parameters, **{k: v.detach() for k, v in self.parameters.tensors().items()})

    def state_dict(self) -> dict[str, Any]:
        """Splats and moments, for a checkpoint."""
        return {"splats": self.detached().tensors(), "adam": self._adam.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.rearrange(
            torch.zeros(len(self.parameters), dtype=torch.bool, device=self.parameters.means.device),
            Parameters(**state["splats"]),
        )
        self._adam.load_state_dict(deepcopy(state["adam"]))


def _leaf(values: Tensor) -> Tensor:
    return values.detach().clone().requires_grad_()
