"""Run a sweep's points on this machine, one after another; what its folder holds, wherever it is run.

OUT/config.yaml is the sweep, OUT/NAME a point: the program's own folder, with launch/ in it (stage.json: what it was
started with, config.yaml, DONE.json once it has ended well, END.json once it has failed).
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamagen_dist.config import difference, dump, load
from llamagen_dist.config.resume import ELASTIC
from llamagen_dist.console import Screen
from llamagen_dist.errors import UserError
from llamagen_dist.files import only_launcher, own_folder, write_text
from llamagen_dist.launch import cluster, pipeline, snapshot
from llamagen_dist.launch.job import DIED, DONE, INTERRUPTED, STOPPED
from llamagen_dist.launch.pipeline import Folder, explain_failure, program_exists, take_code
from llamagen_dist.launch.points import Point, Sweep
from llamagen_dist.launch.slurm.records import Place, finish_whole, read_json
from llamagen_dist.launch.stages import Stage

# How a point is executed may change between two commands; what it computes may not. A ladder is part of that.
_MAY_CHANGE = tuple(key for key in ELASTIC if key != "ladder")


def folder_of(point: Point) -> Folder:
    return Folder(Place.of(point.folder).path)


@dataclass(frozen=True)
class State:
    """What became of a point so far: finished, failed (with the reason) or open."""

    kind: str
    reason: str = ""


def state_of(point: Point) -> State:
    """From the point's folder alone; ``check`` has made sure that it is about this config."""
    folder = folder_of(point)
    if folder.done.exists():
        return State("finished")
    end = read_json(Place.of(point.folder).end)
    return State("open") if end is None else State("failed", str(end.get("reason", "")))


def check(sweep: Sweep) -> None:
    """Refuse, before anything is touched, what cannot go well: raises UserError.

    A folder that holds something else, another sweep, or points that were started with another config; a program that
    is not there.
    """
    program_exists(sweep.config.module, snapshot.code_root())
    out = sweep.out
    if not out.is_dir():
        return
    if not (out / "config.yaml").exists():
        if any(path.name != "lock" for path in out.iterdir()):
            raise UserError(f"{out} is not empty and holds no sweep; choose another --out")
        return
    earlier = load(out / "config.yaml", kind="sweep")
    if earlier.module != sweep.config.module:
        raise UserError(f"{out} holds a sweep of {earlier.module}, not of {sweep.config.module}; choose another --out")
    known = {point.name for point in sweep.points}
    others = sorted({path.parents[1].name for path in out.glob("*/launch/stage.json")} - known)
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise UserError(
            f"{out} holds points that this sweep does not have ({others[0]}{more}): it was started with another file; "
            "choose another --out"
        )
    for point in sweep.points:
        started = pipeline.read_started(folder_of(point))
        if started is None:
            continue
        changed = changes(point, started)
        if changed:
            raise UserError(
                f"{out}: point {point.name} was started with another config ({'; '.join(changed)}): choose another "
                f"--out, or delete {point.folder}"
            )


def changes(point: Point, started: dict[str, Any]) -> list[str]:
    """How the point's config differs from the one it was started with, as ``key: old -> new`` lines."""
    assert point.stage.config is not None
    if started["config"] == dump(point.stage.config):
        return []
    return difference(load(folder_of(point).config), point.stage.config, ignore=_MAY_CHANGE)


def begin(sweep: Sweep) -> None:
    """Write OUT/config.yaml; the folder is ours and locked."""
    write_text(sweep.out / "config.yaml", dump(sweep.config))


def run(sweep: Sweep, retry_failed: bool) -> None:
    """Run every point that is not finished, here. A point that fails does not hold up the others.

    Raises UserError (a refusal), SystemExit(1) at the end where points have failed, SystemExit(130) after a stop.
    """
    from llamagen_dist.launch.slurm.run import nothing_runs  # which itself uses the pipeline's module

    screen = Screen()
    if sweep.out.exists():
        own_folder(sweep.out)
    check(sweep)
    own_folder(sweep.out)
    with only_launcher(sweep.out / "lock"), cluster.StopRequest() as stop:
        check(sweep)  # again: nobody else can change it now
        nothing_runs([point.folder for point in sweep.points])
        for point in sweep.points:
            cluster.wait_for_orphans(folder_of(point).log, screen.say)
        begin(sweep)
        code = take_code(sweep.out, screen) if any(state_of(p).kind != "finished" for p in sweep.points) else sweep.out
        failed = run_points(sweep, code, retry_failed, screen, stop)
    conclude(sweep, failed, screen)


def run_points(sweep: Sweep, code: Path, retry_failed: bool, screen: Screen, stop: cluster.StopRequest) -> list[str]:
    """Every point that is open, one after another; returns the names of those that have failed. Raises SystemExit(130)
    after a stop."""
    failed: list[str] = []
    for number, point in enumerate(sweep.points, start=1):
        where, state = f"[{number}/{len(sweep.points)}] {point.name}", state_of(point)
        if state.kind == "finished":
            screen.say(f"{where} — finished earlier")
            continue
        if state.kind == "failed" and not retry_failed:
            screen.say(f"{where} — failed earlier: {state.reason}")
            failed.append(point.name)
            continue
        if stop.count:
            raise pipeline.stopped(screen, f"stopped before point {point.name}")
        screen.say(where)
        outcome = attempt(point, code, screen, stop)
        if outcome.kind in (INTERRUPTED, STOPPED):
            raise explain_failure(f"point {point.name}", outcome, screen)
        if outcome.kind != DONE:
            failed.append(point.name)
    return failed


def run_stage(stage: Stage, folder: Folder, code: Path, screen: Screen, stop: cluster.StopRequest) -> None:
    """A pipeline's stage that is a sweep: its points here, failed ones again. Raises as ``pipeline.run`` does."""
    assert stage.sweep is not None
    own_folder(stage.sweep.out)
    begin(stage.sweep)
    pipeline.prepare(stage, folder)
    failed = run_points(stage.sweep, code, True, screen, stop)
    if failed:
        screen.say(f"stage {stage.name}: {len(failed)} of {len(stage.sweep.points)} points have failed")
        raise SystemExit(1)
    record = pipeline.record_of(stage, code, stage.sweep.config.ranks)
    if not finish_whole(stage.sweep.out, folder.done, record):
        raise UserError(f"stage {stage.name}: a point has lost its DONE.json meanwhile; start again")
    missing = [path for path in stage.produces if not path.exists()]
    if missing:
        folder.done.unlink()
        raise UserError(f"stage {stage.name}: all its points are finished, but {missing[0]} is not there")


def attempt(point: Point, code: Path, screen: Screen, stop: cluster.StopRequest) -> cluster.Outcome:
    """Run one point; where it fails, say so and leave END.json."""
    end = Place.of(point.folder).end
    folder_of(point).path.mkdir(parents=True, exist_ok=True)
    end.unlink(missing_ok=True)
    outcome = pipeline.attempt(point.stage, folder_of(point), code, screen, stop)
    if outcome.kind not in (DONE, INTERRUPTED, STOPPED):
        lines = outcome.message.splitlines() or [""]
        reason = lines[0] if outcome.kind == "user_error" else lines[-1]
        if outcome.kind == DIED:
            reason = f"rank {outcome.rank} died without a word (killed? out of memory?)"
        write_text(end, json.dumps({"reason": reason, "time": round(time.time(), 3)}, indent=1))
        screen.say(f"      failed: {reason} (log: {outcome.log})")
    return outcome


def conclude(sweep: Sweep, failed: list[str], screen: Screen) -> None:
    """The last line. Raises SystemExit(1) where points have failed."""
    if failed:
        few = ", ".join(failed[:5]) + (f" and {len(failed) - 5} more" if len(failed) > 5 else "")
        screen.say(
            f"{len(sweep.points) - len(failed)} of {len(sweep.points)} points are finished; failed: {few}. To try "
            "these again, add --retry-failed"
        )
        raise SystemExit(1)
    screen.say(f"all {len(sweep.points)} points are finished: {sweep.out}")
