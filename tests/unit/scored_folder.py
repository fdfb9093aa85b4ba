"""What sampling, scoring and the scaling law add to the made-up quickstart folder, with known numbers."""

import json
from pathlib import Path

import numpy as np

from tests.unit.quickstart_folder import BATCH, SIZES, STEPS, TOKENS, make

CLASSES = ("boot", "<i>coat", "dress")
SIDE, PER_CLASS = 32, 9
N = 500


def sample(label: int, number: int) -> np.ndarray:
    """uint8 [32, 32, 3]: a flat picture that says which class and which of its samples it is."""
    return np.full((SIDE, SIDE, 3), (60 * label + 20, 20 * number, 7), np.uint8)


def add_samples(out: Path) -> None:
    """Sample i has class i modulo their number, as eval.sample draws them."""
    folder = out / "samples"
    folder.mkdir()
    numbers = range(len(CLASSES) * PER_CLASS)
    images = np.stack([sample(i % len(CLASSES), i // len(CLASSES)) for i in numbers])
    labels = np.array([i % len(CLASSES) for i in numbers], np.int64)
    np.savez(folder / "model.npz", arr_0=images, labels=labels)
    record = {"checkpoint": "/runs/ladder/g560k", "cfg_scale": 2.0, "cfg_interval": -1, "temperature": 1.0}
    (folder / "record.json").write_text(json.dumps(record | {"top_k": 0, "top_p": 0.8, "seed": 3, "n": len(labels)}))
    (out / "images" / "train").mkdir(parents=True)
    (out / "images" / "train" / "manifest.json").write_text(json.dumps({"kind": "images", "classes": CLASSES}))


SCORES: dict[str, dict[str, float]] = {
    "model": {
        "fid": 98.25,
        "sfid": 141.5,
        "kid_mean": 0.0452,
        "kid_std": 0.0031,
        "precision": 0.456,
        "recall": 0.372,
        "class_agreement": 0.54,
    },
    "held_out": {"fid": 41.75, "class_agreement": 0.86},
    "reconstruction": {"fid": 61.5},
    "untrained": {"fid": 372.5},
    "unigram": {"fid": 301.5},
}
REASON = "the weights have no <logits> layer"


def add_scores(out: Path) -> None:
    sets = {name: {"n": N, **values} for name, values in SCORES.items()}
    record = {"format": 1, "extractor": {"weights_sha256": "feedbeef"}, "sets": {"model": {"path": "<b>samples"}}}
    found = {"n": N, "sets": sets, "class_agreement_real": 0.874, "record": record}
    (out / "evaluation.json").write_text(json.dumps({**found, "absent": {"inception_score": REASON}}))


def add_law(out: Path, measured: float = 2.05) -> None:
    """A law of the three rungs: the largest is held out; predicted 2.0 with a band of 1.9 to 2.1."""
    tokens = STEPS * BATCH * TOKENS
    names = list(SIZES)
    points = [
        {
            "name": name,
            "params": SIZES[name],
            "params_fit": SIZES[name] / 3,
            "tokens": tokens,
            "loss": measured if name == names[-1] else 2.5 - 0.2 * i,
            "fitted": 2.0 if name == names[-1] else 2.5 - 0.2 * i,
            "held_out": name == names[-1],
        }
        for i, name in enumerate(names)
    ]
    prediction = {
        "name": names[-1],
        "params": SIZES[names[-1]],
        "tokens": tokens,
        "predicted": 2.0,
        "ci95": [1.9, 2.1],
        "measured": measured,
        "naive": 2.3,
        "naive_from": names[-2],
        "band": "95% prediction band; residual bootstrap",
    }
    sizes = np.geomspace(1e4, 1e6, 5)
    law = {
        "form": "chinchilla",
        "formula": "L = E + A / N^alpha + B / D^beta",
        "loss": "huber",
        "delta": 1e-3,
        "params": {"E": 1.5, "A": 40.0, "B": 300.0, "alpha": 0.4, "beta": 0.5},
        "ci95": {"E": [1.25, 1.75]},
        "n": 2,
        "diagnostics": {"runs": 2, "warnings": []},
        "points": points,
        "prediction": prediction,
        "predictions": [prediction],
        "curves": [{"tokens": tokens, "params_fit": sizes.tolist(), "loss": (1.5 + 40 / sizes**0.4).tolist()}],
        "frontier": {
            "best": [
                {"flops": 10.0**i, "params": 10.0 ** (i / 2), "tokens": 10.0 ** (i / 2), "loss": 5 - 0.2 * i}
                for i in range(9, 14)
            ]
        },
        "definitions": {"params": "all trainable parameters"},
    }
    (out / "scaling.json").write_text(json.dumps(law))


def finished_folder(parent: Path) -> Path:
    """A whole quickstart folder under ``parent``: runs, samples, scores and a law."""
    folder = parent / "OUT"
    make(folder)
    add_samples(folder)
    add_scores(folder)
    add_law(folder)
    return folder
