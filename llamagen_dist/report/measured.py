"""What sampling, evaluation and the scaling law left in a quickstart's folder, and their part of results.json."""

import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamagen_dist.errors import UserError
from llamagen_dist.files import read_json

_SCORES = ("fid", "sfid", "kid_mean", "kid_std", "precision", "recall")
_ANCHORS = {
    "fid_real": "held_out",
    "rfid": "reconstruction",
    "fid_untrained": "untrained",
    "fid_unigram": "unigram",
}
_PREDICTION = ("params", "tokens", "predicted", "ci95", "measured", "naive")


@dataclass(frozen=True, eq=False)
class Samples:
    """images: uint8 [n, H, W, 3]; labels: int64 [n]; record: record.json, empty where it is missing."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    record: Mapping[str, Any]


def read_samples(folder: Path) -> Samples | None:
    """The model's pictures, or None where there are none. Raises UserError if the file is damaged."""
    path = folder / "model.npz"
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            images, labels = file["arr_0"], file["labels"]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or labels.shape != images.shape[:1]:
            raise ValueError(f"{images.dtype} {list(images.shape)} with {list(labels.shape)} labels")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not pictures with labels ({error}); run the stage sample again") from None
    return Samples(images, labels.astype(np.int64), read_object(folder / "record.json"))


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file. Raises UserError for anything else."""
    return read_json(path) if path.exists() else {}


def scores_result(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """results.json's ``eval``: the model's scores, those of what it is to be compared with, why others are absent."""
    sets = evaluation.get("sets", {})
    model = sets.get("model", {})
    found = {"n": model.get("n", evaluation.get("n"))} | {key: finite(model.get(key)) for key in _SCORES}
    found |= {key: finite(sets.get(name, {}).get("fid")) for key, name in _ANCHORS.items()}
    found["class_agreement"] = finite(model.get("class_agreement"))
    found["class_agreement_real"] = finite(evaluation.get("class_agreement_real"))
    found["absent"] = evaluation.get("absent") or None
    return {key: value for key, value in found.items() if value is not None} if sets else {}


def scaling_result(scaling: Mapping[str, Any]) -> dict[str, Any]:
    """results.json's ``scaling``: the held-out run after all its tokens, foretold and measured."""
    one = scaling.get("prediction") or {}
    return {key: one[key] for key in _PREDICTION if one.get(key) is not None}


def finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
