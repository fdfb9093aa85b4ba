"""load() and dump(): YAML files merged left to right, then ``key=value``, become one frozen section."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llamagen_dist.config.data import ExtractConfig
from llamagen_dist.config.evaluate import (
    EvaluateConfig,
    NeighboursConfig,
    ReconstructConfig,
    ReferenceConfig,
    SampleConfig,
    TokenLossConfig,
)
from llamagen_dist.config.launch import ClusterConfig, PipelineConfig, SweepConfig
from llamagen_dist.config.pack import PackConfig
from llamagen_dist.config.search import SearchConfig
from llamagen_dist.config.section import Section, build, nearest
from llamagen_dist.config.tokenizer import TokenizerConfigFile
from llamagen_dist.config.tokenizers import TokenizersConfig
from llamagen_dist.config.training import GPTConfigFile
from llamagen_dist.config.yaml_text import merge, parse, read, text_of
from llamagen_dist.errors import UserError

KINDS: dict[str, type[Section]] = {
    "gpt": GPTConfigFile,
    "tokenizer": TokenizerConfigFile,
    "extract": ExtractConfig,
    "pipeline": PipelineConfig,
    "sample": SampleConfig,
    "reconstruct": ReconstructConfig,
    "evaluate": EvaluateConfig,
    "neighbours": NeighboursConfig,
    "token_loss": TokenLossConfig,
    "reference": ReferenceConfig,
    "search": SearchConfig,
    "tokenizers": TokenizersConfig,
    "cluster": ClusterConfig,
    "sweep": SweepConfig,
    "pack": PackConfig,
}


def load(
    files: str | Path | Sequence[str | Path],
    overrides: Iterable[str] | Mapping[str, Any] = (),
    kind: str | None = None,
    complete: bool = False,
) -> Any:
    """Read one config.

    files: one YAML file or several, merged left to right.
    overrides: ``key=value`` words, or a nested mapping, merged over them.
    kind: the kind the caller can use; another one is an error.
    complete: also find what only a start would, see ``section.build``.

    Returns a frozen section (see KINDS). Raises UserError with every problem, one line each.
    """
    paths = [Path(files)] if isinstance(files, (str, Path)) else [Path(f) for f in files]
    data: dict[str, Any] = {}
    for path in paths:
        data = merge(data, read(path))
    data = merge(data, overrides if isinstance(overrides, Mapping) else parse(overrides))
    return resolve(data, str(paths[-1]), kind, complete)


def resolve(data: Mapping[str, Any], source: str, kind: str | None = None, complete: bool = False) -> Any:
    """A whole file's content as the section its kind names; see ``load``."""
    named = data.get("kind")
    if not isinstance(named, str) or named not in KINDS:
        what = "missing" if named is None else f"{named!r} is unknown"
        raise UserError(f"{source}: kind: {what}; {nearest(str(named), KINDS)}")
    if kind is not None and named != kind:
        raise UserError(f"{source}: kind is {named!r}, but this program reads kind: {kind}")
    return build(KINDS[named], data, source, complete)


def dump(section: Section) -> str:
    """The resolved config as YAML text; ``load`` of it gives an equal section back."""
    return text_of(section.model_dump(mode="json"))


def difference(old: Section, new: Section, ignore: Iterable[str] = ()) -> list[str]:
    """Dotted keys that differ, as ``key: old -> new`` lines; keys under a prefix in ``ignore`` are left out."""

    def flat(value: Any, prefix: str = "") -> dict[str, Any]:
        if isinstance(value, dict) and value:
            return {k: v for name, inner in value.items() for k, v in flat(inner, f"{prefix}{name}.").items()}
        return {prefix[:-1]: value}

    # as text would have it: a path and its string, a tuple and a list are no difference
    left, right = (flat(section.model_dump(mode="json")) for section in (old, new))
    both = {key: (left.get(key, "(absent)"), right.get(key, "(absent)")) for key in sorted(left.keys() | right.keys())}
    skipped = tuple(ignore)
    return [
        f"{key}: {before} -> {now}"
        for key, (before, now) in both.items()
        if before != now and not any(f"{key}.".startswith(f"{prefix}.") for prefix in skipped)
    ]
