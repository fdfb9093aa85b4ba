"""What must be known to reproduce a result, or to refuse to compare it with another."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llamagen_dist.errors import UserError

FORMAT = 1
VALUES = {
    "fid": ("fid",),
    "sfid": ("sfid",),
    "fid_infinity": ("fid_infinity",),
    "kid": ("kid_mean", "kid_std"),
    "precision_recall": ("precision", "recall"),
    "density_coverage": ("density", "coverage"),
    "inception_score": ("inception_score",),
    "class_agreement": ("class_agreement",),
    "fd_dinov2": ("fd_dinov2",),
    "clip_score": ("clip_score",),
}
"""Metric -> the keys it has in a result."""


def bias(n: int | None, dimensions: int, rough: Sequence[str] = ()) -> str:
    """What a reader must know about the number of images.

    rough: the sets whose covariance is singular and known by moments alone, see ``Comparison.rough``.
    """
    count = "N differs by set" if n is None else f"N={n}"
    text = f"{count}: FID and sFID are biased upward for few images; compare only with equal N"
    if rough:
        text += (
            f" (the covariance of {' and '.join(rough)} is singular, and of it the moments alone are known: half the "
            "digits of the distance are lost, so that about three are left)"
        )
    elif n is not None and n <= dimensions:
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


def common(*results: Mapping[str, Any]) -> dict[str, list[str]]:
    """Set -> the metrics that all results have of it."""
    shared = {}
    for name in results[0]["sets"]:
        values = [result["sets"].get(name, {}) for result in results]
        metrics = [m for m, keys in VALUES.items() if all(key in one for one in values for key in keys)]
        if metrics:
            shared[name] = metrics
    return shared


def differences(a: Mapping[str, Any], b: Mapping[str, Any], shared: Mapping[str, list[str]] | None = None) -> list[str]:
    """``what: in a -> in b`` for everything that makes metrics of two results incomparable.

    shared: the sets and metrics that matter; None: those of ``common``. How the pictures were drawn (guidance, seed)
    is what a comparison is about, and no reason to refuse it.
    """
    shared = common(a, b) if shared is None else shared
    metrics = sorted({metric for names in shared.values() for metric in names})
    pairs: list[tuple[str, Any, Any]] = []
    for metric in metrics:
        pairs += _leaves(metric, *(result["record"]["metrics"].get(metric) for result in (a, b)))
    for name, known in shared.items():
        pairs.append((f"{name}: number of images", a["sets"][name]["n"], b["sets"][name]["n"]))
        looked_at: dict[str, tuple[str, ...]] = {"images": ("size", "resized")}
        if set(known) - {"class_agreement", "inception_score", "clip_score"}:
            looked_at["reference"] = ("n", "sha256", "sha256_of_statistics", "resized")
        if "clip_score" in known:
            looked_at["images"] += ("captions",)
        for side, keys in looked_at.items():
            left, right = (result["record"]["sets"][name].get(side, {}) for result in (a, b))
            what = "reference images" if side == "reference" else "images"
            pairs += [(f"{name}: {what}, {key}", left.get(key), right.get(key)) for key in keys]
        made = [result["record"]["sets"][name].get("images", {}).get("made_by") or {} for result in (a, b)]
        pairs.append((f"{name}: perturbed codes", made[0].get("perturbed"), made[1].get("perturbed")))
        pairs.append((f"{name}: mistakes", _mistakes(a, name), _mistakes(b, name)))
    lines = [f"{what}: {left} -> {right}" for what, left, right in pairs if left != right]
    return list(dict.fromkeys(lines))


def _mistakes(result: Mapping[str, Any], name: str) -> str:
    known = [one["mistake"] for one in result["record"].get("mistakes", ()) if one["set"] == name]
    return ", ".join(sorted(set(known))) or "none"


def _leaves(name: str, left: Any, right: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(left, dict) and isinstance(right, dict):
        keys = [*left, *(key for key in right if key not in left)]
        return [leaf for key in keys for leaf in _leaves(f"{name}.{key}", left.get(key), right.get(key))]
    return [(name, left, right)]
