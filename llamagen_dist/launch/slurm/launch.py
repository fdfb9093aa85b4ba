"""Run a graph on a cluster: what is not finished as jobs that wait for each other in SLURM's queue.

The same command again attaches to what runs or waits, skips what is finished and resumes what has ended. A sweep's
points are one array; a node waits by afterok for those before it, and SLURM cancels it where one of them fails.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llamagen_dist.config import ClusterConfig, Section, dump
from llamagen_dist.config.resume import compare
from llamagen_dist.console import Screen
from llamagen_dist.errors import UserError
from llamagen_dist.files import not_anothers, only_launcher, own_folder, write_text
from llamagen_dist.launch.folder import JobFolder, JobSpec
from llamagen_dist.launch.graph import Graph, Node
from llamagen_dist.launch.here import command, conclude, take_code
from llamagen_dist.launch.slurm import elastic, lock, queue, standby
from llamagen_dist.launch.slurm.submit import Size, Submission, adopt, check_path, limits_of, masked, release, size_of
from llamagen_dist.launch.slurm.watch import GONE, watch
from llamagen_dist.launch.state import JobState, state_of
from llamagen_dist.parallel.division import check_ranks
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
        """Of each of the node's jobs: its own nodes and GPUs; without them one CPU rank for a stage of one rank, else
        the profile's nodes. Raises UserError for what the partition or the batch does not allow."""
        own = node.sweep.nodes[0] if node.sweep is not None else node
        nodes = next((n for n in (node.nodes, own.nodes, self.nodes) if n is not None), None)
        gpus = next((n for n in (node.gpus_per_node, own.gpus_per_node, self.gpus_per_node) if n is not None), None)
        return size_of(self.profile, nodes, gpus)

    def stage_size(self, node: Node) -> Size:
        """``size`` of a pipeline's stage, checked."""
        try:
            if node.sweep is not None:
                return self.array_size(node)
            if node.nodes is None and node.gpus_per_node is None and node.ranks == 1:
                return Size(1, 1, 0)
            size = self.size(node)
            fits(node.config, size.ranks)
        except UserError as error:
            raise UserError(f"stage {node.name}: {error}") from None
        return size

    def array_size(self, node: Node) -> Size:
        """``size`` of every point of a sweep, checked."""
        points, size = node.programs(), self.size(node)
        most = queue.largest_array() if len(points) > USUAL_ARRAY else None
        if most is not None and len(points) > most:
            raise UserError(f"{len(points):,} points: SLURM takes arrays of up to {most:,} here; make several sweeps")
        for point in points:
            try:
                fits(point.config, size.ranks)
            except UserError as error:
                raise UserError(f"point {point.name}: {error}") from None
        return size

    def submission(self, graph: Graph, node: Node, programs: Sequence[Node], size: Size, code: Path) -> Submission:
        """What would be submitted for these programs of a node, without the jobs it waits for."""
        whole: dict[str, Any] = {}
        if graph.kind == "pipeline" and node.sweep is not None:
            whole = {"done": str(node.job.done), "record": node.record(code, size.ranks)}
        prefix = f"{graph.out.name}-" if graph.kind == "pipeline" and node.sweep is None else ""
        specs = tuple(self._spec(program, f"{prefix}{program.name}", size, code, whole) for program in programs)
        sweep = node.sweep
        logs = None if sweep is None else sweep.out / "log"
        return Submission(specs, self.profile, size, at_once=sweep.at_once if sweep else None, logs=logs)

    def _spec(self, node: Node, name: str, size: Size, code: Path, whole: dict[str, Any]) -> JobSpec:
        run_dir = getattr(node.config, "run_dir", None)
        return JobSpec(
            name=name,
            module=node.module,
            arguments=node.command(),
            folder=str(node.folder),
            run_dir=None if run_dir is None else str(run_dir),
            code=str(code),
            ranks_per_node=size.ranks_per_node,
            limits=limits_of(self.profile),
            produces=tuple(map(str, node.produces)),
            record=node.record(code, size.ranks),
            whole=whole,
        )


def fits(config: Section | None, ranks: int) -> None:
    """Refuse before the queue what the ranks would refuse after it. Raises UserError."""
    if config is not None:
        check_ranks(config, ranks)


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
                    adopt(jobs[name], one.lock, one.job)
                between.append(name)
        if not between:
            return states
        if time.monotonic() > deadline:
            raise UserError(f"{between[0]}: its job is still starting or ending after {PATIENCE_S:.0f} s; try again")
        if not announced:
            screen.say(f"waiting for jobs that are just starting or ending ({between[0]}{', …' * (len(jobs) > 1)})")
            announced = True
        time.sleep(0.5)


def release_left(states: Sequence[JobState], target: Target) -> None:
    """Release jobs whose launch died before it did."""
    if not target.profile.sbatch.get("hold"):
        held = (one.job for one in states if one.queued is not None and one.queued.reason == "JobHeldUser")
        for job in dict.fromkeys(job.partition("_")[0] for job in held if job is not None):
            release(job)


# --- one program ---


def launch(graph: Graph, target: Target, *, dry_run: bool = False, follow: bool = False) -> None:
    """One program as one job in the config's run directory.

    The same again attaches to the job that runs or waits; where none does, the run resumes from its last checkpoint.
    Raises UserError; SystemExit(1) with ``follow`` when the run has failed.
    """
    graph.check()
    (node,), profile = graph.nodes, target.profile
    folder, config = node.folder, node.config
    assert config is not None
    not_anothers(folder)
    check_path(folder)
    size = target.size(node)
    fits(config, size.ranks)
    smaller = standby.sizes(profile, size)
    for less in smaller:
        try:
            fits(config, less.ranks)
        except UserError as error:
            raise UserError(f"elastic.nodes: {less.nodes}: {error}") from None
    if smaller:
        config = standby.fixed_micro_batch(config, size.ranks)
        node = replace(node, config=config)
    for line in compare(folder, config).lines(folder):
        print(line)
    if dry_run:
        print(masked(target.submission(graph, node, [node], size, folder / "code/SNAPSHOT").script()), end="")
        for number, less in enumerate(smaller, start=1):
            print(f"# and the same with --nodes={less.nodes} --begin={standby.begins_after(profile, number)}")
        return
    queue.require_slurm()
    screen = Screen()
    if late := timing.warning(folder, profile.signal_delay_s):
        screen.say(late)
    if _submit_or_attach(graph, target, node, smaller, size, screen):
        screen.say(f"logs: {node.job.log}; state: llamagen status {folder}")
        if follow:
            raise SystemExit(1 if watch({str(folder): node.job}, screen) else 0)


def _submit_or_attach(
    graph: Graph, target: Target, node: Node, smaller: list[Size], size: Size, screen: Screen
) -> bool:
    """Whether a job runs or waits now; False: the run is finished.

    Of several launches at once one gets the lock; the others come round again until they see its job.
    """
    job, folder, deadline = node.job, node.folder, time.monotonic() + PATIENCE_S
    while True:
        (state,) = settled({str(folder): job}, screen).values()
        if state.kind == "finished" and not node.reopens():
            screen.say(f"{folder}: finished (job {state.job})")
            return False
        if state.live and state.queued is not None:
            release_left([state], target)
            screen.say(f"{folder}: job {state.job} is {state.queued.state.lower()} already; attached")
            return True
        own_folder(folder)
        job.path.mkdir(mode=0o700, exist_ok=True)
        code = take_code(folder, screen)
        submission = target.submission(graph, node, [node], size, code)
        try:
            _say_what_ended(folder, state, screen)
            if state.lock is not None:
                elastic.cancel_left_over(job, state.lock)
            # the config first: the lock's winner and whoever comes second would write the same
            assert node.config is not None
            write_text(job.config, dump(node.config))
            (name,) = submission.submit([state.lock])
        except lock.TakenError:
            if time.monotonic() > deadline:
                raise UserError(f"{folder}: other launches keep coming between; try again") from None
            time.sleep(0.3)
            continue
        node.attempted(0.0)
        screen.say(f"{folder}: job {name}, {size.ranks} ranks on {size.nodes} node{'s' * (size.nodes > 1)}")
        held = lock.read(job)
        if smaller and held is not None:
            standby.submit_all(replace(submission, token=held.token), name, smaller, screen.say)
        return True


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
    sweep = graph.kind == "sweep"
    nodes = (sweep_node(graph),) if sweep else graph.nodes
    sizes = [target.array_size(node) if sweep else target.stage_size(node) for node in nodes]
    if graph.out.exists():
        own_folder(graph.out)
    graph.check()
    own_folder(graph.out)
    with only_launcher(graph.lock):
        graph.check()
        graph.keep()
        launcher = Launcher(graph, target, screen)
        failed = launcher.sweep(nodes[0], sizes[0], retry_failed) if sweep else {}
        if not sweep:
            launcher.pipeline(sizes)
    if not follow:
        if failed:
            screen.say("To try these again, add --retry-failed")
        screen.say(f"state: llamagen status {graph.out}")
        return
    ended = watch({name: job for name, job in jobs_of(graph).items() if name not in failed}, screen)
    if sweep:
        conclude(graph, list(failed | ended), screen)
    elif ended:
        name, reason = next(((n, why) for n, why in ended.items() if why != GONE), next(iter(ended.items())))
        screen.say(f"{name} has not ended well: {reason}. Resume with:\n  {command()}")
        raise SystemExit(1)
    else:
        screen.say(f"all {len(nodes)} stages are finished: {graph.out}")


def jobs_of(graph: Graph) -> dict[str, JobFolder]:
    """The folders of all that run as jobs of their own, by the name that people know: POINT, STAGE or STAGE/POINT."""
    jobs = {}
    for node in graph.nodes:
        for program in node.programs():
            jobs[program.name if node.sweep is None else f"{node.name}/{program.name}"] = program.job
    return jobs


@dataclass
class Launcher:
    """One launch of a sweep or a pipeline; its folder is locked."""

    graph: Graph
    target: Target
    screen: Screen

    def sweep(self, node: Node, size: Size, retry_failed: bool) -> dict[str, str]:
        """Returns the points that have failed and are not tried again, with the reason."""
        count = len(self.graph.nodes)
        states = settled(jobs_of(self.graph), self.screen)
        states = {point.name: point.reopened(states[point.name]) for point in self.graph.nodes}
        release_left(list(states.values()), self.target)
        chosen = [p for p in self.graph.nodes if states[p.name].kind in ("open", *(["failed"] * retry_failed))]
        failed = {name: one.reason for name, one in states.items() if one.kind == "failed" and not retry_failed}
        for kind in ("finished", "running", "waiting"):
            number = sum(state.kind == kind for state in states.values())
            if number:
                self.screen.say(f"{number} of {count} points {'are ' if kind != 'finished' else ''}{kind}")
        for name, reason in failed.items():
            self.screen.say(f"{name} has failed: {reason}")
        if chosen:
            jobs = self._submit(node, chosen, size, [], [states[point.name].lock for point in chosen])
            beside = f", {self.graph.at_once} at a time" if self.graph.at_once else ""
            self.screen.say(
                f"job {jobs[0].partition('_')[0]}: {len(chosen)} point{'s' * (len(chosen) > 1)}{beside}, each on "
                f"{size.ranks} rank{'s' * (size.ranks > 1)} of {size.nodes} node{'s' * (size.nodes > 1)}; logs: "
                f"{self.graph.out / 'log'}"
            )
        return failed

    def pipeline(self, sizes: Sequence[Size]) -> None:
        """Every stage that is not finished; the jobs of those after it wait for it."""
        states = settled(jobs_of(self.graph), self.screen)
        release_left(list(states.values()), self.target)
        pending: dict[str, list[str]] = {}  # the jobs of every stage that is not finished
        submitted = False
        for number, (node, size) in enumerate(zip(self.graph.nodes, sizes, strict=True), start=1):
            title = f"[{number}/{len(sizes)}] {node.name}"
            names = {p.name if node.sweep is None else f"{node.name}/{p.name}": p for p in node.programs()}
            before = [job for name in node.after for job in pending.get(name, [])]
            live = [name for name in names if states[name].live]
            if not before and not live and node.is_finished():
                self.screen.say(f"{title} — finished earlier")
                continue
            if live and submitted:
                # it waits for a job that is gone; or it runs on what the stage before it is about to make anew
                jobs = [str(states[name].job) for name in live]
                self.screen.say(f"{title} — job {jobs[0]} is cancelled: the stage before it runs again")
                queue.cancel(jobs)
                states |= settled({name: program.job for name, program in names.items()}, self.screen, cancelled=True)
                live = []
            todo = {name: p for name, p in names.items() if name not in live}
            if node.sweep is not None:
                todo = {name: p for name, p in todo.items() if states[name].kind != "finished"}
            jobs = [str(states[name].job) for name in live]
            if live:
                running = any(states[name].kind == "running" for name in live)
                self.screen.say(f"{title} — job {jobs[0]} is {'running' if running else 'pending'} already")
            if todo or not live:
                new = self._submit_stage(node, todo, size, before, [states[name].lock for name in todo])
                if new:
                    waits = f", after job {before[0].partition('_')[0]}" if before else ""
                    many = f"{len(new)} point{'s' * (len(new) > 1)} on " if node.sweep is not None else ""
                    job = new[0].partition("_")[0]
                    self.screen.say(f"{title} — job {job}, {many}{words(size)}{waits}: {node.why}")
                    submitted = True
                jobs += new
            pending[node.name] = jobs

    def _submit_stage(
        self, node: Node, todo: dict[str, Node], size: Size, before: list[str], stale: list[lock.Lock | None]
    ) -> list[str]:
        """Returns the job, or the items of an array; none where all points of a stage turn out to be finished."""
        if node.sweep is None:
            return self._submit(node, [node], size, before, stale)
        own_folder(node.sweep.out)
        node.sweep.keep()
        node.prepare()
        if not todo:
            node.finish_sweep(node.record(self._code(), size.ranks))
            return []
        return self._submit(node, list(todo.values()), size, before, stale)

    def _submit(
        self, node: Node, programs: list[Node], size: Size, after: list[str], stale: list[lock.Lock | None]
    ) -> list[str]:
        code = self._code()
        for program in programs:
            program.prepare()
        submission = replace(self.target.submission(self.graph, node, programs, size, code), after=tuple(after))
        try:
            return submission.submit(stale)
        except lock.TakenError:
            raise UserError(f"{self.graph.out}: {node.name}: another launch came between; try again") from None

    def _code(self) -> Path:
        return take_code(self.graph.out, self.screen)


def words(size: Size) -> str:
    ranks = f"{size.ranks} rank{'s' * (size.ranks > 1)}"
    return f"{ranks} on {size.nodes} nodes" if size.nodes > 1 else ranks
