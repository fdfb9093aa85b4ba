"""``llamagen scaling fit | compare RUNS.csv|LADDER``: scaling laws from measured runs, and how well they predict."""

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
    _add_loss(fit)
    fit.add_argument("--form", default="chinchilla", help="of the law (default: %(default)s); another word lists them")
    fit.add_argument(
        "--hold-out", metavar="RUN", help="fit without it, then predict it: a run, or largest (of every seed)"
    )
    fit.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="where to write the result")
    text = "compare forms: AIC, AICc, BIC, and errors on the largest runs held out"
    compare = actions.add_parser("compare", help=text, description=text)
    plans.add_inputs(compare)
    _add_loss(compare)
    compare.add_argument("--forms", default="chinchilla,chinchilla_tied,kaplan_nd", metavar="A,B,…", help="%(default)s")
    compare.add_argument("--out", type=Path, metavar="FILE.json", help="where to write the result")
    plans.add(actions)


def _add_loss(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--loss", default="huber", help="of the log residuals: huber, l2, lad or pinball (default: %(default)s)"
    )
    parser.add_argument(
        "--delta", type=_delta, default=1e-3, help="where huber turns linear; auto: by the scatter (default: 1e-3)"
    )
    parser.add_argument("--tau", type=float, default=0.1, help="the quantile of pinball (default: %(default)s)")


def _delta(text: str) -> float | str:
    return text if text == "auto" else float(text)


def run(args: argparse.Namespace) -> None:
    if args.action not in ("fit", "compare"):
        plans.run(args)
        return
    from llamagen_dist.scaling import published
    from llamagen_dist.scaling.compare import compare
    from llamagen_dist.scaling.inputs import Inputs
    from llamagen_dist.scaling.study import Options, study

    own = args.runs == [published.NAME]  # figures that come with this package
    found = Inputs(published.fid(), None, (), (), ()) if own else plans.inputs_of(args, args.runs)
    if args.action == "fit":
        how = Options(args.form, args.loss, args.delta, args.hold_out, args.tau)
        result = study(found.points, how, found.ladder, found.dropped_rows())
        result["record"] |= found.record()
        if own:
            result["diagnostics"]["warnings"].append(published.CAVEAT)
        plans.write(args.out, result)
        _show(result)
    else:
        forms = [form.strip() for form in args.forms.split(",")]
        result = compare(found.points, forms, args.loss, args.delta, args.tau)
        result["dropped"] = found.dropped_rows()
        plans.write(args.out, result)
        _show_comparison(result)


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


def _show_comparison(result: dict[str, Any]) -> None:
    """One row for each form: criteria (less is better), signed and absolute error and coverage for each cut."""
    cuts = [cut["cut"] for cut in result["forms"][0]["held_out"]]
    LOG.info(
        "  ".join(["form".ljust(18), "k", *(f"{n:>9}" for n in ("AIC", "AICc", "BIC")), *(f"{c:>20}" for c in cuts)])
    )
    for row in result["forms"]:
        cells = [row["form"].ljust(18), str(row["k"])]
        cells += [f"{'-' if row[name] is None else format(row[name], '.1f'):>9}" for name in ("aic", "aicc", "bic")]
        for cut in row["held_out"]:
            text = "-"
            if "error" in cut:
                text = f"{100 * cut['error']:+.2f}% {100 * cut['absolute_error']:.2f}%"
                text += f" {cut['coverage']:.0%}" if "coverage" in cut else ""
            cells.append(f"{text:>20}")
        LOG.info("  ".join(cells))
    for form, why in result["refused"].items():
        LOG.info(f"{form}: {why}")
    LOG.info("held out: mean error, mean absolute error, share inside the 95% band")
    LOG.info(result["verdict"])
