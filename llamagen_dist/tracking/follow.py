"""Sending a run's lines while it trains: a process of its own per tracker, so that nothing it does can reach the run.

It reads the run directory; the training process starts it and at the end says so. A tracker that raises, blocks, or
has no network, takes no step's time and no step's memory: metrics.jsonl is the queue.

    python -m llamagen_dist.tracking.follow RUN TRACKER PID STARTED FINISH_S SCRATCH

PID and STARTED name the training process (process.Identity). SCRATCH is this process's folder for temporary files:
trackers leave theirs where a process ends without Python's own exit, as this one does. It removes the folder itself, or
the training process does should this one be killed. A byte on standard input is its last word: "0", the run is
finished; "1", it is not. When it is gone without one, that is the same as "1".
"""

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import llamagen_dist
from llamagen_dist.config.training import TrackingSection
from llamagen_dist.process import STOP_SIGNALS, Identity, identify
from llamagen_dist.program import ERROR_FILE
from llamagen_dist.tracking.sinks import Mirror, open_sink, sending, tracking_of

POLL_S = 1.0
LOCK_PATIENCE_S = 60.0  # for the process of an earlier start that is still sending
# What describes another W&B run than this one, or is for the rank's own process.
_NOT_INHERITED = ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_SWEEP_ID", "WANDB_SERVICE", "WORLD_SIZE", ERROR_FILE)


class Followers:
    """The processes that send one run to its trackers, as the training process sees them."""

    def __init__(self, folder: Path, section: TrackingSection, say: Callable[[str], None]) -> None:
        """say(text): prints a line; called once for a tracker that fails."""
        self._folder, self._finish_s, self._say = folder, section.finish_s, say
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._scratch: list[str] = []
        root = str(Path(llamagen_dist.__file__).parents[1])
        environment = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
        environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        me = identify()
        (folder / "log").mkdir(exist_ok=True)
        for name in section.named():
            try:
                scratch = tempfile.mkdtemp(prefix=f"llamagen-{name}-")
                self._scratch.append(scratch)
                words = (str(folder.absolute()), name, str(me.pid), me.started, str(section.finish_s), scratch)
                with open(self._log(name), "wb") as log:
                    self._running[name] = subprocess.Popen(
                        [sys.executable, "-m", __name__, *words],
                        stdin=subprocess.PIPE,
                        stdout=log,
                        stderr=log,
                        env=environment | {"TMPDIR": scratch},
                        start_new_session=True,  # no signal that is meant for the ranks reaches it
                    )
            except OSError as error:
                self._failed(name, str(error))

    def look(self) -> None:
        """Name trackers that have failed since the last look."""
        for name, process in list(self._running.items()):
            if process.poll() is not None:
                del self._running[name]
                lines = self._log(name).read_text(encoding="utf-8", errors="replace").split("\n")
                self._failed(name, next((line for line in reversed(lines) if line.strip()), "it ended"))

    def close(self, finished: bool, at_once: bool = False) -> None:
        """Wait until all is sent, for ``finish_s`` at most, and end what is still there then.

        at_once: do not wait, and send nothing more: the run has been taken over.
        """
        deadline = time.monotonic() + (0.0 if at_once else self._finish_s)
        for process in self._running.values():
            assert process.stdin is not None
            try:
                process.stdin.write(b"0" if finished else b"1")
                process.stdin.close()
            except OSError:
                pass  # it has failed, which ``look`` says
        for name, process in self._running.items():
            try:
                process.wait(max(deadline - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                if not at_once:
                    self._failed(name, f"it had not sent everything {self._finish_s:g} s after the run's end")
        self._running = {name: process for name, process in self._running.items() if process.returncode > 0}
        self.look()
        for scratch in self._scratch:
            shutil.rmtree(scratch, ignore_errors=True)

    def _failed(self, name: str, why: str) -> None:
        self._say(
            f"{name}: {why}; training is not affected (see {self._log(name)}), and llamagen wandb-sync {self._folder} "
            "sends what is missing"
        )

    def _log(self, name: str) -> Path:
        return self._folder / "log" / f"{name}.log"


class _End:
    """Waits in a thread for the training process's last word; from then on this process may live for ``finish_s``."""

    def __init__(self, trainer: Identity, finish_s: float, scratch: str) -> None:
        self.trainer, self._finish_s, self._scratch = trainer, finish_s, scratch
        self._came = threading.Event()
        self.exit_code = 1
        threading.Thread(target=self._watch, daemon=True).start()

    def within(self, seconds: float) -> bool:
        """Whether it has come, after so long at most."""
        return self._came.wait(seconds)

    def _watch(self) -> None:
        # a data worker that was forked keeps the pipe open after the training process is killed: both are looked at
        while not select.select([0], [], [], POLL_S)[0]:
            if not self.trainer.alive():
                break
        else:
            self.exit_code = 0 if os.read(0, 1) == b"0" else 1
        self._came.set()
        time.sleep(self._finish_s + POLL_S)  # longer than the training process waits, where it is still there
        _leave(1, self._scratch)


def _leave(code: int, scratch: str) -> NoReturn:
    """End without Python's own exit, where W&B would wait for the network as long as that takes."""
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(code)


def follow(folder: Path, name: str, end: _End) -> None:
    """Send what comes until the end. Raises whatever the tracker raises."""
    section = tracking_of(folder)[name]
    sink = open_sink(folder, section, end.trainer.pid)
    mirror = Mirror(folder, sink)
    mirror.open()
    print(sink.where, flush=True)
    while True:
        last = end.within(POLL_S)
        mirror.send()
        if last:
            break
    mirror.close(end.exit_code)


def main(argv: list[str]) -> None:
    folder, name, pid, started, finish_s, scratch = argv
    end = _End(Identity(int(pid), started), float(finish_s), scratch)
    os.nice(10)  # sending may wait, training may not
    for number in STOP_SIGNALS:  # SLURM sends them to every process of a job, and the run still has to be saved
        signal.signal(number, signal.SIG_IGN)
    with sending(Path(folder), name, LOCK_PATIENCE_S):
        follow(Path(folder), name, end)


if __name__ == "__main__":
    code = 0
    try:
        main(sys.argv[1:])
    except BaseException as error:
        # the last line is what the training process repeats
        traceback.print_exc()
        print(" ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    _leave(code, sys.argv[-1])
