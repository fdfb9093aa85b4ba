"""PROGRAM: try out the node this rank runs on, and what the ranks do together; ``llamagen check`` launches it.

    srun … python -m llamagen_dist.preflight FOLDER

FOLDER lies on the disk that all nodes share. Every rank leaves rank_K.json there, written again after each part, so
that a rank which hangs or dies has said how far it came. It never fails by itself: who reads the files judges.
"""

import json
import os
import re
import shutil
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llamagen_dist.errors import UserError
from llamagen_dist.files import write_text
from llamagen_dist.launch.check import node
from llamagen_dist.launch.check.verdict import PARTS, report_of
from llamagen_dist.program import run as run_program

JOIN_S = 90.0
COLLECTIVE_S = 90.0


class Trials:
    """``part(name, attempt)`` keeps what ``attempt()`` returns in this rank's report, or why it failed."""

    def __init__(self, folder: Path) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.local = int(os.environ.get("LOCAL_RANK", "0"))
        self._file = report_of(folder, self.rank)
        on_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.facts: dict[str, Any] = {"rank": self.rank, "local_rank": self.local, "ranks_on_node": on_node}
        self.facts |= {"where": node.name(), "seconds": {}}

    def part(self, name: str, attempt: Callable[[], Any]) -> Any:
        """What attempt() returned, or None where it failed, which ends the trials of this rank."""
        assert name in PARTS
        if "problem" in self.facts:
            return None
        self.facts["doing"] = name  # written first, so that a rank which dies here has said where
        self._write()
        began, result = time.perf_counter(), None
        try:
            result = attempt()
        except Exception as error:
            traceback.print_exc()
            line = re.sub(r"^\[\S+\] ", "", (str(error).splitlines() or [""])[0])  # without gloo's file
            self.facts["problem"] = {"part": name, "error": f"{type(error).__name__}: {line}"[:200]}
        self.facts["seconds"][name] = round(time.perf_counter() - began, 3)
        if isinstance(result, dict):
            self.facts[name] = result
        del self.facts["doing"]
        self._write()
        return result

    def _write(self) -> None:
        write_text(self._file, json.dumps(self.facts, indent=1, allow_nan=False))


def main(argv: list[str]) -> None:
    if len(argv) != 1:
        raise UserError("usage: python -m llamagen_dist.preflight FOLDER (on the disk that all nodes share)")
    folder = Path(argv[0])
    trials = Trials(folder)
    first = trials.local == 0
    scratch = folder / f"trials-{os.environ.get('SLURM_JOB_ID', 'local')}"
    scratch.mkdir(exist_ok=True)
    trials.part("node", lambda: node.facts(folder))
    # these load torch, which may be what is wrong: the report of this node has begun by then
    from llamagen_dist.launch.check import disk, network
    from llamagen_dist.parallel.topology import start

    if first:
        trials.part("disk", lambda: disk.alone(scratch))
    topology = trials.part("join", lambda: start(timeout_s=JOIN_S))
    if topology is None:
        return
    if topology.world > 1:
        topology.set_timeouts(COLLECTIVE_S)
        trials.part("clock", lambda: network.clock(topology))
        trials.part("shared", lambda: disk.together(scratch, trials.rank, first, topology.gather))
        trials.part("all_reduce", lambda: network.all_reduce(topology))

    def train() -> Any:
        from llamagen_dist.launch.check import step

        return step.train(topology, folder)

    trials.part("step", train)
    if trials.rank == 0:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    run_program(main)
