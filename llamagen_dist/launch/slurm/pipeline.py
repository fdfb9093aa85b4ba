"""``llamagen pipeline … --cluster FILE``: one job per stage; each waits in SLURM for the one before it to end well."""

import time
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from llamagen_dist.config import ClusterConfig, dump
from llamagen_dist.console import Screen
from llamagen_dist.errors import UserError
from llamagen_dist.files import only_launcher, own_folder, write_text
from llamagen_dist.launch import pipeline, sweep
from llamagen_dist.launch.slurm import lock, queue
from llamagen_dist.launch.slurm import sweep as array
from llamagen_dist.launch.slurm.follow import GONE, Part, settled, watch
from llamagen_dist.launch.slurm.records import Work, finish_whole
from llamagen_dist.launch.slurm.run import Found, find, fits
from llamagen_dist.launch.slurm.submission import Size, limits_of, masked, script, size_of, submit
from llamagen_dist.launch.stages import Plan, Stage

GOING_PATIENCE_S = 60.0  # for a job that was cancelled


def size_for(stage: Stage, profile: ClusterConfig) -> Size:
    """The stage's own nodes and GPUs; without them one CPU rank for a program of one rank, else the profile's nodes.

    Raises UserError for what the partition or the stage's batch does not allow.
    """
    try:
        if stage.sweep is not None:
            own = stage.sweep.config.model_copy(
                update={key: n for key in ("nodes", "gpus_per_node") if (n := getattr(stage, key)) is not None}
            )
            return array.size_for(replace(stage.sweep, config=own), profile)
        if stage.nodes is None and stage.gpus_per_node is None and stage.ranks == 1:
            return Size(1, 1, 0)
        size = size_of(profile, stage.nodes, stage.gpus_per_node)
        if stage.config is not None:
            fits(stage.config, size.ranks)
    except UserError as error:
        raise UserError(f"stage {stage.name}: {error}") from None
    return size


def launch(plan: Plan, profile: ClusterConfig, *, follow: bool) -> None:
    """Submit every stage that is not finished and not in the queue already; finished ones are skipped.

    Raises UserError; with ``follow`` SystemExit(1) where a stage has failed.
    """
    screen = Screen()
    queue.need()
    sizes = [size_for(stage, profile) for stage in plan.stages]
    if plan.out.exists():
        own_folder(plan.out)
    pipeline.check(plan)
    own_folder(plan.out)
    with only_launcher(plan.out / "lock"):
        pipeline.check(plan)
        write_text(plan.out / "config.yaml", dump(plan.config))
        _submit(plan, profile, sizes, screen)
    if not follow:
        screen.say(f"state: llamagen status {plan.out}")
        return
    ended = watch([part for stage in plan.stages for part in parts_of(plan, stage)], screen)
    if ended:
        name, reason = next(((n, why) for n, why in ended.items() if why != GONE), next(iter(ended.items())))
        screen.say(f"{name} has not ended well: {reason}. Go on with:\n  {pipeline.command()}")
        raise SystemExit(1)
    screen.say(f"all {len(plan.stages)} stages are finished: {plan.out}")


def _submit(plan: Plan, profile: ClusterConfig, sizes: list[Size], screen: Screen) -> None:
    found = settled([part for stage in plan.stages for part in parts_of(plan, stage)], screen)
    code: Path | None = None
    before: list[str] = []  # the jobs of the stage before, where that is not finished
    submitted = False
    for number, (stage, size) in enumerate(zip(plan.stages, sizes, strict=True), start=1):
        place = f"[{number}/{len(plan.stages)}] {stage.name}"
        parts = parts_of(plan, stage)
        live = [str(found[part.name].job) for part in parts if found[part.name].kind == "running"]
        if not before and not live and pipeline.is_finished(plan.out, stage):
            screen.say(f"{place} — finished earlier")
            continue
        if live and submitted:
            # it waits for a job that is gone; or it runs on what the stage before it is about to make anew
            screen.say(f"{place} — job {live[0]} is cancelled: the stage before it runs again")
            found |= _cancelled(stage, live, parts)
            live = []
        todo = [part for part in parts if found[part.name].kind != "running"]
        if stage.sweep is not None:
            todo = [part for part in todo if not part.done.exists()]
        if live:
            running = sum(found[part.name].state.state == "RUNNING" for part in parts if found[part.name].state)  # type: ignore[union-attr]
            screen.say(f"{place} — job {live[0]} is {'running' if running else 'pending'} already")
        if live and not todo:
            before = live
            continue
        code = code or pipeline.take_code(plan.out, screen)
        stale = [found[part.name].held for part in todo]
        try:
            jobs = _submit_stage(plan, stage, profile, size, code, before, todo, stale)
        except lock.TakenError:
            raise UserError(f"{plan.out}: stage {stage.name}: another launch came between; try again") from None
        if jobs:
            job = jobs[0].partition("_")[0]
            waits = f", after job {before[0].partition('_')[0]}" if before else ""
            many = f"{len(jobs)} point{'s' * (len(jobs) > 1)} on " if stage.sweep is not None else ""
            screen.say(f"{place} — job {job}, {many}{_words(size)}{waits}: {stage.why}")
            submitted = True
        before = [*live, *jobs]


def _submit_stage(
    plan: Plan,
    stage: Stage,
    profile: ClusterConfig,
    size: Size,
    code: Path,
    before: list[str],
    todo: list[Part],
    stale: list[lock.Lock | None],
) -> list[str]:
    """Returns the job, or the items of an array; none where all points of a stage turn out to be finished."""
    folder = pipeline.folder_of(plan.out, stage)
    if stage.sweep is None:
        pipeline.prepare(stage, folder)
        return submit([work_of(plan, stage, profile, size, code)], profile, size, after=before, stale=stale)
    own_folder(stage.sweep.out)
    sweep.begin(stage.sweep)
    pipeline.prepare(stage, folder)
    record = pipeline.record_of(stage, code, size.ranks)
    chosen = [point for point in stage.sweep.points if point.folder in {part.folder for part in todo}]
    for point in chosen:
        pipeline.prepare(point.stage, sweep.folder_of(point))
    if not chosen:
        missing = [path for path in stage.produces if not path.exists()]
        if missing:
            raise UserError(f"stage {stage.name}: all its points are finished, but {missing[0]} is not there")
        finish_whole(stage.sweep.out, folder.done, record)
        return []
    whole = {"done": str(folder.done), "record": record}
    works = [array.work_of(point, profile, size, code, whole) for point in chosen]
    beside, log = stage.sweep.config.at_once, stage.sweep.out / "log"
    return submit(works, profile, size, at_once=beside, after=before, stale=stale, log=log)


def _cancelled(stage: Stage, jobs: list[str], parts: list[Part]) -> dict[str, Found]:
    """Cancel the stage's jobs and wait until they are gone."""
    deadline = time.monotonic() + GOING_PATIENCE_S
    queue.cancel(jobs)
    while True:
        states = queue.mine()
        found = {part.name: find(part.folder, states) for part in parts}
        if not any(one.kind == "running" for one in found.values()):
            return found
        if time.monotonic() > deadline:
            raise UserError(f"stage {stage.name}: job {jobs[0]} is still ending; try again later")
        time.sleep(0.5)


def parts_of(plan: Plan, stage: Stage) -> list[Part]:
    """What runs as a job of its own: the stage, or each point of a stage that is a sweep."""
    if stage.sweep is not None:
        return [
            Part(f"{stage.name}/{point.name}", point.folder, sweep.folder_of(point).done)
            for point in stage.sweep.points
        ]
    folder = pipeline.folder_of(plan.out, stage)
    return [Part(stage.name, folder.path, folder.done)]


def work_of(plan: Plan, stage: Stage, profile: ClusterConfig, size: Size, code: Path) -> Work:
    folder = pipeline.folder_of(plan.out, stage)
    run_dir = getattr(stage.config, "run_dir", None)
    return Work(
        name=f"{plan.out.name}-{stage.name}",
        module=stage.module,
        arguments=stage.arguments if stage.config is None else (str(folder.config), *stage.arguments),
        folder=str(folder.path),
        run_dir=None if run_dir is None else str(run_dir),
        code=str(code),
        ranks_per_node=size.ranks_per_node,
        limits=limits_of(profile),
        produces=tuple(map(str, stage.produces)),
        done=str(folder.done),
        record=pipeline.record_of(stage, code, size.ranks),
    )


def show(plan: Plan, profile: ClusterConfig) -> None:
    """What ``launch`` would do: a table, and the sbatch script of the first stage that is left."""
    pipeline.check(plan)
    sizes = [size_for(stage, profile) for stage in plan.stages]
    try:
        jobs = queue.mine() if plan.out.is_dir() else {}
    except UserError:
        jobs = {}
    table = Table(title=f"{plan.title} -> {plan.out}")
    for heading in ("", "stage", "size", "program", "state"):
        table.add_column(heading, overflow="fold")
    first: tuple[Stage, Size] | None = None
    for number, (stage, size) in enumerate(zip(plan.stages, sizes, strict=True), start=1):
        found = [find(part.folder, jobs) for part in parts_of(plan, stage)]
        live = [one for one in found if one.kind == "running"]
        failed = [one.reason for one in found if one.kind == "failed"]
        if live:
            state = f"job {live[0].job} {'and others are' if len(live) > 1 else 'is'} in the queue"
        elif pipeline.is_finished(plan.out, stage):
            state = "finished"
        else:
            state = f"failed: {failed[0]}" if failed else "open"
            first = first or (stage, size)
        many = f"{len(stage.sweep.points)} points on " if stage.sweep is not None else ""
        table.add_row(str(number), stage.name, f"{many}{_words(size)}", stage.module, state)
    screen = Screen()
    screen.console.print(table, soft_wrap=False)
    if first is not None:
        stage, size = first
        screen.say(f"The script of {stage.name} (those of the stages after it wait for the one before them):\n")
        if stage.sweep is not None:
            screen.say(array.text(stage.sweep, profile, size, array.states(stage.sweep)))
        else:
            work = work_of(plan, stage, profile, size, plan.out / "code/SNAPSHOT")
            screen.say(masked(script([work], profile, size)))
    screen.say("Nothing was started.")


def _words(size: Size) -> str:
    ranks = f"{size.ranks} rank{'s' * (size.ranks > 1)}"
    return f"{ranks} on {size.nodes} nodes" if size.nodes > 1 else ranks
