"""``llamagen evaluate RUN``: score the checkpoints of a run that have no scores yet, whether it trains or has ended."""

import argparse
from pathlib import Path

from llamagen_dist.commands import options
from llamagen_dist.commands.wandb_sync import send
from llamagen_dist.config import EvaluationSection, GPTConfigFile, load
from llamagen_dist.config.section import build
from llamagen_dist.config.yaml_text import merge, parse
from llamagen_dist.console import LOG
from llamagen_dist.errors import UserError
from llamagen_dist.launch import evaluations
from llamagen_dist.launch.slurm.launch import Target
from llamagen_dist.tracking import evaluations as scores
from llamagen_dist.tracking.sinks import runs_in, tracking_of


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="RUN", help="a run, or a sweep, a ladder or a pipeline of runs")
    options.add_settings(parser, "keys of the section evaluation, instead of the run's own")
    parser.add_argument("--every", type=int, metavar="IMAGES", help="as every_images=IMAGES; 0: every checkpoint")
    options.add_cluster(parser, "three jobs for each checkpoint")
    parser.add_argument("--retry-failed", action="store_true", help="try evaluations again that have failed")
    parser.add_argument(
        "--launcher",
        choices=("here", "cluster"),
        help="what llamagen launch calls: wait for another evaluation, and on a cluster submit to evaluation.cluster",
    )
    parser.add_argument(
        "--record", action="store_true", help="evaluate nothing; write evaluations.jsonl, and send what trackers lack"
    )
    parser.add_argument("--keep-pictures", action="store_true", help="of --record: do not remove pictures once scored")


def run(args: argparse.Namespace) -> None:
    failures = 0
    for folder in runs_in(args.folder):
        if args.record:
            _record(folder, args.keep_pictures)
            continue
        config = load(folder / "config.yaml")
        if isinstance(config, GPTConfigFile):
            failures += _score(folder, config, args)
        elif folder == args.folder:
            raise UserError(f"{folder}: is a run of kind {config.kind}; checkpoints of a GPT are evaluated")
    if failures:
        raise SystemExit(1)


def _score(folder: Path, config: GPTConfigFile, args: argparse.Namespace) -> int:
    every = {} if args.every is None else {"every_images": args.every}
    own = {} if config.evaluation is None else config.evaluation.model_dump()
    section = build(EvaluationSection, merge(merge(own, parse(args.settings)), every), f"{folder}: evaluation")
    scores.check(config.model_copy(update={"evaluation": section}))
    profile = section.cluster if args.launcher == "cluster" else args.cluster
    if profile is None:
        raise UserError(f"{folder}: evaluation.cluster is empty; name the profile of the jobs that score checkpoints")
    target = None if profile == "local" else Target(load(profile, kind="cluster"))
    how = {"retry_failed": args.retry_failed, "follow": args.follow, "wait": bool(args.launcher)}
    failures = evaluations.score(folder, section, config.train.images, target, **how)
    if not scores.recorded(folder):  # an earlier one was killed between its result and this
        _record(folder, section.keep_pictures)
    return failures


def _record(folder: Path, keep_pictures: bool) -> None:
    """What follows an evaluation: its line, and room on the disk."""
    scores.write_lines(folder)
    for scored in scores.begun(folder):
        if not keep_pictures and (scored / scores.RESULT).exists():
            for file in scored.glob("samples/*.npz"):
                file.unlink()
    for name, section in tracking_of(folder).items():
        try:
            LOG.info(f"{folder}: {send(folder, name, section)}")
        except UserError as error:  # the follower of a run that trains, which sends them itself; or no network
            LOG.info(f"{folder}: not sent by this process: {error}")
