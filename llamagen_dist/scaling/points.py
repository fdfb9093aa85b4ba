"""Measured points (parameters, tokens, loss) and their CSV form."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llamagen_dist.errors import UserError
from llamagen_dist.scaling.laws import Floats

_COLUMNS = ("params", "tokens", "loss")


@dataclass(frozen=True, eq=False)
class Points:
    """params, tokens, loss: float64 [n], all positive and finite. runs: n names; points of one run share its name.

    Raises UserError that names the first bad point, by ``sources`` (such as file lines) where they are given.
    """

    params: Floats
    tokens: Floats
    loss: Floats
    runs: tuple[str, ...]
    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.params) == len(self.tokens) == len(self.loss) == len(self.runs):
            raise ValueError("params, tokens, loss and runs differ in length")
        for name in _COLUMNS:
            values = getattr(self, name)
            bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
            if len(bad):
                source = self.sources[bad[0]] if self.sources else f"point {bad[0] + 1} (run {self.runs[bad[0]]})"
                raise UserError(
                    f"{source}: {name} is {values[bad[0]]:g}, and a law is fitted to logarithms, so every {name} must "
                    f"be a positive number; correct or remove "
                    f"{'it' if len(bad) == 1 else f'all {len(bad)} such points'}"
                )

    def __len__(self) -> int:
        return len(self.params)

    def where(self, keep: Sequence[bool] | np.ndarray) -> "Points":
        chosen = np.asarray(keep, bool)
        picked = np.flatnonzero(chosen)
        return Points(
            self.params[chosen],
            self.tokens[chosen],
            self.loss[chosen],
            tuple(self.runs[i] for i in picked),
            tuple(self.sources[i] for i in picked) if self.sources else (),
        )


def read_csv(path: Path) -> Points:
    """Columns params, tokens, loss and, where several points belong to one run, run. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    return parse_csv(text, str(path))


def parse_csv(text: str, name: str) -> Points:
    """As read_csv, from the text; ``name`` stands for the file in messages."""
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise UserError(f"{name}: not a CSV file ({error})") from None
    if not rows:
        raise UserError(f"{name}: empty; it needs a header with the columns params, tokens and loss")
    header = [cell.strip() for cell in rows[0][1]]
    for column in _COLUMNS:
        if header.count(column) != 1:
            fault = "missing" if column not in header else "there twice"
            raise UserError(
                f"{name}: the column {column} is {fault} (the header has {', '.join(header)[:200]}); "
                "it needs params, tokens, loss and, for several points of one run, run"
            )
    if len(rows) == 1:
        raise UserError(f"{name}: a header and no runs; add one line for each measured point")
    values: dict[str, list[float]] = {column: [] for column in _COLUMNS}
    runs, sources = [], []
    for line, row in rows[1:]:
        if len(row) != len(header):
            raise UserError(f"{name}, line {line}: {len(row)} cells under a header of {len(header)}; correct the line")
        cells = dict(zip(header, (cell.strip() for cell in row), strict=True))
        for column in _COLUMNS:
            values[column].append(_number(cells[column], column, f"{name}, line {line}"))
        runs.append(cells.get("run") or f"line {line}")
        sources.append(f"{name}, line {line}")
    arrays = {column: np.array(numbers, float) for column, numbers in values.items()}
    return Points(**arrays, runs=tuple(runs), sources=tuple(sources))


def _number(text: str, column: str, source: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{source}: {column} is {text[:60]!r}, not a number; correct or remove the line") from None
