"""Measure the rasteriser on this machine: `python benchmarks/rasterizer.py [--seconds 1] [--json FILE] [--write]`."""

import argparse
import json
from pathlib import Path

from kinesplat import benchmark
from kinesplat.files import written_whole

RESULTS = Path(__file__).parents[1] / "docs" / "results.md"
HEADING = "## Rasteriser"


def write_section(text: str) -> None:
    """Replace (or append) the rasteriser's section of docs/results.md; the others stay as they are."""
    before, _, rest = RESULTS.read_text().partition(f"{HEADING}\n")
    following = rest.partition("\n## ")[2]
    section = f"{HEADING}\n\n{text}\n"
    joined = before.rstrip() + "\n\n" + section + (f"\n## {following}" if following else "")
    with written_whole(RESULTS) as temporary:
        temporary.write_text(joined)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each figure [s]")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--write", action="store_true", help="put the table into docs/results.md")
    arguments = parser.parse_args()
    report = benchmark.run(
        seconds=arguments.seconds,
        threads=tuple(arguments.threads),
        progress=lambda what: print(f"... {what}", flush=True),
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1))
    text = benchmark.table(report)
    print(text)
    if arguments.write:
        write_section("Repeat with `python benchmarks/rasterizer.py --write` on an idle machine.\n\n" + text)


if __name__ == "__main__":
    main()
