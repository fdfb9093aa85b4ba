"""Run the stages of a plan one after another; the same command again goes on where it ended.

Everything that is known about a stage lies in OUT/stages/NAME: stage.json (what it was started with),
config.yaml, log/, progress.json while it runs, DONE.json once it has ended well.
"""

import json
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamagen_dist.config import dump, load
from llamagen_dist.console import Screen, duration
from llamagen_dist.errors import EXIT_INTERRUPTED, UserError
from llamagen_dist.files import only_launcher, own_folder, write_text
from llamagen_dist.launch import cluster, snapshot
from llamagen_dist.launch.job import CRASHED, DIED, DONE, INTERRUPTED, STOPPED, USER_ERROR
from llamagen_dist.launch.stages import Plan, Stage


@dataclass(frozen=True)
class Folder:
    """OUT/stages/NAME."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def started(self) -> Path:
        return self.path / "stage.json"

    @property
    def done(self) -> Path:
        return self.path / "DONE.json"

    @property
    def log(self) -> Path:
        return self.path / "log"

    @property
    def progress(self) -> Path:
        return self.path / "progress.json"


def folder_of(out: Path, stage: Stage) -> Folder:
    return Folder(out / "stages" / stage.name)


def is_finished(out: Path, stage: Stage) -> bool:
    """DONE.json for this very config is there, and so is everything the stage promises to produce."""
    done = _read(folder_of(out, stage).done)
    return done is not None and done["config_sha256"] == stage.sha256() and all(p.exists() for p in stage.produces)


def check(plan: Plan) -> None:
    """Refuse, before anything is touched, what cannot go well: raises UserError.

    A folder that holds something else, another pipeline, or stages that were started with another config;
    programs that are not there.
    """
    from llamagen_dist.launch import sweep  # which runs its points as stages

    root = snapshot.code_root()
    for stage in plan.stages:
        program_exists(stage.module, root, f"stage {stage.name}: ")
        if stage.sweep is not None:
            sweep.check(stage.sweep)
    out = plan.out
    if not out.is_dir():
        return
    earlier = out / "config.yaml"
    if not earlier.exists():
        if any(path.name != "lock" for path in out.iterdir()):
            raise UserError(f"{out} is not empty and holds no pipeline; choose another --out")
        return
    title = load(earlier, kind="pipeline").title
    if title != plan.title:
        raise UserError(f"{out} holds another pipeline ({title!r}); choose another --out")
    problems = []
    for stage in plan.stages:
        folder = folder_of(out, stage)
        identity = read_started(folder)
        if identity is None:
            continue
        changed = stage.differs_from(identity, folder.config)
        if changed:
            wrote = "".join(f" and {path}" for path in written_by(stage, out))
            problems.append(
                f"stage {stage.name} was started with another config ({'; '.join(changed)}): choose another "
                f"--out, or delete {folder.path}{wrote}"
            )
    if problems:
        raise UserError("\n".join(problems))


def written_by(stage: Stage, out: Path) -> list[Path]:
    """The files and folders directly under OUT that hold what the stage promises to produce."""
    inside = [path.relative_to(out) for path in stage.produces if path.is_relative_to(out)]
    return sorted({out / path.parts[0] for path in inside})


def program_exists(module: str, root: Path, where: str = "") -> None:
    """Raises UserError unless ``python -m module`` would find a program of ours."""
    file = root.joinpath(*module.split("."))
    if not file.with_suffix(".py").is_file() and not (file / "__main__.py").is_file():
        raise UserError(f"{where}module {module}: there is no such program in {root}")


def run(plan: Plan) -> None:
    """Run every stage that is not finished.

    Raises UserError (a refusal, or a stage's own sentence), SystemExit(1) after showing a bug's traceback and
    SystemExit(130) after a stop, when everything that can be saved is saved.
    """
    from llamagen_dist.launch import sweep  # these two use this module
    from llamagen_dist.launch.slurm.run import nothing_runs

    screen = Screen()
    if plan.out.exists():
        own_folder(plan.out)
    check(plan)
    own_folder(plan.out)
    with only_launcher(plan.out / "lock"), cluster.StopRequest() as stop:
        check(plan)  # again: nobody else can change it now
        points = [point for stage in plan.stages if stage.sweep for point in stage.sweep.points]
        nothing_runs([folder_of(plan.out, stage).path for stage in plan.stages] + [point.folder for point in points])
        for folder in [folder_of(plan.out, stage) for stage in plan.stages] + [sweep.folder_of(p) for p in points]:
            cluster.wait_for_orphans(folder.log, screen.say)
        write_text(plan.out / "config.yaml", dump(plan.config))
        code: Path | None = None
        for number, stage in enumerate(plan.stages, start=1):
            place = f"[{number}/{len(plan.stages)}] {stage.name}"
            if code is None and is_finished(plan.out, stage):
                seconds = (_read(folder_of(plan.out, stage).done) or {})["seconds"]
                screen.say(f"{place} — finished earlier (took {duration(seconds)})")
                continue
            # From the first stage that runs, all run: each finds by itself that there is nothing left to do.
            code = code or take_code(plan.out, screen)
            if stop.count:
                raise stopped(screen, f"stopped before stage {stage.name}")
            ranks = f"{stage.ranks} ranks" if stage.ranks > 1 else "1 rank"
            size = ranks if stage.sweep is None else f"{len(stage.sweep.points)} points"
            screen.say(f"{place} — {stage.why} ({size})")
            (run_stage if stage.sweep is None else sweep.run_stage)(
                stage, folder_of(plan.out, stage), code, screen, stop
            )


def take_code(out: Path, screen: Screen) -> Path:
    """The snapshot the next stages run; says so if earlier stages ran another one."""
    earlier = {p.name for p in (out / "code").glob("[!.]*")}
    code = snapshot.take(snapshot.code_root(), out / "code")
    if earlier and code.name not in earlier:
        screen.say(f"the code has changed since the last launch: stages from now on run {code}")
    return code


def run_stage(stage: Stage, folder: Folder, code: Path, screen: Screen, stop: cluster.StopRequest) -> None:
    """Start one stage, wait for its end, and write DONE.json or say what happened (see ``run``)."""
    outcome = attempt(stage, folder, code, screen, stop)
    if outcome.kind != DONE:
        raise explain_failure(f"stage {stage.name}", outcome, screen)


def attempt(stage: Stage, folder: Folder, code: Path, screen: Screen, stop: cluster.StopRequest) -> cluster.Outcome:
    """Start one stage here and wait for its end; DONE.json is written where that is a good one."""
    arguments, spent = prepare(stage, folder)
    began = time.time()
    launch = cluster.submit(stage.module, arguments, stage.ranks, code, folder.log, folder.progress)
    with screen.follow(folder.progress) as tick:
        outcome = launch.watch(stop, tick)
    spent += time.time() - began
    missing = [path for path in stage.produces if not path.exists()]
    if outcome.kind == DONE and missing:
        message = f"it ended without writing {missing[0]}"
        outcome = cluster.Outcome(CRASHED, message, 0, launch.log_of(0), outcome.peak_rss_gb)
    if outcome.kind != DONE:
        write_text(folder.started, json.dumps({"identity": stage.identity(), "spent_s": spent}, indent=1))
        return outcome
    done = {
        **record_of(stage, code, stage.ranks, began),
        "seconds": round(spent, 2),
        "peak_rss_gb": round(outcome.peak_rss_gb, 3),
    }
    write_text(folder.done, json.dumps(done, indent=1))
    screen.say(f"      done in {duration(time.time() - began)}, peak {outcome.peak_rss_gb:.1f} GB per rank")
    return outcome


def prepare(stage: Stage, folder: Folder) -> tuple[tuple[str, ...], float]:
    """Write down what the stage is started with, and forget an earlier end. Returns the program's arguments and the
    seconds that earlier attempts took."""
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.done.unlink(missing_ok=True)
    arguments = stage.arguments
    if stage.config is not None:
        write_text(folder.config, dump(stage.config))
        arguments = (str(folder.config), *arguments)
    spent = (_read(folder.started) or {}).get("spent_s", 0.0)
    write_text(folder.started, json.dumps({"identity": stage.identity(), "spent_s": spent}, indent=1))
    return arguments, spent


def record_of(stage: Stage, code: Path, ranks: int, began: float | None = None) -> dict[str, Any]:
    """What DONE.json says of a stage besides what it took. began: seconds since 1970, now by default."""
    return {
        "name": stage.name,
        "why": stage.why,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(began)),
        "ranks": ranks,
        "module": stage.module,
        "config_sha256": stage.sha256(),
        "code": code.name,
    }


def explain_failure(what: str, outcome: cluster.Outcome, screen: Screen) -> BaseException:
    """Say on the screen how ``what`` ended; returns the exception that ends the launcher accordingly."""
    if outcome.kind == USER_ERROR:
        return UserError(f"{what}: {outcome.message}")
    if outcome.kind == STOPPED:
        return stopped(screen, f"{what} was stopped, its progress is saved")
    if outcome.kind == INTERRUPTED:
        return stopped(screen, f"{what} was stopped; it goes on from what it last saved")
    how = "died without a word (killed? out of memory?); its last lines" if outcome.kind == DIED else "failed"
    print(
        f"{what}: rank {outcome.rank} {how}:\n\n{outcome.message}\n\nfull log: {outcome.log}",
        file=sys.stderr,
        flush=True,
    )
    return SystemExit(1)


def stopped(screen: Screen, what: str) -> SystemExit:
    """Say how to go on; returns the exception that ends the launcher."""
    screen.say(f"{what}. Go on with:\n  {command()}")
    return SystemExit(EXIT_INTERRUPTED)


def command() -> str:
    """The command that was typed, to be typed again."""
    name = Path(sys.argv[0]).name
    words = ["llamagen"] if name == "llamagen" else [Path(sys.executable).name, "-m", "llamagen_dist.cli"]
    return shlex.join([*words, *sys.argv[1:]])


def read_started(folder: Folder) -> dict[str, Any] | None:
    """The identity (``Stage.identity``) a stage was started with, or None."""
    started = _read(folder.started)
    return None if started is None else dict(started["identity"])


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
