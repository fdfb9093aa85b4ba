"""``llamagen report PATH``: one page on a run, sweep, pipeline or evaluation, made from its folder alone."""

import argparse
import json
from pathlib import Path

from llamagen_dist.console import LOG
from llamagen_dist.errors import UserError
from llamagen_dist.files import write_text


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        type=Path,
        metavar="PATH",
        help="a run, a folder of runs (sweep, ladder), the --out of a pipeline or quickstart, a folder of evaluations "
        "or of pictures, the out of eval.search or eval.tokenizers, or one JSON file of these or of llamagen scaling",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the page (default: PATH/report.html)")
    parser.add_argument(
        "--files", type=Path, metavar="DIR", help="also report.md there, with every plot as PNG and SVG beside it"
    )
    parser.add_argument(
        "--interactive", action="store_true", help="plots that can be zoomed; adds five megabytes of script to the page"
    )
    parser.add_argument(
        "--wandb", action="store_true", help="also send it as a W&B Report, to WANDB_PROJECT (needs a key of W&B)"
    )


def run(args: argparse.Namespace) -> None:
    from llamagen_dist.report import files, page
    from llamagen_dist.report.collect import collect
    from llamagen_dist.report.results import results
    from llamagen_dist.report.sections import build

    found = collect(args.folder, _points(args.folder))
    report = build(found)
    folder = args.folder if args.folder.is_dir() else args.folder.parent
    default = "report.html" if args.folder.is_dir() else f"{args.folder.stem}.html"
    written = {args.out or folder / default: page.render(report, args.interactive)}
    if found.kind == "pipeline":
        written[folder / "results.json"] = json.dumps(results(found), indent=1, allow_nan=False) + "\n"
    try:
        for path, text in written.items():
            write_text(path, text)
            LOG.info(path)
    except OSError as error:
        raise UserError(
            f"{error.filename}: cannot be written ({error.strerror}); choose another --out or free the disk"
        ) from None
    if args.files:
        for path in files.write(report, args.files):
            LOG.info(path)
    if args.wandb:
        from llamagen_dist.report.wandb_spec import publish

        LOG.info(publish(report, found))


def _points(folder: Path) -> list[str]:
    """The names of a sweep's points, as the file that its launch left there has them."""
    from llamagen_dist.config import SweepConfig, load
    from llamagen_dist.config.yaml_text import read
    from llamagen_dist.launch.points import combinations, name_points

    file = folder / "config.yaml"
    if not file.is_file() or read(file).get("kind") != "sweep":
        return []
    config: SweepConfig = load(file, kind="sweep")
    return name_points(combinations(config, str(file)), config.name, str(file))
