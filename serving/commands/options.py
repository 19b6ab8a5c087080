"""Options that several commands share, and what they make of them. No JAX."""

import argparse
import dataclasses
import json
import os
import pathlib
from typing import Any

from jmoe.serving.requests import SamplingParams
from jmoe.serving.sizes import CellSizes
from jmoe.sharding.mesh_config import TRANSPORTS, MeshConfig
from jmoe.sharding.placement import ExpertPlacement

MAX_PLACEMENT_BYTES = 16 * 1024 * 1024
_MESH = ("attention", "expert", "num_micro_batches", "attention_tensor", "expert_tensor", "transport")
_COLOCATED = ("colocated", "tensor")
_SIZES = tuple(field.name for field in dataclasses.fields(CellSizes))


class UsageError(ValueError):
    """Options that contradict one another or are out of range: exit code 2."""


def add_cell_options(parser: argparse.ArgumentParser) -> None:
    """Adds the meshes, the sizes and the place to run."""
    mesh = parser.add_argument_group("meshes")
    mesh.add_argument("--attention", type=int, metavar="M", help="attention replicas (default 1)")
    mesh.add_argument("--expert", type=int, metavar="N", help="expert nodes (default 1)")
    mesh.add_argument("--micro-batches", dest="num_micro_batches", type=int, metavar="m", help="in flight (default 2)")
    mesh.add_argument("--attention-tensor", type=int, metavar="T", help="tensor ranks of a replica (default 1)")
    mesh.add_argument("--expert-tensor", type=int, metavar="T", help="tensor ranks of an expert node (default 1)")
    mesh.add_argument(
        "--colocated", type=int, metavar="N", help="instead: both roles on each of N devices (default on a lone GPU)"
    )
    mesh.add_argument("--tensor", type=int, metavar="T", help="with --colocated: tensor ranks (default 1)")
    mesh.add_argument(
        "--transport", choices=TRANSPORTS, help="how rows travel between the meshes (default auto: the best that runs)"
    )
    mesh.add_argument("--placement", metavar="FILE", help="JSON list: the expert ids of each node (default: balanced)")
    mesh.add_argument("--plan", metavar="FILE", help="what `jmoe plan` wrote, instead of the options above")
    sizes = parser.add_argument_group("sizes (left out: chosen from the model)")
    sizes.add_argument("--rows", type=int, help="decode slots of one micro-batch of one replica")
    sizes.add_argument("--chunk-len", type=int, help="prompt tokens that a micro-batch takes at once")
    sizes.add_argument("--num-steps", type=int, help="decode steps of one call")
    sizes.add_argument("--max-len", type=int, help="longest prompt and output together")
    sizes.add_argument("--page-len", type=int, help="tokens of one KV page")
    sizes.add_argument("--num-pages", type=int, help="KV pages of one replica")
    sizes.add_argument("--dtype", choices=("float32", "bfloat16"), help="of weights and activations")
    sizes.add_argument(
        "--quantization", choices=("fp8", "none"), help="of expert weights (default: as the checkpoint has them)"
    )
    sizes.add_argument("--kv-dtype", choices=("auto", "fp8"), help="of KV pages (default auto: as --dtype)")
    where = parser.add_argument_group("where it runs")
    where.add_argument("--executor", choices=("auto", "inline", "processes"), default="auto")
    where.add_argument("--kernels", choices=("auto", "xla", "pallas"), help="of attention and experts (default auto)")
    where.add_argument("--platform", choices=("auto", "cpu", "gpu"), default="auto")
    add_compile_cache_option(where)


def add_compile_cache_option(parser: "argparse._ActionsContainer") -> None:
    """Adds where compiled programs are kept."""
    parser.add_argument(
        "--compile-cache", metavar="DIR|off", default="auto",
        help="where compiled programs are kept for the next start (default: $JMOE_CACHE/compiled, or the user's cache)",
    )  # fmt: skip


def mesh_config(args: argparse.Namespace) -> MeshConfig | None:
    """The meshes that were asked for; None if nothing was said.

    Raises:
      UsageError: a count below 1, a placement that doesn't fit, or options that exclude one another.
      FileNotFoundError: no such file.
    """
    given = {name: value for name in (*_MESH, *_COLOCATED) if (value := getattr(args, name)) is not None}
    if args.plan is not None:
        if given or args.placement is not None:
            names = ", ".join([*given, *(["placement"] if args.placement else [])])
            raise UsageError(f"--plan: expected no other option of the meshes beside it, got {names}")
        from jmoe.planner.plan_file import read_plan

        return read_plan(args.plan).mesh
    try:
        placement = None if args.placement is None else _read_placement(args.placement)
        if args.colocated is not None:
            return _colocated(given, placement)
        if args.tensor is not None:
            raise ValueError(f"--tensor: expected --colocated beside it, got --tensor {args.tensor} alone")
        return MeshConfig(**given, placement=placement) if given or placement is not None else None
    except ValueError as error:
        raise UsageError(str(error)) from error


def _colocated(given: dict[str, int], placement: ExpertPlacement | None) -> MeshConfig:
    """--colocated N with --tensor and --micro-batches; ValueError beside an option of two meshes."""
    if others := given.keys() - {"colocated", "tensor", "num_micro_batches"}:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(others))
        raise ValueError(f"--colocated: expected only --tensor, --micro-batches and --placement beside it, got {names}")
    return MeshConfig.colocate(given["colocated"], given.get("tensor", 1), given.get("num_micro_batches", 1), placement)


def cell_sizes(args: argparse.Namespace, **defaults: Any) -> CellSizes:
    """The sizes that were asked for, then those of the plan, then the command's defaults.

    Raises:
      UsageError: a size below 1.
    """
    if args.plan is not None:
        from jmoe.planner.plan_file import read_plan

        plan = read_plan(args.plan)
        defaults |= {"rows": plan.rows, "num_pages": plan.num_pages, "page_len": plan.page_len}
        if plan.precision.get("weight_bytes") == 1:
            defaults["quantization"] = "fp8"
        if plan.precision.get("kv_bytes") == 1:
            defaults["kv_dtype"] = "fp8"
    try:
        return CellSizes(**(defaults | {n: v for n in _SIZES if (v := getattr(args, n)) is not None}))
    except ValueError as error:
        raise UsageError(str(error)) from error


def choose_platform(args: argparse.Namespace) -> None:
    """Tells JAX, which has not started yet, which devices to take."""
    if args.platform != "auto":
        os.environ["JAX_PLATFORMS"] = {"cpu": "cpu", "gpu": "cuda"}[args.platform]


def add_sampling_options(parser: argparse.ArgumentParser, max_tokens: int = 128) -> None:
    """Adds how tokens are chosen and where they end."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, default=max_tokens, help=f"most tokens (default {max_tokens})")
    group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    group.add_argument("--top-k", type=int, default=0, help="keep the k likeliest tokens")
    group.add_argument("--top-p", type=float, default=1.0, help="keep the likeliest tokens of this total probability")
    group.add_argument("--min-p", type=float, default=0.0, help="keep tokens of this share of the likeliest one's")
    group.add_argument("--seed", type=int, help="the same seed gives the same tokens")
    group.add_argument("--repetition-penalty", type=float, default=1.0, metavar="P")
    group.add_argument("--presence-penalty", type=float, default=0.0, metavar="P")
    group.add_argument("--frequency-penalty", type=float, default=0.0, metavar="P")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end here (may be given again)")
    group.add_argument("--stop-token-ids", type=int, nargs="+", default=[], metavar="ID")
    group.add_argument("--ignore-eos", action="store_true", help="go on past the end of sequence")


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """The sampling that was asked for.

    Raises:
      UsageError: a value out of range.
    """
    names = (field.name for field in dataclasses.fields(SamplingParams))
    try:
        return SamplingParams(**{name: getattr(args, name) for name in names if hasattr(args, name)})
    except ValueError as error:
        raise UsageError(str(error)) from error


def _read_placement(path: str) -> ExpertPlacement:
    file = pathlib.Path(path)
    if (size := file.stat().st_size) > MAX_PLACEMENT_BYTES:
        raise ValueError(f"--placement: expected at most {MAX_PLACEMENT_BYTES} bytes, got {size}")
    try:
        nodes = json.loads(file.read_text())
        return ExpertPlacement.of(nodes)
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"--placement: expected a JSON list of lists of expert ids, got {error}") from error
