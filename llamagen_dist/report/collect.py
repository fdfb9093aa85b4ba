"""Reads what a quickstart left behind, finished or not; what is not there is absent, never guessed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamagen_dist.config import GPTConfigFile, PipelineConfig, TokenizerConfigFile, load
from llamagen_dist.errors import UserError
from llamagen_dist.files import read_jsonl
from llamagen_dist.report.measured import Samples, finite, read_object, read_samples, scaling_result, scores_result

PARITY_STEPS = 50


@dataclass(frozen=True)
class Stage:
    """seconds and peak_rss_gb are None while the stage has no DONE.json."""

    name: str
    why: str
    module: str
    ranks: int
    seconds: float | None = None
    peak_rss_gb: float | None = None


@dataclass(frozen=True)
class Run:
    """A run directory. training, validation: its lines of metrics.jsonl, oldest first; steps, images_seen,
    loss: 1-d, one entry per training line; summary: summary.json, empty while the run is not finished."""

    name: str
    folder: Path
    training: tuple[Mapping[str, float], ...]
    validation: tuple[Mapping[str, float], ...]
    steps: NDArray[np.int64]
    images_seen: NDArray[np.int64]
    loss: NDArray[np.float64]
    summary: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def params(self) -> int | None:
        return self.summary.get("params")

    @property
    def tokens_per_image(self) -> int | None:
        return self.summary.get("tokens_per_image")


@dataclass(frozen=True)
class Parity:
    """One rung under another layout. Differences are in nats per token, None where the runs have no such
    numbers in common; steps: how many were compared, of those both logged among the first PARITY_STEPS."""

    rung: str
    one: Run
    other: Run
    max_abs_loss_diff: float | None
    steps: int
    final_val_loss_diff: float | None
    final_images_seen: int | None


@dataclass(frozen=True)
class Summary:
    folder: Path
    title: str | None
    stages: tuple[Stage, ...]
    tokenizer: Run | None
    tokenizer_config: TokenizerConfigFile | None
    ladder: tuple[Run, ...]
    largest_config: GPTConfigFile | None
    """The config of the ladder's largest rung that has one."""
    parity: Parity | None
    vocab_size: int | None
    classes: tuple[str, ...] = ()
    samples: Samples | None = None
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    """evaluation.json, as eval.evaluate writes it; empty where there is none."""
    scaling: Mapping[str, Any] = field(default_factory=dict)
    """scaling.json, as llamagen scaling fit writes it; empty where there is none."""


def collect(out: Path) -> Summary:
    """Read the folder of a quickstart. Raises UserError if it is none, or naming the file that is damaged."""
    if not (out / "stages").is_dir():
        raise UserError(f"{out}: not a quickstart folder (it has no stages/); give the --out of llamagen quickstart")
    pipeline = _pipeline(out)
    tokenizer = read_run(out / "tokenizer")
    ladder = tuple(sorted(_runs(out / "ladder"), key=lambda run: (run.params or math.inf, run.name)))
    return Summary(
        folder=out,
        title=pipeline.title if pipeline else None,
        stages=_stages(out, pipeline),
        tokenizer=tokenizer,
        tokenizer_config=_config(tokenizer, "tokenizer"),
        ladder=ladder,
        largest_config=_config(ladder[-1] if ladder else None, "gpt"),
        parity=_parity(ladder, _runs(out / "tp2")),
        vocab_size=read_object(out / "tokens" / "train" / "manifest.json").get("vocab_size"),
        classes=tuple(read_object(out / "images" / "train" / "manifest.json").get("classes") or ()),
        samples=read_samples(out / "samples"),
        evaluation=read_object(out / "evaluation.json"),
        scaling=read_object(out / "scaling.json"),
    )


def results(summary: Summary) -> dict[str, Any]:
    """results.json: what others compute with. Keys of what was not measured are left out."""
    found: dict[str, Any] = {}
    if summary.tokenizer and summary.tokenizer.validation:
        last = summary.tokenizer.validation[-1]
        found["tokenizer"] = {k: last[k] for k in ("psnr", "ssim", "codebook_usage") if k in last}
    points = [
        _known(
            name=run.name,
            params=run.params,
            tokens_seen=tokens_seen(run, int(point["images_seen"])),
            val_loss=finite(point.get("val_loss")),
            layout=run.summary.get("layout"),
        )
        for run in summary.ladder
        for point in run.validation
    ]
    if points:
        found["gpt"] = points
    if summary.parity and (
        summary.parity.max_abs_loss_diff is not None or summary.parity.final_val_loss_diff is not None
    ):
        found["parity"] = _known(
            tp_max_abs_loss_diff=finite(summary.parity.max_abs_loss_diff),
            tp_final_val_loss_diff=finite(summary.parity.final_val_loss_diff),
            steps=summary.parity.steps,
            rung=summary.parity.rung,
        )
    for name, part in (("eval", scores_result(summary.evaluation)), ("scaling", scaling_result(summary.scaling))):
        if part:
            found[name] = part
    seconds = {stage.name: stage.seconds for stage in summary.stages if stage.seconds is not None}
    if seconds:
        found["time_s"] = seconds
    peak = peak_rss_gb(summary)
    return found if peak is None else {**found, "peak_rss_gb": peak}


def tokens_seen(run: Run, images_seen: int) -> int | None:
    return None if run.tokens_per_image is None else images_seen * run.tokens_per_image


def peak_rss_gb(summary: Summary) -> float | None:
    """Largest resident memory of any one process, over all stages and runs."""
    runs = [summary.tokenizer, *summary.ladder, summary.parity.other if summary.parity else None]
    peaks = [run.summary.get("peak_rss_gb") for run in runs if run] + [stage.peak_rss_gb for stage in summary.stages]
    return max((peak for peak in peaks if peak is not None), default=None)


def read_run(folder: Path) -> Run | None:
    """A run directory, or None where no metrics were written yet."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return None
    lines = _lines(path)
    training = [line for line in lines if "loss" in line]
    return Run(
        name=folder.name,
        folder=folder,
        training=tuple(training),
        validation=tuple(line for line in lines if "val_loss" in line),
        steps=np.array([line["step"] for line in training], np.int64),
        images_seen=np.array([line["images_seen"] for line in training], np.int64),
        loss=np.array([line["loss"] for line in training], np.float64),
        summary=read_object(folder / "summary.json"),
        record=read_object(folder / "record.json"),
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last one that a killed process left unfinished is not there yet."""
    lines = read_jsonl(path, strict=True)
    for line in lines:
        if not {"step", "images_seen"} <= line.keys():
            raise UserError(f"{path}: a line without step and images_seen ({line}); restore the file")
    return lines


def _runs(folder: Path) -> list[Run]:
    found = [read_run(path) for path in sorted(folder.iterdir()) if path.is_dir()] if folder.is_dir() else []
    return [run for run in found if run is not None]


def _parity(ladder: tuple[Run, ...], others: list[Run]) -> Parity | None:
    """Compare the runs by optimizer step. Steps that saw other numbers of images are not the same."""
    for other in others:
        one = next((run for run in ladder if run.name == other.name), None)
        if one is None:
            continue
        steps, mine, theirs = common(one, other)
        early = steps <= PARITY_STEPS
        gaps = np.abs(theirs[early] - mine[early])
        last = {int(p["images_seen"]): p["val_loss"] for p in one.validation}
        both = [p for p in other.validation if int(p["images_seen"]) in last]
        return Parity(
            rung=other.name,
            one=one,
            other=other,
            steps=int(early.sum()),
            max_abs_loss_diff=float(gaps.max()) if len(gaps) else None,
            final_val_loss_diff=abs(both[-1]["val_loss"] - last[int(both[-1]["images_seen"])]) if both else None,
            final_images_seen=int(both[-1]["images_seen"]) if both else None,
        )
    return None


def common(one: Run, other: Run) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """(steps, loss of one, loss of other) at the steps that both logged after the same number of images."""
    steps, mine, theirs = np.intersect1d(one.steps, other.steps, return_indices=True)
    same = one.images_seen[mine] == other.images_seen[theirs]
    return steps[same], one.loss[mine[same]], other.loss[theirs[same]]


def _stages(out: Path, pipeline: PipelineConfig | None) -> tuple[Stage, ...]:
    """In the pipeline's order; stages it does not know (an older pipeline's) follow by name."""
    planned = [Stage(s.name, s.why, s.module, s.ranks) for s in pipeline.stages] if pipeline else []
    names = [stage.name for stage in planned]
    # in stages/NAME itself launches before November 2026 left it
    files = [*sorted((out / "stages").glob("*/DONE.json")), *sorted((out / "stages").glob("*/launch/DONE.json"))]
    done = {path.relative_to(out / "stages").parts[0]: read_object(path) for path in files}
    extra = sorted((name for name in done if name not in names), key=lambda name: str(done[name].get("started", "")))
    planned += [Stage(name, "", "", 1) for name in extra]
    return tuple(
        Stage(
            stage.name,
            str(d.get("why", stage.why)),
            str(d.get("module", stage.module)),
            int(d.get("ranks", stage.ranks)),
            d.get("seconds"),
            d.get("peak_rss_gb"),
        )
        for stage in planned
        for d in [done.get(stage.name, {})]
    )


def _pipeline(out: Path) -> PipelineConfig | None:
    path = out / "config.yaml"
    return load(path, kind="pipeline") if path.exists() else None


def _config(run: Run | None, kind: str) -> Any:
    path = run.folder / "config.yaml" if run else None
    return load(path, kind=kind) if path and path.exists() else None


def _known(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
