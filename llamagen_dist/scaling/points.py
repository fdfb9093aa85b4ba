"""Measured points (parameters, tokens, loss), and tables of them: CSV files and rows of a tracker."""

import csv
import io
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llamagen_dist.errors import UserError
from llamagen_dist.files import read_jsonl
from llamagen_dist.scaling.laws import Floats

_COLUMNS = ("params", "tokens", "loss")
NAMES: Mapping[str, tuple[str, ...]] = {
    "params": ("N", "n_params", "num_params", "parameters", "model_size", "non_embedding_params"),
    "tokens": ("D", "n_tokens", "num_tokens", "training_tokens", "train_tokens", "tokens_seen", "total_tokens"),
    "loss": ("L", "val_loss", "loss/val", "val/loss", "eval/loss", "validation_loss", "valid_loss", "final_loss"),
    "val_loss": ("loss", "loss/val", "val/loss", "eval/loss", "validation_loss", "valid_loss", "final_loss"),
    "flops": ("C", "compute", "training_flops", "train_flops", "total_flops", "training flop"),
    "run": ("run_id", "run_name", "name", "id"),
    "lr": ("learning_rate", "optim.lr", "peak_lr", "max_lr"),
    "width": ("dim", "d_model", "hidden_size", "model.dim", "n_embd"),
    "unique": ("unique_tokens", "U", "data_size"),
    "vocab": ("vocab_size",),
    "validation": ("validation_set", "val_set", "data.validation"),
}
"""What a law needs -> the headers that other people's tables have for it; single letters count as written."""
FEWEST_TOKENS_PER_PARAMETER = 0.1


@dataclass(frozen=True, eq=False)
class Points:
    """params, tokens, loss: float64 [n], all positive and finite. runs: n names; points of one run share its name.
    also: what else is known of every point, float64 [n] each: ``flops``, ``unique`` (tokens), ``lr``, ``width``,
    and beside another metric ``val_loss``. metric: what ``loss`` is, where it is another metric.

    Raises UserError that names the first bad point, by ``sources`` (such as file lines) where they are given.
    """

    params: Floats
    tokens: Floats
    loss: Floats
    runs: tuple[str, ...]
    sources: tuple[str, ...] = ()
    also: Mapping[str, Floats] = field(default_factory=dict)
    metric: str = "loss"

    def __post_init__(self) -> None:
        if not len(self.params) == len(self.tokens) == len(self.loss) == len(self.runs):
            raise ValueError("params, tokens, loss and runs differ in length")
        for name in _COLUMNS:
            values = getattr(self, name)
            bad = np.flatnonzero(~_usable(values))
            if len(bad):
                source = self.sources[bad[0]] if self.sources else f"point {bad[0] + 1} (run {self.runs[bad[0]]})"
                raise UserError(
                    f"{source}: {name} is {values[bad[0]]:g}, and a law is fitted to logarithms, so every {name} must "
                    f"be a positive number; correct or remove "
                    f"{'it' if len(bad) == 1 else f'all {len(bad)} such points'}, or give --drop-bad"
                )

    def __len__(self) -> int:
        return len(self.params)

    @classmethod
    def of(cls, rows: Sequence[tuple[str, str, Mapping[str, float]]], metric: str | None = None) -> "Points":
        """From (source, run, number by column) of each point; all of them know the same columns."""
        sources, runs, values = zip(*rows, strict=True)
        columns = {name: np.array([numbers[name] for numbers in values], float) for name in values[0]}
        params, tokens, loss = (columns.pop(name) for name in _COLUMNS)
        return cls(params, tokens, loss, runs, sources, columns, metric or "loss")

    def where(self, keep: Sequence[bool] | np.ndarray) -> "Points":
        chosen = np.asarray(keep, bool)
        picked = np.flatnonzero(chosen)
        return Points(
            self.params[chosen],
            self.tokens[chosen],
            self.loss[chosen],
            tuple(self.runs[i] for i in picked),
            tuple(self.sources[i] for i in picked) if self.sources else (),
            {name: values[chosen] for name, values in self.also.items()},
            self.metric,
        )

    @property
    def flops(self) -> Floats:
        """Training FLOPs of every point; 6 N D where nothing better is known."""
        return self.also.get("flops", 6 * self.params * self.tokens)


def _usable(values: Floats) -> np.ndarray:
    return np.isfinite(values) & (values > 0)


@dataclass(frozen=True)
class Options:
    """How what was measured is read.

    metric: the column or key that is fitted in place of the held-out loss.
    columns: what a law needs -> the header that stands for it, before the names that are recognised.
    drop_bad: leave out and count points that are not positive numbers, rather than refuse them.
    vocab: of the tokens, for the check of units. tokens_per_image: the tokens column counts images of so many tokens.
    bits: the loss is in bits per token. as_given: no check of units.
    """

    metric: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    drop_bad: bool = False
    vocab: int = 16384
    tokens_per_image: int = 1
    bits: bool = False
    as_given: bool = False


AS_NAMED = Options()


@dataclass(frozen=True)
class Dropped:
    """Something that was left out, and why; in the result's ``dropped``."""

    what: str
    why: str


Table = tuple[Points, list[Dropped], list[str]]
"""Points, what was dropped, and what was recognised or assumed."""


def read_table(path: Path, options: Options = AS_NAMED) -> Table:
    """A CSV file, or JSON lines with a point each; see ``table``. Raises UserError."""
    if path.suffix == ".jsonl":
        lines = enumerate(read_jsonl(path, strict=True), 1)
        return table([(f"{path}, object {number}", line) for number, line in lines], str(path), options)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    return parse_csv(text, str(path), options)


def parse_csv(text: str, name: str, options: Options = AS_NAMED) -> Table:
    """As ``table``, from a CSV file's text; ``name`` stands for the file in messages."""
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise UserError(f"{name}: not a CSV file ({error})") from None
    if not rows:
        raise UserError(f"{name}: empty; it needs a header with the columns params, tokens and loss")
    header = [cell.strip() for cell in rows[0][1]]
    recognise(header, name, options)
    if len(rows) == 1:
        raise UserError(f"{name}: a header and no runs; add one line for each measured point")
    for line, row in rows[1:]:
        if len(row) != len(header):
            raise UserError(f"{name}, line {line}: {len(row)} cells under a header of {len(header)}; correct the line")
    return table(
        [(f"{name}, line {line}", dict(zip(header, row, strict=True))) for line, row in rows[1:]], name, options
    )


def table(objects: Sequence[tuple[str, Mapping[str, Any]]], name: str, options: Options = AS_NAMED) -> Table:
    """Points of a table: where each row stands, and the row, whose nested keys are joined by dots.

    Rows without the loss are no points (lines of training steps, runs that were never validated).
    Raises UserError: a column missing or ambiguous, a cell that is no number, units that cannot be meant, one run with
    two losses after the same tokens, validation sets or vocabularies that differ.
    """
    rows = [(source, flattened(value)) for source, value in objects]
    called = recognise(list(dict.fromkeys(key for _, row in rows for key in row)), name, options)
    notes = [f"{name}: {head} is read as {role}" for role, head in called.items() if head != role]
    if "tokens" not in called:
        notes.append(f"{name}: it has no tokens, taken as flops / (6 params)")
    dropped: list[Dropped] = []
    kept: list[tuple[str, str, dict[str, float]]] = []
    seen: dict[tuple[str, float, float], tuple[float, str]] = {}
    for source, row in rows:
        if called["loss"] not in row:
            dropped.append(Dropped(source, "no loss"))
            continue
        numbers = _numbers(row, called, source, options)
        wrong = [role for role in _COLUMNS if not _usable(np.array(numbers[role]))]
        if wrong and options.drop_bad:
            dropped.append(Dropped(source, f"{wrong[0]} is {numbers[wrong[0]]:g}"))
            continue
        run = str(row.get(called.get("run", ""), "")).strip()
        key = (run, numbers["params"], numbers["tokens"])
        loss, where = seen.setdefault(key, (numbers["loss"], source))
        if run and where != source and loss == numbers["loss"]:
            dropped.append(Dropped(source, f"the same as {where}"))
            continue
        if run and where != source:
            raise UserError(
                f"{source}: {run} has the loss {numbers['loss']:g}, and {loss:g} at {where}, after the same tokens; "
                "give repeated runs names of their own, or remove one"
            )
        kept.append((source, run or source.removeprefix(f"{name}, "), numbers))
    if not kept:
        reasons = "; ".join(f"{n} x {why}" for why, n in Counter(one.why for one in dropped).most_common(3))
        raise UserError(f"{name}: nothing is left of its {len(rows)} rows ({reasons})")
    for role in ("vocab", "validation"):
        if role in called:
            one_of_a_kind(((str(row.get(called[role])), source) for source, row in rows), role)
    points = Points.of(kept, options.metric)
    if not options.as_given and options.metric is None:
        check_units(points, options.vocab)
    return points, dropped, notes


def flattened(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= flattened(inner, f"{prefix}{key}.") if isinstance(inner, Mapping) else {f"{prefix}{key}": inner}
    return flat


def recognise(header: Sequence[str], name: str, options: Options) -> dict[str, str]:
    """What a law needs -> its header. One of our own name goes before others; --columns and --metric before both."""
    listed = ", ".join(header)[:200]
    called: dict[str, str] = {}
    for role, aliases in NAMES.items():
        if role == "val_loss" and options.metric is None:
            continue  # it is what is fitted
        wanted = options.columns.get(role, options.metric if role == "loss" else None)
        if wanted is not None and wanted not in header:
            raise UserError(f"{name}: there is no column {wanted} to read {role} from; it has {listed}")
        there = [head for head in header if head == (wanted or role)]
        if not there:  # single letters as they are written: d may be a width
            there = [head for head in header if (head if len(head) == 1 else head.lower().replace("-", "_")) in aliases]
        if len(there) > 1 and role in _COLUMNS:
            fault = "is there twice" if len(set(there)) == 1 else f"could be {' or '.join(there)}"
            raise UserError(
                f"{name}: the column {role} {fault} (the header has {listed}); say which with "
                f"--columns {role}={there[0]}, or remove one"
            )
        if there:
            called[role] = there[0]
    missing = [role for role in _COLUMNS if role not in called and not (role == "tokens" and "flops" in called)]
    if missing:
        raise UserError(
            f"{name}: the column {missing[0]} is missing (the header has {listed}); it needs params, tokens, "
            f"loss and, for several points of one run, run; others are named with --columns {missing[0]}=HEADER"
        )
    return called


def _numbers(row: Mapping[str, Any], called: Mapping[str, str], source: str, options: Options) -> dict[str, float]:
    """In tokens and nats; tokens from flops where they are not given; NaN for what only some rows have."""
    numbers: dict[str, float] = {}
    for role, head in called.items():
        if role in ("run", "vocab", "validation"):
            continue
        try:
            numbers[role] = float(row.get(head, ""))
        except (TypeError, ValueError):
            if role in (*_COLUMNS, "flops"):
                shown = str(row.get(head, ""))[:60]
                raise UserError(f"{source}: {role} is {shown!r}, not a number; correct or remove the line") from None
            numbers[role] = math.nan
    if "tokens" not in numbers:
        numbers["tokens"] = numbers["flops"] / (6 * numbers["params"]) if numbers["params"] else math.nan
    numbers["tokens"] *= options.tokens_per_image
    if options.bits and (loss := "loss" if options.metric is None else "val_loss") in numbers:
        numbers[loss] *= math.log(2)
    return numbers


def check_units(points: Points, vocab: int) -> None:
    """Raises UserError that asks, where a loss is worse than guessing or tokens are implausibly few."""
    worst, fewest = int(points.loss.argmax()), int((points.tokens / points.params).argmin())
    where = points.sources or points.runs
    if points.loss[worst] > math.log(vocab):
        raise UserError(
            f"{where[worst]}: loss is {points.loss[worst]:g}, more than ln {vocab} = {math.log(vocab):.4g} nats per "
            "token, which guessing gives: is it in bits (--bits), per image, or of another vocabulary (--vocab)? "
            "--as-given takes it as it is"
        )
    ratio = points.tokens[fewest] / points.params[fewest]
    if ratio < FEWEST_TOKENS_PER_PARAMETER:
        raise UserError(
            f"{where[fewest]}: {points.tokens[fewest]:g} tokens for {points.params[fewest]:g} parameters are "
            f"{ratio:.2g} each: does the column count images (--tokens-per-image N)? --as-given takes it as it is"
        )


def one_of_a_kind(values: Iterator[tuple[str, str]], what: str) -> None:
    """values: (value, where it stands). Raises UserError where they differ: such losses are not comparable."""
    first: tuple[str, str] | None = None
    for value, where in values:
        first = first or (value, where)
        if value != first[0]:
            raise UserError(
                f"{where} has another {what} ({value}) than {first[1]} ({first[0]}): losses of the two cannot be "
                "compared; fit them apart"
            )


def together(parts: Sequence[Points]) -> Points:
    """All points of several sources; what only some of them know is left out."""
    shared = [name for name in parts[0].also if all(name in part.also for part in parts)]
    return Points(
        np.concatenate([part.params for part in parts]),
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.loss for part in parts]),
        tuple(run for part in parts for run in part.runs),
        tuple(source for part in parts for source in part.sources),
        {name: np.concatenate([part.also[name] for part in parts]) for name in shared},
        parts[0].metric,
    )
