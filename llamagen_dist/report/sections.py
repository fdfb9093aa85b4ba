"""The sections of a quickstart's report, each from what was measured; None where nothing was."""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from llamagen_dist.report import plots
from llamagen_dist.report import quantities as q
from llamagen_dist.report.blocks import Block, Columns, Markdown, Section, Table, literal
from llamagen_dist.report.collect import PARITY_STEPS, Parity, Run, Summary, common, peak_rss_gb, tokens_seen
from llamagen_dist.report.style import THEME

_MOST_BUDGETS = 5


def stages(s: Summary) -> Section | None:
    if not s.stages:
        return None
    rows = []
    for stage in s.stages:
        spent = (
            q.duration(stage.seconds)
            if stage.seconds is not None
            else ("this page" if stage.name == "report" else "not finished")
        )
        rows.append((stage.name, stage.why or None, str(stage.ranks), spent))
    return Section(
        "What was run",
        (Table(("stage", "why", "ranks", "time"), tuple(rows), (2, 3)),),
        "Every stage is a program of its own, started on so many ranks; a finished stage is not run again.",
    )


def ladder(s: Summary) -> Section | None:
    if not s.ladder:
        return None
    tokens = all(run.tokens_per_image for run in s.ladder)
    unit = "tokens" if tokens else "images"

    def amount(run: Run, images: int) -> int:
        return tokens_seen(run, images) or images

    points = [{amount(run, int(p["images_seen"])): p for p in run.validation} for run in s.ladder]
    budgets = _spread(sorted({budget for found in points for budget in found if budget > 0}))
    rows = []
    lines: dict[float, list[tuple[float, float]]] = {b: [] for b in budgets}
    for run, found in zip(s.ladder, points, strict=True):
        losses = [found[b]["val_loss"] if b in found else None for b in budgets]
        null = run.validation[-1].get("val_loss_null") if run.validation else None
        rows.append(
            (
                run.name,
                q.count(run.params) if run.params else None,
                *(None if v is None else q.loss(v) for v in losses),
                None if null is None else q.loss(null),
            )
        )
        for b, v in zip(budgets, losses, strict=True):
            if run.params and v is not None and math.isfinite(v):
                lines[b].append((float(run.params), float(v)))
    lines = {b: line for b, line in lines.items() if len({size for size, _ in line}) > 1}
    table = Table(
        ("model", "parameters", *(f"{q.count(b)} {unit}" for b in budgets), "without label"),
        tuple(rows),
        tuple(range(1, len(budgets) + 3)),
        "Held-out loss in nats per token after so much training, with the true class label; last column: the "
        "same at the end, with the label withheld (the branch that classifier-free guidance needs).",
    )
    curves = [
        plots.Curve(
            run.name,
            np.array([amount(run, int(i)) for i in run.images_seen], float),
            run.loss,
            np.array([amount(run, int(p["images_seen"])) for p in run.validation], float),
            np.array([p["val_loss"] for p in run.validation], float),
        )
        for run in s.ladder
    ]
    figures: list[Block] = [
        plots.ladder_curves(
            curves,
            f"{unit} seen",
            "Thin: training loss as logged. Thick: its running mean. Dots: held-out loss.",
        )
    ]
    if lines:
        figures.append(
            plots.loss_against_size(
                lines,
                unit,
                "Each line is one training budget: the learning rate is constant, "
                "so every validation point is the end of a shorter run."
                if _constant_rate(s, max(lines) / amount(s.ladder[-1], 1))
                else "Each line is one training budget.",
            )
        )
    floor = (
        f" Guessing blindly among {q.count(s.vocab_size)} codes costs ln {s.vocab_size:,} = "
        f"{math.log(s.vocab_size):.3f} nats."
        if s.vocab_size
        else ""
    )
    return Section(
        "The ladder",
        (table, Columns(tuple(figures))),
        f"GPTs of growing size, trained on the same tokens in the same order.{floor}{_goes_on(s, unit, amount)}",
    )


def _constant_rate(s: Summary, images: float) -> bool:
    """Whether the largest run's rate was constant up to so many images (the others share its schedule)."""
    return s.largest_config is not None and images <= s.largest_config.optim.constant_until


def _goes_on(s: Summary, unit: str, amount: Callable[[Run, int], int]) -> str:
    """What the largest run does after the others have ended."""
    if s.largest_config is None or s.largest_config.optim.constant_until == math.inf or len(s.ladder) < 2:
        return ""
    run, alone = s.ladder[-1], s.largest_config.optim.cooldown_from
    if any(len(other.images_seen) and other.images_seen[-1] > alone for other in s.ladder[:-1]):
        return ""
    return (
        f" After {q.count(amount(run, alone))} {unit} {literal(run.name)} goes on alone, with a learning rate that "
        "falls to zero; that part is not comparable with the others."
    )


def _spread(budgets: list[int]) -> list[int]:
    """At most _MOST_BUDGETS of them, the last among them, the others about evenly spread in order."""
    if len(budgets) <= _MOST_BUDGETS:
        return budgets
    return [budgets[i] for i in sorted({round(x) for x in np.linspace(0, len(budgets) - 1, _MOST_BUDGETS)})]


def parity(s: Summary) -> Section | None:
    p = s.parity
    if p is None:
        return None
    steps, one, other = common(p.one, p.other)
    names = (_layout(p.one, "the ladder's ranks"), _layout(p.other, "the split run's ranks"))
    text = []
    if p.max_abs_loss_diff is not None:
        text.append(
            f"{literal(p.rung)} was trained twice from the same weights on the same batches: once on "
            f"{literal(names[0])}, once on {literal(names[1])}. The training losses agree within "
            f"**{q.small(p.max_abs_loss_diff)} nats** over {window(p)}."
        )
        text.append(_later(steps, np.abs(other - one), p.max_abs_loss_diff))
    if p.final_val_loss_diff is not None:
        end = f"at image {q.count(p.final_images_seen)}" if p.final_images_seen else "at the end"
        apart = f"differ by **{q.small(p.final_val_loss_diff)} nats**"
        text.append(f"The final validation losses ({end}) {apart if p.final_val_loss_diff else 'are equal'}.")
    if not text:
        text.append(
            f"{literal(p.rung)} was started twice, but the two runs have no step or validation point in common."
        )
    finite = np.isfinite(one) & np.isfinite(other)
    drawn = (
        (
            plots.tensor_parallel(
                steps[finite].astype(float),
                one[finite],
                other[finite],
                PARITY_STEPS,
                names,
                f"Shaded: the first {PARITY_STEPS} steps.",
            ),
        )
        if finite.sum() > 1
        else ()
    )
    return Section(
        "One model, split or whole",
        (Columns((*drawn, Markdown("\n\n".join(text)))),),
        "Tensor parallelism must not change what is learnt.",
    )


def _later(steps: NDArray[np.int64], gaps: NDArray[np.float64], early: float) -> str:
    """What became of the differences after the first steps, said only as far as it was measured."""
    why = "Summing in another order changes the last bits"
    if len(gaps) and gaps.max() > early:
        return (
            f"{why}, and Adam, which divides by a running gradient size, lets such rounding differences grow "
            f"later: to at most **{q.small(float(gaps.max()))} nats**, at step {steps[gaps.argmax()]:,}."
        )
    return f"{why}; over all {len(steps):,} steps that both runs logged, no difference is larger."


def _layout(run: Run, otherwise: str) -> str:
    found = run.summary.get("layout")
    if not found:
        return otherwise
    ranks = "1 rank" if found["ranks"] == 1 else f"{found['ranks']} ranks"
    return f"{ranks} (tensor {found['tensor']} × data {found['data']}, ZeRO-{found['zero']})"


def cost(s: Summary) -> Section | None:
    timed = [stage for stage in s.stages if stage.seconds is not None]
    if not timed:
        return None
    names = [stage.name for stage in timed]
    seconds = [float(stage.seconds or 0) for stage in timed]
    blocks: list[Block] = [plots.bars(names, seconds, [q.duration(x) for x in seconds], "wall-clock time")]
    weighed = [(stage.name, float(stage.peak_rss_gb)) for stage in timed if stage.peak_rss_gb is not None]
    if weighed:
        blocks.append(
            plots.bars(
                [n for n, _ in weighed],
                [v for _, v in weighed],
                [q.gigabytes(v) for _, v in weighed],
                "peak resident memory of one rank",
                THEME["green"][0],
            )
        )
    peak = peak_rss_gb(s)
    most = f", and no process ever held more than **{q.gigabytes(peak)}**" if peak is not None else ""
    return Section(
        "Time and memory",
        (Columns(tuple(blocks)),),
        f"{q.duration(sum(seconds))} in all{most} (10⁹ bytes, the largest rank of each stage).",
    )


def window(found: Parity) -> str:
    """Says how many steps were compared, should fewer than all of the first 50 be in the logs."""
    last = int(max(found.one.steps.max(initial=0), found.other.steps.max(initial=0)))
    if found.steps == min(PARITY_STEPS, last):
        return f"the first {found.steps} steps"
    return f"{found.steps} of the first {PARITY_STEPS} steps"
