"""The two ends of a batch script, before srun and after it: claim the folder, then judge how it ended.

    python -m llamagen_dist.launch.slurm.batch begin SPECS PID      PID: the script's own
    python -m llamagen_dist.launch.slurm.batch keep SPECS PID       started by begin, beside the ranks (elastic.py)
    python -m llamagen_dist.launch.slurm.batch end SPECS STATUS     STATUS: srun's
    python -m llamagen_dist.launch.slurm.batch refused SPECS        SLURM refused the requeue

The script asks SLURM to requeue where ``end`` exits with ``REQUEUE``, since in a container SLURM's commands may be
missing. ``end`` does not run after scancel or when SLURM requeues by itself (preemption, a lost node).
"""

import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from llamagen_dist.files import json_if_there
from llamagen_dist.launch.folder import JobFolder, JobSpec, finish_whole, read_spec
from llamagen_dist.launch.rank import DONE
from llamagen_dist.launch.scoring import Scoring
from llamagen_dist.launch.slurm import elastic, lock
from llamagen_dist.launch.slurm.task import facts_of, owner
from llamagen_dist.launch.slurm.verdict import Verdict, decide
from llamagen_dist.process import identify

REQUEUE = 99
NOT_OURS = 3
SUBMIT_S = 120.0  # for the evaluations of the last checkpoints


def begin(spec: JobSpec) -> int:
    """Become the one incarnation that may write in the folder. Returns the exit code."""
    folder, me = spec.job, owner(os.environ)
    current = lock.read(folder)  # names this job: it was submitted held, and released after that
    if current is None or current.token != spec.token:
        print(f"{spec.folder} belongs to another launch by now; this job ends", file=sys.stderr, flush=True)
        return NOT_OURS
    if not current.jobs:  # its launch was killed right after sbatch, and somebody has released it by hand
        lock.name_submitted(folder, spec.token, me.partition(".")[0])
    if not elastic.claim(spec, me):
        return NOT_OURS
    folder.progress.unlink(missing_ok=True)
    folder.forget(folder.failed)  # written on a lost node, by an incarnation that knew of no restart
    shutil.rmtree(folder.ranks(me), ignore_errors=True)
    lock.own(folder, me, host=platform.node())
    nodes, where = int(os.environ.get("SLURM_JOB_NUM_NODES", "1")), os.environ.get("SLURM_JOB_NODELIST", "")
    folder.tell("started", **facts_of(spec, me), nodes=nodes, where=where)  # what was waited for has saved meanwhile
    return 0


def end(spec: JobSpec, rc: int) -> int:
    """Judge srun's status ``rc``, write down what follows. Returns the exit code: REQUEUE, 0 or rc."""
    folder, me = spec.job, owner(os.environ)
    facts = facts_of(spec, me)
    job, holder = facts["job"], lock.owner(folder)
    if holder != me:
        folder.tell("handed_over", to=holder, **facts)
        current, new = lock.read(folder), lock.last_job(folder)
        ours = current is not None and current.token == spec.token and new != job and new in current.jobs
        return REQUEUE if ours else 0  # back into the queue, to grow again or to stand by
    Scoring.on_cluster(spec).finish(lambda: False, SUBMIT_S)
    events = folder.events()
    since = max((n for n, event in enumerate(events) if event["event"] == "submitted"), default=-1) + 1
    reports = read_reports(folder.ranks(me))
    verdict = decide(rc, reports, spec.limits, events[since:], facts["steps"])
    missing = [path for path in spec.produces if not Path(path).exists()]
    if verdict.action == "done" and missing:
        verdict = Verdict("failed", DONE, f"it ended without writing {missing[0]}")
    folder.tell("ended", rc=rc, outcome=verdict.outcome, reason=verdict.reason, **facts)
    larger = elastic.makes_room(folder, job)
    if verdict.action == "requeue" and not verdict.fault and larger is not None:
        print(f"job {larger} takes over; this one stands by", flush=True)
        folder.tell("handed_over", to=larger, **facts)
        return REQUEUE
    if verdict.action == "requeue":
        print(f"requeueing: {verdict.reason}", flush=True)
        folder.tell("requeued", why=verdict.reason, fault=verdict.fault, **facts)
        return REQUEUE
    if verdict.action == "failed":
        give_up(folder, verdict.reason, facts)
        return rc or 1
    folder.finish(spec.record, *_cost(events[since:], reports))
    if spec.whole:
        finish_whole(Path(spec.folder).parent, Path(spec.whole["done"]), spec.whole["record"])
    folder.tell("done", **facts)
    elastic.cancel_others(folder, job)
    return 0


def refused(spec: JobSpec) -> int:
    """SLURM did not take the requeue back: say so, or the run would look as if it continued."""
    facts = facts_of(spec, owner(os.environ))
    give_up(spec.job, "scontrol requeue failed; the same command resumes it", facts)
    return 1


def give_up(folder: JobFolder, reason: str, facts: dict[str, Any]) -> None:
    print(f"failed: {reason}", file=sys.stderr, flush=True)
    folder.fail(reason, outcome="failed", **facts)
    folder.tell("failed", reason=reason, **facts)
    elastic.cancel_others(folder, facts["job"])


def read_reports(folder: Path) -> list[dict[str, Any]]:
    """The ranks' reports, each with the sentence that a rank without a report may have left (its watchdog's)."""
    files = map(json_if_there, folder.glob("rank_*.json"))
    reports = {report["rank"]: report for report in files if report is not None}
    for path in folder.glob("error_*.txt"):
        rank = int(path.stem.removeprefix("error_"))
        reports.setdefault(rank, {"rank": rank})["sentence"] = path.read_text(encoding="utf-8")
    return [reports[rank] for rank in sorted(reports)]


def _cost(events: list[dict[str, Any]], reports: list[dict[str, Any]]) -> tuple[float, float]:
    """Seconds of all incarnations of this submission, and GB of the largest rank that said so."""
    spent, since = 0.0, None
    for event in [*events, {"event": "ended", "time": time.time()}]:
        if event["event"] == "started":
            since = event["time"]
        elif event["event"] == "ended" and since is not None:
            spent, since = spent + event["time"] - since, None
    return spent, max((report.get("peak_rss_gb", 0.0) for report in reports), default=0.0)


def main(argv: list[str]) -> int:
    what, specs, *rest = argv
    spec = read_spec(specs, int(os.environ.get("SLURM_ARRAY_TASK_ID", "0")))
    if what == "begin":
        code = begin(spec)
        if code == 0:
            keeper = [sys.executable, "-m", "llamagen_dist.launch.slurm.batch", "keep", specs, rest[0]]
            subprocess.Popen(keeper, stdin=subprocess.DEVNULL)
        return code
    if what == "keep":
        elastic.keep(spec, owner(os.environ), os.environ.get("SLURM_JOB_PARTITION"), identify(int(rest[0])))
        return 0
    return end(spec, int(rest[0])) if what == "end" else refused(spec)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
