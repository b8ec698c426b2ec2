"""Inverse problems on a self-model: which configuration and camera explain these pixels?"""

from kinesplat.inverse.reconstruct import reconstruct
from kinesplat.inverse.result import FitResult, Hypothesis

__all__ = ["FitResult", "Hypothesis", "reconstruct"]
