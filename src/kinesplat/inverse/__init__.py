"""Inverse problems on a self-model: which configuration and camera explain these pixels, or these words?"""

from kinesplat.inverse.calibrate import calibrate
from kinesplat.inverse.calibration_result import CalibrationResult
from kinesplat.inverse.initializer import Initializer
from kinesplat.inverse.priors import Priors
from kinesplat.inverse.reconstruct import reconstruct
from kinesplat.inverse.result import FitResult, Hypothesis
from kinesplat.inverse.retarget import retarget
from kinesplat.inverse.retarget_result import RetargetResult
from kinesplat.inverse.text import text_to_q
from kinesplat.inverse.text_result import TextResult
from kinesplat.inverse.track import track
from kinesplat.inverse.track_result import TrackResult

__all__ = [
    "CalibrationResult",
    "FitResult",
    "Hypothesis",
    "Initializer",
    "Priors",
    "RetargetResult",
    "TextResult",
    "TrackResult",
    "calibrate",
    "reconstruct",
    "retarget",
    "text_to_q",
    "track",
]
