"""A stand-in for a GPU on machines without one: its tensors live on the CPU, but say "cuda" and refuse to be mixed with
tensors that do not, as a GPU's would. Kernels are checked for what they are given; rendering is done natively."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from kinesplat.rasterizer import cpu, cuda, gauss_newton
from kinesplat.rasterizer.render import Render, Scene

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
INDEXING = {"__getitem__", "__setitem__", "index_put_"}
"""They take an index from the CPU."""
LIKE = {"copy_", "expand_as", "view_as", "reshape_as", "result_type"}
"""They take values or sizes from anywhere."""


class OnGpu(Tensor):
    """A tensor that says it is on the GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __deepcopy__(self, memo: dict[int, Any]) -> "OnGpu":
        copied = self.detach().clone().as_subclass(OnGpu).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copied._is_param = True  # what makes an nn.Parameter of a tensor of another class
        return copied


class StandInGpu(TorchFunctionMode):
    """Within it, device "cuda" exists."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        owner = getattr(getattr(func, "__self__", None), "__name__", "")
        if name == "__get__" and owner in ("device", "is_cuda", "is_cpu"):
            on_gpu = isinstance(args[0], OnGpu)
            return {"device": CUDA if on_gpu else CPU, "is_cuda": on_gpu, "is_cpu": not on_gpu}[owner]
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._moved(func, args, kwargs)
        if name == "_has_compatible_shallow_copy_type":
            return False  # nn.Module.to then makes new parameters, which can be marked
        if name == "numpy" and isinstance(args[0], OnGpu):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        wanted = kwargs.pop("device", None)
        on_gpu = any(isinstance(t, OnGpu) for t in tensors)
        self._check(name, tensors)
        target = torch.device(wanted) if wanted is not None else None
        if target is not None and target.type != "cuda":
            kwargs["device"] = target
        on_gpu = on_gpu if target is None else target.type == "cuda"
        if name in ("tolist", "item", "__bool__", "__float__", "__int__", "__index__", "equal", "allclose"):
            return func(*args, **kwargs)
        if name in INDEXING | LIKE and isinstance(args[0], Tensor):
            on_gpu = isinstance(args[0], OnGpu)
        return marked(func(*args, **kwargs), on_gpu)

    def _check(self, name: str, tensors: list[Tensor]) -> None:
        in_backward = torch._C._current_graph_task_id() != -1  # gradients arrive there without their mark
        kinds = {isinstance(t, OnGpu) for t in tensors if t.dim() > 0}
        if len(kinds) == 2 and not in_backward:
            if name in LIKE or (name in INDEXING and isinstance(tensors[0], OnGpu)):
                return
            raise RuntimeError(f"Expected all tensors to be on the same device, in {name}")

    def _moved(self, func: Any, args: Any, kwargs: Any) -> Any:
        value, rest = args[0], list(args[1:])
        target = CUDA if isinstance(value, OnGpu) else CPU
        if func in (Tensor.cpu, Tensor.cuda):
            target, rest = CPU if func is Tensor.cpu else CUDA, []
        for i, given in enumerate(rest):
            if isinstance(given, str | torch.device):
                target, rest[i] = torch.device(given), None
            elif isinstance(given, Tensor):
                target, rest[i] = CUDA if isinstance(given, OnGpu) else CPU, given.dtype
        if kwargs.get("device") is not None:
            target = torch.device(kwargs["device"])
        kwargs.pop("device", None)
        dtypes = [r for r in rest if isinstance(r, torch.dtype)] + [d for d in [kwargs.pop("dtype", None)] if d]
        result = Tensor.to(value, dtypes[0], **kwargs) if dtypes else value
        return marked(result, target.type == "cuda")


def marked(result: Any, on_gpu: bool) -> Any:
    """`result` with its tensors on the GPU, or on the CPU; what lies there already stays the same object."""

    def mark(t: Any) -> Any:
        if not isinstance(t, Tensor) or isinstance(t, OnGpu) == on_gpu:
            return t
        return t.as_subclass(OnGpu if on_gpu else Tensor)

    return result if isinstance(result, torch.Size) else tree_map(mark, result)


def unmarked(value: Any) -> Any:
    """The same with every tensor on the CPU; dataclasses, dicts and tuples are gone through."""
    if isinstance(value, Tensor):
        return marked(value, False)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: unmarked(getattr(value, f.name)) for f in fields(value) if f.init})
    if isinstance(value, dict):
        return {k: unmarked(v) for k, v in value.items()}
    return value


@contextmanager
def native() -> Iterator[None]:
    """Real CPU tensors within."""
    with torch._C.DisableTorchFunction():
        yield


@dataclass
class Work:
    """How often splats were rendered, or compared with a picture, on the stand-in and on the CPU."""

    gpu: int = 0
    cpu: int = 0


def _render(work: Work, scene: Scene) -> Render:
    assert isinstance(scene.gaussians.means, OnGpu)
    work.gpu += 1
    with native():
        out = cpu.render(unmarked(scene))
    return Render(**{name: marked(getattr(out, name), True) for name in scene.outputs})


def _normal(
    work: Work, scene: Scene, targets: dict[str, Tensor | None], batch_dims: int
) -> gauss_newton.NormalEquations:
    assert all(t is None or isinstance(t, OnGpu) for t in targets.values())
    work.gpu += 1
    with native():
        plain, given = unmarked(scene), unmarked(targets)
        more = {k: v for k, v in given.items() if k != "rgb"}
        found = gauss_newton.normal_equations(
            plain.gaussians, plain.link_index[:, 0], plain.Ts_world_link, plain.camera, given["rgb"],
            background=plain.background, eps2d=plain.eps2d, **more,
        )  # fmt: skip
    return gauss_newton.NormalEquations(*(marked(t, True) for t in (found.loss, found.gradient, found.hessian)))


@contextmanager
def standing_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Work]:
    """Device "cuda" exists within; rendering and normal equations happen natively."""
    work, plan = Work(), cpu.make_plan

    def plan_on_cpu(scene: Scene) -> Any:
        if torch._C._is_torch_function_mode_enabled():  # not for the stand-in itself
            work.cpu += 1
        return plan(scene)

    monkeypatch.setattr(cpu, "make_plan", plan_on_cpu)
    monkeypatch.setattr(cuda, "render", partial(_render, work))
    monkeypatch.setattr(gauss_newton, "_on_gpu", partial(_normal, work))
    autocast = torch.autocast  # asks a real GPU what it can
    monkeypatch.setattr(torch, "autocast", lambda device, *args, **options: autocast("cpu", *args, **options))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with StandInGpu():
        yield work
