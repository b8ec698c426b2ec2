"""Where and with what images are made."""

from typing import Literal

Device = Literal["auto", "cpu", "cuda"]
Renderer = Literal["warp", "gl"]
