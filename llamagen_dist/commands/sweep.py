"""``llamagen sweep SWEEP.yaml --out DIR [key=value …]``: one program with many configs, finished ones skipped."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llamagen_dist.launch.points import Sweep
    from llamagen_dist.launch.sweep import State


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a YAML file of kind: sweep")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="laid on the config of every point")
    parser.add_argument("--out", type=Path, required=True, help="folder for all points; the same again goes on with it")
    parser.add_argument(
        "--cluster",
        default="local",
        metavar="FILE",
        help="a cluster profile (slurm/NAME.yaml): all points are one job array; default: one after another here",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="what every point needs, and all together; start nothing"
    )
    parser.add_argument("--retry-failed", action="store_true", help="start points again that have failed")
    parser.add_argument("--follow", action="store_true", help="on a cluster: stay, and say what becomes of the points")
    parser.add_argument(
        "--gpu",
        default="A100-80",
        metavar="NAME",
        help="of --dry-run: A100-40, A100-80, H100, H200 or custom:MEMORY_GIB:PEAK_TFLOPS (default: %(default)s)",
    )
    parser.add_argument("--mfu", type=float, help="of --dry-run: share of the peak that is reached (default: 0.4)")


def run(args: argparse.Namespace) -> None:
    from llamagen_dist.config import load
    from llamagen_dist.launch.points import sweep

    made = sweep(args.file, args.out.absolute(), args.settings)
    if args.cluster == "local":
        from llamagen_dist.launch import sweep as local

        if args.dry_run:
            local.check(made)
            _show(args, made, (made.config.ranks, made.config.ranks, 1), [local.state_of(p) for p in made.points])
            print("Nothing was started.")
        else:
            local.run(made, args.retry_failed)
        return
    from llamagen_dist.launch.slurm import sweep as cluster

    profile = load(args.cluster, kind="cluster")
    if not args.dry_run:
        cluster.launch(made, profile, retry_failed=args.retry_failed, follow=args.follow)
        return
    cluster.check(made)
    size, states = cluster.size_for(made, profile), cluster.states(made)
    _show(args, made, (size.ranks, size.ranks_per_node, made.config.at_once or len(made.points)), states)
    print(f"\n{cluster.text(made, profile, size, states)}\nNothing was started.")


def _show(args: argparse.Namespace, made: "Sweep", sizes: tuple[int, int, int], states: list["State"]) -> None:
    """sizes: ranks of a point, of them on a node, points at the same time."""
    from llamagen_dist.console import Screen
    from llamagen_dist.errors import UserError
    from llamagen_dist.planning import sweep as planning
    from llamagen_dist.planning.plan import MFU, Machine
    from llamagen_dist.tracking.devices import named

    if args.mfu is not None and not 0 < args.mfu <= 1:
        raise UserError(f"--mfu {args.mfu}: a share of the peak rate, above 0 and at most 1 (0.4 = 40 %)")
    ranks, per_node, beside = sizes
    machine = Machine(named(args.gpu), ranks, per_node, args.mfu or MFU, args.mfu is not None)
    said = [f"{state.kind}: {state.reason}" if state.reason else state.kind for state in states]
    needs = [planning.need(point.name, point.stage.config, machine) for point in made.points]
    planning.show(f"{made.config.title} -> {made.out}", needs, said, machine, beside, Screen())
