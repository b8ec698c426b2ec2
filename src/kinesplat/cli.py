"""The command line: `kinesplat COMMAND --help` is a manual in itself."""

import functools
import io
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import Any

import tyro

from kinesplat.commands.calibrate import calibrate
from kinesplat.commands.common import EXIT_BAD_INPUT, EXIT_INTERRUPTED, err
from kinesplat.commands.dataset import dataset
from kinesplat.commands.evaluate import evaluate
from kinesplat.commands.evaluate_pose import evaluate_pose
from kinesplat.commands.imagine import finetune_video, imagine
from kinesplat.commands.initializer import initializer
from kinesplat.commands.reconstruct import reconstruct
from kinesplat.commands.render import render
from kinesplat.commands.retarget import retarget
from kinesplat.commands.self_models import build, inspect, models
from kinesplat.commands.show import benchmark, demo
from kinesplat.commands.text import text
from kinesplat.commands.track import track
from kinesplat.commands.train import train
from kinesplat.errors import KinesplatError

EXIT_UNREAD = 1
COMMANDS = (
    demo,
    build,
    dataset,
    train,
    evaluate,
    evaluate_pose,
    inspect,
    models,
    render,
    reconstruct,
    initializer,
    calibrate,
    track,
    retarget,
    text,
    imagine,
    finetune_video,
    benchmark,
)


def program() -> tyro.extras.SubcommandApp:
    """All commands. Parsing only binds their arguments, so that usage errors are told from their own."""
    app = tyro.extras.SubcommandApp()
    for function in COMMANDS:
        app.command(_bound(function))
    return app


def _bound(function: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    @functools.wraps(function)
    def bind(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return functools.partial(function, *args, **kwargs)

    return bind


def main() -> None:
    """Entry point: 0 on success, 2 with one line on bad usage or input, 130 when interrupted, 1 if nobody reads on."""
    try:
        _main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter complains at its end
        sys.exit(EXIT_UNREAD)


def _main() -> None:
    usage = io.StringIO()
    try:
        with redirect_stderr(usage):
            run = program().cli(
                prog="kinesplat", description="A robot's picture, differentiable: build, render, reconstruct."
            )
    except SystemExit as end:
        if end.code:
            words = " ".join(word for word in usage.getvalue().split() if not set(word) <= set("─━-╭╮╰╯│|"))
            err.print(f"kinesplat: {words}")
        raise
    try:
        run()
    except KinesplatError as error:
        err.print(f"kinesplat: {error}")
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        err.print("kinesplat: interrupted")
        sys.exit(EXIT_INTERRUPTED)
