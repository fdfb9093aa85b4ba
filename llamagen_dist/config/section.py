"""What all sections are made of: frozen groups of keys, the kinds of number in them, and one sentence per mistake."""

import difflib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from llamagen_dist.errors import UserError

STRICT = ConfigDict(extra="forbid", protected_namespaces=())


def finite(value: Any, validate: Callable[[Any], Any]) -> Any:
    """A validator around each key's own: no number of a run is infinite, NaN, beyond 64 bits or a truth value.

    YAML reads 1e400 as infinity, pydantic reads the word ``nan`` as a float, and NaN passes some comparisons; so what
    is given and what is made of it are both looked at. Raises ValueError.
    """
    given = value
    for stage in (lambda x: x, validate):
        value = stage(value)
        for number, where in _numbers(value):
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{where}{number} is not a finite number")
            if isinstance(number, int) and not -(1 << 63) <= number < 1 << 63:
                raise ValueError(f"{where}does not fit in 64 bits")
    truth = any(isinstance(number, bool) for number, _ in _numbers(given))
    if truth and all(type(number) in (int, float) for number, _ in _numbers(value)):
        raise ValueError("needs a number")  # pydantic takes true for 1
    return value


def _numbers(value: Any, where: str = "") -> Iterator[tuple[Any, str]]:
    if isinstance(value, (tuple, list)):
        value = dict(enumerate(value))
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(inner, f"{where.removesuffix(': ')}{'.' if where else ''}{key}: ")
    else:
        yield value, where


class Section(BaseModel):
    """A frozen group of keys in which an unknown key is an error."""

    model_config = ConfigDict(**STRICT, frozen=True)
    _finite = field_validator("*", mode="wrap")(finite)

    def rules(self) -> Iterator[str]:
        """What is wrong between keys that are each right by themselves, a sentence each."""
        yield from ()

    @model_validator(mode="after")
    def _keeps_its_rules(self) -> "Section":
        if broken := "\n".join(self.rules()):
            raise ValueError(broken)
        return self


@dataclass(frozen=True)
class Scaled:
    """Marks a number of images that ``--small FACTOR`` multiplies.

    whole_batches: of a training's lengths, which stay multiples of its global batch.
    """

    whole_batches: bool = True


PositiveInt = Annotated[int, Field(gt=0)]
CountInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
CountFloat = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Images = Annotated[int, Field(ge=0), Scaled()]
"""A point in a training, or a distance between two, in images; 0 is none."""
PositiveImages = Annotated[int, Field(gt=0), Scaled()]
Pictures = Annotated[int, Field(gt=0), Scaled(whole_batches=False)]
"""How many images are looked at, made or scored; not tied to a batch."""
Threads = PositiveInt | None
"""CPU threads per rank; empty leaves it to OMP_NUM_THREADS or torch."""


def keys_of(section: Any, prefix: str = "") -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Every dotted key below ``section``, with the types and marks its annotation is made of; a ``*`` stands for the
    names or numbers in a mapping or a list of sections."""
    for name, field in section.__pydantic_fields__.items():
        # pydantic takes marks off the outermost Annotated and leaves those inside a union or a tuple
        parts = (*field.metadata, *_parts(field.annotation))
        yield prefix + name, parts
        for part in parts:
            if hasattr(part, "__pydantic_fields__"):
                single = field.annotation in (part, part | None)
                yield from keys_of(part, f"{prefix}{name}." if single else f"{prefix}{name}.*.")


def _parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for inner in (*get_args(annotation), *getattr(annotation, "__metadata__", ())):
        yield from _parts(inner)


def scaled_keys(section: type[Section]) -> dict[str, Scaled]:
    """Every dotted key whose number of images scales, with its mark."""
    return {key: part for key, parts in keys_of(section) for part in parts if isinstance(part, Scaled)}


# --- from plain values to a section ---

S = TypeVar("S", bound=Section)


def build(section: type[S], data: Mapping[str, Any], source: str, complete: bool = False) -> S:
    """Validate ``data`` as ``section``.

    source: what messages name, a file.
    complete: also what only a start would find; ``llamagen plan`` loads such a config and says what to change.

    Raises UserError with every problem, one line each.
    """
    try:
        return section.model_validate(dict(data), context={"complete": complete})
    except ValidationError as error:
        raise UserError("\n".join(f"{source}: {line}" for line in explain(error, section))) from None


def explain(error: ValidationError, section: type[Section]) -> Iterator[str]:
    """One line per problem: dotted key, what is wrong with it, and what to write."""
    items = error.errors()
    for item in items:
        # sections within this list or mapping that are wrong themselves
        inside = [i for i in items if i["loc"][: len(item["loc"])] == item["loc"] and i is not item]
        if item["type"] == "too_short" and inside:
            continue  # pydantic counts only the parts that are right
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            yield f"{where}: unknown key; {_nearest_key(section, where)}"
        elif item["type"] == "missing":
            yield f"{where}: missing; set it in the file or as {where}=…"
        else:
            given = item.get("input")
            scalar = isinstance(given, (str, int, float, list, tuple)) or given is None
            for message in item["msg"].removeprefix("Value error, ").splitlines():
                yield _with_key(where, message) + (f" (given: {given!r:.200})" if scalar else "")


def _with_key(where: str, message: str) -> str:
    """The message behind its dotted key; one that begins with a key (``lr: …``) continues the section's."""
    inner, colon, _ = message.partition(": ")
    if colon and " " not in inner:
        return f"{where}.{message}".lstrip(".")
    return f"{where or '(the whole file)'}: {message}"


def nearest(word: str, known: Collection[str], within: str = "") -> str:
    """What to write instead of a word that is none of ``known``. within: the dotted keys above it, with a dot."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {within}{near[0]}?" if near else f"one of {', '.join(known)}"


def _nearest_key(section: type[Section], where: str) -> str:
    *above, key = where.split(".")
    known = [name.split(".") for name, _ in keys_of(section)]
    siblings = [
        name[-1]
        for name in known
        if len(name) == len(above) + 1 and all(a in (b, "*") for a, b in zip(name, above, strict=False))
    ]
    if elsewhere := [name for name in known if name[-1] == key]:
        return f"did you mean {'.'.join(elsewhere[0])}?"
    return nearest(key, siblings, "".join(f"{part}." for part in above))


def _batch(data: Mapping[str, Any], otherwise: int = 1) -> int:
    """The global batch of a section that trains; elsewhere ``train`` is a path, or absent."""
    train = data.get("train")
    return int(train["global_batch"]) if isinstance(train, dict) else otherwise


def shrink(config: S, factor: float) -> S:
    """The same config with every scaled number of images times ``factor``, and at least one.

    A training's lengths stay whole batches, in its ladder too, by the rung's own batch. Raises UserError where the
    short lengths do not go together.
    """
    data = config.model_dump()
    keys = scaled_keys(type(config))
    batch = _batch(data)

    def scaled(value: Any, key: str, batch: int) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(sorted({scaled(inner, key, batch) for inner in value}))
        # rounding to whole batches may make two points one, and never makes one vanish
        unit = batch if keys[key].whole_batches else 1
        return max(1, round(value * factor / unit)) * unit if value else value

    for key in keys:
        *path, last = key.split(".")
        inner, unit = data, batch
        for part in path:
            inner = inner.get(part) or {}
            unit = _batch(inner, unit)  # of a training within another config
        if last in inner:
            inner[last] = scaled(inner[last], key, unit)
    for changes in data.get("ladder", {}).values():
        own = changes.get("train.global_batch", batch)
        if own != batch:
            changes.setdefault("train.images", config.model_dump()["train"]["images"])
        changes.update({key: scaled(value, key, own) for key, value in changes.items() if key in keys})
    return build(type(config), data, f"shrunk by {factor}")
