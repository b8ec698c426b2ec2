"""The program on itself: demo, benchmark."""

from pathlib import Path
from typing import Annotated

import tyro

from kinesplat import benchmark as benchmark_module
from kinesplat import demo as demo_module
from kinesplat.commands.common import DEFAULTS, CommonOptions, cpu_of, err, out, write_json


def demo(
    output: Annotated[Path, tyro.conf.arg(name="out")] = Path("demo"), *, common: CommonOptions = DEFAULTS
) -> None:
    """Recover a real robot's joints (and camera) from packaged pictures, on a CPU, without network or GL.

    Writes pictures, films, report.html and report.json into the output folder.

    Args:
        output: folder for the results; created if needed.
    """
    cpu_of(common)
    report = demo_module.run(output, seed=common.seed, console=out)
    write_json(common.json, report)


def benchmark(seconds: float = 1.0, threads: tuple[int, ...] = (1, 2), *, common: CommonOptions = DEFAULTS) -> None:
    """Measure the rasteriser on this machine: forward, backward, pose-only steps, share of peak, against the reference.

    Args:
        seconds: time for each figure [s].
        threads: thread counts to measure with.
    """
    cpu_of(common)
    report = benchmark_module.run(seconds=seconds, threads=threads, progress=err.print)
    out.print(benchmark_module.table(report))
    write_json(common.json, report)
