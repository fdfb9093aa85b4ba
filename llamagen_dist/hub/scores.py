"""What was measured on the very weights that are exported: named by the sha256 in the records, or not taken."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llamagen_dist.checkpoint.checkpoint import Checkpoint
from llamagen_dist.config import GPTConfigFile, TokenizerConfigFile, is_remote
from llamagen_dist.data.manifest import MANIFEST, read_manifest
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation.record import VALUES, read_result
from llamagen_dist.files import json_if_there, read_jsonl

DRAWN = {"model": ("model.npz", "checkpoint"), "tokenizer": ("reconstruction.npz", "tokenizer")}
"""Part -> the file of its pictures, and the key of record.json beside it for the path of its weights."""
SETTINGS = ("cfg_scale", "cfg_interval", "guidance", "temperature", "top_k", "top_p", "seed")


@dataclass(frozen=True)
class Scores:
    """Numbers of one set of images (or tokens).

    part: ``model`` or ``tokenizer``.
    what: what was measured, in words.
    n: images measured; None where that is not known.
    reference: what they were compared with, in words.
    reference_n: images of it; None where only statistics of it were there.
    settings: how the images were drawn.
    evaluation: the whole result of eval.evaluate, without folders of the machine; empty where there is none.
    """

    part: str
    what: str
    values: Mapping[str, float]
    n: int | None
    reference: str
    reference_n: int | None = None
    reference_sha256: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    file: str = ""
    evaluation: Mapping[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, Any]:
        return {"part": self.part, "what": self.what, "values": dict(self.values), "n": self.n}


Drawn = list[tuple[str, str, Mapping[str, Any]]]
"""(set of a result, part that drew its images, record of how it did)."""


def of_images(
    identities: Mapping[str, str], given: Path | None, folders: Sequence[Path]
) -> tuple[list[Scores], list[str]]:
    """(scores of the parts named by ``identities``, what to note about those that are not there).

    given: a file of eval.evaluate; None looks for an evaluation.json in ``folders``.
    Raises UserError for a file that was given and holds no score of these weights, saying why.
    """

    def why_not(part: str, record: Mapping[str, Any]) -> str:
        if part not in identities:
            return "not drawn by a trained model"
        return "" if record.get(f"{DRAWN[part][1]}_sha256") == identities[part] else "drawn with other weights"

    file, result, drawn, reasons = _find(given, folders, why_not, "these weights")
    if not drawn:
        why = f" ({'; '.join(reasons)})" if reasons else ""
        return [], [f"No evaluation of these weights was found{why}; --evaluation FILE.json names one."]
    scores = [_scores(result, name, part, record, file) for name, part, record in drawn]
    return scores, [f"Absent from the evaluation: {m}: {why}." for m, why in result.get("absent", {}).items()]


def of_run(run: Path, given: Path | None) -> dict[str, float | str]:
    """``evaluation/SET/METRIC`` -> what was measured on images that a checkpoint of ``run`` drew, and of which weights.

    given: a file of eval.evaluate; None looks for an evaluation.json in the run's folder and the two above it.
    Raises UserError for a file that was given and holds no score of this run, saying why.
    """
    here = run.resolve()

    def why_not(part: str, record: Mapping[str, Any]) -> str:
        drawn_by = Path(str(record.get(DRAWN[part][1]))).resolve()
        return "" if here in (drawn_by, *drawn_by.parents) else f"drawn with {drawn_by}"

    _, result, drawn, _ = _find(given, (here, here.parent, here.parent.parent), why_not, "this run")
    values: dict[str, float | str] = {}
    for name, part, record in drawn:
        sha256 = str(record.get(f"{DRAWN[part][1]}_sha256"))
        known = {**_values(result["sets"][name]), "n": result["sets"][name]["n"], "weights_sha256": sha256}
        values |= {f"evaluation/{name}/{key}": value for key, value in known.items()}
    return values


def _find(
    given: Path | None, folders: Sequence[Path], why_not: Callable[[str, Mapping[str, Any]], str], whose: str
) -> tuple[str, dict[str, Any], Drawn, list[str]]:
    """(file, result, its sets whose pictures are ours, why others are not) of the first evaluation that has such.

    why_not(part, record of how it drew): why that is not ours; empty where it is.
    """
    files = [given] if given else [f / "evaluation.json" for f in folders if (f / "evaluation.json").exists()]
    reasons: list[str] = []
    for file in files:
        try:
            result = read_result(file)
        except UserError as error:
            if given is not None:
                raise UserError(f"--evaluation: {error}") from None
            reasons.append(str(error))
            continue
        drawn: Drawn = []
        for name in result["sets"]:
            path = Path(str(result["record"]["sets"][name]["images"].get("path", "")))
            part = next((part for part, (pictures, _) in DRAWN.items() if path.name == pictures), None)
            record = json_if_there(path.parent / "record.json")
            if part is None:
                why = "not drawn by a trained model"
            elif record is None:
                why = f"{path.parent / 'record.json'}, which names the weights that drew it, is gone"
            else:
                why = why_not(part, record)
            if why:
                reasons.append(f"{file}, set {name}: {why}")
            else:
                assert part is not None
                drawn.append((name, part, record or {}))
        if drawn:
            return file.name, result, drawn, reasons
    if given is not None:
        raise UserError(f"--evaluation: {given} has no score of {whose} ({'; '.join(reasons)})")
    return "", {}, [], reasons


def _values(measured: Mapping[str, float]) -> dict[str, float]:
    return {key: measured[key] for keys in VALUES.values() for key in keys if key in measured}


def _scores(result: Mapping[str, Any], name: str, part: str, drawn: Mapping[str, Any], file: str) -> Scores:
    values, reference = result["sets"][name], result["record"]["sets"][name]["reference"]
    what = "images drawn from the model" if part == "model" else "held-out images through the tokenizer and back"
    return Scores(
        part,
        what,
        _values(values),
        values["n"],
        _short(str(reference.get("path", ""))) or "real images",
        reference.get("n"),
        reference.get("sha256"),
        {key: drawn[key] for key in SETTINGS if key in drawn},
        file,
        without_folders(result),
    )


def held_out_loss(run: Path, checkpoint: Checkpoint, trained: GPTConfigFile | TokenizerConfigFile) -> Scores | None:
    """The held-out numbers that the run logged at this very checkpoint; None where it logged none there."""
    seen, found = checkpoint.state.get("images_seen"), None
    try:
        for line in read_jsonl(run / "metrics.jsonl", strict=True):
            if "val_loss" in line and line.get("images_seen") == seen:
                found = line
    except FileNotFoundError:
        return None
    if found is None:
        return None
    looks = ("psnr", "ssim", "ssim_llamagen", "rfid", "lpips", "lpips-hed", "lpips-custom")
    keys = ("val_loss", "val_loss_null", *looks, "codebook_usage", "codebook_perplexity")
    validation, n, sha256 = trained.data.validation, trained.validation.images, None
    if not is_remote(validation) and (Path(validation) / MANIFEST).exists():
        manifest = read_manifest(Path(validation))
        n, sha256 = min(n or manifest.count, manifest.count), manifest.fingerprint()
    part, unit = ("model", ", nats per token") if isinstance(trained, GPTConfigFile) else ("tokenizer", "")
    return Scores(
        part,
        f"held-out loss while training{unit}",
        {key: found[key] for key in keys if key in found},
        n,
        _short(str(validation)),
        n,
        sha256,
    )


def without_folders(value: Any) -> Any:
    """JSON with every absolute path cut to its last two parts: where a lab keeps its files is nobody's business."""
    if isinstance(value, Mapping):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    return _short(value) if isinstance(value, str) else value


def _short(text: str) -> str:
    return "/".join(Path(text).parts[-2:]) if re.fullmatch(r"/[^\s]*", text) else text
