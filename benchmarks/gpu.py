"""The CUDA backend on a bare machine, in one command: installs, checks parity, measures, trains, writes a report.

    python benchmarks/gpu.py --out gpu_report            # everything, within --budget seconds
    python benchmarks/gpu.py --only parity speed         # parts of it
    python benchmarks/gpu.py --dry-run --only parity     # tiny sizes on a CPU, kernels in Triton's interpreter

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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {  # seconds that a section may take; gsplat is compiled beside the sections before it
    "environment": 40,
    "parity": 150,
    "robots": 120,
    "speed": 120,
    "fits": 60,
    "tracking": 60,
    "gsplat": 200,
    "capture": 60,
    "train": 150,
}
NEEDED = ("torch", "triton", "numpy", "jaxtyping", "safetensors", "scipy", "PIL")
TAIL = 2000  # characters of a failed section's output to keep


@dataclass(frozen=True)
class Options:
    """What a section is told."""

    dry_run: bool = False
    dataset: str | None = None
    seconds: float = 0.5
    robots: tuple[str, ...] = ()


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    given = parse(arguments)
    options = Options(given.dry_run, given.dataset, given.seconds, tuple(given.robots))
    if given.section:
        Path(given.result).write_text(json.dumps(measure(given.section, options)))
        return {}
    out = Path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    started, report = time.monotonic(), {"dry_run": options.dry_run, "sections": {}}
    report["install"] = {} if options.dry_run else install(given.wheels, given.native)
    builder = None if options.dry_run or "gsplat" not in given.only else compile_gsplat(out)
    for name in given.only:
        left = given.budget - (time.monotonic() - started)
        before = time.monotonic()
        if options.dry_run:
            found = measure(name, options)
        elif left < 10:
            found = {"skipped": f"the budget of {given.budget:.0f} s is spent"}
        else:
            if name == "gsplat" and builder is not None:
                found = wait_for(builder, min(left, LIMITS[name]))
                left = given.budget - (time.monotonic() - started)
            else:
                found = {}
            found |= in_process(name, given, min(left, LIMITS[name]), out) if "failed" not in found else {}
        report["sections"][name] = found | {"seconds": round(time.monotonic() - before, 2)}
        write(out, report)
        print(f"{name}: {summary(found)}", flush=True)
    if builder is not None and builder.poll() is None:
        builder.terminate()
    return report


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(LIMITS), default=list(LIMITS), help="sections, in this order")
    parser.add_argument("--out", default="gpu_report", help="folder of the report")
    parser.add_argument("--budget", type=float, default=570.0, help="seconds for everything")
    parser.add_argument("--wheels", help="folder with the wheels of docs/gpu.md, for a machine without network")
    parser.add_argument("--native", action="store_true", help="build the CPU kernels too, to compare with them")
    parser.add_argument("--dataset", help="folder of `kinesplat dataset`, to train on")
    parser.add_argument("--robots", nargs="*", default=[], help="packaged models; default: all")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each figure")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU, to test this script")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def install(wheels: str | None, native: bool) -> dict[str, Any]:
    """Install what of the wheels is missing here, then the CPU kernels if asked for; sources run where they lie."""
    done: dict[str, Any] = {}
    if wheels is not None:
        files = sorted(str(p) for p in Path(wheels).glob("*.whl"))
        done["wheels"] = pip("--no-index", "--no-deps", *files)
    probe = f"import importlib.util as u; print([m for m in {NEEDED!r} if u.find_spec(m) is None])"
    done["missing"] = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout.strip()
    if native:
        target = ROOT / "build" / "gpu-native"
        done["native"] = pip("--no-build-isolation", "--no-deps", "--target", str(target), "--upgrade", str(ROOT))
        built = sorted(target.glob("kinesplat/rasterizer/_native*.so"))
        if built:
            place = ROOT / "src" / "kinesplat" / "rasterizer" / built[0].name
            place.write_bytes(built[0].read_bytes())
    return done


def pip(*arguments: str) -> dict[str, Any]:
    started = time.monotonic()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    run = subprocess.run(command, capture_output=True, text=True)
    found: dict[str, Any] = {"seconds": round(time.monotonic() - started, 1)}
    return found if run.returncode == 0 else found | {"failed": run.stderr[-TAIL:]}


def environment_of() -> dict[str, str]:
    """Variables of a section's process: our sources, and gsplat compiled for this card only."""
    path = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    more = {"PYTHONPATH": os.pathsep.join(path), "MAX_JOBS": str(os.cpu_count() or 4)}
    probe = "import torch; print('.'.join(map(str, torch.cuda.get_device_capability())))"
    found = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    if found.returncode == 0:
        more["TORCH_CUDA_ARCH_LIST"] = found.stdout.strip()
    return {**os.environ, **more}


def compile_gsplat(out: Path) -> subprocess.Popen[bytes]:
    """gsplat compiles its kernels with nvcc at its first use: minutes, beside everything else."""
    code = (
        "import time; t = time.monotonic(); from gsplat.cuda._backend import _C; assert _C is not None;"
        "print('compiled in %.1f s' % (time.monotonic() - t))"
    )
    log = (out / "gsplat_build.log").open("wb")
    return subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log, env=environment_of())


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
    command = [sys.executable, __file__, "--section", name, "--result", str(result), "--seconds", str(given.seconds)]
    if given.dataset:
        command += ["--dataset", given.dataset]
    if given.robots:
        command += ["--robots", *given.robots]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment_of())
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
    import gpu_sections

    return getattr(gpu_sections, name)(options)


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
    for name, found in report["sections"].items():
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
