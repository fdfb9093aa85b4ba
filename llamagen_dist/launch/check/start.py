"""Launch the check on a cluster, or on this machine, wait for it, and read what the ranks have found."""

import shutil
import time
from pathlib import Path

from llamagen_dist.config import ClusterConfig
from llamagen_dist.console import Screen
from llamagen_dist.errors import UserError
from llamagen_dist.files import only_launcher, own_folder
from llamagen_dist.launch import local
from llamagen_dist.launch.check.verdict import Verdict, judge, read_reports
from llamagen_dist.launch.folder import JobFolder, JobSpec, Limits
from llamagen_dist.launch.here import take_code
from llamagen_dist.launch.rank import DONE
from llamagen_dist.launch.slurm import queue
from llamagen_dist.launch.slurm.launch import settled
from llamagen_dist.launch.slurm.submit import Size, Submission, size_of
from llamagen_dist.launch.state import state_of

PROGRAM = "llamagen_dist.preflight"
MINUTES = 10
POLL_S = 3.0


def on_cluster(
    profile: ClusterConfig, out: Path, nodes: int | None, gpus_per_node: int | None, screen: Screen
) -> Verdict:
    """One job of the profile's size (or another), of ten minutes at most; Ctrl-C takes it back.

    Raises UserError; queue.SilentError where SLURM does not answer.
    """
    queue.require_slurm()
    size = size_of(profile, nodes, gpus_per_node)
    short = {"time": str(MINUTES), "signal_delay_s": 60, "requeue": False}
    if profile.time_minutes > MINUTES:
        profile = profile.model_copy(update=short)
    own_folder(out)
    state = settled({str(out): JobFolder.of(out)}, screen)[str(out)]
    if state.live:
        raise UserError(f"{out}: a check runs there already (job {state.job}); wait for it, or give another --out")
    spec = JobSpec(
        name=f"check-{out.name}",
        module=PROGRAM,
        arguments=(str(out / "reports"),),
        folder=str(out),
        code=str(take_code(out, screen)),
        ranks_per_node=size.ranks_per_node,
        limits=Limits(requeue=False, max_faults=0, signal_delay_s=profile.signal_delay_s),
    )
    _empty(out / "reports")
    (job,) = Submission((spec,), profile, size).submit([state.lock])
    screen.say(
        f"job {job}: {size.ranks} ranks on {size.nodes} node{'s' * (size.nodes > 1)}; logs in {out / 'log' / job}"
    )
    try:
        ended = _wait(out, job, screen)
    except KeyboardInterrupt:
        queue.cancel([job])
        raise
    log = out / "log" / job / f"{job}_0_log.out"
    last = local.tail(log).splitlines()[-1:]
    return _judged(out, size, f"{ended}; the last line of {log}: {last[0] if last else 'it is empty'}" if ended else "")


def on_this_machine(ranks: int, out: Path, screen: Screen) -> Verdict:
    """The same trials on ``ranks`` processes of this machine. Raises UserError."""
    own_folder(out)
    with only_launcher(out / "launch.lock"), local.StopRequest() as stop:
        _empty(out / "reports")
        code = take_code(out, screen)
        devices = local.devices(ranks)
        gpus = len([d for d in (devices or "").split(",") if d])
        running = local.submit(PROGRAM, (str(out / "reports"),), ranks, code, JobFolder.of(out))
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
    folder, said = JobFolder.of(out), ""
    while True:
        state = state_of(folder, queue.my_jobs())
        if state.kind == "finished":
            return ""
        if state.kind == "failed":
            return state.reason
        if not state.live or state.queued is None:
            return f"job {job} is over without a result (cancelled, or its node was lost)"
        why = f" ({state.queued.reason})" if state.queued.reason not in ("None", "") else ""
        if said != (now := f"job {job} {state.queued.state.lower()}{why}"):
            screen.say(now)
            said = now
        time.sleep(POLL_S)


def _judged(out: Path, size: Size, ended: str) -> Verdict:
    reports = read_reports(out / "reports")
    for left in (out / "reports").glob("trials-*"):
        shutil.rmtree(left, ignore_errors=True)
    return judge(reports, size.nodes, size.ranks_per_node, size.gpus_per_node, ended)
