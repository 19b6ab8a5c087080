"""The command `jmoe`. Importing it, and `jmoe --help`, import no JAX."""

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

import jmoe
from jmoe.errors import CellFailedError, JmoeError

# name: (module with add_arguments(parser) and run(args) -> exit code, one line, examples)
_COMMANDS = {
    "demo": (
        "jmoe.serving.commands.demo",
        "fetch a small real model, serve it on two meshes of CPU devices, stream an answer",
        """\
  jmoe demo
  jmoe demo "Why is the sky blue?" --max-tokens 60
""",
    ),
    "serve": (
        "jmoe.serving.commands.serve",
        "serve a checkpoint over gRPC",
        """\
  jmoe serve ./Mixtral-8x7B                                 one attention and one expert device
  jmoe serve ./Qwen3-30B-A3B --attention 2 --expert 6 --micro-batches 4
  jmoe serve ./Mixtral-8x7B --attention-tensor 2 --expert 2 --expert-tensor 2 --rows 64
  jmoe serve ./Qwen3-30B-A3B --colocated 1                  both roles on one GPU (the default where there is one)
  jmoe serve ./Mixtral-8x7B --colocated 4 --tensor 4        tensor parallelism over four
  jmoe serve ./Mixtral-8x7B --plan plan.json                what `jmoe plan` decided
  jmoe serve ./model --executor processes --worker hostA:7000 --worker hostB:7000 --token-file secret
  jmoe serve ./model --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem

The server speaks jmoe.v1, grpc.health.v1 and reflection. SIGTERM drains it: running requests get --grace-s seconds.
""",
    ),
    "generate": (
        "jmoe.serving.commands.generate",
        "answer one prompt, in this process or at a running server",
        """\
  jmoe generate ./model "The capital of France is" --max-tokens 20
  jmoe generate --address 127.0.0.1:50051 "Why is the sky blue?" --chat --temperature 0.7 --seed 1
  cat prompt.txt | jmoe generate --address 127.0.0.1:50051 -
""",
    ),
    "plan": (
        "jmoe.planner.cli",
        "choose meshes for a model, a pool of GPUs and a latency bound",
        """\
  jmoe plan --model mixtral-8x22b --gpus h20:64,l40s:64 --slo-ms 150
""",
    ),
    "profile": (
        "jmoe.serving.commands.profile",
        "measure stage times on two GPUs of this host, for the planner",
        """\
  jmoe profile ./Mixtral-8x7B --gpu h200 --out h200.json
  jmoe plan --model ./Mixtral-8x7B --gpus h200:16 --profile h200.json
""",
    ),
}
_TEACH = """\
A Mixture-of-Experts model runs on two device meshes: attention, with embeddings, KV cache and sampling, on one
(--attention M replicas), the expert FFNs on the other (--expert N nodes). The batch is cut into --micro-batches m
slices that play ping-pong between them, so that neither mesh waits: m = 3 or 4 fills the pipeline.
--colocated N puts both roles on each of N devices instead; on a host with one GPU that is the default.

examples:
  jmoe demo                                                 no GPU, no model at hand: start here
  jmoe serve ./Mixtral-8x7B --attention 2 --expert 2 --micro-batches 4
  jmoe generate --address 127.0.0.1:50051 "Why is the sky blue?" --chat
  jmoe COMMAND --help                                       more examples

exit codes: 0 done, 1 failed (one line on stderr says why), 2 wrong usage
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `jmoe` and returns its exit code: 0 done, 1 failed with one line on stderr, 2 wrong usage."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser, commands = _parsers()
    command = next((word for word in words if word in _COMMANDS), None)
    if command is not None:  # only its own options are loaded
        importlib.import_module(_COMMANDS[command][0]).add_arguments(commands[command])
    args = parser.parse_args(words)
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    _log_to_stderr(args.verbose)
    return _run(args, commands[args.command])


def _run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from jmoe.serving.commands.options import UsageError

    try:
        return importlib.import_module(_COMMANDS[args.command][0]).run(args)
    except UsageError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if args.verbose:
            logging.getLogger("jmoe").exception("%s failed", args.command)
        known = isinstance(error, ValueError | OSError) and not isinstance(error, UnicodeError)
        text = str(error).strip().partition("\n")[0]  # one line; a dead worker's last words are in the log
        name = "" if known and text else f"{type(error).__name__}: "
        hint = "" if known or isinstance(error, JmoeError) else " (a bug? --verbose shows where)"
        print(f"jmoe {args.command}: {name}{text}{hint}", file=sys.stderr, flush=True)
        return 1


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and those of the commands, still without options."""
    raw = argparse.RawDescriptionHelpFormatter
    about = "Serve Mixture-of-Experts language models with attention on one device mesh and experts on another, in JAX."
    parser = argparse.ArgumentParser("jmoe", description=about, epilog=_TEACH, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"jmoe {jmoe.__version__}")
    parser.add_argument("--verbose", action="store_true", help="log what happens, and tracebacks, to stderr")
    found = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands = {}
    for name, (_, line, examples) in _COMMANDS.items():
        epilog = f"examples:\n{examples}"
        commands[name] = found.add_parser(name, help=line, description=line, epilog=epilog, formatter_class=raw)
    return parser, commands


class _KnownFailures(logging.Filter):
    """Without --verbose a cell's failure is told once, by the command's last line."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.exc_info, record.exc_text = None, None
        args = record.args if isinstance(record.args, tuple) else ()
        return not any(isinstance(arg, CellFailedError) for arg in args)


def _log_to_stderr(verbose: bool) -> None:
    logger = logging.getLogger("jmoe")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("jmoe: %(levelname)s: %(message)s"))
    if not verbose:
        handler.addFilter(_KnownFailures())
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    logger.propagate = False


if __name__ == "__main__":
    sys.exit(main())
