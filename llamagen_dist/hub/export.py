"""A finished run as a folder that needs torch and safetensors alone: weights, config, code, loader, model card."""

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from llamagen_dist import __version__
from llamagen_dist.build import gpt_config
from llamagen_dist.checkpoint import llamagen
from llamagen_dist.checkpoint.checkpoint import Checkpoint
from llamagen_dist.checkpoint.llamagen import CLASSES
from llamagen_dist.config import GPTConfigFile, TokenizerConfigFile, is_remote
from llamagen_dist.data.manifest import MANIFEST, read_manifest
from llamagen_dist.errors import UserError
from llamagen_dist.files import OutputFolder, json_if_there, remove_asides, sha256_file, written_aside
from llamagen_dist.hub import plain
from llamagen_dist.hub.card import Export, card
from llamagen_dist.hub.scores import held_out_loss, of_images
from llamagen_dist.models import fixed_codebooks, learned_codebooks, quantizer, quantizers, vq
from llamagen_dist.models.gpt import GPTConfig
from llamagen_dist.sampling.load import WEIGHTS, Tokenizer, load_tokenizer, maker_of, open_checkpoint, tokenizer_of

FORMAT = 1
RECORD = "export.json"
FILES = (
    *("config.json", "load.py", "README.md", "evaluation.json"),
    *(f"{part}.{suffix}" for part in ("model", "tokenizer") for suffix in ("py", "safetensors")),
)
LOADER = '''"""Opens what is in this folder with torch and safetensors alone; README.md shows how it is used."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
CONFIG = json.loads((HERE / "config.json").read_text(encoding="utf-8"))


def load(part="model"):
    """The GPT (``model``) or the image tokenizer (``tokenizer``), in evaluation mode. KeyError: it is not here."""
    config = SimpleNamespace(**CONFIG[part])
    if part == "model":
        from model import GPT as Kind
    else:
        from tokenizer import VQModel as Kind
    with torch.device("meta"):  # its weights come from the file
        module = Kind(config)
    module.load_state_dict(load_file(HERE / f"{part}.safetensors"), assign=True)
    return module.eval()
'''


def read_run(
    path: Path, which: str | None = None, tokenizer: Path | None = None, evaluation: Path | None = None
) -> Export:
    """All that there is to export of a run.

    path: the run's directory, or one of its step_… folders.
    which: ``weights`` or ``ema``; None: the average where the run kept one.
    tokenizer: of a GPT; None: the one that its token shards name, if that is there.
    evaluation: a file of eval.evaluate; None: an evaluation.json in the run's folder or the two above it.

    Raises UserError: not a run, not finished, damaged, a tokenizer or an evaluation of other weights.
    """
    checkpoint = open_checkpoint(path, "RUN", which=which)
    trained = checkpoint.config
    if checkpoint.folder is None or not isinstance(trained, (GPTConfigFile, TokenizerConfigFile)):
        raise UserError(f"RUN: {path} is a bare weights file, which does not say what it was trained with; give a run")
    run = checkpoint.folder.parent.parent
    if path.resolve() != checkpoint.folder.resolve() and not (run / "summary.json").exists():
        seen, wanted = checkpoint.state.get("images_seen"), trained.train.images
        so_far = "" if seen is None else f"; its newest checkpoint has {seen:,} of {wanted:,} images"
        raise UserError(
            f"RUN: {path} is not finished (no summary.json){so_far}; finish it, or name the checkpoint to export: "
            f"{checkpoint.folder}"
        )
    if which is None and trained.ema.decay > 0:
        which = "ema"
        checkpoint = open_checkpoint(path, "RUN", which=which)
    if isinstance(trained, TokenizerConfigFile):
        if tokenizer is not None:
            raise UserError(f"--tokenizer: {path} is a tokenizer's run itself")
        export = Export(run.name, "tokenizer", which or "weights")
        _put_tokenizer(export, load_tokenizer(path, key="RUN", weights="ema" if which == "ema" else "trained"))
    else:
        export = _gpt_run(checkpoint, trained, run, which or "weights")
        _add_tokenizer(export, checkpoint, trained, tokenizer)
    export.about |= {key: checkpoint.state[key] for key in ("images_seen", "step") if key in checkpoint.state}
    export.about["trained_with"] = trained.model_dump(mode="json", include={"optim", "train", "compute", "ema"})
    if export.group == "ema":
        export.notes.append("The weights are the moving average of training; --weights model exports the others.")
    scores, notes = of_images(export.identities, evaluation, (run, run.parent, run.parent.parent))
    export.scores += scores
    export.notes += notes
    measured = WEIGHTS[trained.validation.weights]
    if export.group == measured and (loss := held_out_loss(run, checkpoint, trained)) is not None:
        export.scores.append(loss)
    return export


def _gpt_run(checkpoint: Checkpoint, trained: GPTConfigFile, run: Path, group: str) -> Export:
    shapes = checkpoint.shapes
    if "output.weight" not in shapes:
        raise UserError(f"RUN: {checkpoint.path} holds no output.weight: these are not the weights of a GPT")
    rows, columns = checkpoint.state.get("grid") or (1, 1)
    if rows != columns:
        raise UserError(f"RUN: {checkpoint.path} draws prefix tokens, which cannot be exported yet")
    config = gpt_config(
        trained.model,
        vocab_size=shapes["output.weight"][0],
        image_tokens=_image_tokens(run, trained),
        num_classes=shapes[CLASSES][0] - 1 if CLASSES in shapes else None,
        tensors=shapes,
    )
    if (reason := llamagen.beyond(shapes)) is not None:
        raise UserError(f"RUN: {checkpoint.path} {reason}")
    export = Export(run.name, f"{config.condition}-conditional GPT", group)
    export.config["model"] = plain_config(config)
    export.weights["model"] = checkpoint.read_all()
    export.identities["model"] = checkpoint.identity
    if checkpoint.classes is not None:
        export.config["classes"] = checkpoint.classes
    if config.condition == "text" and checkpoint.state.get("captions"):
        export.config["captions"] = checkpoint.state["captions"]
    with torch.device("meta"):
        model = plain.GPT(SimpleNamespace(**export.config["model"]))  # as the exported loader makes it
    _check_fit(model, export.weights["model"], checkpoint.path)
    return export


def _image_tokens(run: Path, trained: GPTConfigFile) -> int:
    """Tokens of one image: no weight shows them."""
    summary = json_if_there(run / "summary.json") or {}
    if isinstance(summary.get("tokens_per_image"), int):
        return int(summary["tokens_per_image"])
    tokens = trained.data.train
    if is_remote(tokens) or not (Path(tokens) / MANIFEST).exists():
        raise UserError(
            f"RUN: how many tokens an image has is not known: {run} has no summary.json, and its token shards "
            f"({tokens}) are not there"
        )
    return int(read_manifest(Path(tokens)).gpt_sizes(tokens)["image_tokens"])


def plain_config(config: GPTConfig) -> dict[str, Any]:
    """Everything that plain.GPT reads, nothing left to a default."""
    names = ["n_layer", "n_head", "dim", "ffn_dim", "vocab_size", "image_tokens", "condition", "num_classes"]
    names += ["prefix_rotation", "qk_norm", "norm_eps", "rope_base"]
    names += ["caption_dim"] if config.condition == "text" else []
    values = {name: getattr(config, name) for name in names}
    return {**values, "n_kv_head": config.kv_heads, "prefix_tokens": config.prefix}


def _check_fit(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:300]
        raise UserError(f"RUN: the weights in {path} do not fit its config: {first}") from None


def _add_tokenizer(export: Export, checkpoint: Checkpoint, trained: GPTConfigFile, given: Path | None) -> None:
    """The GPT's tokenizer, if it is known and there. Raises UserError for one of other tokens."""
    try:
        path = given or tokenizer_of(checkpoint)
    except UserError as error:
        export.notes.append(f"Without its tokenizer: {error}.")
        return
    tokenizer = load_tokenizer(path, key="--tokenizer", made=maker_of(checkpoint))
    tokens = trained.data.train
    if not is_remote(tokens) and (Path(tokens) / MANIFEST).exists():
        made_with = read_manifest(Path(tokens)).tokenizer_sha256
        if made_with is not None and made_with != tokenizer.sha256:
            raise UserError(
                f"--tokenizer: {path} (sha256 {tokenizer.sha256[:12]}…) is not the one whose tokens "
                f"{checkpoint.path} was trained on (sha256 {made_with[:12]}…)"
            )
    elif tokenizer.model.config.codebook_size != export.config["model"]["vocab_size"]:
        raise UserError(
            f"--tokenizer: {path} has {tokenizer.model.config.codebook_size} codes, and {checkpoint.path} was trained "
            f"on {export.config['model']['vocab_size']}"
        )
    _put_tokenizer(export, tokenizer)


def _put_tokenizer(export: Export, tokenizer: Tokenizer) -> None:
    config = tokenizer.model.config
    if config.tokens == "prefix":
        raise UserError(f"RUN: {tokenizer.path} makes prefix tokens, which cannot be exported yet")
    export.config["tokenizer"] = {**asdict(config), "downsampling": config.downsampling}
    if tokenizer.image_size is not None:
        export.config["image_size"] = tokenizer.image_size
    export.weights["tokenizer"] = tokenizer.model.state_dict()
    export.identities["tokenizer"] = tokenizer.sha256


# --- the folder ---


def tokenizer_source() -> str:
    """The quantizers and models/vq.py as one file that imports nothing of this package."""
    modules = (quantizer, learned_codebooks, fixed_codebooks, quantizers, vq)
    parts = [inspect.getsource(module) for module in modules]
    text = "\n\n".join(re.sub(r"^(from llamagen_dist\.|__all__ = ).*\n", "", part, flags=re.M) for part in parts)
    begin = '"""LlamaGen\'s image tokenizer in plain torch: its codebook, then the autoencoder around it."""\n\n'
    return f"{begin}from types import SimpleNamespace as VQConfig  # the object tokenizer of config.json\n\n{text}"


def write(export: Export, out: Path) -> bool:
    """Write the folder; False: the very same export is there already. Raises UserError where anything else is."""
    files: dict[str, Callable[[Path], Any]] = {
        "config.json": _text(json.dumps(_config(export), indent=1, ensure_ascii=False) + "\n"),
        "load.py": _text(LOADER),
        "README.md": _text(card(export)),
    }
    for part, source in (("model", inspect.getsource(plain)), ("tokenizer", tokenizer_source())):
        if part in export.weights:
            files[f"{part}.py"] = _text(source)
            files[f"{part}.safetensors"] = _tensors(export.weights[part])
    if (evaluation := next((score.evaluation for score in export.scores if score.evaluation), None)) is not None:
        files["evaluation.json"] = _text(json.dumps(evaluation, indent=1, ensure_ascii=False) + "\n")
    identity = {
        "format": FORMAT,
        "llamagen_dist": __version__,
        "weights": export.group,
        "sha256": export.identities,
        "scores": [score.identity for score in export.scores],
    }
    folder = OutputFolder(out, identity, RECORD, what="an exported model", key="--out")
    if folder.finished(out / name for name in files) is not None:
        return False

    def discard() -> None:  # what an export of something else left that was cut off
        remove_asides(out)
        for name in FILES:
            (out / name).unlink(missing_ok=True)

    try:
        there = [path for path in out.iterdir() if path != folder.parts] if out.exists() else []
    except OSError as error:
        raise UserError(f"--out: {out} cannot be read as a folder ({error.strerror})") from None
    folder.begin(foreign=there, discard=discard)
    try:
        for name, write_file in files.items():
            with written_aside(out / name) as aside:
                write_file(aside)
    except (OSError, RuntimeError) as error:  # safetensors reports a full disk as an error of its own
        raise UserError(f"--out: {out} cannot be written ({str(error).splitlines()[0]})") from None
    folder.finish({"files": {name: sha256_file(out / name) for name in files}, "notes": export.notes})
    return True


def _config(export: Export) -> dict[str, Any]:
    return {"format": FORMAT, "name": export.name, "kind": export.kind, **export.config, **export.about}


def _text(text: str) -> Callable[[Path], Any]:
    return lambda path: path.write_text(text, encoding="utf-8")


def _tensors(weights: dict[str, Tensor]) -> Callable[[Path], Any]:
    from safetensors.torch import save_file

    return lambda path: save_file({k: v.contiguous() for k, v in weights.items()}, path, metadata={"format": "pt"})
