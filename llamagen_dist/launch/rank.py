"""What submitit runs in each rank: set the rank's environment, then run the program by its module name."""

import json
import os
import runpy
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from llamagen_dist.console import LOG, PROGRESS_FILE
from llamagen_dist.errors import EXIT_INTERRUPTED, EXIT_STOPPED, EXIT_USER_ERROR, Stopped, UserError
from llamagen_dist.process import STOP_SIGNALS, Identity, cores, identify, peak_rss_gb
from llamagen_dist.program import ERROR_FILE

ORPHAN_POLL_S = 0.5
ORPHAN_PATIENCE_S = 300.0  # a rank whose launcher is gone may save for so long, then it is killed
TRACE_LINES = 40

# How a rank can end, as its report says. "died" is written by nobody: the launcher concludes it.
DONE, USER_ERROR, STOPPED, INTERRUPTED, CRASHED = "done", "user_error", "stopped", "interrupted", "crashed"
DIED = "died"


@dataclass(frozen=True)
class RankProgram:
    """One program on ``ranks`` ranks of this machine. submitit pickles it and calls it in every rank.

    It has no ``checkpoint`` method on purpose: submitit must not requeue it; programs resume by themselves.
    """

    module: str
    arguments: tuple[str, ...]
    root: str
    """The code snapshot: cwd, sys.path[0] and PYTHONPATH of the rank."""
    reports: str
    """The folder of the ranks' reports (``JobFolder.ranks``)."""
    ranks: int
    port: int
    launcher: Identity
    progress: str
    devices: str | None
    """CUDA_VISIBLE_DEVICES for the ranks (submitit's local executor clears it); None: leave it unset."""

    def __call__(self) -> dict[str, float]:
        """Run the program. Returns {"seconds", "peak_rss_gb"}, which also go into the rank's report."""
        from submitit import JobEnvironment

        rank = JobEnvironment().global_rank
        # A session of its own: a terminal's Ctrl-C reaches the launcher alone, which passes it on, and
        # killing the rank's process group takes its data workers along.
        if os.getpgid(0) != os.getpid():
            os.setsid()
        for number in STOP_SIGNALS:  # in place of submitit's handlers, which would requeue or ignore
            signal.signal(number, _interrupt)
        report = RankReport(Path(self.reports), rank)
        began = time.time()
        report.write(began=began)
        watch_launcher(self.launcher)
        outcome, message, failure = run_program(self.module, self.arguments, lambda: self._environment(rank, report))
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if not message and report.sentence.exists():
            message = report.sentence.read_text(encoding="utf-8")
        result = {"seconds": time.time() - began, "peak_rss_gb": peak_rss_gb()}
        report.write(began=began, outcome=outcome, message=message, ended=time.time(), **result)
        if failure is not None:
            raise failure
        if outcome != DONE:
            sys.exit({USER_ERROR: EXIT_USER_ERROR, STOPPED: EXIT_STOPPED, INTERRUPTED: EXIT_INTERRUPTED}[outcome])
        return result

    def _environment(self, rank: int, report: "RankReport") -> None:
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(self.ranks),
            LOCAL_RANK=str(rank),
            LOCAL_WORLD_SIZE=str(self.ranks),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(self.port),
        )
        # not the shell's number, which was meant for one process: all ranks share this machine's cores
        # (parallel.threads, a key of the config, still decides where it is set)
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[name] = str(max(1, cores() // self.ranks))
        os.environ[ERROR_FILE] = str(report.sentence)
        os.environ.pop(PROGRESS_FILE, None)
        if rank == 0:
            os.environ[PROGRESS_FILE] = self.progress
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        if self.devices is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.devices
        set_rank_environment(self.root, {})


def set_rank_environment(root: str, environment: dict[str, str]) -> None:
    """Set environment variables and make the code at ``root`` the one that is run and imported."""
    os.environ.update(environment, PYTHONPATH=root)
    os.chdir(root)
    sys.path[:] = [root, *(p for p in sys.path if p not in ("", root))]


class RankReport:
    """``rank_K.json``: who the rank is, and in the end how it went. A launcher on this machine polls it, the batch
    script of a cluster's job reads it after srun."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.path, self.rank = folder / f"rank_{rank}.json", rank
        self.sentence = folder / f"error_{rank}.txt"

    def write(self, **facts: Any) -> None:
        me = identify()
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text(json.dumps({"rank": self.rank, "pid": me.pid, "started": me.started, **facts}))
        scratch.replace(self.path)


def run_program(
    module: str, arguments: tuple[str, ...], prepare: Callable[[], None]
) -> tuple[str, str, BaseException | None]:
    """Run a module as ``python -m`` would. Returns (outcome, message, the exception of a bug)."""
    try:
        prepare()
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is None or end.code == 0:
            return DONE, "", None
        known = {EXIT_USER_ERROR: USER_ERROR, EXIT_STOPPED: STOPPED, EXIT_INTERRUPTED: INTERRUPTED}
        outcome = known.get(end.code, CRASHED) if isinstance(end.code, int) else CRASHED
        if outcome == CRASHED:
            return outcome, f"the program ended with exit code {end.code}", end
        return outcome, "", None
    except UserError as error:  # a program that does not go through program.run
        return USER_ERROR, str(error), None
    except Stopped as stopped:
        return STOPPED, str(stopped), None
    except KeyboardInterrupt:
        return INTERRUPTED, "", None
    except BaseException as error:
        return CRASHED, program_trace(error), error
    return DONE, "", None


def program_trace(error: BaseException) -> str:
    """The traceback from the program's first line on (without the launcher's and runpy's), its last lines."""
    trace: TracebackType | None = error.__traceback__
    foreign = (__file__, "<frozen runpy>", "runpy.py", "llamagen_dist/program.py")
    while trace is not None and any(part in trace.tb_frame.f_code.co_filename for part in foreign):
        trace = trace.tb_next
    lines = "".join(traceback.format_exception(type(error), error, trace or error.__traceback__)).splitlines()
    if len(lines) > TRACE_LINES:
        lines = ["…", *lines[-TRACE_LINES:]]
    return "\n".join(lines)


def watch_launcher(launcher: Identity) -> None:
    """Stop this rank once its launcher is gone, so that it cannot run on beside a second launch.

    The stop is the same SIGTERM that the launcher would send: a program that trains saves and ends.
    """

    def stop() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def watch() -> None:
        while launcher.alive():
            time.sleep(ORPHAN_POLL_S)
        LOG.error("the launcher is gone: saving and stopping")
        stop()
        time.sleep(ORPHAN_PATIENCE_S)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Before a program has handlers of its own there is nothing to save: end at once."""
    raise KeyboardInterrupt(signal.Signals(number).name)
