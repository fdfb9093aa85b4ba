"""``--dry-run`` on a cluster: what would be submitted, and the script; starts nothing, needs no SLURM."""

from dataclasses import replace

from rich.table import Table

from llamagen_dist.console import Screen
from llamagen_dist.errors import UserError
from llamagen_dist.launch.graph import Graph, Node
from llamagen_dist.launch.slurm import queue
from llamagen_dist.launch.slurm.launch import Target, jobs_of, words
from llamagen_dist.launch.slurm.submit import Size, masked
from llamagen_dist.launch.state import JobState, state_of


def states(graph: Graph) -> dict[str, JobState]:
    """Of all that run as jobs of their own; from the folders alone where SLURM gives no answer."""
    known: dict[str, queue.QueuedJob] = {}
    if graph.out.is_dir():
        try:
            known = queue.my_jobs()
        except UserError:
            known = {}
    return {name: state_of(job, known) for name, job in jobs_of(graph).items()}


def script_of(graph: Graph, target: Target, node: Node, size: Size, known: dict[str, JobState]) -> str:
    """The sbatch script of what is open of a node, as it would be handed over; empty where nothing is."""
    code = graph.out / "code/SNAPSHOT"
    if node.sweep is None:
        return masked(target.submission(graph, node, [node], size, code).script())
    prefix = "" if graph.kind == "sweep" else f"{node.name}/"
    points = [point for point in node.programs() if known[prefix + point.name].kind == "open"]
    if not points:
        return ""
    one = target.submission(graph, node, points[:1], size, code)
    # the script names the first item and says how many there are
    return masked(replace(one, specs=one.specs * len(points)).script())


def show(graph: Graph, target: Target) -> None:
    """What ``run`` would do with a pipeline: a table, and the sbatch script of the first stage that is left."""
    graph.check()
    sizes = [target.stage_size(node) for node in graph.nodes]
    known = states(graph)
    table = Table(title=f"{graph.title} -> {graph.out}")
    for heading in ("", "stage", "size", "program", "state"):
        table.add_column(heading, overflow="fold")
    first: tuple[Node, Size] | None = None
    for number, (node, size) in enumerate(zip(graph.nodes, sizes, strict=True), start=1):
        mine = [s for name, s in known.items() if name == node.name or name.startswith(f"{node.name}/")]
        live = [one for one in mine if one.live]
        failed = [one.reason for one in mine if one.kind == "failed"]
        if live:
            state = f"job {live[0].job} {'and others are' if len(live) > 1 else 'is'} in the queue"
        elif node.is_finished():
            state = "finished"
        else:
            state = f"failed: {failed[0]}" if failed else "open"
            first = first or (node, size)
        many = f"{len(node.sweep.nodes)} points on " if node.sweep is not None else ""
        table.add_row(str(number), node.name, f"{many}{words(size)}", node.module, state)
    screen = Screen()
    screen.console.print(table, soft_wrap=False)
    if first is not None:
        screen.say(f"The script of {first[0].name} (those of the stages after it wait for the one before them):\n")
        screen.say(script_of(graph, target, *first, known))
    screen.say("Nothing was started.")
