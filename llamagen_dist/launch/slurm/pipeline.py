"""``llamagen pipeline … --cluster FILE``: one job per stage; each waits in SLURM for the one before it to end well."""

import time
from pathlib import Path

from rich.table import Table

from llamagen_dist.config import ClusterConfig, UserError, dump
from llamagen_dist.files import write_text
from llamagen_dist.launch import pipeline
from llamagen_dist.launch.process import only_launcher, own_folder
from llamagen_dist.launch.screen import Screen
from llamagen_dist.launch.slurm import lock, queue
from llamagen_dist.launch.slurm.follow import Part, settled, watch
from llamagen_dist.launch.slurm.records import Work
from llamagen_dist.launch.slurm.run import Found, find, fits
from llamagen_dist.launch.slurm.submission import Size, limits_of, masked, script, size_of, submit
from llamagen_dist.launch.stages import Plan, Stage

GOING_PATIENCE_S = 60.0  # for a job that was cancelled


def size_for(stage: Stage, profile: ClusterConfig) -> Size:
    """The stage's own nodes and GPUs; without them one CPU rank for a program of one rank, else the profile's nodes.

    Raises UserError for what the partition or the stage's batch does not allow.
    """
    try:
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
    ended = watch([part_of(plan, stage) for stage in plan.stages], screen)
    if ended:
        name, reason = next(iter(ended.items()))
        screen.say(f"stage {name} has not ended well: {reason}. Go on with:\n  {pipeline.command()}")
        raise SystemExit(1)
    screen.say(f"all {len(plan.stages)} stages are finished: {plan.out}")


def _submit(plan: Plan, profile: ClusterConfig, sizes: list[Size], screen: Screen) -> None:
    found = settled([part_of(plan, stage) for stage in plan.stages], screen)
    code: Path | None = None
    before: str | None = None  # the job of the stage before, where that is not finished
    submitted = False
    for number, (stage, size) in enumerate(zip(plan.stages, sizes, strict=True), start=1):
        place = f"[{number}/{len(plan.stages)}] {stage.name}"
        now = found[stage.name]
        if before is None and now.kind != "running" and pipeline.is_finished(plan.out, stage):
            screen.say(f"{place} — finished earlier")
            continue
        if now.kind == "running":
            assert now.state is not None
            if not submitted:
                screen.say(f"{place} — job {now.job} is {now.state.state.lower()} already")
                before = now.job
                continue
            # it waits for a job that is gone; or it runs on what the stage before it is about to make anew
            screen.say(f"{place} — job {now.job} is cancelled: the stage before it runs again")
            now = _cancelled(plan, stage, now)
        code = code or pipeline.take_code(plan.out, screen)
        pipeline.prepare(stage, pipeline.folder_of(plan.out, stage))
        work = work_of(plan, stage, profile, size, code)
        try:
            (job,) = submit([work], profile, size, after=[before] if before else (), stale=[now.held])
        except lock.TakenError:
            raise UserError(f"{plan.out}: stage {stage.name}: another launch came between; try again") from None
        screen.say(f"{place} — job {job}, {_words(size)}{f', after job {before}' if before else ''}: {stage.why}")
        before, submitted = job, True


def _cancelled(plan: Plan, stage: Stage, now: Found) -> Found:
    """Cancel the stage's job and wait until it is gone."""
    folder = pipeline.folder_of(plan.out, stage).path
    deadline = time.monotonic() + GOING_PATIENCE_S
    queue.cancel([str(now.job)])
    while now.kind == "running":
        if time.monotonic() > deadline:
            raise UserError(f"stage {stage.name}: job {now.job} is still ending; try again later")
        time.sleep(0.5)
        now = find(folder)
    return now


def part_of(plan: Plan, stage: Stage) -> Part:
    folder = pipeline.folder_of(plan.out, stage)
    return Part(stage.name, folder.path, folder.done)


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
        found = find(pipeline.folder_of(plan.out, stage).path, jobs)
        if found.kind == "running" and found.state is not None:
            state = f"job {found.job}, {found.state.state.lower()}"
        elif pipeline.is_finished(plan.out, stage):
            state = "finished"
        else:
            state = f"failed: {found.reason}" if found.kind == "failed" else "open"
            first = first or (stage, size)
        table.add_row(str(number), stage.name, _words(size), stage.module, state)
    screen = Screen()
    screen.console.print(table, soft_wrap=False)
    if first is not None:
        work = work_of(plan, first[0], profile, first[1], plan.out / "code/SNAPSHOT")
        screen.say(f"The script of {first[0].name} (those of the stages after it wait for the one before them):\n")
        screen.say(masked(script([work], profile, first[1])))
    screen.say("Nothing was started.")


def _words(size: Size) -> str:
    ranks = f"{size.ranks} rank{'s' * (size.ranks > 1)}"
    return f"{ranks} on {size.nodes} nodes" if size.nodes > 1 else ranks
