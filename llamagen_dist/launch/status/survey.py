"""From folders to rows: what each run, sweep and pipeline in them is doing."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llamagen_dist.errors import UserError
from llamagen_dist.files import json_if_there
from llamagen_dist.launch.folder import VARIABLE, JobFolder
from llamagen_dist.launch.status.program import (
    FAILED,
    FINISHED,
    RUNNING,
    STOPPED,
    UNKNOWN,
    WAITING,
    Progress,
    Reader,
    State,
    described,
    is_done,
    lives,
    names_in,
    one_line,
    read_text,
)
from llamagen_dist.tracking import evaluations

DEPTH = 3  # folders below the one that was named, in which runs are looked for
READERS = 16  # a network disk takes a millisecond per file
QUIET_S = 600.0
_RUN_MARKS = {"metrics.jsonl", "record.json", "checkpoints", "summary.json", "launch.lock"}
_LAUNCH_MARKS = {"lock.json", "job.json", "stage.json", "history.jsonl", "DONE.json", "FAILED.json", "END.json"}
_INSIDE = {"code", "checkpoints", "log", "report", "stages", "wandb", "pictures", "__pycache__"}


@dataclass(frozen=True)
class Row:
    """One line of the table. ``depth``: 0, or more for what belongs to the row above it: a stage, a point, a rung."""

    name: str
    folder: Path
    depth: int
    state: State
    progress: Progress
    broken: str = ""
    """Which evaluation of a checkpoint has failed."""

    @property
    def eta_s(self) -> float | None:
        """Seconds for the steps that are left, at the speed of the last lines; None where it is unknown."""
        done, total, rate = self.progress.done, self.progress.total, self.progress.images_per_s
        if self.state.name != RUNNING or not rate or not total or done is None:
            return None
        return max(total - done, 0) / rate

    @property
    def note(self) -> str:
        """What is odd about it."""
        quiet = self.progress.quiet_s or 0.0
        silent = f"no sign of life for {quiet / 60:.0f} min" if self.state.name == RUNNING and quiet > QUIET_S else ""
        return "; ".join(filter(None, (silent, self.broken)))

    def as_json(self) -> dict[str, Any]:
        state, progress = asdict(self.state), asdict(self.progress)
        state["restarts"] = dict(self.state.restarts)
        del progress["finished"]
        if self.state.name == FINISHED:
            progress["quiet_s"] = None
        head = {"name": self.name, "folder": str(self.folder), "depth": self.depth, "state": state.pop("name")}
        return {**head, **state, **progress, "eta_s": self.eta_s, "note": self.note}


class Survey(Reader):
    """The rows of one look at many folders."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Row] = []

    def as_json(self) -> dict[str, Any]:
        rows = [row.as_json() for row in self.rows]
        return {"runs": rows, "slurm": self.slurm or None, "clock_ahead_s": round(self.clock_ahead_s, 3)}

    def read(self, name: str, folder: Path, kind: str) -> list[Row]:
        """The rows of a pipeline, a sweep or a run."""
        if kind == "pipeline":
            return self._pipeline(name, folder)
        return self._sweep(name, folder) if kind == "sweep" else self._program(name, JobFolder.of(folder), folder)

    def _pipeline(self, name: str, out: Path) -> list[Row]:
        """A row for the pipeline, and for each stage that has begun or is to come."""
        declared = stages(out) or dict.fromkeys(sorted(names_in(out / "stages")))
        rows = [row for stage, points in declared.items() for row in self._stage(stage, out / "stages" / stage, points)]
        states = [row.state.name for row in rows if row.depth == 1]
        now = next((state for state in states if state != FINISHED), FINISHED)
        if now == WAITING and not any((row.folder / "launch/lock.json").exists() for row in rows):
            # on this machine the launcher, which lock names, starts one stage after another
            now = RUNNING if lives(json_if_there(out / "lock") or {}) else STOPPED
        reason = "" if now == FINISHED else f"{states.count(FINISHED)} of {len(states)} stages are done"
        return [Row(name, out, 0, State(now, reason), Progress(kind="pipeline")), *rows]

    def _stage(self, name: str, folder: Path, points: Path | None) -> list[Row]:
        """points: of a stage that is a sweep, the folder of its points."""
        job = JobFolder.of(folder)
        if points is not None and points.is_dir():
            whole, *rows = self._sweep(name, points, 1)
            return [replace(whole, state=State(FINISHED)) if is_done(job) else whole, *rows]
        if not names_in(folder) & {"launch", "log", "DONE.json"}:
            return [Row(name, folder, 1, State(WAITING, "for the stages before it"), Progress())]
        run_dir = _yaml(job.where(job.config) or folder / "config.yaml").get("run_dir")
        return self._program(name, job, Path(run_dir) if isinstance(run_dir, str) else folder, 1)

    def _sweep(self, name: str, out: Path, depth: int = 0) -> list[Row]:
        """A row for the sweep, and for each point that has been launched."""
        points = [point for inner in _inner(out, names_in(out)) for point, _ in _units(inner, 0)]
        with ThreadPoolExecutor(READERS) as pool:
            jobs = ((point.name, JobFolder.of(point), point, depth + 1) for point in points)
            parts = list(pool.map(lambda job: self._program(*job), jobs))
        states = Counter(part[0].state.name for part in parts)
        now = next((one for one in (RUNNING, WAITING, UNKNOWN, FAILED, STOPPED) if states[one]), FINISHED)
        order = (FAILED, RUNNING, WAITING, UNKNOWN, STOPPED, FINISHED)
        counts = ", ".join(f"{states[one]} {one}" for one in order if states[one])
        reason = f"{len(points)} point{'s' * (len(points) != 1)}: {counts}" if points else "no point has begun"
        rows = [row for part in parts for row in part]
        return [Row(name, out, depth, State(now, reason), Progress(kind="sweep")), *rows]

    def _program(self, name: str, job: JobFolder, run: Path, depth: int = 0) -> list[Row]:
        """A row for a program, and for each rung of its ladder. run: the run directory of one that trains."""
        progress = self.progress(run)
        rungs = {}
        if not progress.kind:
            inner = [path for path in _inner(run, names_in(run)) if (path / "record.json").exists()]
            rungs = {path: self.progress(path) for path in inner if (path / "config.yaml").exists()}
        if progress.done is None and not rungs and (counts := job.where(job.progress)) is not None:
            counted = json_if_there(counts) or {}
            done, total = (n if isinstance(n := counted.get(key), int) else None for key in ("done", "total"))
            progress = replace(progress, done=done, total=progress.total or total or None, quiet_s=self.age(counts))
        finished = progress.finished or is_done(job)
        if rungs and not (job.path.is_dir() or (job.folder / "launch.lock").exists()):
            # of a launched ladder the launcher knows better whether it is done than the rungs that have begun
            finished = finished or all(rung.finished for rung in rungs.values())
        state = self.state(job, run, finished)
        return [Row(name, job.folder, depth, state, progress, _broken(run)), *_rung_rows(rungs, state, depth + 1)]


def look(paths: Iterable[Path]) -> Survey:
    """What is in these folders and up to three levels below. Raises UserError for one that is not there."""
    roots = list(paths)
    for root in roots:
        if not root.is_dir():
            raise UserError(
                f"{root}: there is no such folder; name a run, a sweep or a pipeline's --out, or a folder of them"
            )
    survey = Survey()

    def rows(root: Path, folder: Path, kind: str) -> list[Row]:
        return survey.read(root.resolve().name if folder == root else str(folder.relative_to(root)), folder, kind)

    with ThreadPoolExecutor(READERS) as pool:
        units = [(root, *unit) for root in roots for unit in _units(root, DEPTH, pool.map)]
        survey.rows = [row for part in pool.map(lambda unit: rows(*unit), units) for row in part]
    return survey


def _kind(folder: Path, names: set[str]) -> str:
    """Whether the folder of these names is a pipeline, a sweep or a run; empty for none of them."""
    if "stages" in names:
        return "pipeline"
    # a folder called launch may also be a run among others: then it holds none of a launcher's files
    if names & _RUN_MARKS or ("launch" in names and names_in(folder / "launch") & _LAUNCH_MARKS):
        return "run"
    return "sweep" if "config.yaml" in names and described(folder)[0] == "sweep" else ""


def _units(folder: Path, depth: int, each: Callable[..., Iterable[Any]] = map) -> list[tuple[Path, str]]:
    """Runs, sweeps and pipelines in ``folder``, itself included, with their kind; none is looked for inside of one.

    each: maps over the folders right below, perhaps side by side."""
    names = names_in(folder)
    if kind := _kind(folder, names):
        return [(folder, kind)]
    below = each(lambda inner: _units(inner, depth - 1), _inner(folder, names)) if depth else ()  # a file has no names
    return [unit for units in below for unit in units]


def _inner(folder: Path, names: set[str]) -> list[Path]:
    """What may be a run in it."""
    return [folder / name for name in sorted(names - _INSIDE) if not name.startswith(".")]


def _rung_rows(rungs: Mapping[Path, Progress], whole: State, depth: int) -> list[Row]:
    """One row per rung; while the ladder runs, the rung that gave the last sign of life is the one that is trained."""
    ages = {rung: part.quiet_s for rung, part in rungs.items() if not part.finished and part.quiet_s is not None}
    trained = min(ages, key=lambda rung: ages[rung], default=None)
    rows = []
    for rung, part in rungs.items():
        state = State(FINISHED if part.finished else whole.name)
        if state.name == RUNNING and rung != trained:
            state = State(WAITING, "for its turn")
        rows.append(Row(rung.name, rung, depth, state, part, _broken(rung)))
    return rows


def _broken(run: Path) -> str:
    """The newest evaluation of a checkpoint that has failed, and how many more; empty where none has."""
    folders = [run / "evaluations" / name for name in sorted(names_in(run / "evaluations"), reverse=True)]
    known = [(folder.name, why) for folder in folders if (why := evaluations.failed(folder)) is not None]
    if not known:
        return ""
    name, (reason, log) = known[0]
    more = f" and {len(known) - 1} more" if len(known) > 1 else ""
    return f"evaluation {name}{more} failed: {one_line(reason)} (log: {log})"


def stages(out: Path) -> dict[str, Path | None]:
    """The stages of a pipeline, in order, as OUT/config.yaml declares them, each with the folder of its points if it is
    a sweep."""
    pipeline = _yaml(out / "config.yaml")
    values = {**(pipeline.get("counts") or {}), **(pipeline.get("variables") or {}), "out": str(out)}

    def filled(text: str) -> Path:
        return Path(VARIABLE.sub(lambda match: str(values.get(match[1], match[0])), text))

    declared = pipeline.get("stages") or []
    return {stage["name"]: filled(stage["out"]) if stage.get("out") is not None else None for stage in declared}


def _yaml(path: Path) -> dict[str, Any]:
    """For the few files of a pipeline: the parser takes some 20 ms for a page."""
    import yaml

    try:
        content = yaml.load(read_text(path), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}
