"""Figure blocks from runs and from a scaling law."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamagen_dist.report import quantities as q
from llamagen_dist.report.blocks import Colour, Figure, Panel, Series
from llamagen_dist.report.collect import Run
from llamagen_dist.report.results import PARITY_STEPS, Parity
from llamagen_dist.scaling.valley import valley

Floats = NDArray[np.float64]
LOSS = "loss (nats per token)"
SETS = {
    "held_out": "real, held out",
    "reconstruction": "real, through tokenizer",
    "model": "samples of the GPT",
    "unigram": "codes by frequency",
    "untrained": "untrained GPT",
}
"""The quickstart's sets of images in words, from the best that can be expected to no learning at all."""
_ERRORS = {"l2": "squared error of pixels in [−1, 1]", "l1": "absolute error of pixels in [−1, 1]"}
_HELD_OUT = {
    "psnr": "held-out PSNR (dB)",
    "lpips": "held-out LPIPS",
    "lpips-hed": "held-out lpips-hed",
    "lpips-custom": "held-out lpips-custom",
    "rfid": "held-out rFID",
}
_MOST_POINTS = 600
_SAME_BUDGET = 1.15  # points this near to a budget's mean FLOPs are of it


@dataclass(frozen=True, eq=False)
class Curve:
    """One run: x and y of its training loss, and of its held-out loss (``marks``), all float64, 1-d."""

    name: str
    x: Floats
    y: Floats
    marks_x: Floats
    marks_y: Floats

    @classmethod
    def of(cls, run: Run, per_image: float = 1.0, key: str = "loss", marks: str = "val_loss") -> "Curve":
        """per_image: what x counts of each image. Points without a number are left out."""
        (x, y), (marks_x, marks_y) = run.points(key), run.points(marks)
        return cls(run.name, x * per_image, y, marks_x * per_image, marks_y)

    @property
    def smooth(self) -> Floats:
        return smooth(self.y, max(3, len(self.y) // 25))

    def series(self, colour: Colour, marks: Colour | None = None) -> Iterator[Series]:
        """As logged (faint), its running mean, and held-out loss (dots).

        marks: the colour of those; None: the run's own, and its name at the right end. With a colour x is linear.
        """
        log, label = marks is None, self.name if marks is None else ""
        yield Series(f"{self.name}, as logged", *thin(self.x, self.y, log), "faint", colour)
        yield Series(self.name, *thin(self.x, self.smooth, log), "line", colour, "" if len(self.marks_x) else label)
        if len(self.marks_x):
            name, own = f"{self.name}, held out", colour if marks is None else marks
            yield Series(name, self.marks_x, self.marks_y, "dots", own, label)


def smooth(y: Floats, window: int) -> Floats:
    """Centred running mean; the window shrinks symmetrically towards both ends. Same length as y."""
    if len(y) == 0 or window < 2:
        return y
    total = np.concatenate([[0.0], np.cumsum(y)])
    at = np.arange(len(y))
    half = np.minimum(np.minimum(at, len(y) - 1 - at), window // 2)
    return (total[at + half + 1] - total[at - half]) / (2 * half + 1)


def thin(x: Floats, y: Floats, log: bool = True) -> tuple[Floats, Floats]:
    """Means of neighbours, so that a long run does not make a large file; evenly spaced on the axis."""
    if len(x) <= _MOST_POINTS:
        return x, y
    spaced = np.geomspace(1, len(x), _MOST_POINTS) if log else np.linspace(1, len(x), _MOST_POINTS)
    edges = np.unique(np.concatenate([[0], spaced.astype(int)]))[:-1]
    sizes = np.diff([*edges, len(x)])
    return np.add.reduceat(x, edges) / sizes, np.add.reduceat(y, edges) / sizes


def share(number: int, of: int) -> float:
    """The colour of a member of an ordered family."""
    return number / (of - 1) if of > 1 else 1.0


def _settled(curves: Sequence[Curve]) -> tuple[float, float] | None:
    """Limits for y that cut off the steep beginning."""
    values = np.concatenate([part for c in curves for part in (c.smooth[len(c.y) // 50 :], c.marks_y)] or [np.empty(0)])
    if not len(values):
        return None
    room = 0.06 * float(np.ptp(values)) or 0.1
    return float(values.min()) - room, float(values.max()) + room


def learning(runs: Sequence[Run], per_image: Mapping[str, float], counted: str) -> Figure:
    """Training and held-out losses of runs from small to large."""
    curves = [Curve.of(run, per_image[run.name]) for run in runs]
    series = [one for n, curve in enumerate(curves) for one in curve.series(share(n, len(curves)))]
    panel = Panel(LOSS, tuple(series), y_range=_settled(curves))
    alt = f"Loss against {counted} seen for " + ", ".join(run.name for run in runs)
    of = ", of the moving average of the weights" if any(run.averaged for run in runs) else ""
    caption = f"Thin: training loss as logged. Thick: its running mean. Dots: held-out loss{of}."
    return Figure((panel,), alt, f"{counted} seen", log_x=True, caption=caption)


def held_out(best_first: Sequence[Run], per_image: Mapping[str, float], x: str, more: str) -> Figure:
    """Held-out loss, or training loss where runs were not validated often; the best is drawn last and strongest."""
    often = any(len(run.validation) > 1 for run in best_first)
    curves = [Curve.of(run, per_image[run.name]) for run in best_first]
    if not often:
        curves = [replace(curve, marks_x=curve.x, marks_y=curve.smooth) for curve in curves]
    series = []
    for number, curve in reversed(list(enumerate(curves))):
        colour = 1 - share(number, len(curves)) if len(curves) > 1 else 1.0
        label = curve.name if len(curves) <= 8 or number < 3 else ""
        points = thin(curve.marks_x, curve.marks_y)
        series.append(Series(curve.name, *points, "dotted line" if len(points[0]) < 40 else "line", colour, label))
    title = "held-out loss" if often else "training loss (running mean)"
    late = [replace(c, y=np.empty(0), marks_y=c.marks_y[len(c.marks_y) // 10 :]) for c in curves]
    alt = f"{title} against {x} of {', '.join(run.name for run in best_first)}"
    return Figure((Panel(title, tuple(series), y_range=_settled(late)),), alt, x, log_x=True, caption=more)


def by_position(loss: Floats, null: Floats, grid: Sequence[int] | None) -> Figure:
    """Held-out loss at each token of the picture, float64 [N] each: with its condition, and without (null)."""
    x = np.arange(len(loss), dtype=np.float64)
    series = (
        Series("without condition", x, null, "thin", "orange", "without condition"),
        Series("held out", x, loss, "line", "blue", "held out"),
    )
    rows = f" ({grid[0]} rows of {grid[1]})" if grid else ""
    alt = f"Held-out loss at each of {len(loss)} token positions, with and without the condition"
    return Figure((Panel(LOSS, series),), alt, f"token position{rows}")


def against_size(lines: Mapping[float, list[tuple[int, float]]], counted: str, constant: bool) -> Figure:
    """lines: budget -> (parameters, held-out loss) of runs. constant: whether the learning rate was, up to there."""
    series = []
    for number, (budget, points) in enumerate(sorted(lines.items())):
        x, y = np.array(sorted(points), float).T
        name = f"{q.count(budget)} {counted}"
        series.append(Series(name, x, y, "dotted line", share(number, len(lines)), name))
    why = ": the learning rate is constant, so every validation point is the end of a shorter run" if constant else ""
    alt = f"Validation loss against parameters, one line for each of {len(lines)} training budgets"
    panel = Panel("validation loss (nats per token)", tuple(series))
    return Figure((panel,), alt, "parameters", log_x=True, caption=f"Each line is one training budget{why}.")


def _alone(curve: Curve, title: str, log_y: bool = False) -> Panel:
    """A run's losses over images on a linear axis."""
    held: tuple[tuple[str, Colour], ...] = (("held out", "orange"),) if len(curve.marks_x) else ()
    return Panel(title, tuple(curve.series("blue", "orange")), log_y, legend=(("training", "blue"), *held))


def gpt(run: Run) -> Figure:
    """Loss and gradient norm of one run."""
    panels = [replace(_alone(curve := Curve.of(run), LOSS), y_range=_settled([curve]))]
    x, norm = run.points("grad_norm")
    if len(x):
        panels.append(Panel("gradient norm", (Series("gradient norm", *thin(x, norm, log=False), "thin"),)))
    return Figure(tuple(panels), f"Loss and gradient norm of {run.name} against images seen", "images seen")


def tokenizer(run: Run) -> Figure:
    """The reconstruction term where it was logged (the sum of all jumps when the discriminator joins), and PSNR."""
    key = "reconstruction" if all("reconstruction" in line for line in run.training) else "loss"
    error = run.config.loss.reconstruction if run.config and key == "reconstruction" else ""
    curve = Curve.of(run, key=key)
    if error != "l2":  # validation measures the squared error, whatever is trained
        curve = replace(curve, marks_x=np.empty(0), marks_y=np.empty(0))
    panels = [_alone(curve, _ERRORS.get(error, f"tokenizer {key}"), log_y=bool((curve.y > 0).all()))]
    for name, title in _HELD_OUT.items():
        x, values = run.points(name)
        if len(x) > 1:
            panels.append(Panel(title, (Series(name, x, values, "dotted line", "orange"),)))
    gan = run.config.loss.discriminator if run.config else None
    events: tuple[tuple[float, str], ...] = ()
    if gan and gan.kind != "none" and gan.weight and gan.joins_at < run.config.train.images:
        events = ((float(gan.joins_at), "discriminator joins"),)
    return Figure(tuple(panels), "Tokenizer loss against images seen", "images seen", events=events)


def same_losses(twin: Parity, names: Sequence[str]) -> Figure | None:
    """Two training losses at the same steps, and |their difference|, without those that are exactly 0."""
    shown = np.isfinite(twin.gaps)
    if shown.sum() < 2:
        return None
    steps, gaps = twin.steps[shown].astype(float), twin.gaps[shown]
    one, other = (thin(steps, loss[shown], log=False) for loss in twin.losses)
    lines = (Series(names[0], *one, "wide"), Series(names[1], *other, "thin", "orange"))
    above = Panel(f"training {LOSS}", lines, legend=((names[0], "blue"), (names[1], "orange")))
    early = gaps[steps <= PARITY_STEPS].max(initial=0)
    note = (
        f"largest in the first {PARITY_STEPS}: {q.small(float(early))}" if gaps.any() else "no difference at any step"
    )
    apart = Series("difference", steps[gaps > 0], gaps[gaps > 0], "thin", "ink")
    below = Panel("|difference| (nats per token)", (apart,), log_y=True, note=note)
    alt = f"Training loss of {names[0]} and {names[1]} overlaid, and the absolute difference below"
    shaded = (float(steps.min()), float(min(PARITY_STEPS, steps.max())))
    caption = f"Shaded: the first {PARITY_STEPS} steps."
    return Figure((above, below), alt, "optimizer step", caption=caption, shaded=shaded)


def law(points: Sequence[Mapping[str, Any]], curves: Sequence[Mapping[str, Any]]) -> Figure:
    """Fitted loss over N, one line per token budget; full dots were fitted, rings were not."""
    series = []
    for number, curve in enumerate(curves):
        colour, name = share(number, len(curves)), f"{q.count(curve['tokens'])} tokens"
        series.append(Series(name, np.array(curve["params_fit"]), np.array(curve["loss"]), "thin", colour, name))
        for left_out, style, what in ((False, "dots", "measured"), (True, "rings", "left out")):
            here = [p for p in points if p["tokens"] == curve["tokens"] and p["held_out"] == left_out]
            x, y = (np.array([p[key] for p in here], float) for key in ("params_fit", "loss"))
            series.append(Series(f"{name}, {what}", x, y, style, colour))  # type: ignore[arg-type]
    left = sorted({str(p["name"]) for p in points if p["held_out"]})
    rings = f" Rings: {', '.join(left)}, which the law did not see." if left else ""
    alt = f"The fitted law against parameters, {len(curves)} token budgets, with {len(points)} measured points"
    panel = Panel("held-out loss (nats per token)", tuple(series))
    caption = f"Lines: the law. Dots: measured.{rings}"
    return Figure((panel,), alt, "parameters in the law (N)", log_x=True, caption=caption)


def predicted(predictions: Sequence[Mapping[str, Any]]) -> Figure:
    """How far the law, its band and the naive forecast lie from the measurement, one column per token budget."""

    def off(key: str, end: int | None = None) -> tuple[Floats, Floats]:
        one = {i: p[key] if end is None else p[key][end] for i, p in enumerate(predictions) if key in p}
        known = [(i, value, predictions[i]["measured"]) for i, value in one.items()]
        at, value, measured = np.array(known, float).reshape(-1, 3).T
        return at, 100 * (value / measured - 1)

    columns = np.array([-0.5, len(predictions) - 0.5])
    band = Series("95% band", *off("ci95", 0), "band", to=off("ci95", 1)[1])
    naive = Series("as the next smaller run", *off("naive"), "diamonds", "green")
    measured = Series("measured", columns, np.zeros(2), "line", "orange")
    series = (band, measured, Series("law", *off("predicted"), "dots"), naive)
    seen = np.concatenate([s.y for s in series] + [off("ci95", 1)[1]])
    room = 0.08 * float(np.ptp(seen)) or 1.0
    limits = (float(seen.min()) - room, float(seen.max()) + room + 0.28 * float(np.ptp(seen)))  # the legend's
    legend: tuple[tuple[str, Colour], ...] = (
        ("law, with 95% band" if len(band.x) else "law", "blue"),
        ("measured", "orange"),
    )
    legend += ((naive.name, "green"),) if len(naive.x) else ()
    panel = Panel("forecast against measured loss (% too high)", series, y_range=limits, legend=legend)
    alt = "Predicted against measured loss of the left-out run, one column per token budget"
    text = str(predictions[-1].get("band", ""))
    caption = f"{text[:1].upper()}{text[1:]}." if text else ""
    return Figure((panel,), alt, caption=caption, ticks=tuple(f"{q.count(p['tokens'])} tokens" for p in predictions))


def frontier(best: Sequence[Mapping[str, Any]], points: Sequence[Mapping[str, Any]]) -> Figure:
    """Lowest loss the law promises for each amount of compute, and the size that gives it; dashed where that asks for
    more parameters or tokens than any run had."""
    limits = {key: max((p[key] for p in points), default=0.0) for key in ("params", "tokens")}
    inside = [all(b.get(key, 0) <= most for key, most in limits.items()) for b in best]
    known = inside.index(False) if False in inside else len(inside)
    panels = []
    for key, title, colour in (
        ("loss", "lowest loss by the law (nats per token)", "blue"),
        ("params", "parameters of the model that reaches it", "orange"),
    ):
        x, y = (np.array([b[k] for b in best], float) for k in ("flops", key))
        solid = Series(f"{key}, trained so far", x[:known], y[:known], "line", colour)
        beyond = Series(f"{key}, beyond", x[max(0, known - 1) :], y[max(0, known - 1) :], "dashed", colour)
        panels.append(Panel(title, (solid, beyond), log_y=key == "params"))
    alt = "Lowest predicted loss and best model size against training FLOPs"
    return Figure(tuple(panels), alt, "training FLOPs", log_x=True)


def isoflop(budgets: Sequence[Mapping[str, Any]], points: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Measured losses over N with a parabola in log N for each budget; None where the points are not there.

    budgets: of llamagen scaling isoflop. points: of a fit to the same runs. A budget whose parabola they do not give is
    left out: its runs are others.
    """
    series = []
    for number, budget in enumerate(budgets):
        spent = [p for p in points if abs(np.log(p["flops"] / budget["flops"])) < np.log(_SAME_BUDGET)]
        if len(spent) < 3:
            continue
        one = valley(np.log([p["params_fit"] for p in spent]), np.array([p["loss"] for p in spent]))
        if not np.isclose(np.exp(one.bottom), budget["params"], rtol=1e-6):
            continue
        colour, name = share(number, len(budgets)), f"{q.power(budget['flops'])} FLOPs"
        x = np.linspace(one.x[0], one.x[-1], 60)
        parabola = one.floor + one.curvature * (x - one.bottom) ** 2
        series += [
            Series(f"{name}, parabola", np.exp(x), parabola, "thin", colour, name),
            Series(f"{name}, measured", np.exp(one.x), one.y, "dots", colour),
            Series(f"{name}, best", np.exp([one.bottom]), np.array([one.floor]), "diamonds", "orange"),
        ]
    if not series:
        return None
    alt = f"Held-out loss against parameters for {len(series) // 3} budgets, with parabolas and their lowest points"
    caption = "Dots: measured. Lines: a parabola for each budget. Diamonds: its lowest point."
    panel = Panel("held-out loss (nats per token)", tuple(series))
    return Figure((panel,), alt, "parameters (N)", log_x=True, caption=caption)
