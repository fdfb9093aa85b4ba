"""Run a graph on a cluster: what is not finished as jobs that wait for each other in SLURM's queue.

The same command again attaches to what runs or waits, skips what is finished and resumes what has ended. A sweep's
points are one array; a node waits by afterok for those before it, and SLURM cancels it where one of them fails.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llamagen_dist.config import ClusterConfig, GPTConfigFile, Section, TrainingConfig, dump
from llamagen_dist.config.resume import compare
from llamagen_dist.console import Screen
from llamagen_dist.errors import UserError
from llamagen_dist.files import not_anothers, only_launcher, own_folder, write_text
from llamagen_dist.launch.folder import JobFolder, JobSpec
from llamagen_dist.launch.graph import Graph, Node
from llamagen_dist.launch.here import command, conclude, take_code
from llamagen_dist.launch.slurm import elastic, lock, queue
from llamagen_dist.launch.slurm.queue import array_of
from llamagen_dist.launch.slurm.submit import Size, Submission, limits_of, many, size_of, submit_stand_bys
from llamagen_dist.launch.slurm.watch import GONE, watch
from llamagen_dist.launch.state import JobState, state_of
from llamagen_dist.parallel.division import check_ranks, data_ranks, per_rank_batch
from llamagen_dist.tracking.provenance import masked_script
from llamagen_dist.training import timing

PATIENCE_S = 120.0  # for a job that is just ending, or a launch that is just submitting
USUAL_ARRAY = 500  # no cluster allows fewer; of larger ones it is asked how many


@dataclass(frozen=True)
class Target:
    """Where a graph runs. nodes, gpus_per_node: of ``llamagen launch``, instead of the profile's."""

    profile: ClusterConfig
    nodes: int | None = None
    gpus_per_node: int | None = None

    def size(self, node: Node) -> Size:
        """Of each of the node's jobs: its own nodes and GPUs, else the profile's. Raises UserError for what the
        partition or the batch does not allow."""
        points = node.programs()
        nodes = next((n for n in (node.nodes, points[0].nodes, self.nodes) if n is not None), None)
        own_gpus = (node.gpus_per_node, points[0].gpus_per_node, self.gpus_per_node)
        size = size_of(self.profile, nodes, next((n for n in own_gpus if n is not None), None))
        most = queue.largest_array() if len(points) > USUAL_ARRAY else None
        if most is not None and len(points) > most:
            raise UserError(f"{len(points):,} points: SLURM takes arrays of up to {most:,} here; make several sweeps")
        for point in points:
            fits(point.config, size.ranks, f"point {point.name}: " if node.sweep is not None else "")
        return size

    def stage_size(self, node: Node) -> Size:
        """``size`` of a pipeline's stage: one CPU rank where it is a program of one process."""
        if node.sweep is None and node.nodes is None and node.gpus_per_node is None and node.ranks == 1:
            return Size(1, 1, 0)
        try:
            return self.size(node)
        except UserError as error:
            raise UserError(f"stage {node.name}: {error}") from None


def fits(config: Section | None, ranks: int, where: str = "") -> None:
    """Refuse before the queue what the ranks would refuse after it. Raises UserError, which begins with ``where``."""
    try:
        if config is not None:
            check_ranks(config, ranks)
    except UserError as error:
        raise UserError(f"{where}{error}") from None


def sweep_node(graph: Graph) -> Node:
    """A sweep of its own as the one node that it would be in a pipeline; it has no folder but its points'."""
    return Node(name=graph.title, module=graph.module, folder=graph.out, config=graph.config, sweep=graph)


def settled(jobs: Mapping[str, JobFolder], screen: Screen, cancelled: bool = False) -> dict[str, JobState]:
    """The state of every folder, by name, once none is between two states (a job just ending, another launch just
    submitting). SLURM is asked once for all of them. Raises UserError.

    A job that was submitted by a launch which then died is named in its folder. cancelled: all of them were, and are
    waited for until they are gone.
    """
    deadline, announced = time.monotonic() + PATIENCE_S, False
    while True:
        known = queue.my_jobs() if any(job.lock.exists() for job in jobs.values()) else {}
        states = {name: state_of(job, known) for name, job in jobs.items()}
        between = [
            name for name, one in states.items() if one.kind == "submitting" or one.leaving or (cancelled and one.live)
        ]
        for name, one in states.items():
            if one.live and one.job is not None and one.lock is not None and not one.lock.jobs:
                with suppress(lock.TakenError):
                    lock.adopt(jobs[name], one.lock, one.job)
                between.append(name)
        if not between:
            return states
        if time.monotonic() > deadline:
            raise UserError(f"{between[0]}: its job is still starting or ending after {PATIENCE_S:.0f} s; try again")
        if not announced:
            screen.say(f"waiting for jobs that are just starting or ending ({between[0]}{', …' * (len(jobs) > 1)})")
            announced = True
        time.sleep(0.5)


def release_left(states: Iterable[JobState], profile: ClusterConfig) -> None:
    """Release jobs whose launch died before it did."""
    if not profile.sbatch.get("hold"):
        left = (one.job for one in states if one.queued is not None and one.queued.reason == "JobHeldUser")
        for job in dict.fromkeys(array_of(job) for job in left if job is not None):
            queue.release(job)


# --- one program ---


def launch(graph: Graph, target: Target, *, dry_run: bool = False, follow: bool = False) -> None:
    """One program as one job in the config's run directory.

    The same again attaches to the job that runs or waits; where none does, the run resumes from its last checkpoint.
    Raises UserError; SystemExit(1) with ``follow`` when the run has failed.
    """
    graph.check()
    not_anothers(graph.out)
    screen = Screen()
    launcher = Launcher(graph, target, screen)
    (node,) = launcher.nodes
    planned = launcher.submission(node, [node])
    for less in planned.stand_bys:
        fits(node.config, less.size.ranks, f"elastic.nodes: {less.size.nodes}: ")
    assert node.config is not None
    for line in compare(node.folder, node.config).lines(node.folder):
        print(line)
    if dry_run:
        print(masked_script(planned.script()), end="")
        for less in planned.stand_bys:
            print(f"# and the same with --nodes={less.size.nodes} --begin={less.begin}")
        return
    queue.require_slurm()
    if late := timing.warning(node.folder, target.profile.signal_delay_s):
        screen.say(late)
    if launcher.single(node, node.config):
        screen.say(f"logs: {node.job.log}; state: llamagen status {node.folder}")
        if follow:
            raise SystemExit(1 if watch({str(node.folder): node.job}, screen) else 0)


def fixed_micro_batch(config: Section | None, ranks: int) -> Section | None:
    """The config with the micro-batch of the full size written down: with fewer ranks a share is larger, and must be
    accumulated in pieces that fit into memory as before.

    Raises UserError where the ranks cannot share the batch.
    """
    if not isinstance(config, TrainingConfig) or config.train.micro_batch is not None:
        return config
    micro = per_rank_batch(config.train.global_batch, data_ranks(ranks, config.parallel.tensor))
    return config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": micro})})


def _say_what_ended(folder: Path, state: JobState, screen: Screen) -> None:
    if state.kind == "failed":
        screen.say(f"{folder}: job {state.job} failed ({state.reason}); resuming from the last checkpoint")
    elif state.kind == "open" and state.lock is not None:
        how = f"job {state.job}" if state.job else "an earlier launch"
        how += f" ended as {state.queued.state}" if state.queued else " is over"
        screen.say(f"{folder}: {how}; resuming from the last checkpoint")


# --- many programs ---


def run(graph: Graph, target: Target, *, retry_failed: bool = False, follow: bool = False) -> None:
    """A sweep or a pipeline: submit what is not finished and not in the queue already.

    retry_failed: a sweep's failed points too. Raises UserError; with ``follow`` SystemExit(1) where something failed.
    """
    screen = Screen()
    queue.require_slurm()
    launcher = Launcher(graph, target, screen)
    if graph.out.exists():
        own_folder(graph.out)
    graph.check()
    own_folder(graph.out)
    failed: dict[str, str] = {}
    with only_launcher(graph.lock):
        graph.check()
        graph.keep()
        if graph.kind == "sweep":
            failed = launcher.sweep(retry_failed)
        else:
            launcher.pipeline()
    if not follow:
        if failed:
            screen.say("To try these again, add --retry-failed")
        screen.say(f"state: llamagen status {graph.out}")
        return
    ended = watch({name: job for name, job in jobs_of(graph).items() if name not in failed}, screen)
    if graph.kind == "sweep":
        conclude(graph, list(failed | ended), screen)
    elif ended:
        name, reason = next(((n, why) for n, why in ended.items() if why != GONE), next(iter(ended.items())))
        screen.say(f"{name} has not ended well: {reason}. Resume with:\n  {command()}")
        raise SystemExit(1)
    else:
        screen.say(f"all {len(graph.nodes)} stages are finished: {graph.out}")


def programs_of(graph: Graph, node: Node) -> dict[str, Node]:
    """What runs as a job of its own for a node, by the name that people know: POINT, STAGE or STAGE/POINT."""
    prefix = f"{node.name}/" if graph.kind == "pipeline" and node.sweep is not None else ""
    return {prefix + program.name: program for program in node.programs()}


def jobs_of(graph: Graph) -> dict[str, JobFolder]:
    """The folders of all that run as jobs of their own, by the name that people know."""
    return {name: program.job for node in graph.nodes for name, program in programs_of(graph, node).items()}


class Launcher:
    """One launch of a graph on a cluster. ``sizes``: of the jobs of every node, by its name."""

    def __init__(self, graph: Graph, target: Target, screen: Screen) -> None:
        """Touches nothing. Raises UserError for a size that the cluster or a batch does not allow."""
        self.graph, self.profile, self.screen = graph, target.profile, screen
        self.nodes = (sweep_node(graph),) if graph.kind == "sweep" else graph.nodes
        size = target.stage_size if graph.kind == "pipeline" else target.size
        self.sizes = {node.name: size(node) for node in self.nodes}
        self.states: dict[str, JobState] = {}
        self.submitted = False
        for program in graph.programs():
            section = program.config.evaluation if isinstance(program.config, GPTConfigFile) else None
            if section is not None and section.cluster is None:
                raise UserError(
                    "evaluation.cluster: is empty; name the profile (slurm/NAME.yaml) of the jobs that score "
                    "checkpoints, or leave evaluation out and use llamagen evaluate"
                )
        if graph.kind == "launch":
            (node,), one = graph.nodes, self.sizes[graph.nodes[0].name]
            if any(nodes < one.nodes for nodes in self.profile.elastic.nodes):  # it may run on fewer ranks
                self.nodes = (replace(node, config=fixed_micro_batch(node.config, one.ranks)),)

    def submission(self, node: Node, programs: Sequence[Node], code: Path | None = None) -> Submission:
        """What is submitted for these programs of a node, without the jobs it waits for.

        code: the snapshot; None: as a dry run calls it. Raises UserError for a path that SLURM misreads.
        """
        code = code or self.graph.out / "code/SNAPSHOT"
        sweep, size, stage = node.sweep, self.sizes[node.name], self.graph.kind == "pipeline"
        whole: dict[str, Any] = {}
        if stage and sweep is not None:
            whole = {"done": str(node.job.done), "record": node.record(code, size.ranks)}
        prefix = f"{self.graph.out.name}-" if stage and sweep is None else ""
        specs = tuple(
            JobSpec(
                name=f"{prefix}{program.name}",
                module=program.module,
                arguments=program.command(),
                folder=str(program.folder),
                run_dir=str(run_dir) if (run_dir := getattr(program.config, "run_dir", None)) is not None else None,
                code=str(code),
                ranks_per_node=size.ranks_per_node,
                limits=limits_of(self.profile),
                produces=tuple(map(str, program.produces)),
                record=program.record(code, size.ranks),
                whole=whole,
            )
            for program in programs
        )
        logs = None if sweep is None else sweep.out / "log"
        return Submission(specs, self.profile, size, at_once=sweep.at_once if sweep else None, logs=logs)

    def single(self, node: Node, config: Section) -> bool:
        """Submit one program, or attach. Whether a job runs or waits now; False: the run is finished.

        Of several launches at once one gets the lock; the others come round again until they see its job.
        """
        job, folder, say, deadline = node.job, node.folder, self.screen.say, time.monotonic() + PATIENCE_S
        while True:
            (state,) = settled({str(folder): job}, self.screen).values()
            if state.kind == "finished" and not node.reopens():
                say(f"{folder}: finished (job {state.job})")
                return False
            if state.live and state.queued is not None:
                release_left([state], self.profile)
                say(f"{folder}: job {state.job} is {state.queued.state.lower()} already; attached")
                return True
            own_folder(folder)
            job.path.mkdir(mode=0o700, exist_ok=True)
            submission = self.submission(node, [node], take_code(folder, self.screen))
            try:
                _say_what_ended(folder, state, self.screen)
                if state.lock is not None:
                    queue.cancel(elastic.left_over(job, state.lock, queue.my_jobs()))
                # the config first: the lock's winner and whoever comes second would write the same
                write_text(job.config, dump(config))
                (name,) = submission.submit([state.lock])
            except lock.TakenError:
                if time.monotonic() > deadline:
                    raise UserError(f"{folder}: other launches keep coming between; try again") from None
                time.sleep(0.3)
                continue
            node.attempted(0.0)
            say(f"{folder}: job {name}, {many(submission.size.ranks, 'rank')} on {many(submission.size.nodes, 'node')}")
            submit_stand_bys(submission, name, say)
            return True

    def sweep(self, retry_failed: bool) -> dict[str, str]:
        """Returns the points that have failed and are not tried again, with the reason."""
        self._look()
        self.states |= {point.name: point.reopened(self.states[point.name]) for point in self.graph.nodes}
        (node,), say = self.nodes, self.screen.say
        kinds = {name: state.kind for name, state in self.states.items()}
        failed = {name: one.reason for name, one in self.states.items() if one.kind == "failed" and not retry_failed}
        for kind in ("finished", "running", "waiting"):
            if number := list(kinds.values()).count(kind):
                say(f"{number} of {len(kinds)} points {'are ' if kind != 'finished' else ''}{kind}")
        for name, reason in failed.items():
            say(f"{name} has failed: {reason}")
        wanted = ("open", "failed") if retry_failed else ("open",)
        if todo := {name: point for name, point in programs_of(self.graph, node).items() if kinds[name] in wanted}:
            jobs, size = self._submit(node, todo), self.sizes[node.name]
            beside = f", {self.graph.at_once} at a time" if self.graph.at_once else ""
            say(
                f"job {array_of(jobs[0])}: {many(len(todo), 'point')}{beside}, each on {many(size.ranks, 'rank')} of "
                f"{many(size.nodes, 'node')}; logs: {self.graph.out / 'log'}"
            )
        return failed

    def pipeline(self) -> None:
        """Every stage that is not finished; the jobs of those after it wait for it."""
        self._look()
        pending: dict[str, list[str]] = {}  # the jobs of every stage that is not finished
        for number, node in enumerate(self.nodes, start=1):
            before = [job for name in node.after for job in pending.get(name, [])]
            pending[node.name] = self._stage(node, f"[{number}/{len(self.nodes)}] {node.name}", before)

    def _look(self) -> None:
        self.states = settled(jobs_of(self.graph), self.screen)
        release_left(self.states.values(), self.profile)

    def _stage(self, node: Node, title: str, before: list[str]) -> list[str]:
        """Submit what is left of a stage, to run after ``before``. Returns its jobs; none of a finished one."""
        say, programs = self.screen.say, programs_of(self.graph, node)
        live = [name for name in programs if self.states[name].live]
        if not before and not live and node.is_finished():
            say(f"{title} — finished earlier")
            return []
        if live and self.submitted:
            # it waits for a job that is gone; or it runs on what the stage before it is about to make anew
            jobs = [str(self.states[name].job) for name in live]
            say(f"{title} — job {jobs[0]} is cancelled: the stage before it runs again")
            queue.cancel(jobs)
            folders = {name: program.job for name, program in programs.items()}
            self.states |= settled(folders, self.screen, cancelled=True)
            live = []
        jobs = [str(self.states[name].job) for name in live]
        if live:
            running = any(self.states[name].kind == "running" for name in live)
            say(f"{title} — job {jobs[0]} is {'running' if running else 'pending'} already")
        todo = {name: program for name, program in programs.items() if name not in live}
        if node.sweep is not None:
            todo = {name: point for name, point in todo.items() if self.states[name].kind != "finished"}
        if node.sweep is not None and (todo or not live):
            own_folder(node.sweep.out)
            node.sweep.keep()
            node.prepare()
            if not todo:  # all its points are finished, only its own mark is not there
                node.finish_sweep(node.record(take_code(self.graph.out, self.screen), self.sizes[node.name].ranks))
        if todo:
            new = self._submit(node, todo, before)
            waits = f", after job {array_of(before[0])}" if before else ""
            points = f"{many(len(new), 'point')} on " if node.sweep is not None else ""
            say(f"{title} — job {array_of(new[0])}, {points}{words(self.sizes[node.name])}{waits}: {node.why}")
            self.submitted = True
            jobs += new
        return jobs

    def _submit(self, node: Node, todo: Mapping[str, Node], after: Sequence[str] = ()) -> list[str]:
        """Submit these programs of a node, as an array where it is a sweep. Returns a job per program."""
        programs, code = list(todo.values()), take_code(self.graph.out, self.screen)
        for program in programs:
            program.prepare()
        submission = self.submission(node, programs, code)
        try:
            return replace(submission, after=tuple(after)).submit([self.states[name].lock for name in todo])
        except lock.TakenError:
            raise UserError(f"{self.graph.out}: {node.name}: another launch came between; try again") from None


def words(size: Size) -> str:
    ranks = many(size.ranks, "rank")
    return f"{ranks} on {size.nodes} nodes" if size.nodes > 1 else ranks
