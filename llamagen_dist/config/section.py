"""What all sections are made of: frozen groups of keys, the kinds of number in them, and which of these scale."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A frozen group of keys in which an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


@dataclass(frozen=True)
class Scaled:
    """Marks a number of images that ``--small FACTOR`` multiplies.

    whole_batches: of a training's lengths, which stay multiples of its global batch.
    """

    whole_batches: bool = True


PositiveInt = Annotated[int, Field(gt=0)]
CountInt = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Images = Annotated[int, Field(ge=0), Scaled()]
"""A point in a training, or a distance between two, in images; 0 is none."""
PositiveImages = Annotated[int, Field(gt=0), Scaled()]
Pictures = Annotated[int, Field(gt=0), Scaled(whole_batches=False)]
"""How many images are looked at, made or scored; not tied to a batch."""


def scaled_keys(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Scaled]]:
    """Every dotted key below ``section`` whose number scales, with its mark."""
    for name, field in section.model_fields.items():
        # pydantic takes marks off the outermost Annotated and leaves those inside a union or a tuple
        for part in (*field.metadata, *_parts(field.annotation)):
            if isinstance(part, Scaled):
                yield prefix + name, part
            elif isinstance(part, type) and issubclass(part, BaseModel):
                yield from scaled_keys(part, f"{prefix}{name}.")


def _parts(annotation: Any) -> Iterator[Any]:
    """The types and marks that an annotation is made of, at any depth."""
    yield annotation
    for inner in (*get_args(annotation), *getattr(annotation, "__metadata__", ())):
        yield from _parts(inner)
