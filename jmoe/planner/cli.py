"""`jmoe plan`: from a model, a pool of GPUs and an SLO to a ranked table and a plan file. No JAX."""

import argparse
import dataclasses
import json
import pathlib
import sys
from typing import Any

import numpy as np

from jmoe.planner.baselines import BaselineOptions, baselines
from jmoe.planner.choice import NoPlanError, cell_text, choose
from jmoe.planner.deployment import Problem
from jmoe.planner.hardware import GpuKind, load_catalogue, parse_gpus
from jmoe.planner.latency_front import cell_of
from jmoe.planner.model_shape import load_model_shape
from jmoe.planner.performance import Precision, Roofline, StageTimes
from jmoe.planner.plan_file import Objective, Plan, write_plan
from jmoe.planner.profile_file import MeasuredTimes, check_profile, read_profiles
from jmoe.planner.search import SearchOptions, search
from jmoe.planner.table import OBJECTIVES, explain, find, rank, write_parquet
from jmoe.planner.workload import Workload, lengths_summary

MAX_HISTOGRAM_BYTES = 1 << 20
_BYTES = {"bf16": 2.0, "fp8": 1.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `jmoe plan` to a parser."""
    parser.add_argument("--model", required=True, help="a preset, or a folder with a Hugging Face config.json")
    parser.add_argument("--gpus", required=True, help="kinds and counts: h20:64,l40s:64")
    parser.add_argument("--slo-ms", type=float, default=150.0, help="longest time between two tokens (default 150)")
    parser.add_argument("--objective", choices=tuple(OBJECTIVES), default="price", help="throughput per what")
    parser.add_argument("--prompt-len", type=float, default=571, help="median prompt, tokens (default 571)")
    parser.add_argument("--output-len", type=float, default=159, help="median answer, tokens (default 159)")
    parser.add_argument("--length-sigma", type=float, default=0.0, help="spread of log-normal lengths (default 0)")
    parser.add_argument("--trace", help="JSON lines or CSV with prompt_len and output_len, instead of the lengths")
    parser.add_argument("--expert-imbalance", type=float, default=1.0, help="busiest node's rows over the mean")
    parser.add_argument(
        "--routing", choices=("even", "drawn"), default="even", help="drawn: the busiest node has its chance excess too"
    )
    parser.add_argument("--histogram", help="JSON list of rows by expert: replicate and place experts by it")
    parser.add_argument("--weights", choices=tuple(_BYTES), default="bf16")
    parser.add_argument("--kv", choices=tuple(_BYTES), default="bf16")
    parser.add_argument("--dispatch", choices=tuple(_BYTES), default="bf16", help="rows on their way to the experts")
    parser.add_argument("--transport", choices=("exact", "ppermute"), default="exact", help="exact rows, or padded")
    parser.add_argument("--hardware", help="a TOML file that adds or overrides GPU kinds")
    parser.add_argument(
        "--profile", action="append", default=[], help="a file of `jmoe profile`, instead of the roofline; one a kind"
    )
    parser.add_argument("--max-wide", type=int, default=320, help="most GPUs of a wide expert-parallel baseline")
    parser.add_argument("--top", type=int, default=5, help="rows to print of each table")
    parser.add_argument("--output", default="plan.json", help="the plan file (default plan.json)")
    parser.add_argument("--table", help="keep every configuration tried (default: the plan file's name, .parquet)")
    parser.add_argument("--explain", metavar="COLUMN=VALUE,...", help="why rows were rejected or came behind")
    parser.add_argument("--plot", metavar="FOLDER", help="draw throughput, Pareto front, timeline; write a trace")


def run(args: argparse.Namespace) -> int:
    """Runs `jmoe plan`: 0 when a plan was written, 1 when nothing meets the request, 2 for bad input (with why)."""
    try:
        return _run(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"jmoe plan: {error}", file=sys.stderr)
        return 1 if isinstance(error, NoPlanError) else 2


def _problem(args: argparse.Namespace) -> Problem:
    catalogue = load_catalogue(args.hardware)
    model = load_model_shape(args.model)
    slo_s = args.slo_ms / 1e3
    if args.trace:
        workload = Workload.from_trace(args.trace, slo_s)
    elif args.length_sigma:
        workload = Workload.lognormal(args.prompt_len, args.output_len, args.length_sigma, slo_s)
    else:
        workload = Workload((round(args.prompt_len),), (round(args.output_len),), slo_s)
    workload = dataclasses.replace(
        workload, expert_imbalance=args.expert_imbalance, drawn_routing=args.routing == "drawn"
    )
    precision = Precision(_BYTES[args.weights], _BYTES[args.kv], _BYTES[args.dispatch])
    profiles = read_profiles(args.profile)
    for profile in profiles.values():
        check_profile(profile, model.name, precision)

    def times(attention: GpuKind, expert: GpuKind) -> StageTimes:
        return MeasuredTimes(Roofline(model, attention, expert, precision), profiles)

    pool = parse_gpus(args.gpus, catalogue)
    histogram = _read_histogram(args.histogram) if args.histogram else None
    return Problem(model, catalogue, pool, workload, precision, times if profiles else None, histogram)


def _read_histogram(path: str) -> tuple[float, ...]:
    file = pathlib.Path(path)
    if file.stat().st_size > MAX_HISTOGRAM_BYTES:
        raise ValueError(f"--histogram {path}: expected at most {MAX_HISTOGRAM_BYTES} bytes, got a larger file")
    counts = json.loads(file.read_text())
    if not isinstance(counts, list) or not all(isinstance(c, int | float) and c >= 0 for c in counts):
        raise ValueError(f"--histogram {path}: expected a list of numbers of at least 0, got something else")
    return tuple(float(c) for c in counts)


def _run(args: argparse.Namespace) -> int:
    problem = _problem(args)
    table = search(problem, SearchOptions(transport=args.transport))
    colocated = baselines(problem, BaselineOptions(max_wide=args.max_wide))
    print(_header(problem, args))
    output = pathlib.Path(args.output)
    kept = pathlib.Path(args.table) if args.table else output.with_suffix(".parquet")
    try:
        plan = choose(problem, table, colocated, args.objective, args.model)
    except NoPlanError:
        if len(colocated) and (colocated["status"] == "ok").any():
            print("\nNot disaggregated, the same GPUs:")
            print(format_rows(rank(colocated, args.objective).head(args.top), problem, args.objective))
        raise
    finally:
        if len(table):
            import pandas

            write_parquet(pandas.concat([table, colocated]) if len(colocated) else table, kept)
    ranked = rank(table, args.objective)
    print(f"\nDisaggregated ({len(table):,} configurations tried, {_rejections(table)}):")
    print(format_rows(ranked.head(args.top), problem, args.objective, ranked.iloc[0]))
    if len(colocated) and (colocated["status"] == "ok").any():
        print("\nNot disaggregated, the same GPUs:")
        print(format_rows(rank(colocated, args.objective).head(args.top), problem, args.objective))
    print("\n" + verdict(plan))
    if args.transport == "exact":
        print(_padded(problem, ranked.iloc[0]))
    write_plan(plan, output)
    print(f"wrote {output} and {kept}")
    if args.explain:
        _explain(args, table, problem, ranked.iloc[0])
    if args.plot:
        from jmoe.planner.plots import draw_plan  # matplotlib only when it is asked for

        for path in draw_plan(problem, table, colocated, ranked.iloc[0], args.objective, pathlib.Path(args.plot)):
            print(f"drew {path}")
    return 0


def _padded(problem: Problem, best: Any) -> str:
    """What the portable transport would make of the chosen cell: every pair carries the worst case."""
    rows = np.array([int(best["rows"])])
    step = float(dataclasses.replace(cell_of(problem, best), transport="ppermute").step(rows)[0])
    return (
        f"the times are for exact row counts; with the padded ppermute transport this cell takes {step * 1e3:.1f} ms a "
        f"token instead of {best['step_s'] * 1e3:.1f} (--transport ppermute plans for it)"
    )


def _explain(args: argparse.Namespace, table: Any, problem: Problem, best: Any) -> None:
    wanted: dict[str, Any] = {}
    for part in args.explain.split(","):
        name, _, value = part.partition("=")
        wanted[name.strip()] = int(value) if value.strip().isdecimal() else value.strip()
    rows = find(table, **wanted).sort_values([OBJECTIVES[args.objective]], ascending=False)
    print(f"\n{len(rows):,} configurations with {args.explain}:")
    for _, row in rows.head(args.top).iterrows():
        print(f"  {cell_text(row)}, m = {row['num_micro_batches']}: {explain(row, problem, best, args.objective)}")


def _header(problem: Problem, args: argparse.Namespace) -> str:
    pool = " + ".join(f"{count} {name}" for name, count in problem.pool.items())
    work = problem.workload
    return (
        f"{problem.model.name}: {problem.model.total_params / 1e9:.1f} B parameters, {args.weights} weights, "
        f"on {pool}\n"
        f"prompts {lengths_summary(work.prompt_lens)}, answers {lengths_summary(work.output_lens)} tokens; at most "
        f"{work.slo_s * 1e3:g} ms between tokens; best by throughput per {args.objective}"
    )


def _rejections(table: Any) -> str:
    counts = table["status"].value_counts()
    parts = [f"{count:,} {name}" for name, count in counts.items() if name != "ok" and count]
    return "rejected: " + (", ".join(parts) or "none")


def format_rows(rows: Any, problem: Problem, objective: Objective, best: Any | None = None) -> str:
    """A short text table of ranked rows, with what holds each back."""
    by = f"{f'tok/s/{objective}':>11}" if objective != "gpu" else ""
    lines = [f"  # {'cell':<46} {'GPUs':>4} {'m':>2} {'batch':>6} {'ms':>6} {'tok/s/GPU':>9} {by}  why"]
    for number, (_, row) in enumerate(rows.iterrows(), 1):
        value = f"{row[OBJECTIVES[objective]]:>11.2f}" if objective != "gpu" else ""
        micro = f"{row['num_micro_batches']}{ {'both': 'b', 'one': ''}.get(row['schedule'], '')}"
        lines.append(
            f" {number:>2} {cell_text(row):<46} {row['num_gpus']:>4} {micro:>2} {row['batch']:>6} "
            f"{row['step_s'] * 1e3:>6.1f} {row['tokens_s_per_gpu']:>9.1f} {value}  "
            f"{explain(row, problem, best, objective)}"
        )
    return "\n".join(lines)


def verdict(plan: Plan) -> str:
    """The decision in a sentence."""
    column = OBJECTIVES[plan.objective]
    ours = f"{plan.predicted[column]:.1f} tokens/s per {plan.objective}"
    cells = f"{plan.num_cells} such cell{'s' if plan.num_cells != 1 else ''} in the pool"
    if not plan.colocated:
        return f"disaggregate: {ours}, {cells}; no colocated deployment of this pool meets the SLO"
    gain = plan.colocated["gain"]
    theirs = f"{plan.colocated[column]:.1f} colocated ({plan.colocated['mode']})"
    if plan.advice == "disaggregate":
        return f"disaggregate: {ours} against {theirs}, {gain:.2f}x; {cells}"
    return f"do not disaggregate: {ours} against {theirs}, {gain:.2f}x; the plan file still holds the best split"
