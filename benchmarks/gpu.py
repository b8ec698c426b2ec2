"""The CUDA backend on a bare machine, in one command: installs, checks parity, measures, trains, writes a report.

    python benchmarks/gpu.py --out gpu_report              # all but "paper", as far as --budget seconds go
    python benchmarks/gpu.py --only parity speed           # parts of it; the report keeps what other calls found
    python benchmarks/gpu.py --only train                  # again and again, until ten robots are trained
    python benchmarks/gpu.py --only paper --images 10000x12 --robots franka_emika_panda --budget 590   # likewise
    python benchmarks/gpu.py --dry-run --only parity       # tiny sizes on a CPU, kernels in Triton's interpreter

What it needs, and what to carry to a machine without network, stands in docs/gpu.md. Every section is a process of its
own: a crash, an exception or a limit of time in one is a line of the report (the exception's type and message) and
costs the others nothing. The report, gpu_report.json and gpu_report.md, is written anew after every section.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {  # seconds that a section may take; gsplat is compiled beside the sections before it
    "environment": 60,
    "parity": 150,
    "robots": 120,
    "speed": 90,
    "fits": 60,
    "tracking": 60,
    "capture": 120,
    "train": 600,
    "gsplat": 200,
    "graphs": 40,
    "compiled": 90,
    "tiles": 120,
    "paper": 600,
}
SHARE_OF_TRAIN = 150  # seconds of "train" where other sections follow
MODULES = {"train": "gpu_training", "paper": "gpu_training"} | dict.fromkeys(
    ("tiles", "graphs", "compiled"), "gpu_tuning"
)
NEEDED = ("torch", "triton", "numpy", "jaxtyping", "safetensors", "scipy", "PIL", "rich", "pytest")
TAIL = 2000  # characters of a failed section's output to keep


@dataclass(frozen=True)
class Options:
    """What a section is told."""

    dry_run: bool = False
    seconds: float = 0.5
    robots: tuple[str, ...] = ()
    folder: str = "gpu_report"
    sets: str | None = None
    images: tuple[int, int] = (500, 3)
    minutes: float = 0.8
    paper_minutes: float = 30.0
    limit: float = 600.0


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    given = parse(arguments)
    configurations, views = (int(count) for count in given.images.split("x"))
    options = Options(
        given.dry_run, given.seconds, tuple(given.robots), given.out, given.sets, (configurations, views),
        given.minutes, given.paper_minutes, given.limit,
    )  # fmt: skip
    if given.section:
        Path(given.result).write_text(json.dumps(measure(given.section, options)))
        return {}
    out = Path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    started, report = time.monotonic(), former(out, options.dry_run)
    installed = {} if options.dry_run else install(given.wheels, given.native, out)
    if installed:
        report["sections"]["install"] = installed | {"seconds": round(time.monotonic() - started, 2)}
    builder = None if options.dry_run or "gsplat" not in given.only else compile_gsplat(out)
    for name in given.only:
        limit = SHARE_OF_TRAIN if name == "train" and name != given.only[-1] else LIMITS[name]
        limit, before = min(given.budget - (time.monotonic() - started), limit), time.monotonic()
        if options.dry_run:
            found = measure(name, options)
        elif limit < 10:
            found = {"skipped": f"the budget of {given.budget:.0f} s is spent"}
        else:
            found = wait_for(builder, limit) if name == "gsplat" and builder is not None else {}
            limit -= time.monotonic() - before
            found |= in_process(name, given, limit, out) if "failed" not in found else {}
        report["sections"][name] = found | {"seconds": round(time.monotonic() - before, 2)}
        write(out, report)
        print(f"{name}: {summary(found)}", flush=True)
    if builder is not None and builder.poll() is None:
        builder.terminate()
    return report


def former(out: Path, dry_run: bool) -> dict[str, Any]:
    """The report that an earlier call left here, or an empty one; dry runs and true ones are not mixed."""
    path = out / "gpu_report.json"
    report = json.loads(path.read_text()) if path.is_file() else {}
    return report if report.get("dry_run") == dry_run else {"dry_run": dry_run, "sections": {}}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = [name for name in LIMITS if name != "paper"]
    parser.add_argument("--only", nargs="+", choices=list(LIMITS), default=usual, help="sections, in this order")
    parser.add_argument("--out", default="gpu_report", help="folder of the report, of data sets and models")
    parser.add_argument("--budget", type=float, default=570.0, help="seconds for everything")
    parser.add_argument("--wheels", help="folder with the wheels of docs/gpu.md, for a machine without network")
    parser.add_argument("--native", action="store_true", help="build the CPU kernels too, to compare with them")
    parser.add_argument("--robots", nargs="*", default=[], help="packaged models; default: all")
    parser.add_argument("--sets", help="folder of data sets NAME made elsewhere; default: traced on the card")
    parser.add_argument("--images", default="500x3", help="configurations x views of a data set")
    parser.add_argument("--minutes", type=float, default=0.8, help="of training by the default recipe, a robot")
    parser.add_argument("--paper-minutes", type=float, default=30.0, help="of stage 3 of the paper's recipe, a model")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each figure")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU, to test this script")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, default=600.0, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def install(wheels: str | None, native: bool, out: Path) -> dict[str, Any]:
    """Put the wheels beside the report, then the CPU kernels, if asked for, beside our sources, which run where they
    lie; nothing of the machine's own Python is changed."""
    done: dict[str, Any] = {}
    if wheels is not None:
        files = sorted(str(p) for p in Path(wheels).glob("*.whl"))
        done["wheels"] = pip(out, "--no-index", "--no-deps", "--target", str(out / "site"), "--upgrade", *files)
    probe = f"import importlib.util as u; print(*[m for m in {NEEDED!r} if u.find_spec(m) is None])"
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, env=environment_of(out))
    if run.stdout.strip():
        done["missing"] = run.stdout.strip()
    if native:
        target = out / "native"
        done["native"] = pip(out, "--no-build-isolation", "--no-deps", "--target", str(target), "--upgrade", str(ROOT))
        built = sorted(target.glob("kinesplat/rasterizer/_native*.so"))
        if built:
            place = ROOT / "src" / "kinesplat" / "rasterizer" / built[0].name
            place.write_bytes(built[0].read_bytes())
    return done


def pip(out: Path, *arguments: str) -> dict[str, Any]:
    started = time.monotonic()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=environment_of(out))
    found: dict[str, Any] = {"seconds": round(time.monotonic() - started, 1)}
    return found if run.returncode == 0 else found | {"failed": run.stderr[-TAIL:]}


def environment_of(out: Path) -> dict[str, str]:
    """Variables of a section's process: our sources, the wheels, and gsplat compiled for this card only, on half of
    the cores, since it is compiled while others are measured."""
    path = [str(ROOT / "src"), str((out / "site").resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
    more = {"PYTHONPATH": os.pathsep.join(path), "MAX_JOBS": str(max(1, (os.cpu_count() or 4) // 2))}
    return {**os.environ, **more, **card()}


@lru_cache
def card() -> dict[str, str]:
    """Which card to compile for; nothing where there is none."""
    probe = "import torch; print('.'.join(map(str, torch.cuda.get_device_capability())))"
    found = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    return {"TORCH_CUDA_ARCH_LIST": found.stdout.strip()} if found.returncode == 0 else {}


def compile_gsplat(out: Path) -> subprocess.Popen[bytes]:
    """gsplat compiles its kernels with nvcc at its first use: minutes, beside everything else."""
    code = (
        "import time; t = time.monotonic(); from gsplat.cuda._backend import _C; assert _C is not None;"
        "print('compiled in %.1f s' % (time.monotonic() - t))"
    )
    log = (out / "gsplat_build.log").open("wb")
    return subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log, env=environment_of(out))


def wait_for(builder: subprocess.Popen[bytes], limit: float) -> dict[str, Any]:
    try:
        code = builder.wait(limit)
    except subprocess.TimeoutExpired:
        builder.terminate()
        return {"failed": f"gsplat was not compiled after {limit:.0f} s of waiting; see gsplat_build.log"}
    return {"build": "compiled"} if code == 0 else {"failed": "gsplat does not compile here; see gsplat_build.log"}


def in_process(name: str, given: argparse.Namespace, limit: float, out: Path) -> dict[str, Any]:
    """One section as a process; what went wrong becomes data."""
    result = out / f".{name}.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--section", name, "--result", str(result), "--limit", str(limit - 10.0)]
    for option in ("seconds", "out", "images", "minutes", "paper_minutes", "sets"):
        if getattr(given, option) is not None:
            command += [f"--{option.replace('_', '-')}", str(getattr(given, option))]
    if given.robots:
        command += ["--robots", *given.robots]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment_of(out))
    except subprocess.TimeoutExpired as error:
        words = error.stdout or b""
        return {"failed": f"TimeoutExpired: more than {limit:.0f} s", "output": str(words)[-TAIL:]}
    if run.returncode != 0:
        lines = run.stderr.strip().splitlines() or [f"exit status {run.returncode}"]
        return {"failed": lines[-1], "output": run.stderr[-TAIL:]}
    found = json.loads(result.read_text())
    result.unlink()
    return found


def measure(name: str, options: Options) -> dict[str, Any]:
    """Run a section here and now."""
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]
    return getattr(import_module(MODULES.get(name, "gpu_sections")), name)(options)


def summary(found: dict[str, Any]) -> str:
    for key in ("failed", "skipped"):
        if key in found:
            return f"{key}: {found[key]}"
    return "done"


def write(out: Path, report: dict[str, Any]) -> None:
    """The report so far, each file whole."""
    texts = {"gpu_report.json": json.dumps(report, indent=1) + "\n", "gpu_report.md": markdown(report)}
    for name, text in texts.items():
        partial = out / f"{name}.part"
        partial.write_text(text)
        partial.replace(out / name)


def markdown(report: dict[str, Any]) -> str:
    """Tables of all sections; one that failed says why."""
    lines = ["# The CUDA backend, measured", ""]
    if report["dry_run"]:
        lines += ["Dry run: tiny sizes in Triton's interpreter on a CPU. No figure here says anything of a GPU.", ""]
    order = ["install", *LIMITS]
    for name, found in sorted(report["sections"].items(), key=lambda item: order.index(item[0])):
        lines += [f"## {name} ({found['seconds']} s)", ""]
        if "failed" in found or "skipped" in found:
            lines += [summary(found), ""]
        for key, value in found.items():
            rows = value if isinstance(value, list) and value and isinstance(value[0], dict) else None
            if rows is None and key not in ("failed", "skipped", "seconds", "output"):
                lines += [f"- {key}: {value}"]
        for value in found.values():
            if isinstance(value, list) and value and isinstance(value[0], dict):
                lines += ["", *table(value)]
        lines.append("")
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> list[str]:
    head = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[cell(row.get(key)) for key in head] for row in rows]
    return [f"| {' | '.join(r)} |" for r in (head, ["---"] * len(head), *cells)]


def cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
