"""``llamagen scaling advise``: from a fitted law and a budget to the model to train, with what is not known of it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llamagen_dist.config import GPTConfigFile
from llamagen_dist.errors import UserError
from llamagen_dist.models.sizes import GPTConfig
from llamagen_dist.planning import layouts
from llamagen_dist.planning.plan import Machine
from llamagen_dist.scaling.basis import Basis
from llamagen_dist.scaling.bootstrap import interval, quantiles
from llamagen_dist.scaling.fid import FidLaw
from llamagen_dist.scaling.fit import Fit, other_forms
from llamagen_dist.scaling.laws import Floats
from llamagen_dist.scaling.shapes import Shapes, family

FLAT = 1e-3
"""Sizes whose predicted loss is within this share of the best are as good as the best."""
FAR = 10.0
"""Beyond this multiple of the largest measured compute a prediction is called an extrapolation."""
WORST_REPEATS = 5.5
"""R_D*, where nobody knows it: the lower end of the 95 % interval on the only public data (182 language models; it has
no upper end). Images with crops and flips may be far better; so the band's other end treats repeats as fresh."""
GLOBAL_BATCH = 256
_ROWS = 8
_APART = 1.12  # rows of the table differ at least by this factor in N
_FORMS = ("chinchilla", "chinchilla_tied")


@dataclass(frozen=True)
class Ask:
    """flops: the budget. target: a loss to reach. unique: images; what is shown beyond them is a repeat.
    repeats: R_D*, how many repeats of the data are worth training on; None: not known."""

    machine: Machine
    flops: float | None = None
    target: float | None = None
    unique: float | None = None
    repeats: float | None = None
    precision: str = "bf16"


def effective(tokens: Floats | float, unique: Floats | float | None, repeats: float) -> Floats:
    """Fresh tokens that are worth as much as ``tokens`` of which only ``unique`` are different ones.

    Muennighoff et al. 2023: U (1 + R* (1 - exp(-R / R*))) for R = D / U - 1 repeats.
    """
    d = np.asarray(tokens, float)
    if unique is None:
        return d
    extra = np.maximum(d / unique - 1, 0)
    worth = repeats * -np.expm1(-extra / repeats) if math.isfinite(repeats) else extra
    return np.minimum(d, unique) + unique * worth


def advise(basis: Basis, ask: Ask, fid: Basis | None = None) -> dict[str, Any]:
    """The answer as JSON-serialisable values. fid: a fit of FID, to show it beside the loss.

    Raises UserError where the law cannot answer: no terms for both size and tokens, a loss that does not fall, a
    target below the floor, nothing that fits; or where ``fid`` is a fit of something else, or of other tokens.
    """
    _answers(basis)
    beside = None if fid is None else FidLaw.of(fid, basis)
    shapes = family(basis.like)
    repeats, by, said = _repeats(basis, ask)
    planner = Planner(basis, shapes, ask, repeats, by == "assumed", beside)
    warnings = [*basis.notes, *basis.fit.warnings, *said]
    if basis.refused:
        warnings.append(f"no bands: {basis.refused}")
    result: dict[str, Any] = {"fit": dict(basis.source), "machine": _machine(ask)}
    if beside is not None:
        result["fid_fit"] = dict(beside.basis.source)
    flops = ask.flops
    if ask.target is not None:
        result["target"] = planner.cheapest(ask.target)
        flops = result["target"]["flops"] if flops is None else flops
    assert flops is not None
    result["budget"] = {"flops": flops, "gpu_hours": planner.hours(flops)}
    result |= planner.table(flops)
    if result["extrapolated"]:
        warnings.append(
            f"{flops:.3g} FLOPs are {flops / basis.largest:.3g} times the most expensive run the law was fitted to: an "
            f"extrapolation; bands are widened to what the forms {', '.join(result['forms'])} say"
        )
    if beside is not None:
        warnings += beside.warnings(result["configs"])
    result["next_runs"] = planner.next_runs(flops)
    result["warnings"] = warnings
    result["record"] = {
        "unique_images": ask.unique,
        "repeats_worth": None if ask.unique is None else repeats,
        "repeats_worth_is": None if ask.unique is None else by,
        "params_fit": basis.count,
        "bands": None if basis.resampled is None else basis.resampled.method,
        "global_batch": GLOBAL_BATCH,
    }
    return result


def _answers(basis: Basis) -> None:
    """Raises UserError unless more parameters and more tokens both help in the fitted law."""
    fit, points = basis.fit, basis.fit.points
    n, d = float(np.exp(np.log(points.params).mean())), float(np.exp(np.log(points.tokens).mean()))
    middle, larger, longer = (float(fit.predict(*at)) for at in ((n, d), (10 * n, d), (n, 10 * d)))
    for name, better in (("parameters", larger), ("tokens", longer)):
        if better >= middle * (1 - 1e-9):
            raise UserError(
                f"{basis.source['path']}: in this {fit.law.name} law more {name} do not lower the loss, so no budget "
                "can be divided by it; fit a form with both, to runs of several sizes and lengths"
            )


def _repeats(basis: Basis, ask: Ask) -> tuple[float, str, list[str]]:
    """R_D*, whether it is ``given``, ``fitted`` or ``assumed``, and what to say of it."""
    fitted = basis.fit.params.get("R_D")
    if ask.repeats is not None:
        return ask.repeats, "given", []
    if fitted is not None and ask.unique is None:
        return fitted, "fitted", ["the law knows what repeats are worth; without --unique-images all tokens are fresh"]
    if fitted is not None:
        within = ""
        if basis.resampled is not None:
            low, high = quantiles(basis.fit.in_units(basis.resampled.theta)["R_D"])
            within = f" ({low:.3g} to {high:.3g})"
        text = f"repeats of the {ask.unique:,.0f} unique images count as the fit found: R_D* = {fitted:.3g}{within}"
        return fitted, "fitted", [text]
    text = (
        f"how much repeated images are worth is not known for images: losses count with R_D* = {WORST_REPEATS:g}, the "
        "low end of what language models showed, and bands reach to repeats as good as fresh ones; --repeats-worth "
        "gives another"
    )
    return WORST_REPEATS, "assumed", [] if ask.unique is None else [text]


def _machine(ask: Ask) -> dict[str, Any]:
    machine = ask.machine
    peak = machine.device.peaks[ask.precision]
    given = "given" if machine.mfu_given else "assumed"
    return {
        "gpu": machine.device.name, "gpus": machine.gpus, "mfu": machine.mfu, "mfu_is": given, "peak_flops": peak
    }  # fmt: skip


@dataclass(frozen=True, eq=False)
class Planner:
    """One law, one family of models, one machine. repeats: R_D*. guessed: it is not known, so that intervals reach
    from it to repeats as good as fresh tokens. fid: what predicts FID beside the loss."""

    basis: Basis
    shapes: Shapes
    ask: Ask
    repeats: float
    guessed: bool
    fid: FidLaw | None = None

    @property
    def unique(self) -> float | None:
        """Unique tokens."""
        return None if self.ask.unique is None else self.ask.unique * self.basis.like.image_tokens

    def asked(self, tokens: Floats) -> tuple[Floats, dict[str, Floats]]:
        """What the law is asked for a run of so many tokens [...]: a data-constrained one for all of them, with those
        that are unique, so that every resample has its own R_D*; others, or with R_D* given, for what they are worth
        in fresh tokens."""
        if "unique" in self.basis.fit.law.columns and self.ask.repeats is None:
            return tokens, {"unique": tokens if self.unique is None else np.full_like(tokens, self.unique)}
        return effective(tokens, self.unique, self.repeats), {}

    def hours(self, flops: float) -> float:
        """GPU-hours at the machine's MFU."""
        machine = self.ask.machine
        return flops / (machine.mfu * machine.device.peaks[self.ask.precision]) / 3600

    def curve(self, theta: Floats, flops: float) -> tuple[Floats, Floats]:
        """Sizes [m] and losses [r, m] along one budget, for parameter sets theta [r, k]."""
        points = self.basis.fit.points
        known = self.shapes.sizes(self.basis.count)
        low, high = max(known.min(), points.params.min() / 1e3), min(known.max(), points.params.max() * 1e5)
        size = np.geomspace(low, high, 500)
        tokens = flops / self.shapes.flops_at(size, self.basis.count)
        asked, also = self.asked(tokens)
        return size, self.basis.fit.predict_with(theta, size, asked, **also)

    def best_sizes(self, theta: Floats, flops: float) -> Floats:
        """log N* for each parameter set, [r]; between the grid's sizes by a parabola."""
        size, losses = self.curve(theta, flops)
        at = np.clip(losses.argmin(axis=1), 1, len(size) - 2)
        rows = np.arange(len(losses))
        left, middle, right = losses[rows, at - 1], losses[rows, at], losses[rows, at + 1]
        bend = left - 2 * middle + right
        shift = np.where(bend > 0, (left - right) / (2 * np.where(bend > 0, bend, 1)), 0)
        return np.log(size[at]) + np.clip(shift, -1, 1) * math.log(size[1] / size[0])

    def table(self, flops: float) -> dict[str, Any]:
        """The ranked configs, the optimum between them, the flat range, and whether this is an extrapolation."""
        size = self.shapes.sizes(self.basis.count)
        tokens = flops / self.shapes.flops
        asked, also = self.asked(tokens)
        losses = self.basis.predict(size, asked, **also)
        order = np.argsort(losses, kind="stable")
        flat = losses <= losses.min() * (1 + FLAT)
        extrapolated = flops > FAR * self.basis.largest
        forms = self._forms() if extrapolated else {}
        rows: list[dict[str, Any]] = []
        too_large: list[int] = []
        shown: list[float] = []
        for i in order:
            near = any(1 / _APART < size[i] / other < _APART for other in shown)
            if len(rows) == _ROWS or near:
                continue
            layout = self._layout(self.shapes.configs[i])
            shown.append(size[i])
            if layout is None:
                too_large.append(int(i))
                continue
            rows.append(self._row(i, flops, tokens[i], float(losses[i]), layout, forms))
        if not rows:
            raise UserError(
                f"none of the best sizes fits on {self.ask.machine.gpus} x {self.ask.machine.device.name}; give more "
                "--gpus or another --gpu"
            )
        for rank, row in enumerate(rows, 1):
            row["rank"] = rank
        return {
            "extrapolated": extrapolated,
            "forms": list(forms),
            "configs": rows,
            "does_not_fit": [self._shape(i) for i in too_large],
            "optimum": self._optimum(flops),
            "flat": {
                "within": FLAT,
                "params": [float(self.shapes.params[flat].min()), float(self.shapes.params[flat].max())],
                "tokens": [float(tokens[flat].min()), float(tokens[flat].max())],
            },
        }

    def _shape(self, i: int) -> dict[str, int]:
        config = self.shapes.configs[i]
        return {"n_layer": config.n_layer, "n_head": config.n_head, "dim": config.dim}

    def _row(
        self, i: int, flops: float, tokens: float, loss: float, layout: dict[str, Any], forms: Mapping[str, Fit]
    ) -> dict[str, Any]:
        images = tokens / self.basis.like.image_tokens
        hours = self.hours(flops)
        size = self.shapes.sizes(self.basis.count)[i]
        row: dict[str, Any] = {
            **self._shape(i),
            "params": float(self.shapes.params[i]),
            "params_fit": float(size),
            "tokens": float(tokens),
            "images": float(images),
            "loss": loss,
            "gpu_hours": hours,
            "hours": hours / self.ask.machine.gpus,
            "layout": layout,
        }
        if self.ask.unique is not None:
            row["epochs"] = float(images / self.ask.unique)
        worth = float(effective(tokens, self.unique, self.repeats))
        ends = np.array([tokens if self.guessed else worth, worth])
        losses = self._losses(float(size), float(tokens))
        if losses is not None:
            low, high = quantiles(losses)
            others = [float(other.predict(size, at)) for other in forms.values() for at in ends]
            row["ci95"] = [float(min([low[0], *others])), float(max([high[1], *others]))]
        if self.fid is not None:
            counted = float(self.shapes.sizes(self.fid.basis.count)[i])
            row |= self.fid.beside(counted, ends, flops * ends / tokens, loss, losses, row.get("ci95", ()))
        return row

    def _losses(self, size: float, tokens: float) -> Floats | None:
        """What a new run's loss may be, [r, 2]: with ``guessed`` repeats as good as fresh tokens, and as they count."""
        if self.basis.resampled is None:
            return None
        asked, also = self.asked(np.array([tokens, tokens]))
        if self.guessed:
            asked = np.array([tokens, asked[1]])
        return self.basis.resampled.draws(self.basis.fit, np.array([size, size]), asked, also)

    def _forms(self) -> dict[str, Fit]:
        """Other forms of the same points; without a term for repeats, of what their tokens are worth."""
        points = self.basis.fit.points
        if "unique" in self.basis.fit.law.columns:
            points = replace(points, tokens=effective(points.tokens, points.also["unique"], self.repeats))
        return other_forms(self.basis.fit, _FORMS, points)

    def _optimum(self, flops: float) -> dict[str, Any]:
        """N* between the buildable sizes, D* and D / N, with 95 % intervals over the resamples."""
        fit, resampled = self.basis.fit, self.basis.resampled
        best = float(np.exp(self.best_sizes(fit.theta[None], flops)[0]))
        optimum: dict[str, Any] = {"params_fit": best}
        optimum |= {name: float(value) for name, value in self._with_tokens(np.array(best), flops).items()}
        if resampled is not None:
            ends = [self, replace(self, repeats=math.inf)] if self.guessed else [self]
            parts = [(end, part) for end in ends for part in np.array_split(resampled.theta, 8)]
            sizes = np.exp(np.concatenate([end.best_sizes(part, flops) for end, part in parts]))
            spread = {"params_fit": sizes, **self._with_tokens(sizes, flops)}
            optimum["ci95"] = {name: interval(values) for name, values in spread.items()}
        return optimum

    def _with_tokens(self, size: Floats, flops: float) -> dict[str, Floats]:
        tokens = flops / self.shapes.flops_at(size, self.basis.count)
        return {"tokens": tokens, "tokens_per_param": tokens / size}

    def _layout(self, model: GPTConfig) -> dict[str, Any] | None:
        """The layout nearest to ZeRO-1 in bf16 that fits, as ``llamagen plan`` finds it; None where none does."""
        machine = self.ask.machine
        config = GPTConfigFile.model_validate(
            {
                "kind": "gpt", "run_dir": "runs/advised", "data": {"train": "tokens", "validation": "tokens"},
                "model": {"n_layer": model.n_layer, "n_head": model.n_head, "dim": model.dim},
                "train": {"images": GLOBAL_BATCH, "global_batch": GLOBAL_BATCH},
                "parallel": {"zero": 1}, "compute": {"precision": self.ask.precision},
            }
        )  # fmt: skip
        start, _ = layouts.configured(model, config, machine.gpus)
        change = layouts.smallest_change(model, config, start, machine.gpus, machine.per_node, machine.device.memory)
        if change is None:
            return None
        layout = change.layout
        return {
            "zero": layout.zero,
            "tensor": layout.tensor,
            "data": layout.data,
            "micro_batch": layout.micro,
            "recompute_every": layout.recompute_every,
            "bytes": layouts.total(model, layout),
        }

    def cheapest(self, target: float) -> dict[str, Any]:
        """The fewest FLOPs whose best size reaches the loss ``target``. Raises UserError where none does."""
        fit, resampled = self.basis.fit, self.basis.resampled
        budgets = np.geomspace(self.basis.largest / 1e3, self.basis.largest * 1e8, 221)
        lowest = np.array([self.curve(fit.theta[None], c)[1].min() for c in budgets])
        if lowest.min() > target:
            floor = f"its floor E is {fit.params['E']:.4g}" if "E" in fit.params else "it falls too slowly"
            fewer = "" if self.unique is None else " with so many unique images"
            raise UserError(
                f"--target-loss {target:g}: the law reaches {lowest.min():.4g} at best{fewer} ({floor}); give a higher "
                "loss, or more --unique-images"
            )
        found: dict[str, Any] = {"loss": target, "flops": float(_crossing(budgets, lowest[None], target)[0])}
        found["gpu_hours"] = self.hours(found["flops"])
        if resampled is not None:
            theta = resampled.theta[:500]
            curves = np.stack([self.curve(theta, c)[1].min(axis=1) for c in budgets[::2]], axis=1)
            needed = _crossing(budgets[::2], curves, target)
            low, high = interval(needed)
            found["ci95"] = [low, high if math.isfinite(high) else None]
        return found

    def next_runs(self, flops: float, most: int = 3) -> list[dict[str, Any]]:
        """Of runs no dearer than three times the dearest so far: which narrow N* of this budget most per FLOP.

        A linear (Laplace) estimate: the covariance of theta from the Jacobian of the log losses, one row more for the
        new run. Only runs that narrow by a twentieth count: a run of no cost and no use would come first otherwise.
        """
        fit = self.basis.fit
        points = fit.points
        known = {"unique": points.also["unique"]} if "unique" in fit.law.columns else {}
        j = _slopes(lambda theta: np.log(fit.predict_with(theta, points.params, points.tokens, **known)), fit.theta)
        used = np.abs(j).max(axis=0) > 0
        scale = np.sqrt((j[:, used] ** 2).sum(axis=0))
        spare = max(len(points) - int(used.sum()), 1)
        variance = float((fit.residuals**2).sum() / spare)
        if variance == 0:
            return []
        covariance = variance * np.linalg.pinv((j[:, used] / scale).T @ (j[:, used] / scale), rcond=1e-12)
        g = _slopes(lambda theta: self.best_sizes(theta, flops)[:, None], fit.theta)[0, used] / scale
        before = float(g @ covariance @ g)
        if not before > 0:
            return []
        size, tokens, cost, which = self._affordable()
        also = self.asked(tokens)[1]
        new = _slopes(lambda theta: np.log(fit.predict_with(theta, size, tokens, **also)), fit.theta)[:, used] / scale
        along = new @ covariance
        gain = (along @ g) ** 2 / (variance + (along * new).sum(axis=1))
        narrower = 1 - np.sqrt(np.maximum(1 - gain / before, 0))
        worth = np.where(narrower >= min(0.05, narrower.max()), narrower / cost, 0)
        rows: list[dict[str, Any]] = []
        for i in np.argsort(-worth, kind="stable"):
            shape = self._shape(int(which[i]))
            if worth[i] > 0 and shape not in [{key: row[key] for key in shape} for row in rows] and len(rows) < most:
                images = float(tokens[i] / self.basis.like.image_tokens)
                rows.append(
                    {**shape, "params_fit": float(size[i]), "tokens": float(tokens[i]), "images": images,
                     "flops": float(cost[i]), "narrows_by": float(narrower[i])}
                )  # fmt: skip
        return rows

    def _affordable(self) -> tuple[Floats, Floats, Floats, np.ndarray]:
        """Runs to choose from: (N, tokens, FLOPs, index of the shape) [c]."""
        points, size = self.basis.fit.points, self.shapes.sizes(self.basis.count)
        near = np.flatnonzero((size >= points.params.min() / 2) & (size <= points.params.max() * 4))
        lengths = np.geomspace(points.tokens.min(), points.tokens.max() * 2, 8)
        i, d = np.repeat(near, len(lengths)), np.tile(lengths, len(near))
        cost = d * self.shapes.flops[i]
        keep = cost <= 3 * self.basis.largest
        return size[i][keep], d[keep], cost[keep], i[keep]


def _crossing(budgets: Floats, losses: Floats, target: float) -> Floats:
    """The first budget [r] at which each falling row of losses [r, m] is at ``target``; infinite where none is."""
    below = losses <= target
    at = below.argmax(axis=1)
    rows = np.arange(len(losses))
    before = np.maximum(at - 1, 0)
    y0, y1 = losses[rows, before], losses[rows, at]
    share = np.where(y0 > y1, (y0 - target) / np.where(y0 > y1, y0 - y1, 1), 0)
    between = np.log(budgets[before]) + np.clip(share, 0, 1) * np.log(budgets[at] / budgets[before])
    return np.where(below.any(axis=1), np.exp(between), np.inf)


def _slopes(function: Any, theta: Floats) -> Floats:
    """Central differences of function(theta [r, k]) -> [r, n] at theta [k]: [n, k]."""
    step = 1e-4 * np.maximum(np.abs(theta), 1e-3)
    up, down = theta + np.diag(step), np.maximum(theta - np.diag(step), 0)
    width = np.diag(up - down)
    return ((function(up) - function(down)) / width[:, None]).T
