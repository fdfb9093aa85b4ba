"""``llamagen wandb-sync RUN|SWEEP``: what a tracker lacks of runs that do not train is sent, and nothing twice."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llamagen_dist.console import LOG
from llamagen_dist.errors import UserError

if TYPE_CHECKING:
    from llamagen_dist.config.training import TrackioSection, WandbSection


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="a run, or a sweep, a ladder or a pipeline of runs"
    )
    parser.add_argument(
        "--to", choices=("wandb", "trackio"), default="wandb", help="the tracker (default: %(default)s)"
    )
    parser.add_argument("--project", help="instead of the config's; needed for runs whose config names none")
    parser.add_argument("--entity", help="of W&B, instead of the config's")
    parser.add_argument(
        "--evaluation",
        type=Path,
        metavar="FILE.json",
        help="of eval.evaluate, for W&B's summary; default: evaluation.json of a run or the two folders above it, if a "
        "checkpoint of the run drew its images",
    )
    parser.add_argument("--group", help="instead of the config's (default for several runs: their folder's name)")


def run(args: argparse.Namespace) -> None:
    from llamagen_dist.tracking.sinks import runs_in

    if args.entity and args.to != "wandb":
        raise UserError("--entity is W&B's; leave it out with --to trackio")
    if args.evaluation and args.to != "wandb":
        raise UserError("--evaluation is W&B's, since trackio has no summary; leave it out with --to trackio")
    for folder in args.folders:
        runs = runs_in(folder)
        if args.evaluation and (len(runs) > 1 or len(args.folders) > 1):
            raise UserError("--evaluation is of one run; name that run alone")
        for one in runs:
            LOG.info(f"{one}: {_sync(one, args, None if one == folder else folder.resolve().name)}")


def _sync(folder: Path, args: argparse.Namespace, group: str | None) -> str:
    """Send one run; returns what to say about it. group: of a run that belongs to several."""
    from llamagen_dist.config.training import TrackioSection, WandbSection
    from llamagen_dist.hub.scores import of_run
    from llamagen_dist.tracking.sinks import tracking_of

    section = tracking_of(folder).get(args.to)
    if section is None and not args.project:
        raise UserError(f"{folder}: its config sets no tracking.{args.to}; say where to send it: --project NAME")
    kind = WandbSection if args.to == "wandb" else TrackioSection
    section = section or kind(project=args.project)
    given = {name: value for name in ("project", "entity", "group") if (value := getattr(args, name))}
    section = section.model_copy(update={"group": section.group or group, **given})
    return send(folder, args.to, section, of_run(folder, args.evaluation))


def send(
    folder: Path, name: str, section: "WandbSection | TrackioSection", scores: Mapping[str, float | str] | None = None
) -> str:
    """Send what the tracker ``name`` lacks of a run that does not train; returns what to say about it.

    scores: for the summary. Raises UserError, also where another process sends it or the network fails.
    """
    from llamagen_dist.tracking.sinks import Mirror, open_sink, sending

    with sending(folder, name):
        sink = open_sink(folder, section)
        mirror = Mirror(folder, sink)
        try:
            mirror.open()
            mirror.send(everything=True)
            measured = sink.scores(scores or {})
            mirror.close(0)
        except UserError:
            raise
        except Exception as error:  # whatever a tracker's library makes of its network
            why = " ".join(str(error).split())
            raise UserError(f"{folder}: {name}: {why}; the same command sends the rest") from error
    if not (mirror.rows or mirror.checkpoints or mirror.evaluations or measured):
        return f"nothing new ({sink.where})"
    more = f", {mirror.evaluations:,} evaluations" if mirror.evaluations else ""
    more += f", {measured} scores" if measured else ""
    return f"{mirror.rows:,} steps and {mirror.checkpoints:,} checkpoints{more} sent ({sink.where})"
