"""From folders to rows: what each run in them is doing. SLURM is asked once, whatever the number of runs."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llamagen_dist.errors import UserError
from llamagen_dist.files import json_if_there
from llamagen_dist.launch.folder import JobFolder
from llamagen_dist.launch.slurm import lock
from llamagen_dist.launch.status import files
from llamagen_dist.launch.status.files import Clock, Progress
from llamagen_dist.launch.status.state import (
    FAILED,
    FINISHED,
    RUNNING,
    STOPPED,
    UNKNOWN,
    WAITING,
    Slurm,
    State,
    count_restarts,
    lives,
    of_cluster,
    of_this_machine,
)

DEPTH = 3  # folders below the one that was named, in which runs are looked for
READERS = 16  # a network disk takes a millisecond per file
QUIET_S = 600.0
SWEEP = "sweep"
_MARKS = {"metrics.jsonl", "record.json", "checkpoints", "summary.json", "launch", "launch.lock"}
_INSIDE = {"code", "checkpoints", "log", "launch", "report", "stages", "__pycache__"}


@dataclass(frozen=True)
class Row:
    """One line of the table. ``depth`` 1: a rung of the ladder, or a stage of the pipeline, above it.

    Ages and ``eta_s`` in seconds, counts in images; what is unknown is None. ``eta_s``: of the steps that are left,
    at the speed of the last lines.
    """

    name: str
    folder: Path
    depth: int
    state: State
    progress: Progress
    eta_s: float | None = None
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        said = asdict(self.progress)
        said.pop("finished")
        state = asdict(self.state)
        name = state.pop("name")
        return {
            "name": self.name,
            "folder": str(self.folder),
            "depth": self.depth,
            "state": name,
            **state,
            "restarts": dict(self.state.restarts),
            **said,
            "eta_s": self.eta_s,
            "note": self.note,
        }


@dataclass(frozen=True)
class Survey:
    """``slurm``: why it could not be asked, or empty. ``clock_ahead_s``: how far files are dated in the future."""

    rows: tuple[Row, ...]
    slurm: str
    clock_ahead_s: float

    def as_json(self) -> dict[str, Any]:
        return {
            "runs": [row.as_json() for row in self.rows],
            "slurm": self.slurm or None,
            "clock_ahead_s": round(self.clock_ahead_s, 3),
        }


def look(paths: Iterable[Path]) -> Survey:
    """What goes on in these folders and up to three levels below. Raises UserError for one that is not there."""
    named = list(paths)
    for path in named:
        if not path.is_dir():
            raise UserError(
                f"{path}: there is no such folder; name a run, a sweep or a pipeline's --out, or a folder of them"
            )
    clock, slurm = Clock(), Slurm()
    with ThreadPoolExecutor(READERS) as pool:
        found = [(root, folder) for root in named for folder in _units(root, DEPTH, pool.map)]
        rows = list(pool.map(lambda unit: _rows(_name(*unit), unit[1], slurm, clock), found))
    return Survey(tuple(row for part in rows for row in part), slurm.silent, clock.ahead_s)


def _name(root: Path, folder: Path) -> str:
    inner = folder.relative_to(root)
    return str(inner) if inner.parts else root.resolve().name


def _names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()


def _units(folder: Path, depth: int, each: Callable[..., Iterable[list[Path]]] = map) -> list[Path]:
    """Runs, sweeps and pipelines in ``folder``, itself included; nothing is looked for inside of one.

    each: maps over the folders right below, perhaps side by side."""
    names = _names(folder)
    if names & _MARKS or "stages" in names or ("config.yaml" in names and files.described(folder)[0] == SWEEP):
        return [folder]
    if not depth:
        return []
    below = each(lambda inner: _units(inner, depth - 1), _inner(folder, names))  # a file holds no names
    return [unit for units in below for unit in units]


def _inner(folder: Path, names: set[str]) -> list[Path]:
    """What may be a run in it."""
    return [folder / name for name in sorted(names - _INSIDE) if not name.startswith(".")]


def _rows(name: str, folder: Path, slurm: Slurm, clock: Clock) -> list[Row]:
    names = _names(folder)
    if "stages" in names:
        return _pipeline(name, folder, slurm, clock)
    if not names & _MARKS:
        return _sweep(name, folder, slurm, clock)
    return _run(name, folder, 0, slurm, clock)


def _sweep(name: str, out: Path, slurm: Slurm, clock: Clock) -> list[Row]:
    """A row for the sweep, one for each point that has been launched."""
    points = [unit for inner in _inner(out, _names(out)) for unit in _units(inner, 0)]
    with ThreadPoolExecutor(READERS) as pool:
        parts = list(pool.map(lambda point: _run(point.name, point, 1, slurm, clock), points))
    states = [part[0].state.name for part in parts]
    counts = {one: states.count(one) for one in (FAILED, RUNNING, WAITING, UNKNOWN, STOPPED, FINISHED)}
    whole = next((one for one in (RUNNING, WAITING, UNKNOWN, FAILED, STOPPED) if counts.get(one)), FINISHED)
    said = ", ".join(f"{number} {one}" for one, number in counts.items() if number)
    state = State(whole, f"{len(points)} point{'s' * (len(points) != 1)}: {said}" if points else "no point has begun")
    return [Row(name, out, 0, state, Progress(kind=SWEEP)), *(row for part in parts for row in part)]


def _run(name: str, folder: Path, depth: int, slurm: Slurm, clock: Clock) -> list[Row]:
    return _job(name, JobFolder.of(folder), folder, depth, slurm, clock)


def _job(name: str, job: JobFolder, run: Path, depth: int, slurm: Slurm, clock: Clock) -> list[Row]:
    """A row for a program, one for each rung of its ladder. run: the run directory of one that trains."""
    progress = files.progress(run, clock) if run.is_dir() else Progress()
    rungs = [] if progress.kind else _rungs(run, _names(run))
    parts = [files.progress(rung, clock) for rung in rungs]
    launched = job.path.is_dir() or (job.folder / "launch.lock").exists()
    # of a launched ladder the launcher knows better whether it is done than the rungs that have begun
    finished = progress.finished or (bool(parts) and not launched and all(part.finished for part in parts))
    if not progress.kind and not rungs and (file := job.where(job.progress)) is not None:
        progress = files.counted(file, clock)
    if finished or _done(job):
        restarts = tuple(count_restarts(_events(job)).items())
        state = State(FINISHED, job=_first_job(job), restarts=restarts)
    elif _on_cluster(job):
        state = of_cluster(job, slurm)
    else:
        state = of_this_machine(job, run, False, clock)
    return [_row(name, job.folder, depth, state, progress), *_ladder_rows(rungs, parts, state, depth + 1)]


def _on_cluster(job: JobFolder) -> bool:
    """Whether it was launched there last: an event of this machine's launcher names no job."""
    if not job.lock.exists() and not job.history.exists():
        return False
    last = next((event for event in reversed(_events(job)) if event.get("event") in ("started", "submitted")), None)
    return job.lock.exists() if last is None else bool(last.get("job"))


def _events(job: JobFolder) -> list[dict[str, Any]]:
    try:
        return job.events()
    except OSError:  # somebody else's, or damaged
        return []


def _done(job: JobFolder) -> bool:
    try:
        return job.is_done()
    except OSError:
        return False


def _first_job(job: JobFolder) -> str:
    held = lock.read(job)
    return held.jobs[0] if held is not None and held.jobs else ""


def _rungs(folder: Path, names: set[str]) -> list[Path]:
    """The runs of a ladder: run directories right below."""
    return [
        path for path in _inner(folder, names) if (path / "record.json").exists() and (path / "config.yaml").exists()
    ]


def _ladder_rows(rungs: list[Path], parts: list[Progress], whole: State, depth: int) -> list[Row]:
    """One row per rung; while the ladder runs, the rung that gave the last sign of life is the one that is trained."""
    open_ones = [i for i, part in enumerate(parts) if not part.finished]
    ages = {i: quiet for i in open_ones if (quiet := parts[i].quiet_s) is not None}
    latest = min(ages, key=lambda i: ages[i], default=None)
    rows = []
    for i, (rung, part) in enumerate(zip(rungs, parts, strict=True)):
        if part.finished:
            state = State(FINISHED)
        elif whole.name == RUNNING:
            state = State(RUNNING if i == latest else WAITING, "" if i == latest else "for its turn")
        else:
            state = State(whole.name)
        rows.append(_row(rung.name, rung, depth, state, part))
    return rows


def _pipeline(name: str, out: Path, slurm: Slurm, clock: Clock) -> list[Row]:
    """A row for the pipeline, one for each stage that has begun or is to come."""
    declared = files.stages(out) or dict.fromkeys(sorted(_names(out / "stages")))
    rows = []
    for stage, points in declared.items():
        rows += _stage(stage, out / "stages" / stage, points, slurm, clock)
    stages = [row for row in rows if row.depth == 1]
    now = next((row for row in stages if row.state.name != FINISHED), None)
    done = f"{sum(row.state.name == FINISHED for row in stages)} of {len(stages)} stages are done"
    state = State(FINISHED) if now is None else State(now.state.name, done)
    if state.name == WAITING and not any((row.folder / "launch/lock.json").exists() for row in rows):
        # on this machine the launcher starts one stage after another; lock names it
        state = State(RUNNING, done) if lives(json_if_there(out / "lock") or {}) else State(STOPPED, done)
    return [Row(name, out, 0, state, Progress(kind="pipeline")), *rows]


def _stage(name: str, folder: Path, points: Path | None, slurm: Slurm, clock: Clock) -> list[Row]:
    """points: of a stage that is a sweep, the folder of its points."""
    names = _names(folder)
    done = _done(JobFolder.of(folder))
    if points is not None and points.is_dir():
        whole, *rows = _sweep(name, points, slurm, clock)
        state = State(FINISHED) if done else whole.state
        return [replace(row, depth=row.depth + 1) for row in (replace(whole, state=state), *rows)]
    job = JobFolder.of(folder)
    if not done and not job.path.is_dir() and "log" not in names:
        return [_row(name, folder, 1, State(WAITING, "for the stages before it"), Progress())]
    run = files.trained_in(job.where(job.config) or folder / "config.yaml") or folder
    return _job(name, job, run, 1, slurm, clock)


def _row(name: str, folder: Path, depth: int, state: State, progress: Progress) -> Row:
    eta = None
    if state.name == RUNNING and progress.images_per_s and progress.total and progress.done is not None:
        eta = max(progress.total - progress.done, 0) / progress.images_per_s
    if state.name == FINISHED:
        progress = replace(progress, quiet_s=None)
    quiet = progress.quiet_s
    note = f"no sign of life for {quiet / 60:.0f} min" if state.name == RUNNING and quiet and quiet > QUIET_S else ""
    return Row(name, folder, depth, state, progress, eta, note)
