"""One program on its own (``llamagen launch``): its run directory holds the snapshot and the logs."""

from pathlib import Path

from llamagen_dist.config import PipelineConfig, Section, StageSection, dump
from llamagen_dist.console import Screen, duration
from llamagen_dist.errors import UserError
from llamagen_dist.files import only_launcher, own_folder, write_text
from llamagen_dist.launch import cluster, snapshot
from llamagen_dist.launch.job import DONE
from llamagen_dist.launch.pipeline import explain_failure, program_exists, take_code
from llamagen_dist.launch.stages import Plan, Stage, absolute


def launch(module: str, config: Section, ranks: int, dry_run: bool) -> None:
    """Run ``module`` on ``ranks`` ranks of this machine and wait for it.

    The folder is the config's run_dir; a program with ``out`` instead gets OUT.launch beside it, since what is
    there belongs to the results alone. Raises as ``pipeline.run`` does.
    """
    program_exists(module, snapshot.code_root())
    config = absolute(config)
    folder = folder_of(config)
    stage = Stage(name=module.rpartition(".")[2], why="", module=module, ranks=ranks, config=config)
    if dry_run:
        from llamagen_dist.launch.listing import show

        section = StageSection(name="program", why="", module=module)
        whole = PipelineConfig(kind="pipeline", title=module, stages=(section,))
        show(Plan(module, folder, whole, (stage,)))
        return
    from llamagen_dist.launch.slurm.run import nothing_runs  # which asks this module where a config's folder is

    screen = Screen()
    own_folder(folder)
    log = folder / "log"
    with only_launcher(folder / "launch.lock"), cluster.StopRequest() as stop:
        nothing_runs([folder])
        cluster.wait_for_orphans(log, screen.say)
        log.mkdir(exist_ok=True)
        write_text(log / "config.yaml", dump(config))
        code = take_code(folder, screen)
        screen.say(f"{module} on {ranks} rank{'s' if ranks > 1 else ''}; logs in {log}")
        progress = log / "progress.json"
        job = cluster.submit(module, (str(log / "config.yaml"),), ranks, code, log, progress)
        with screen.follow(progress) as tick:
            outcome = job.watch(stop, tick)
        if outcome.kind != DONE:
            raise explain_failure(module, outcome, screen)
        screen.say(f"done in {duration(job.seconds())}, peak {outcome.peak_rss_gb:.1f} GB per rank: {folder}")


def folder_of(config: Section) -> Path:
    """Where the launch of a program with this config keeps its files. Raises UserError for kinds that do not run."""
    if isinstance(config, PipelineConfig):
        raise UserError("a pipeline file is run by: llamagen pipeline FILE --out DIR")
    out, run_dir = getattr(config, "out", None), getattr(config, "run_dir", None)
    if out is not None:  # the folder, or the file, belongs to the results alone
        return Path(out).with_name(Path(out).name + ".launch")
    if run_dir is None:
        raise UserError(f"kind {getattr(config, 'kind', '?')}: this is no config of a program that runs")
    return Path(run_dir)
