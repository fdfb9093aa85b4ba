"""``llamagen sweep … --cluster FILE``: the points that are not finished as one job array."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llamagen_dist.config import ClusterConfig
from llamagen_dist.console import Screen
from llamagen_dist.errors import UserError
from llamagen_dist.files import only_launcher, own_folder
from llamagen_dist.launch import pipeline
from llamagen_dist.launch.points import Point, Sweep
from llamagen_dist.launch.slurm import lock, queue
from llamagen_dist.launch.slurm.follow import Part, settled, watch
from llamagen_dist.launch.slurm.records import Work
from llamagen_dist.launch.slurm.run import Found, find, fits
from llamagen_dist.launch.slurm.submission import Size, limits_of, masked, script, size_of, submit
from llamagen_dist.launch.sweep import State, begin, check, conclude, folder_of, state_of

USUAL_ARRAY = 500  # no cluster allows fewer; of larger ones it is asked how many


def size_for(sweep: Sweep, profile: ClusterConfig) -> Size:
    """Of every point's job. Raises UserError for what the partition or a point's batch does not allow."""
    size = size_of(profile, sweep.config.nodes, sweep.config.gpus_per_node)
    most = queue.largest_array() if len(sweep.points) > USUAL_ARRAY else None
    if most is not None and len(sweep.points) > most:
        raise UserError(f"{len(sweep.points):,} points: SLURM takes arrays of up to {most:,} here; make several sweeps")
    for point in sweep.points:
        assert point.stage.config is not None
        try:
            fits(point.stage.config, size.ranks)
        except UserError as error:
            raise UserError(f"point {point.name}: {error}") from None
    return size


def launch(sweep: Sweep, profile: ClusterConfig, *, retry_failed: bool, follow: bool) -> None:
    """Submit what is open; what runs or waits already is left alone, what is finished is skipped.

    Raises UserError; with ``follow`` SystemExit(1) where points have failed in the end.
    """
    screen = Screen()
    queue.need()
    size = size_for(sweep, profile)
    if sweep.out.exists():
        own_folder(sweep.out)
    check(sweep)
    own_folder(sweep.out)
    with only_launcher(sweep.out / "lock"):
        check(sweep)
        begin(sweep)
        failed = _submit(sweep, profile, size, retry_failed, screen)
    if not follow:
        if failed:
            screen.say("To try these again, add --retry-failed")
        screen.say(f"state: llamagen status {sweep.out}")
        return
    parts = [part for part in map(part_of, sweep.points) if part.name not in failed]
    failed |= watch(parts, screen)
    conclude(sweep, list(failed), screen)


def _submit(sweep: Sweep, profile: ClusterConfig, size: Size, retry_failed: bool, screen: Screen) -> dict[str, str]:
    """Returns the points that have failed and are not tried again, with the reason."""
    left = [point for point in sweep.points if state_of(point).kind != "finished"]
    found = settled([part_of(point) for point in left], screen) if left else {}
    states = {point.name: state_with(point, found.get(point.name)) for point in sweep.points}
    again = ("open", "failed") if retry_failed else ("open",)
    chosen = [point for point in sweep.points if states[point.name].kind in again]
    failed = {name: state.reason for name, state in states.items() if state.kind == "failed" and not retry_failed}
    for word in ("finished", "running", "waiting"):
        names = [name for name, state in states.items() if state.kind == word]
        if names:
            screen.say(f"{len(names)} of {len(sweep.points)} points {'are ' if word != 'finished' else ''}{word}")
    for name, reason in failed.items():
        screen.say(f"{name} has failed: {reason}")
    if not chosen:
        return failed
    code = pipeline.take_code(sweep.out, screen)
    for point in chosen:
        pipeline.prepare(point.stage, folder_of(point))
    stale = [found[point.name].held for point in chosen]
    works = [work_of(point, profile, size, code) for point in chosen]
    log = sweep.out / "log"
    try:
        jobs = submit(works, profile, size, at_once=sweep.config.at_once, stale=stale, log=log)
    except lock.TakenError:
        raise UserError(f"{sweep.out}: another launch came between; try again") from None
    job = jobs[0].partition("_")[0]
    beside = f", {sweep.config.at_once} at a time" if sweep.config.at_once else ""
    screen.say(
        f"job {job}: {len(works)} point{'s' * (len(works) > 1)}{beside}, each on {size.ranks} rank"
        f"{'s' * (size.ranks > 1)} of {size.nodes} node{'s' * (size.nodes > 1)}; logs: {log}"
    )
    return failed


def states(sweep: Sweep) -> list[State]:
    """Of every point; from the folders alone where SLURM gives no answer."""
    try:
        jobs = queue.mine() if sweep.out.is_dir() else {}
    except UserError:
        jobs = {}
    return [state_with(point, find(point.folder, jobs)) for point in sweep.points]


def state_with(point: Point, found: Found | None) -> State:
    """What the folder says, and SLURM: also running and waiting."""
    state = state_of(point)
    if state.kind == "finished" or found is None or found.kind not in ("running", "submitting"):
        return state
    running = found.state is not None and found.state.state == "RUNNING"
    return State("running" if running else "waiting", f"job {found.job}")


def part_of(point: Point) -> Part:
    return Part(point.name, point.folder, folder_of(point).done)


def work_of(point: Point, profile: ClusterConfig, size: Size, code: Path, whole: dict[str, Any] | None = None) -> Work:
    """whole: the pipeline's stage that the point is one of (``Work.whole``)."""
    folder = folder_of(point)
    return Work(
        name=point.name,
        module=point.stage.module,
        arguments=(str(folder.config), *point.stage.arguments),
        folder=str(point.folder),
        code=str(code),
        ranks_per_node=size.ranks_per_node,
        limits=limits_of(profile),
        done=str(folder.done),
        record=pipeline.record_of(point.stage, code, size.ranks),
        whole=whole or {},
    )


def text(sweep: Sweep, profile: ClusterConfig, size: Size, known: Sequence[State]) -> str:
    """The sbatch script for the points that are open, as ``launch`` would hand it over; empty where none is."""
    code = sweep.out / "code/SNAPSHOT"
    chosen = [point for point, state in zip(sweep.points, known, strict=True) if state.kind == "open"]
    if not chosen:
        return ""
    works = [work_of(chosen[0], profile, size, code)] * len(chosen)  # the script names the first and says how many
    return masked(script(works, profile, size, at_once=sweep.config.at_once, log=sweep.out / "log"))
