"""One program on the ranks of this machine, through submitit's local executor: start it, watch it, judge its end."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from submitit import AutoExecutor

from llamagen_dist.errors import UserError
from llamagen_dist.launch.folder import HERE, JobFolder
from llamagen_dist.launch.rank import CRASHED, DIED, DONE, INTERRUPTED, STOPPED, USER_ERROR, RankProgram
from llamagen_dist.process import Identity, free_port, identify

POLL_S = 0.1
COMPANION_GRACE_S = 2.0  # once a rank has failed, the others may notice by themselves for so long
START_PATIENCE_S = 180.0  # from submission to the rank's first sign of life (a cold disk imports slowly)
EXIT_PATIENCE_S = 15.0  # from a rank's last word to the end of its process
STOP_PATIENCE_S = 60.0  # what a stop may take: one step and one save
REMIND_S = 10.0  # the signal is sent again, for a program that was between two trainings when it came
LOG_TAIL_LINES = 25
ONE_YEAR_MIN = 525_600  # submitit's local executor wants a time limit


@dataclass
class Outcome:
    """How a stage ended: its kind (rank.py names them) and what is known of it."""

    kind: str
    message: str = ""
    rank: int = 0
    log: Path | None = None
    peak_rss_gb: float = 0.0


@dataclass
class StopRequest:
    """Ctrl-C and SIGTERM at the launcher: counted here, acted upon in ``watch``; the second one kills."""

    count: int = 0
    _previous: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._previous[number] = signal.signal(number, self._up)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _up(self, number: int, frame: object) -> None:
        self.count += 1


class LocalJob:
    """A submitted program, seen from the launcher."""

    def __init__(self, submitted: Any, reports: Path, ranks: int) -> None:
        self._submitted, self._reports, self.ranks = submitted, reports, ranks
        self._began = time.monotonic()
        self._killed: set[int] = set()

    def log_of(self, rank: int) -> Path:
        """Everything this rank printed, stdout and stderr."""
        return Path(self._submitted.task(rank).paths.stdout)

    def reports(self) -> dict[int, dict[str, Any]]:
        """What each rank has reported; a rank that ended without a report gets the outcome ``died``."""
        reports = read_reports(self._reports)
        over = self._submitted.done()
        late = time.monotonic() - self._began > START_PATIENCE_S
        for rank in range(self.ranks):
            if rank not in reports:
                if over or late:
                    reports[rank] = {"outcome": DIED, "ended": time.time()}
            elif "outcome" not in reports[rank] and not _process_of(reports[rank]).alive():
                again = read_reports(self._reports)[rank]  # it may have written its last word just before it ended
                reports[rank] = again if "outcome" in again else {**again, "outcome": DIED, "ended": time.time()}
        return reports

    def watch(self, stop: StopRequest, tick: Callable[[], None]) -> Outcome:
        """Wait until every rank has ended; pass stops on; no rank outlives a failed one by much."""
        stop_since = failed_since = None
        signalled: dict[int, float] = {}
        while True:
            reports = self.reports()
            ended = {rank: report for rank, report in reports.items() if "outcome" in report}
            if len(ended) == self.ranks:
                break
            now = time.monotonic()
            if stop.count:
                stop_since = stop_since or now
                for rank in reports.keys() - ended.keys():
                    if now - signalled.get(rank, float("-inf")) > REMIND_S:
                        _send(_process_of(reports[rank]), signal.SIGTERM)
                        signalled[rank] = now
                if stop.count > 1 or now - stop_since > STOP_PATIENCE_S:
                    self.kill()
                    break
            if any(report["outcome"] not in (DONE, STOPPED) for report in ended.values()):
                failed_since = failed_since or now
                if now - failed_since > COMPANION_GRACE_S:
                    self.kill()
                    break
            tick()
            time.sleep(POLL_S)
        self._settle()
        tick()
        return self._judge(stop_since is not None)

    def _settle(self) -> None:
        """Wait for the processes to leave, then make sure of it."""
        if not _wait(self._submitted.done, EXIT_PATIENCE_S):
            self.kill()

    def kill(self) -> None:
        """Kill the ranks with all their workers, then the controller that started them."""
        for rank, report in self.reports().items():
            if "outcome" not in report:
                self._killed.add(rank)
            if "pid" in report:
                _send(_process_of(report), signal.SIGKILL, group=True)
        controller = self._submitted._process  # submitit's own cancel() sends SIGINT, which the controller ignores
        controller.terminate()  # it passes SIGTERM on to ranks that have not introduced themselves yet
        _wait(lambda: controller.poll() is not None, 2.0)
        controller.kill()
        controller.wait()

    def _judge(self, stop_requested: bool) -> Outcome:
        """One outcome for the program: the user's own mistake first, else the failure that came first."""
        reports = self.reports()
        peak = max((report.get("peak_rss_gb", 0.0) for report in reports.values()), default=0.0)
        if all(report["outcome"] == DONE for report in reports.values()):
            return Outcome(DONE, peak_rss_gb=peak)
        by_itself = [(rank, report) for rank, report in reports.items() if rank not in self._killed]
        by_itself.sort(key=lambda one: one[1]["ended"])
        if stop_requested:
            order: list[tuple[str, ...]] = [(USER_ERROR,), (STOPPED,), (INTERRUPTED,)]
        else:
            order = [(USER_ERROR,), (CRASHED, DIED), (INTERRUPTED,), (STOPPED,)]
        for kinds in order:
            for rank, report in by_itself:
                if report["outcome"] in kinds:
                    log = self.log_of(rank)
                    message = tail(log) if report["outcome"] == DIED else report.get("message", "")
                    return Outcome(report["outcome"], message, rank, log, peak)
        return Outcome(INTERRUPTED, peak_rss_gb=peak)  # stopped before it could save, or killed as a companion


def submit(module: str, arguments: tuple[str, ...], ranks: int, root: Path, job: JobFolder) -> LocalJob:
    """Start one program on ``ranks`` ranks of this machine, one process each.

    root: the snapshot of the code. job: the folder for its reports, progress and logs.
    """
    reports = job.ranks(HERE)
    for folder in (reports, job.log):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for old in [*reports.glob("rank_*.json"), *reports.glob("error_*.txt")]:
        old.unlink()
    job.forget(job.progress)
    program = RankProgram(
        module=module,
        arguments=arguments,
        root=str(root),
        reports=str(reports),
        ranks=ranks,
        port=free_port(),
        launcher=identify(),
        progress=str(job.progress),
        devices=devices(ranks),
    )
    with _as_if_at(root):
        executor = AutoExecutor(folder=job.log, cluster="local")
        executor.update_parameters(tasks_per_node=ranks, timeout_min=ONE_YEAR_MIN, stderr_to_stdout=True)
        return LocalJob(executor.submit(program), reports, ranks)


@contextmanager
def _as_if_at(root: Path) -> Iterator[None]:
    """submitit's processes inherit cwd, PYTHONPATH and ignored signals from the moment of submission.

    cwd and PYTHONPATH: so that even the job's callable is imported from the snapshot. SIGINT ignored: so that
    a terminal's Ctrl-C does not reach the controller, which would kill the ranks within a second.
    """
    here, path = Path.cwd(), os.environ.get("PYTHONPATH")
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.chdir(root)
    os.environ["PYTHONPATH"] = str(root)
    try:
        yield
    finally:
        os.chdir(here)
        if path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = path
        signal.signal(signal.SIGINT, handler)


def wait_for_orphans(job: JobFolder, say: Callable[[str], None], patience_s: float = 120.0) -> None:
    """Ranks of a killed launcher stop by themselves; wait for them. Raises UserError if they do not."""

    def alive() -> str:
        processes = [_process_of(report) for report in read_reports(job.ranks(HERE)).values()]
        return ", ".join(str(process.pid) for process in processes if process.alive())

    if pids := alive():
        say(f"waiting for ranks of an earlier launch to save and stop (pids {pids})")
        if not _wait(lambda: not alive(), patience_s):
            raise UserError(
                f"{job.folder}: ranks of an earlier launch are still running (pids {alive()}); end them with kill, "
                "then start again"
            )


def read_reports(folder: Path) -> dict[int, dict[str, Any]]:
    reports = (json.loads(path.read_text()) for path in sorted(folder.glob("rank_*.json")))
    return {report["rank"]: report for report in reports}


def tail(log: Path) -> str:
    """The last lines of a log, without submitit's own."""
    if not log.exists():
        return "(it printed nothing)"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([line for line in lines if not line.startswith("submitit ")][-LOG_TAIL_LINES:])


def devices(ranks: int) -> str | None:
    """CUDA_VISIBLE_DEVICES for the ranks: what this process has, or none if that is less than one each."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        count = len([word for word in given.split(",") if word.strip()])
    elif shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
        count = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    else:
        return None
    return given if count >= ranks else ""


def _process_of(report: dict[str, Any]) -> Identity:
    return Identity(report["pid"], report["started"])


def _send(who: Identity, number: int, group: bool = False) -> None:
    if not who.alive():
        return
    try:
        if group and os.getpgid(who.pid) == who.pid:
            os.killpg(who.pid, number)
        else:
            os.kill(who.pid, number)
    except ProcessLookupError:
        return  # it ended between the two lines


def _wait(over: Callable[[], bool], patience_s: float) -> bool:
    """Wait until something is over, at most so long; whether it is."""
    deadline = time.monotonic() + patience_s
    while not over():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S / 2)
    return True
