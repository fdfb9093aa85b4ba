"""``llamagen scaling fit RUNS.csv|LADDER``: a scaling law from measured runs, with what it predicts and how well."""

import argparse
import json
from pathlib import Path
from typing import Any

from llamagen_dist.console import LOG
from llamagen_dist.errors import UserError
from llamagen_dist.files import write_text


def arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    text = "fit a law to runs and predict the one that was held out"
    fit = actions.add_parser("fit", help=text, description=text)
    fit.add_argument(
        "runs", type=Path, metavar="RUNS", help="a CSV with params,tokens,loss[,run], or a folder of finished runs"
    )
    fit.add_argument("--form", default="chinchilla", help="chinchilla, chinchilla_tied, power_irr or power_irr_tokens")
    fit.add_argument("--loss", default="huber", help="of the log residuals: huber or l2 (default: %(default)s)")
    fit.add_argument("--delta", type=float, default=1e-3, help="where huber turns linear (default: %(default)s)")
    fit.add_argument("--hold-out", metavar="RUN", help="fit without it, then predict it: largest, or a run's name")
    fit.add_argument(
        "--params",
        choices=("blocks", "total"),
        default="blocks",
        help="what N counts in a folder of runs: the blocks' matrices, or everything (default: %(default)s)",
    )
    fit.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="where to write the result")


def run(args: argparse.Namespace) -> None:
    from llamagen_dist.scaling.ladder import read_ladder
    from llamagen_dist.scaling.points import read_csv
    from llamagen_dist.scaling.study import Options, study

    ladder = read_ladder(args.runs, args.params) if args.runs.is_dir() else None
    points = ladder.points if ladder else read_csv(args.runs)
    result = study(points, Options(args.form, args.loss, args.delta, args.hold_out), ladder)
    if args.out.is_dir():
        raise UserError(f"--out {args.out} is a folder; name the JSON file to write")
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.out, json.dumps(result, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot be written ({error.strerror})") from None
    _show(result)


def _show(result: dict[str, Any]) -> None:
    values = "  ".join(f"{name} {value:.6g}" for name, value in result["params"].items())
    LOG.info(f"{result['formula']}: {values}")
    for text in result["diagnostics"]["warnings"]:
        LOG.info(f"note: {text}")
    for text in result.get("absent", {}).values():
        LOG.info(f"no interval: {text}")
    for one in result.get("predictions", []):
        band = "{:.4f} to {:.4f}".format(*one["ci95"]) if "ci95" in one else "no band"
        naive = f", {one['naive_from']} had {one['naive']:.4f}" if "naive" in one else ""
        LOG.info(
            f"{one['name']} after {one['tokens']:,.0f} tokens: predicted {one['predicted']:.4f} ({band}), "
            f"measured {one['measured']:.4f}{naive}"
        )
