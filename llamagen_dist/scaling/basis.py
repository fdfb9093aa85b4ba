"""A fit's JSON file read back: the fit itself again, with all its resamples, for whoever decides by it."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamagen_dist.errors import UserError
from llamagen_dist.files import sha256_file
from llamagen_dist.models.sizes import GPTConfig
from llamagen_dist.scaling.bootstrap import Bootstrap, attempt
from llamagen_dist.scaling.fit import Fit, fit_law
from llamagen_dist.scaling.laws import Floats
from llamagen_dist.scaling.points import Points


@dataclass(frozen=True, eq=False)
class Basis:
    """A fit again, from the points of its JSON file, with all its resamples.

    refused: why there are no resamples. like: a model of the runs' family; stated: the fit says so, it is not assumed.
    count: what N is.
    """

    fit: Fit
    resampled: Bootstrap | None
    refused: str | None
    like: GPTConfig
    stated: bool
    count: str
    notes: tuple[str, ...]
    largest: float
    """FLOPs of the most expensive point."""
    source: Mapping[str, Any]

    def predict(self, size: Floats | float, tokens: Floats | float, **also: Floats | float) -> Floats:
        return self.fit.predict(size, tokens, **also)


def read_fit(path: Path) -> Basis:
    """What ``llamagen scaling fit`` wrote. Raises UserError: another file, or points that no longer give its fit."""
    try:
        found = json.loads(path.read_text())
        rows = [row for row in found["points"] if not row["held_out"]]
        known = [name for name in ("tokens", "loss", "flops", "unique", "val_loss") if name in rows[0]]
        measured = [
            (f"{path}, {row['name']}", row["name"], {name: row[name] for name in known} | {"params": row["params_fit"]})
            for row in rows
        ]
        points = Points.of(measured, found["record"].get("metric"))
        record, objective = found["record"], float(found["objective"])
        form, loss, delta = found["form"], found["loss"], found["delta"]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path}: not a result of llamagen scaling fit ({error!r})") from None
    fit = fit_law(points, form, loss, 1e-3 if delta is None else delta)
    if not math.isclose(fit.objective, objective, rel_tol=1e-6, abs_tol=1e-12):
        raise UserError(
            f"{path}: its points give the objective {fit.objective:.9g}, not the {objective:.9g} it states; it was "
            "changed, or made by another version: run llamagen scaling fit again"
        )
    resampled, refused = attempt(fit)
    # what the fit said beyond what every fit of these points says, such as how published figures were made
    notes = [text for text in found["diagnostics"].get("warnings", []) if text not in fit.warnings]
    if "model" in record:
        like = GPTConfig(**record["model"])
    else:
        like = GPTConfig(n_layer=12, n_head=12, dim=768)
        notes.append("the fit does not say which models it is of: LlamaGen's, of 256 tokens from 16384 codes, assumed")
    count = record.get("count")
    if count is None:
        count = "total"
        notes.append("the fit does not say what its N counts: all parameters assumed")
    source = {"path": str(path), "sha256": sha256_file(path), "form": form}
    stated, largest = "model" in record, float(points.flops.max())
    return Basis(fit, resampled, refused, like, stated, count, tuple(notes), largest, source)
