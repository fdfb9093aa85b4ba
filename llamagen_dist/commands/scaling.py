"""``llamagen scaling fit RUNS.csv|LADDER``: a scaling law from measured runs, with what it predicts and how well."""

import argparse
from pathlib import Path
from typing import Any

from llamagen_dist.commands import scaling_plans as plans
from llamagen_dist.console import LOG


def arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    text = "fit a law to runs and predict the one that was held out"
    fit = actions.add_parser("fit", help=text, description=text)
    plans.add_inputs(fit)
    fit.add_argument("--form", default="chinchilla", help="chinchilla, chinchilla_tied, power_irr or power_irr_tokens")
    fit.add_argument("--loss", default="huber", help="of the log residuals: huber or l2 (default: %(default)s)")
    fit.add_argument("--delta", type=float, default=1e-3, help="where huber turns linear (default: %(default)s)")
    fit.add_argument("--hold-out", metavar="RUN", help="fit without it, then predict it: largest, or a run's name")
    fit.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="where to write the result")
    plans.add(actions)


def run(args: argparse.Namespace) -> None:
    if args.action != "fit":
        plans.run(args)
        return
    from llamagen_dist.scaling.study import Options, study

    found = plans.inputs_of(args, args.runs)
    result = study(found.points, Options(args.form, args.loss, args.delta, args.hold_out), found.ladder)
    result["dropped"] = found.dropped_rows()
    result["record"] |= found.record()
    plans.write(args.out, result)
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
