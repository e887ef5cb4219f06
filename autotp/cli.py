"""The command line: `autotp demo`, `calibrate`, `regions`, and of a MODEL `plan`, `grids`, `check`
and `dryrun`.

Prints results on standard output and progress on standard error. Exit status: 0 when all is well,
1 when the demo or a check finds a difference, 2 when autotp refuses what it was asked.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from rich.console import Console

import autotp
from autotp import demo
from autotp.calibrate import calibrate_rank, table
from autotp.cost_model.cluster import CLUSTERS, bandwidth_bound, by_name
from autotp.dryrun import STEPS
from autotp.errors import AutotpError, CalibrationError
from autotp.launch import launch
from autotp.measure import THOROUGH
from autotp.progress import stage
from autotp.reading import MEASURE
from autotp.regions import win_regions
from autotp.zoo import ZOO, build

Built = tuple[torch.nn.Module, dict[str, torch.Tensor]]
DTYPES = ("float32", "bfloat16", "float16")
GridArgument = tuple[int, ...] | dict[str, int]


def parse_grid(text: str) -> GridArgument:
    """Read a grid: sizes, or named axes.

    >>> parse_grid("2x2"), parse_grid("dp=2,tp=4")
    ((2, 2), {'dp': 2, 'tp': 4})
    """
    if re.fullmatch(r"\d+(x\d+)*", text):
        return tuple(int(size) for size in text.split("x"))
    if re.fullmatch(r"\w+=\d+(,\w+=\d+)*", text):
        return {name: int(size) for name, size in (axis.split("=") for axis in text.split(","))}
    raise argparse.ArgumentTypeError(f"{text!r} is not a grid such as 2x2 or dp=2,tp=4")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(prog="autotp", description=autotp.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    shown = commands.add_parser("demo", help="train a byte-level GPT-2 on four local ranks")
    shown.add_argument("--steps", type=int, default=demo.STEPS)
    shown.set_defaults(run=run_demo)
    calibrate = commands.add_parser(
        "calibrate",
        help="measure this machine, and keep it for plans",
        description="Measure this machine on local ranks, or under torchrun on those it starts.",
    )
    calibrate.add_argument("--ranks", type=int, default=4, help="local ranks, without torchrun")
    calibrate.add_argument("--seconds", type=float, default=THOROUGH.seconds)
    calibrate.add_argument("--force", action="store_true", help="measure anew what is kept")
    calibrate.set_defaults(run=run_calibrate)
    plan = commands.add_parser("plan", help="show the plan of a model, without its weights")
    plan.add_argument("--save", metavar="FILE", help="write the plan as JSON")
    _add_model(plan, batch=8, seq=1024)
    plan.set_defaults(run=run_plan)
    grids = commands.add_parser("grids", help="show what a model takes on every grid")
    _add_model(grids, batch=8, seq=1024, grid=False)
    grids.add_argument("--ranks", type=int, required=True, help="such as 64")
    grids.set_defaults(run=run_grids)
    regions = commands.add_parser(
        "regions", help="show where each scheme sends least, and formulas"
    )
    regions.add_argument("--ranks", type=int, required=True, help="such as 64")
    regions.add_argument("--cluster", choices=sorted(CLUSTERS), default="dgx_h100")
    regions.add_argument("--seq", type=int, default=2048)
    regions.set_defaults(run=run_regions)
    check = commands.add_parser("check", help="compare every rank's program with the model")
    _add_model(check, batch=4, seq=16)
    check.set_defaults(run=run_check)
    dry = commands.add_parser(
        "dryrun",
        help="run one rank of a cluster on this one device",
        description="Run one rank's program alone: compute and memory measured, links predicted.",
    )
    _add_model(dry, batch=8, seq=1024)
    dry.add_argument("--rank", type=int, default=0, help="which rank of the grid")
    dry.add_argument("--plan", metavar="FILE", help="follow a plan that `autotp plan --save` wrote")
    dry.add_argument("--device", help="cpu or cuda; by default the GPU if there is one")
    dry.add_argument("--small", action="store_true", help="a small variant of the model")
    dry.add_argument("--steps", type=int, default=STEPS, help="how many steps are timed")
    dry.add_argument("--json", action="store_true", help="print figures as JSON")
    dry.set_defaults(run=run_dryrun)
    return parser


def _add_model(parser: argparse.ArgumentParser, *, batch: int, seq: int, grid: bool = True) -> None:
    parser.add_argument("model", choices=sorted(ZOO))
    if grid:
        shown = "such as 2x2 or dp=2,tp=4"
        parser.add_argument("--grid", type=parse_grid, required=True, help=shown)
    parser.add_argument(
        "--cluster", choices=[*sorted(CLUSTERS), MEASURE], help="the machine to plan for"
    )
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--seq", type=int, default=seq)
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the weights")


def _built(args: argparse.Namespace, *, small: bool = False, device: str = "meta") -> Built:
    """Return the model that was asked for and its inputs."""
    with stage(f"build {args.model}"):
        model, inputs = build(
            args.model, small=small, batch=args.batch, seq=args.seq, device=device
        )
        return model.to(getattr(torch, args.dtype)), inputs


def run_demo(args: argparse.Namespace) -> int:
    """Train, compare, and tell by the exit status whether every claim held."""
    return 0 if demo.run(args.steps) else 1


def run_calibrate(args: argparse.Namespace) -> int:
    """Measure on the ranks that torchrun started, or on local ones."""
    effort = replace(THOROUGH, seconds=args.seconds)
    if args.ranks < 2:
        raise CalibrationError(
            "one rank sends nothing", at=[("--ranks", str(args.ranks))], remedy="--ranks 2 or more"
        )
    if "RANK" in os.environ:
        found = calibrate_rank(effort, args.force)
    else:
        found = launch(calibrate_rank, args.ranks, effort, args.force)[0]
    if os.environ.get("RANK", "0") == "0":
        print(table(found))
    return 0


def run_plan(args: argparse.Namespace) -> int:
    """Plan a model of full size on the meta device."""
    model, inputs = _built(args)
    plan = autotp.plan(model, args.grid, inputs, cluster=args.cluster)
    print(plan)
    if args.save:
        plan.save(args.save)
    return 0


def run_grids(args: argparse.Namespace) -> int:
    """Price every grid of a number of ranks for a model of full size on the meta device."""
    model, inputs = _built(args)
    print(autotp.grids(model, args.ranks, inputs, cluster=args.cluster))
    return 0


def run_regions(args: argparse.Namespace) -> int:
    """Draw the winners over batch and hidden size."""
    batches, hiddens = ([2**k for k in powers] for powers in (range(10), range(8, 15)))
    cluster = by_name(args.cluster)
    Console().print(win_regions(args.ranks, cluster, args.seq, batches, hiddens))
    return 0


def run_check(args: argparse.Namespace) -> int:
    """Run every rank of a small variant with random weights."""
    torch.manual_seed(0)
    model, inputs = _built(args, small=True, device="cpu")
    # Models this small are not worth splitting on a real machine: let arithmetic be dear.
    dear = bandwidth_bound(1e9, flops_per_s=1e9)
    report = autotp.check(model, args.grid, inputs, cluster=args.cluster or dear)
    print(report)
    return 0 if report.ok else 1


def run_dryrun(args: argparse.Namespace) -> int:
    """Run one rank of a model that is captured on the meta device."""
    model, inputs = _built(args, small=args.small)
    found = autotp.dryrun(
        model,
        args.grid,
        inputs,
        rank=args.rank,
        cluster=args.cluster,
        plan=autotp.Plan.load(args.plan) if args.plan else None,
        device=args.device,
        steps=args.steps,
    )
    print(json.dumps(found.to_json(), indent=1) if args.json else found)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    args = make_parser().parse_args(arguments)
    try:
        status: int = args.run(args)
    except AutotpError as error:
        print(error, file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
