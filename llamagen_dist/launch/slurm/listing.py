"""``--dry-run`` on a cluster: what would be submitted, and the script; starts nothing, needs no SLURM."""

from dataclasses import replace

from rich.table import Table

from llamagen_dist.console import Screen
from llamagen_dist.errors import UserError
from llamagen_dist.launch.graph import Graph, Node
from llamagen_dist.launch.slurm import queue
from llamagen_dist.launch.slurm.launch import Launcher, Target, jobs_of, programs_of, words
from llamagen_dist.launch.state import JobState, state_of
from llamagen_dist.tracking.provenance import masked_script


def states(graph: Graph) -> dict[str, JobState]:
    """Of all that run as jobs of their own; from the folders alone where SLURM gives no answer."""
    known: dict[str, queue.QueuedJob] = {}
    if graph.out.is_dir():
        try:
            known = queue.my_jobs()
        except UserError:
            known = {}
    return {name: state_of(job, known) for name, job in jobs_of(graph).items()}


def script_of(launcher: Launcher, node: Node, known: dict[str, JobState]) -> str:
    """The sbatch script of what is open of a node, as it would be handed over; empty where nothing is."""
    if node.sweep is None:
        return masked_script(launcher.submission(node, [node]).script())
    points = [point for name, point in programs_of(launcher.graph, node).items() if known[name].kind == "open"]
    if not points:
        return ""
    one = launcher.submission(node, points[:1])
    # the script names the first item and says how many there are
    return masked_script(replace(one, specs=one.specs * len(points)).script())


def show(graph: Graph, target: Target) -> None:
    """What ``run`` would do with a pipeline: a table, and the sbatch script of the first stage that is left."""
    graph.check()
    screen = Screen()
    launcher = Launcher(graph, target, screen)
    known = states(graph)
    table = Table(title=f"{graph.title} -> {graph.out}")
    for heading in ("", "stage", "size", "program", "state"):
        table.add_column(heading, overflow="fold")
    first: Node | None = None
    for number, node in enumerate(graph.nodes, start=1):
        mine = [known[name] for name in programs_of(graph, node)]
        live = [one for one in mine if one.live]
        failed = [one.reason for one in mine if one.kind == "failed"]
        if live:
            state = f"job {live[0].job} {'and others are' if len(live) > 1 else 'is'} in the queue"
        elif node.is_finished():
            state = "finished"
        else:
            state = f"failed: {failed[0]}" if failed else "open"
            first = first or node
        many = f"{len(node.sweep.nodes)} points on " if node.sweep is not None else ""
        table.add_row(str(number), node.name, f"{many}{words(launcher.sizes[node.name])}", node.module, state)
    screen.console.print(table, soft_wrap=False)
    if first is not None:
        screen.say(f"The script of {first.name} (those of the stages after it wait for the one before them):\n")
        screen.say(script_of(launcher, first, known))
    screen.say("Nothing was started.")
