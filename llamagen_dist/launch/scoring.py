"""What a launcher does for the scores of checkpoints: start ``llamagen evaluate RUN``, and never wait while it trains.

On this machine beside the ranks or after them (here.py); on a cluster the keeper beside the ranks and the batch script
after them (slurm/batch.py), where the command submits jobs and returns.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from llamagen_dist.console import LOG
from llamagen_dist.launch.folder import JobSpec

LOOK_EVERY_S = 2.0
STOP_S = 90.0  # what saving an evaluation's finished part may take
_SECTION = re.compile(r"^evaluation:$", re.MULTILINE)


class Scoring:
    """``llamagen evaluate`` for one launched run (or ladder), at most one process at a time."""

    def __init__(
        self,
        run_dir: Path | None,
        code: Path,
        where: Literal["here", "cluster"],
        beside: bool = True,
        log: Path | None = None,
    ) -> None:
        """run_dir: None does nothing. code: the snapshot that is run. beside: start it while the training runs too.
        log: of what it prints then."""
        self._run_dir, self._code, self._where, self._beside, self._log = run_dir, code, where, beside, log
        self._offered: set[Path] = set()
        self._child: subprocess.Popen[bytes] | None = None
        self._looked = 0.0

    @classmethod
    def on_cluster(cls, spec: JobSpec) -> "Scoring":
        """Of a job, if the config that it was launched with asks for that; reads text, no YAML."""
        try:
            scores = _SECTION.search(spec.job.config.read_text(encoding="utf-8")) is not None
        except OSError:
            scores = False
        return cls(Path(spec.run_dir) if scores and spec.run_dir else None, Path(spec.code), "cluster")

    def look(self) -> None:
        """Start it where a checkpoint is there that it has not seen; returns at once."""
        if not self._beside or time.monotonic() - self._looked < LOOK_EVERY_S:
            return
        self._looked = time.monotonic()
        if self._child is None or self._child.poll() is not None:
            self._start(beside=True)

    def finish(self, stopped: Callable[[], bool], patience_s: float | None = None) -> None:
        """Score all that is left, now that nothing trains; returns early after a stop.

        patience_s: longer it is not waited for; None: as long as it takes.
        """
        deadline = None if patience_s is None else time.monotonic() + patience_s
        if self._child is not None and self._wait(self._child, stopped, deadline):
            return
        self._offered.clear()  # those that were stopped, or came after it had looked
        self._start(beside=False)
        if self._child is not None:
            self._wait(self._child, stopped, deadline)

    def stop(self) -> None:
        """End it: what is finished of an evaluation stays, and the next launch takes it up."""
        if self._child is not None and self._child.poll() is None:
            self._child.terminate()
            try:
                self._child.wait(STOP_S)
            except subprocess.TimeoutExpired:
                os.killpg(self._child.pid, signal.SIGKILL)

    def _wait(self, child: "subprocess.Popen[bytes]", stopped: Callable[[], bool], deadline: float | None) -> bool:
        """Whether it was stopped, or took too long."""
        while child.poll() is None:
            late = deadline is not None and time.monotonic() > deadline
            if stopped() or late:
                why = ", which takes too long" if late else ""
                LOG.warning(f"scoring is stopped{why}; llamagen evaluate {self._run_dir} takes it up")
                self.stop()
                return True
            time.sleep(0.1)
        return False

    def _start(self, beside: bool) -> None:
        if self._run_dir is None:
            return
        patterns = ("checkpoints/step_*/COMPLETE", "*/checkpoints/step_*/COMPLETE")  # a ladder's rungs too
        there = {mark.parent for pattern in patterns for mark in self._run_dir.glob(pattern)}
        if there <= self._offered:
            return
        self._offered |= there
        words = [sys.executable, "-m", "llamagen_dist.cli", "evaluate", str(self._run_dir), "--launcher", self._where]
        environment = {**os.environ, "PYTHONPATH": str(self._code)}
        if beside:
            words = ["nice", "-n", "19", *words]
        if beside and self._where == "here":
            environment["CUDA_VISIBLE_DEVICES"] = ""  # they are the training's
        try:
            with open(self._log or os.devnull, "ab") as log:
                to: dict[str, Any] = {"stdout": log, "stderr": log} if beside and self._log else {}
                self._child = subprocess.Popen(
                    words, cwd=self._code, env=environment, stdin=subprocess.DEVNULL, start_new_session=True, **to
                )
        except OSError as error:  # nothing of this may reach the training
            LOG.warning(f"checkpoints are not scored: {error}; llamagen evaluate {self._run_dir} does it")
