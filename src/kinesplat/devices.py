"""The one place that turns a device's name into a device."""

from typing import Literal

import torch

from kinesplat.errors import BackendError, InputError, unknown

DeviceName = Literal["auto", "cpu", "cuda"]
NAMES = ("auto", "cpu", "cuda")


def resolve_device(name: str) -> torch.device:
    """The device called `name`: "cpu"; "cuda", a GPU; "auto", a GPU if there is one, else the CPU.

    Raises:
        InputError: another name.
        BackendError: "cuda" where PyTorch sees no GPU; nothing falls back.
    """
    if name not in NAMES:
        raise InputError(unknown("device", name, NAMES))
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    built = torch.version.cuda
    reason = (
        f"this PyTorch ({torch.__version__}) was built without CUDA; install one of the CUDA builds from pytorch.org"
        if built is None
        else f"PyTorch was built for CUDA {built} but sees no GPU; check that nvidia-smi lists one, and the driver"
    )
    raise BackendError(f"device 'cuda': {reason}; or choose 'cpu' or 'auto'")
