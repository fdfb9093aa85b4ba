"""Run a graph on this machine, one program after another; the same command again resumes where it ended."""

import shlex
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from llamagen_dist.config import GPTConfigFile
from llamagen_dist.console import Screen, duration
from llamagen_dist.errors import EXIT_INTERRUPTED, UserError
from llamagen_dist.files import only_launcher, own_folder
from llamagen_dist.launch import local, snapshot
from llamagen_dist.launch.graph import Graph, Node
from llamagen_dist.launch.rank import CRASHED, DIED, DONE, INTERRUPTED, STOPPED, USER_ERROR
from llamagen_dist.launch.scoring import Scoring
from llamagen_dist.launch.state import nothing_runs, state_of


def run(graph: Graph, retry_failed: bool = False) -> None:
    """Run every node that is not finished. retry_failed: a sweep's failed points too.

    Raises UserError (a refusal, or a program's own sentence), SystemExit(1) after showing a bug's traceback or where
    points of a sweep have failed, and SystemExit(130) after a stop, when everything that can be saved is saved.
    """
    screen = Screen()
    if graph.kind != "launch" and graph.out.exists():
        own_folder(graph.out)
    graph.check()
    own_folder(graph.out)
    with only_launcher(graph.lock), local.StopRequest() as stop:
        graph.check()  # again: nobody else can change it now
        programs = graph.programs()
        nothing_runs([node.folder for node in (*graph.nodes, *programs)])
        for node in programs:
            local.wait_for_orphans(node.job, screen.say)
        graph.keep()
        runner = Runner(graph.out, screen, stop)
        if graph.kind == "launch":
            runner.single(graph.nodes[0])
        elif graph.kind == "pipeline":
            runner.pipeline(graph)
        else:
            conclude(graph, runner.points(graph, retry_failed), screen)


@dataclass
class Runner:
    """One launch on this machine. out: whose code/ the snapshot is taken into."""

    out: Path
    screen: Screen
    stop: local.StopRequest

    @cached_property
    def code(self) -> Path:
        """The snapshot that everything of this launch runs, taken when it is needed first."""
        return take_code(self.out, self.screen)

    def single(self, node: Node) -> None:
        """A program on its own; it finds by itself where nothing is left to do."""
        self.screen.say(f"{node.module} on {_ranks(node.ranks)}; logs in {node.job.log}")
        outcome = self.attempt(node)
        if outcome.kind != DONE:
            raise explain_failure(node.module, outcome, self.screen)
        self.screen.say(f"results in {node.folder}")

    def pipeline(self, graph: Graph) -> None:
        """One node after another. What follows one that runs, runs too, and finds out whether it has to."""
        ran: set[str] = set()
        for number, node in enumerate(graph.nodes, start=1):
            title = f"[{number}/{len(graph.nodes)}] {node.name}"
            if not ran & set(node.after) and node.is_finished():
                seconds = (node.job.read(node.job.done) or {}).get("seconds", 0.0)
                self.screen.say(f"{title} — finished earlier (took {duration(seconds)})")
                continue
            if self.stop.count:
                raise stopped(self.screen, f"stopped before stage {node.name}")
            ran.add(node.name)
            _ = self.code  # said before the stage
            size = _ranks(node.ranks) if node.sweep is None else f"{len(node.sweep.nodes)} points"
            self.screen.say(f"{title} — {node.why} ({size})")
            if node.sweep is not None:
                self.sweep_stage(node, node.sweep)
                continue
            outcome = self.attempt(node)
            if outcome.kind != DONE:
                raise explain_failure(f"stage {node.name}", outcome, self.screen)

    def sweep_stage(self, node: Node, sweep: Graph) -> None:
        """The points of a stage that is a sweep, failed ones again."""
        own_folder(sweep.out)
        sweep.keep()
        node.prepare()
        failed = self.points(sweep, retry_failed=True)
        if failed:
            self.screen.say(f"stage {node.name}: {len(failed)} of {len(sweep.nodes)} points have failed")
            raise SystemExit(1)
        node.finish_sweep(node.record(self.code, sweep.nodes[0].ranks))

    def points(self, sweep: Graph, retry_failed: bool) -> list[str]:
        """Every point that is not finished; one that fails does not hold up the others. Returns those that failed.

        Raises SystemExit(130) after a stop.
        """
        failed: list[str] = []
        for number, point in enumerate(sweep.nodes, start=1):
            where, state = f"[{number}/{len(sweep.nodes)}] {point.name}", point.reopened(state_of(point.job, {}))
            if state.kind == "finished":
                self.screen.say(f"{where} — finished earlier")
                continue
            if state.kind == "failed" and not retry_failed:
                self.screen.say(f"{where} — failed earlier: {state.reason}")
                failed.append(point.name)
                continue
            if self.stop.count:
                raise stopped(self.screen, f"stopped before point {point.name}")
            _ = self.code
            self.screen.say(where)
            outcome = self.attempt(point)
            if outcome.kind in (INTERRUPTED, STOPPED):
                raise explain_failure(f"point {point.name}", outcome, self.screen)
            if outcome.kind != DONE:
                self.screen.say(f"      failed: {failure(outcome)} (log: {outcome.log})")
                failed.append(point.name)
        return failed

    def attempt(self, node: Node) -> local.Outcome:
        """Start one program and wait for its end, which DONE.json or FAILED.json then tells."""
        arguments, spent = node.prepare()
        job, began = node.job, time.time()
        job.tell("started", job="", restart=0, nodes=1, where="")
        scoring = scoring_of(node, self.code)

        def look() -> None:
            tick()
            scoring.look()

        running = local.submit(node.module, arguments, node.ranks, self.code, job)
        with self.screen.follow(job.progress) as tick:
            outcome = running.watch(self.stop, look)
        spent += time.time() - began
        missing = node.missing()
        if outcome.kind == DONE and missing is not None:
            message = f"it ended without writing {missing}"
            outcome = local.Outcome(CRASHED, message, 0, running.log_of(0), outcome.peak_rss_gb)
        reason = "" if outcome.kind == DONE else failure(outcome)
        job.tell("ended", job="", outcome=outcome.kind, reason=reason)
        node.attempted(spent)
        if outcome.kind == DONE:
            job.finish(node.record(self.code, node.ranks, began), spent, outcome.peak_rss_gb)
            peak = f"peak {outcome.peak_rss_gb:.1f} GB per rank"
            self.screen.say(f"      done in {duration(time.time() - began)}, {peak}")
        elif outcome.kind not in (INTERRUPTED, STOPPED):
            job.fail(reason)
        if outcome.kind == DONE:
            scoring.finish(lambda: self.stop.count > 0)
        else:
            scoring.stop()
        return outcome


def scoring_of(node: Node, code: Path) -> Scoring:
    """What evaluates the checkpoints of a training, if its config asks for that."""
    config = node.config
    section = config.evaluation if isinstance(config, GPTConfigFile) else None
    if section is None or not isinstance(config, GPTConfigFile):
        return Scoring(None, code, "here")
    return Scoring(config.run_dir, code, "here", section.here == "beside", node.job.log / "evaluations.log")


def take_code(out: Path, screen: Screen) -> Path:
    """The snapshot the next programs run; says so if earlier ones ran another."""
    earlier = {p.name for p in (out / "code").glob("[!.]*")}
    code = snapshot.take(snapshot.code_root(), out / "code")
    if earlier and code.name not in earlier:
        screen.say(f"the code has changed since the last launch: stages from now on run {code}")
    return code


def failure(outcome: local.Outcome) -> str:
    """Why a program failed, in one line."""
    lines = outcome.message.splitlines() or [""]
    if outcome.kind == DIED:
        return f"rank {outcome.rank} died without a message (killed? out of memory?)"
    return lines[0] if outcome.kind == USER_ERROR else lines[-1]


def explain_failure(what: str, outcome: local.Outcome, screen: Screen) -> BaseException:
    """Say on the screen how ``what`` ended; returns the exception that ends the launcher accordingly."""
    if outcome.kind == USER_ERROR:
        return UserError(f"{what}: {outcome.message}")
    if outcome.kind == STOPPED:
        return stopped(screen, f"{what} was stopped, its progress is saved")
    if outcome.kind == INTERRUPTED:
        return stopped(screen, f"{what} was stopped; it resumes from what it last saved")
    how = "died without a message (killed? out of memory?); its last lines" if outcome.kind == DIED else "failed"
    print(
        f"{what}: rank {outcome.rank} {how}:\n\n{outcome.message}\n\nfull log: {outcome.log}",
        file=sys.stderr,
        flush=True,
    )
    return SystemExit(1)


def conclude(sweep: Graph, failed: list[str], screen: Screen) -> None:
    """The last line. Raises SystemExit(1) where points have failed."""
    count = len(sweep.nodes)
    if failed:
        few = ", ".join(failed[:5]) + (f" and {len(failed) - 5} more" if len(failed) > 5 else "")
        screen.say(
            f"{count - len(failed)} of {count} points are finished; failed: {few}. To try these again, add "
            "--retry-failed"
        )
        raise SystemExit(1)
    screen.say(f"all {count} points are finished: {sweep.out}")


def stopped(screen: Screen, what: str) -> SystemExit:
    """Say how to resume; returns the exception that ends the launcher."""
    screen.say(f"{what}. Resume with:\n  {command()}")
    return SystemExit(EXIT_INTERRUPTED)


def command() -> str:
    """The command that was typed, to be typed again."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # of python -m
    module = "llamagen_dist.cli" if spec is None else spec.name
    words = ["llamagen"] if Path(sys.argv[0]).name == "llamagen" else [Path(sys.executable).name, "-m", module]
    return shlex.join([*words, *sys.argv[1:]])


def _ranks(count: int) -> str:
    return f"{count} rank{'s' * (count > 1)}"
