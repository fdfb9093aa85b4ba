"""What must be known to reproduce a result, or to refuse to compare it with another."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamagen_dist.errors import UserError

FORMAT = 1
VALUES = {
    "fid": ("fid",),
    "sfid": ("sfid",),
    "kid": ("kid_mean", "kid_std"),
    "precision_recall": ("precision", "recall"),
    "inception_score": ("inception_score",),
    "class_agreement": ("class_agreement",),
}
"""Metric -> the keys it has in a result."""


def bias(n: int | None, dimensions: int) -> str:
    """What a reader must know about the number of images."""
    count = "N differs by set" if n is None else f"N={n}"
    text = f"{count}: FID and sFID are biased upward for few images; compare only with equal N"
    if n is not None and n <= dimensions:
        text += f" (N <= {dimensions} dimensions, so the covariances are singular; the distance is still exact)"
    return text


def read_result(path: Path) -> dict[str, Any]:
    """A file that eval.evaluate wrote. Raises UserError for anything else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["record"]["format"] != FORMAT:
            raise ValueError(f"format {data['record']['format']} is not {FORMAT}, the one this version reads")
        for name, values in data["sets"].items():
            if bad := [key for key, value in values.items() if not math.isfinite(value)]:
                raise ValueError(f"{bad[0]} of the set {name} is {values[bad[0]]}")
            if "n" not in values or "sha256" not in data["record"]["sets"][name]["reference"]:
                raise ValueError(f"the set {name} is incomplete")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; eval.evaluate writes it (out=FILE.json)") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a result of eval.evaluate ({type(error).__name__}: {error})") from None
    return dict(data)


def common(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[str]]:
    """Set -> the metrics that both results have of it."""
    shared = {}
    for name in a["sets"]:
        other = b["sets"].get(name, {})
        metrics = [m for m, keys in VALUES.items() if all(k in a["sets"][name] and k in other for k in keys)]
        if metrics:
            shared[name] = metrics
    return shared


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """``what: in a -> in b`` for everything that makes the common metrics of two results incomparable."""
    shared = common(a, b)
    metrics = sorted({metric for names in shared.values() for metric in names})
    pairs: list[tuple[str, Any, Any]] = []
    for metric in metrics:
        pairs += _leaves(metric, *(result["record"]["metrics"].get(metric) for result in (a, b)))
    for name, known in shared.items():
        pairs.append((f"{name}: number of images", a["sets"][name]["n"], b["sets"][name]["n"]))
        if known != ["class_agreement"] and known != ["inception_score"]:
            for key in ("n", "sha256"):
                references = [result["record"]["sets"][name]["reference"].get(key) for result in (a, b)]
                pairs.append((f"{name}: reference images, {key}", *references))
    lines = [f"{what}: {left} -> {right}" for what, left, right in pairs if left != right]
    return list(dict.fromkeys(lines))


def _leaves(name: str, left: Any, right: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(left, dict) and isinstance(right, dict):
        keys = [*left, *(key for key in right if key not in left)]
        return [leaf for key in keys for leaf in _leaves(f"{name}.{key}", left.get(key), right.get(key))]
    return [(name, left, right)]
