"""Launch the check on a cluster, or on this machine, wait for it, and read what the ranks have found."""

import shutil
import time
from pathlib import Path

from llamagen_dist.config import ClusterConfig
from llamagen_dist.console import Screen
from llamagen_dist.errors import UserError
from llamagen_dist.files import only_launcher, own_folder
from llamagen_dist.launch import cluster
from llamagen_dist.launch.check.verdict import Verdict, judge, read_reports
from llamagen_dist.launch.job import DONE
from llamagen_dist.launch.pipeline import take_code
from llamagen_dist.launch.slurm import queue
from llamagen_dist.launch.slurm.records import Limits, Place, Work
from llamagen_dist.launch.slurm.run import describe, find, settled
from llamagen_dist.launch.slurm.submission import Size, size_of, submit

PROGRAM = "llamagen_dist.preflight"
MINUTES = 10
POLL_S = 1.0


def on_cluster(
    profile: ClusterConfig, out: Path, nodes: int | None, gpus_per_node: int | None, screen: Screen
) -> Verdict:
    """One job of the profile's size (or another), of ten minutes at most; Ctrl-C takes it back.

    Raises UserError; queue.SilentError where SLURM does not answer.
    """
    queue.need()
    size = size_of(profile, nodes, gpus_per_node)
    short = {"time": str(MINUTES), "signal_delay_s": 60, "requeue": False}
    if profile.time_minutes > MINUTES:
        profile = profile.model_copy(update=short)
    own_folder(out)
    found = settled(out, screen)
    if found.kind == "running":
        raise UserError(f"{out}: a check runs there already (job {found.job}); wait for it, or give another --out")
    work = Work(
        name=f"check-{out.name}",
        module=PROGRAM,
        arguments=(str(out / "reports"),),
        folder=str(out),
        code=str(take_code(out, screen)),
        ranks_per_node=size.ranks_per_node,
        limits=Limits(requeue=False, max_faults=0, signal_delay_s=profile.signal_delay_s),
    )
    _empty(out / "reports")
    (job,) = submit([work], profile, size, stale=[found.held])
    screen.say(
        f"job {job}: {size.ranks} ranks on {size.nodes} node{'s' * (size.nodes > 1)}; logs in {out / 'log' / job}"
    )
    try:
        ended = _wait(out, job, screen)
    except KeyboardInterrupt:
        queue.cancel([job])
        raise
    log = out / "log" / job / f"{job}_0_log.out"
    last = cluster.tail(log).splitlines()[-1:]
    return _judged(out, size, f"{ended}; the last line of {log}: {last[0] if last else 'it is empty'}" if ended else "")


def on_this_machine(ranks: int, out: Path, screen: Screen) -> Verdict:
    """The same trials on ``ranks`` processes of this machine. Raises UserError."""
    own_folder(out)
    with only_launcher(out / "launch.lock"), cluster.StopRequest() as stop:
        _empty(out / "reports")
        code, log = take_code(out, screen), out / "log"
        devices = cluster.devices(ranks)
        gpus = len([d for d in (devices or "").split(",") if d])
        running = cluster.submit(PROGRAM, (str(out / "reports"),), ranks, code, log, log / "progress.json")
        outcome = running.watch(stop, lambda: None)
        if stop.count:
            raise KeyboardInterrupt
    last = outcome.message.splitlines()[-1:] or [""]
    ended = "" if outcome.kind == DONE else f"rank {outcome.rank} {outcome.kind}: {last[0]}; its log: {outcome.log}"
    return _judged(out, Size(1, ranks, ranks if gpus >= ranks else 0), ended)


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)


def _wait(out: Path, job: str, screen: Screen) -> str:
    """Until the job has ended; returns how, where that was not well."""
    place, said, asked, seen = Place.of(out), "", 0.0, 0
    since = max((n for n, e in enumerate(place.events()) if e["event"] == "submitted" and e["job"] == job), default=0)
    while True:
        events = place.events()[since + 1 :]
        for event in events[seen:]:
            screen.say(describe(event))
        seen = len(events)
        last = events[-1] if events else {}
        if last.get("event") in ("done", "failed"):
            return "" if last["event"] == "done" else str(last.get("reason", ""))
        if time.monotonic() - asked > (POLL_S * 5 if said else 0):
            asked = time.monotonic()
            found = find(out)
            if found.kind in ("stopped", "free") and len(place.events()[since + 1 :]) == seen:
                return f"job {job} is over without a word (cancelled, or its node was lost)"
            state = found.state
            now = (
                ""
                if state is None
                else f"job {job} {state.state.lower()}"
                + (f" ({state.reason})" if state.reason not in ("None", "") else "")
            )
            if now and now != said:
                screen.say(now)
                said = now
        time.sleep(POLL_S)


def _judged(out: Path, size: Size, ended: str) -> Verdict:
    reports = read_reports(out / "reports")
    for left in (out / "reports").glob("trials-*"):
        shutil.rmtree(left, ignore_errors=True)
    return judge(reports, size.nodes, size.ranks_per_node, size.gpus_per_node, ended)
