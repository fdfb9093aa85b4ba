"""results.json: the numbers of a pipeline that others compute with. Keys of what was not measured are left out."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamagen_dist.report.collect import Found, Run

PARITY_STEPS = 50
_SCORES = ("fid", "sfid", "kid_mean", "kid_std", "precision", "recall")
_TOKENIZER = (
    *("psnr", "ssim", "ssim_llamagen", "lpips", "lpips-hed", "lpips-custom", "rfid"),
    *("codebook_usage", "codebook_perplexity"),
)
_ANCHORS = {"fid_real": "held_out", "rfid": "reconstruction", "fid_untrained": "untrained", "fid_unigram": "unigram"}
_PREDICTION = ("params", "tokens", "predicted", "ci95", "measured", "naive")


@dataclass(frozen=True, eq=False)
class Parity:
    """One rung under another layout. Differences are in nats per token, None where the runs have no such numbers in
    common.

    steps: int64, those that both logged; gaps: float64, |difference| of the training losses there.
    final: (difference of the last held-out losses in common, after so many images).
    """

    one: Run
    other: Run
    steps: NDArray[np.int64]
    losses: tuple[NDArray[np.float64], NDArray[np.float64]]
    final: tuple[float, int] | None

    @property
    def gaps(self) -> NDArray[np.float64]:
        return np.abs(self.losses[1] - self.losses[0])

    @property
    def compared(self) -> int:
        """How many of the first PARITY_STEPS both logged."""
        return int((self.steps <= PARITY_STEPS).sum())

    @property
    def largest(self) -> float | None:
        """The largest difference of training losses among those."""
        return float(self.gaps[: self.compared].max()) if self.compared else None

    @property
    def window(self) -> str:
        """Says how many steps were compared, should fewer than all of the first be in the logs."""
        last = max((line["step"] for run in (self.one, self.other) for line in run.training), default=0)
        every = self.compared == min(PARITY_STEPS, last)
        return f"the first {self.compared} steps" if every else f"{self.compared} of the first {PARITY_STEPS} steps"


def parity(found: Found) -> Parity | None:
    """The first run of another group that is called like one of the ladder's, in a pipeline.

    Compared by optimizer step. Steps that saw other numbers of images are not the same.
    """
    ladder = {run.name: run for run in found.ladder}
    others = [run for run in found.runs if found.kind == "pipeline" and run.name in ladder and run not in found.ladder]
    for other in others:
        one = ladder[other.name]
        lines = [{line["step"]: line for line in run.training} for run in (one, other)]
        steps = [n for n in sorted(lines[0].keys() & lines[1].keys()) if len({x[n]["images_seen"] for x in lines}) == 1]
        losses = [np.array([known[n]["loss"] for n in steps], np.float64) for known in lines]
        last = {int(p["images_seen"]): p["val_loss"] for p in one.validation}
        both = [p for p in other.validation if int(p["images_seen"]) in last]
        seen = int(both[-1]["images_seen"]) if both else 0
        final = (abs(both[-1]["val_loss"] - last[seen]), seen) if both else None
        return Parity(one, other, np.array(steps, np.int64), (losses[0], losses[1]), final)
    return None


def results(found: Found) -> dict[str, Any]:
    known: dict[str, Any] = {}
    tokenizer, twin = found.tokenizer, parity(found)
    if tokenizer and tokenizer.validation:
        last = tokenizer.validation[-1]
        known["tokenizer"] = {k: last[k] for k in _TOKENIZER if k in last}
    points = [
        _known(
            name=run.name,
            params=run.params,
            tokens_seen=run.tokens_per_image and int(point["images_seen"]) * run.tokens_per_image,
            val_loss=finite(point.get("val_loss")),
            layout=run.summary.get("layout"),
        )
        for run in found.ladder
        for point in run.validation
    ]
    if points:
        known["gpt"] = points
    if twin and (twin.compared or twin.final):
        known["parity"] = _known(
            tp_max_abs_loss_diff=finite(twin.largest),
            tp_final_val_loss_diff=finite(twin.final[0]) if twin.final else None,
            steps=twin.compared,
            rung=twin.other.name,
        )
    law = found.forecast.get("prediction") or {}
    known |= {"eval": _scores(found.evaluation), "scaling": _known(**{key: law.get(key) for key in _PREDICTION})}
    known["time_s"] = {stage.name: stage.seconds for stage in found.stages if stage.seconds is not None}
    known["peak_rss_gb"] = peak_rss_gb(found)
    return {key: value for key, value in known.items() if value or value == 0}


def peak_rss_gb(found: Found) -> float | None:
    """Largest resident memory of any one process, over all stages and runs."""
    peaks = [run.summary.get("peak_rss_gb") for run in found.runs] + [stage.peak_rss_gb for stage in found.stages]
    return max((peak for peak in peaks if peak is not None), default=None)


def _scores(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The model's scores, those of what it is to be compared with, why others are absent."""
    sets = evaluation.get("sets", {})
    model = sets.get("model", {})
    scores = {"n": model.get("n", evaluation.get("n"))} | {key: finite(model.get(key)) for key in _SCORES}
    scores |= {key: finite(sets.get(name, {}).get("fid")) for key, name in _ANCHORS.items()}
    scores["class_agreement"] = finite(model.get("class_agreement"))
    scores["class_agreement_real"] = finite(evaluation.get("class_agreement_real"))
    scores["absent"] = evaluation.get("absent") or None
    return _known(**scores) if sets else {}


def finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _known(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
