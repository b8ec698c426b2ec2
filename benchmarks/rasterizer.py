"""Measure the rasteriser on this machine: `python benchmarks/rasterizer.py [--seconds 1] [--json FILE]`."""

import argparse
import json
from pathlib import Path

from kinesplat import benchmark


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each figure [s]")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    report = benchmark.run(
        seconds=arguments.seconds, threads=tuple(arguments.threads), progress=lambda what: print(f"... {what}", flush=True)
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1))
    print(benchmark.table(report))


if __name__ == "__main__":
    main()
