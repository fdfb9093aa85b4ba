"""The model card: README.md with front matter that model hubs read, and only what was measured."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import yaml
from torch import Tensor

from llamagen_dist import __version__
from llamagen_dist.hub.scores import Scores
from llamagen_dist.models.quantizer import STATE

NAMES = {
    "fid": "FID",
    "sfid": "sFID",
    "kid_mean": "KID (mean over subsets)",
    "kid_std": "KID (standard deviation over subsets)",
    "precision": "precision",
    "recall": "recall",
    "inception_score": "Inception score",
    "class_agreement": "share in which a classifier finds the class that was asked for",
    "val_loss": "held-out loss",
    "val_loss_null": "held-out loss without condition",
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "ssim_llamagen": "SSIM as LlamaGen computes it (data range 2)",
    "rfid": "rFID",
    "lpips": "LPIPS",
    "lpips-hed": "LPIPS on an edge-tuned VGG16 (lpips-hed)",
    "codebook_usage": "share of codes used",
    "codebook_perplexity": "codes that would do if all were used alike",
}

USE_GPT = """\
```python
import torch
from load import load  # of this folder

gpt = load("model")
condition = {condition}
tokens = gpt.generate(condition, cfg_scale=2.0)  # (1, {tokens}) int64, in raster order
logits = gpt(tokens, condition)                  # (1, {tokens}, {codes}): what predicts each of them
```
"""
USE_TOKENIZER = """\
```python
import torch
from load import load  # of this folder

tokenizer = load("tokenizer")
images = tokenizer.decode(codes)   # codes int64 (B, h, w) -> (B, 3, {factor} h, {factor} w), nominally in [-1, 1]
codes = tokenizer.encode(images)   # and back
```
"""


@dataclass
class Export:
    """What is exported, and what there is to say about it.

    kind: ``class-conditional GPT``, ``text-conditional GPT`` or ``tokenizer``.
    group: ``weights`` or ``ema``, of the weights named by the run.
    weights, config: of each part, ``model`` and ``tokenizer``, one of which may be absent.
    identities: sha256 over each part's weights, as samples and scores name them.
    about: what is known of the training.
    scores: measured on these very weights.
    notes: what was left out or could not be found, a sentence each.
    """

    name: str
    kind: str
    group: str
    weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    identities: dict[str, str] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    scores: list[Scores] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        """Of the part that the run trained; buffers are none."""
        main = "tokenizer" if self.kind == "tokenizer" else "model"
        buffers = (*STATE, "cls_embedding.uncond_embedding")
        return sum(tensor.numel() for name, tensor in self.weights[main].items() if name not in buffers)


def card(export: Export) -> str:
    """The text of README.md."""
    front: dict[str, Any] = {
        "library_name": "pytorch",
        "tags": ["llamagen", "autoregressive-image-generation", export.kind.lower().replace(" ", "-")],
    }
    if export.config.get("model", {}).get("condition") == "text":
        front["pipeline_tag"] = "text-to-image"
    if export.scores:
        front["model-index"] = [{"name": export.name, "results": [_result(export, score) for score in export.scores]}]
    matter = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=110)
    return f"---\n{matter}---\n\n" + "\n".join(_sections(export))


def _result(export: Export, score: Scores) -> dict[str, Any]:
    """One entry of the model index: a hub shows its metrics beside the data they were measured on."""
    task = "text-to-image" if export.kind.startswith("text") else "unconditional-image-generation"
    details = {
        "images": score.n,
        "reference_images": score.reference_n,
        "reference_sha256": score.reference_sha256,
        "record": score.file or None,
        **score.settings,
    }
    known = {key: value for key, value in details.items() if value is not None}
    return {
        "task": {"type": "image-to-image" if score.part == "tokenizer" else task, "name": score.what},
        "dataset": {"type": "image-folder", "name": score.reference},
        "metrics": [  # a dictionary each: YAML would write the same one as a reference, which few readers expect
            {"type": key, "name": NAMES[key], "value": value, "args": dict(known)}
            for key, value in score.values.items()
        ],
    }


def _sections(export: Export) -> Iterable[str]:
    kind = "image tokenizer" if export.kind == "tokenizer" else export.kind
    group = ", moving average of the weights" if export.group == "ema" else ""
    yield f"# {export.name}\n"
    yield (
        f"A {kind} of LlamaGen (arXiv 2406.06525) with {export.parameters:,} parameters{group}, trained and exported "
        f"by llamagen-dist {__version__}. Every number below is copied from a record of this run; what was not "
        "measured is not here.\n"
    )
    yield "## Use\n\nNeeds torch and safetensors, nothing else.\n"
    if "model" in export.config:
        model = export.config["model"]
        condition = "torch.tensor([0])  # a class; config.json has their names"
        if model["condition"] == "text":
            condition = "(features, mask)  # of the text encoder, left-padded: (1, T, C) and (1, T) bool"
        yield USE_GPT.format(condition=condition, tokens=model["image_tokens"], codes=model["vocab_size"])
    if "tokenizer" in export.config:
        yield USE_TOKENIZER.format(factor=export.config["tokenizer"]["downsampling"])
    yield from _measured(export)
    yield "## Training\n"
    facts = {key: export.about[key] for key in ("images_seen", "step") if key in export.about}
    yield from (f"* {key.replace('_', ' ')}: {value:,}" for key, value in facts.items())
    yield "* options: `trained_with` in config.json\n"
    if export.notes:
        yield "## Notes\n"
        yield from (f"* {' '.join(note.split())}" for note in export.notes)
        yield ""


def _measured(export: Export) -> Iterable[str]:
    yield "## Measured\n"
    if not export.scores:
        yield "Nothing.\n"
        return
    yield "| what | metric | value | N | reference | its N |\n|---|---|---|---|---|---|"
    for score in export.scores:
        for key, value in score.values.items():
            counts = ["unknown" if n is None else f"{n:,}" for n in (score.n, score.reference_n)]
            yield f"| {score.what} | {NAMES[key]} | {value:.6g} | {counts[0]} | {score.reference} | {counts[1]} |"
    yield ""
    for score in export.scores:
        if score.settings:
            yield f"Drawn with {', '.join(f'{key} {value}' for key, value in score.settings.items())}.\n"
        if bias := score.evaluation.get("record", {}).get("bias"):
            yield f"{bias}. Protocol, extractor and hashes of the images: `evaluation.json`.\n"
