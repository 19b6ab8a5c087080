"""Options of the worker processes that several commands share, and what they make of them. No JAX."""

import argparse
import pathlib

from jmoe.serving.commands.options import UsageError
from jmoe.serving.deadlines import Deadlines
from jmoe.serving.process_options import ProcessOptions

_MAX_TOKEN_BYTES = 4096
# option: (field of Deadlines, help)
_DEADLINES = {
    "step_deadline_s": ("step_s", "one call of up to num_steps tokens (default 10 on GPUs, 120 on CPU)"),
    "heartbeat_deadline_s": ("heartbeat_s", "a worker's silence, in which it may be stopped (default 7)"),
    "load_deadline_s": ("load_s", "reading the checkpoint (default 1800)"),
    "compile_deadline_s": ("compile_s", "one program (default 900)"),
}


def add_worker_options(parser: argparse.ArgumentParser) -> None:
    """Adds where worker processes stand and how long each thing may take them."""
    group = parser.add_argument_group("worker processes (--executor processes, the default on GPUs)")
    group.add_argument("--processes-per", choices=("role", "device"), help="one worker a role (default) or a device")
    group.add_argument(
        "--worker", action="append", default=[], metavar="HOST:PORT",
        help="a worker on another host (`python -m jmoe.serving.worker --listen`); one for each, attention first",
    )  # fmt: skip
    group.add_argument("--token-file", metavar="FILE", help="the secret of those workers (default $JMOE_WORKER_TOKEN)")
    group.add_argument("--log-dir", metavar="FOLDER", help="keep what each worker of this host writes")
    for option, (_, text) in _DEADLINES.items():
        group.add_argument(f"--{option.replace('_', '-')}", type=float, metavar="S", help=f"seconds for {text}")


def process_options(args: argparse.Namespace) -> ProcessOptions | None:
    """What was asked for; None if nothing was.

    Raises:
      UsageError: an address that is none, or a deadline out of range.
      FileNotFoundError: no such token file.
    """
    limits = {field: v for option, (field, _) in _DEADLINES.items() if (v := getattr(args, option)) is not None}
    given = {"per": args.processes_per, "addresses": tuple(args.worker), "log_dir": args.log_dir}
    options = {name: value for name, value in given.items() if value}
    try:
        if args.token_file is not None:
            options["token"] = _read_token(args.token_file)
        if limits:
            options["deadlines"] = Deadlines(**limits)
        return ProcessOptions(**options) if options else None
    except ValueError as error:
        raise UsageError(str(error)) from error


def _read_token(path: str) -> str:
    with pathlib.Path(path).open("rb") as file:
        token = file.read(_MAX_TOKEN_BYTES + 1).strip()
    if not 0 < len(token) <= _MAX_TOKEN_BYTES:
        got = "none" if not token else "more"
        raise ValueError(f"--token-file: expected 1 to {_MAX_TOKEN_BYTES} bytes, got {got}")
    return token.decode()
