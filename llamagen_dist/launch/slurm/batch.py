"""The two ends of a batch script, before srun and after it: claim the folder, then judge how it ended.

    python -m llamagen_dist.launch.slurm.batch begin WORKS PID      (of the script itself)
    python -m llamagen_dist.launch.slurm.batch end WORKS STATUS

The script asks SLURM to requeue where ``end`` exits with ``REQUEUE``, since in a container SLURM's commands may be
missing. Nothing here runs after scancel or when SLURM requeues by itself (preemption, a lost node).
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from llamagen_dist.files import write_text
from llamagen_dist.launch.job import DONE
from llamagen_dist.launch.slurm import elastic, lock
from llamagen_dist.launch.slurm.decide import Verdict, decide
from llamagen_dist.launch.slurm.records import Place, Work, finish_whole, read_json, read_work, steps_of
from llamagen_dist.launch.slurm.task import owner

REQUEUE = 99
NOT_OURS = 3
NAMED_S = 10.0  # how long a launch that lives takes from sbatch to the job's id in the lock


def begin(work: Work) -> int:
    """Become the one incarnation that may write in the folder. Returns the exit code."""
    place, me = Place.of(work.folder), owner(os.environ)
    held, deadline = lock.read(place), time.monotonic() + NAMED_S
    while held is not None and held.token == work.token and not held.jobs and time.monotonic() < deadline:
        time.sleep(0.1)  # "submitted" comes first in the history: what ended is told by what comes last
        held = lock.read(place)
    if held is None or held.token != work.token:
        print(f"{work.folder} belongs to another launch by now; this job ends", file=sys.stderr, flush=True)
        return NOT_OURS
    if not held.jobs and "SLURM_ARRAY_JOB_ID" not in os.environ:  # its launch was killed right after sbatch
        lock.name_jobs(place, work.token, (me.split(".")[0],))
    if not elastic.claim(work, me):
        return NOT_OURS
    job, restart = me.split(".")
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    place.progress.unlink(missing_ok=True)
    place.end.unlink(missing_ok=True)  # written on a lost node, by an incarnation that knew of no restart
    shutil.rmtree(place.notes(me), ignore_errors=True)
    lock.own(place, me, host=platform.node())
    where = os.environ.get("SLURM_JOB_NODELIST", "")
    place.tell("started", job=job, restart=int(restart), steps=steps_of(work), nodes=nodes, where=where)
    return 0


def end(work: Work, rc: int) -> int:
    """Judge srun's status ``rc``, write down what follows. Returns the exit code: REQUEUE, 0 or rc."""
    place, me = Place.of(work.folder), owner(os.environ)
    job, restart = me.split(".")
    facts: dict[str, Any] = {"job": job, "restart": int(restart), "steps": steps_of(work)}
    holder = lock.owner(place)
    if holder != me:
        place.tell("handed_over", to=holder, **facts)
        held = lock.read(place)
        others = {other for other in held.jobs if other != job} if held and held.token == work.token else ()
        return REQUEUE if (holder or "").partition(".")[0] in others else 0  # it may still grow back
    events = place.events()
    since = max((n for n, event in enumerate(events) if event["event"] == "submitted"), default=-1) + 1
    notes = read_notes(place.notes(me))
    verdict = decide(rc, notes, work.limits, events[since:], facts["steps"])
    missing = [path for path in work.produces if not Path(path).exists()]
    if verdict.action == "done" and missing:
        verdict = Verdict("failed", DONE, f"it ended without writing {missing[0]}")
    place.tell("ended", rc=rc, outcome=verdict.outcome, reason=verdict.reason, **facts)
    larger = elastic.makes_room(place, job)
    if verdict.action == "requeue" and not verdict.fault and larger is not None:
        print(f"job {larger} goes on; this one stands by", flush=True)
        place.tell("handed_over", to=larger, **facts)
        return REQUEUE
    if verdict.action == "requeue":
        print(f"requeueing: {verdict.reason}", flush=True)
        place.tell("requeued", why=verdict.reason, fault=verdict.fault, **facts)
        return REQUEUE
    if verdict.action == "failed":
        give_up(place, verdict.reason, facts)
        return rc or 1
    if work.done is not None:
        spent, peak = _cost(events[since:], notes)
        record = {**work.record, "seconds": round(spent, 2), "peak_rss_gb": round(peak, 3)}
        write_text(Path(work.done), json.dumps(record, indent=1))
    if work.whole:
        finish_whole(Path(work.folder).parent, Path(work.whole["done"]), work.whole["record"])
    place.tell("done", **facts)
    elastic.cancel_others(place, job)
    return 0


def refused(work: Work) -> int:
    """SLURM did not take the requeue back: say so, or the run would look as if it went on."""
    job, restart = owner(os.environ).split(".")
    facts = {"job": job, "restart": int(restart), "steps": steps_of(work)}
    give_up(Place.of(work.folder), "scontrol requeue failed; the same command goes on", facts)
    return 1


def give_up(place: Place, reason: str, facts: dict[str, Any]) -> None:
    print(f"failed: {reason}", file=sys.stderr, flush=True)
    write_text(place.end, json.dumps({"outcome": "failed", "reason": reason, "time": time.time(), **facts}, indent=1))
    place.tell("failed", reason=reason, **facts)
    elastic.cancel_others(place, facts["job"])


def read_notes(folder: Path) -> list[dict[str, Any]]:
    """The notes of ranks, each with the sentence that a rank without a last word may have left (its watchdog's)."""
    notes = {note["rank"]: note for path in folder.glob("rank_*.json") if (note := read_json(path)) is not None}
    for path in folder.glob("error_*.txt"):
        rank = int(path.stem.removeprefix("error_"))
        notes.setdefault(rank, {"rank": rank})["sentence"] = path.read_text(encoding="utf-8")
    return [notes[rank] for rank in sorted(notes)]


def _cost(events: list[dict[str, Any]], notes: list[dict[str, Any]]) -> tuple[float, float]:
    """Seconds of all incarnations of this submission, and GB of the largest rank that said so."""
    spent, since = 0.0, None
    for event in [*events, {"event": "ended", "time": time.time()}]:
        if event["event"] == "started":
            since = event["time"]
        elif event["event"] == "ended" and since is not None:
            spent, since = spent + event["time"] - since, None
    return spent, max((note.get("peak_rss_gb", 0.0) for note in notes), default=0.0)


def main(argv: list[str]) -> int:
    what, works, *rest = argv
    index = int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))
    work = read_work(works, index)
    if what == "begin":
        code = begin(work)
        if code == 0:
            keeper = [sys.executable, "-m", "llamagen_dist.launch.slurm.keeper", works, str(index), rest[0]]
            subprocess.Popen(keeper, stdin=subprocess.DEVNULL)
        return code
    return end(work, int(rest[0])) if what == "end" else refused(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
