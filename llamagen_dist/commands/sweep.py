"""``llamagen sweep SWEEP.yaml --out DIR [key=value …]``: one program with many configs, finished ones skipped."""

import argparse
from pathlib import Path

from llamagen_dist.commands import options
from llamagen_dist.commands.plan import add_gpu, machine
from llamagen_dist.config import load
from llamagen_dist.console import Screen
from llamagen_dist.launch import here
from llamagen_dist.launch.graph import Graph
from llamagen_dist.launch.points import sweep
from llamagen_dist.launch.slurm import launch, listing
from llamagen_dist.launch.state import JobState, state_of
from llamagen_dist.planning.plan import Machine
from llamagen_dist.planning.sweep import need, show


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a YAML file of kind: sweep")
    options.add_settings(parser, "override keys of every point's config")
    options.add_out(parser, "all points")
    options.add_cluster(parser, "all points are one job array")
    options.add_dry_run(parser, "what every point needs, and all together")
    parser.add_argument("--retry-failed", action="store_true", help="start points again that have failed")
    add_gpu(parser, "of --dry-run: ")


def run(args: argparse.Namespace) -> None:
    graph = sweep(args.file, args.out.absolute(), args.settings)
    if args.cluster == "local":
        if not args.dry_run:
            here.run(graph, args.retry_failed)
            return
        graph.check()
        ranks = graph.nodes[0].ranks
        _show(graph, machine(args, ranks, ranks), 1, [p.reopened(state_of(p.job, {})) for p in graph.nodes])
        print("Nothing was started.")
        return
    target = launch.Target(load(args.cluster, kind="cluster"))
    if not args.dry_run:
        launch.run(graph, target, retry_failed=args.retry_failed, follow=args.follow)
        return
    graph.check()
    launcher = launch.Launcher(graph, target, Screen())
    (node,), states = launcher.nodes, listing.states(graph)
    states = {point.name: point.reopened(states[point.name]) for point in graph.nodes}
    size = launcher.sizes[node.name]
    there = machine(args, size.ranks, size.ranks_per_node)
    _show(graph, there, graph.at_once or len(graph.nodes), list(states.values()))
    print(f"\n{listing.script_of(launcher, node, states)}\nNothing was started.")


def _show(graph: Graph, there: Machine, at_once: int, states: list[JobState]) -> None:
    """at_once: points that run at the same time."""
    words = [f"{state.kind}: {state.reason}" if state.reason else state.kind for state in states]
    needs = [need(point.name, point.config, there) for point in graph.nodes]
    show(f"{graph.title} -> {graph.out}", needs, words, there, at_once, Screen())
