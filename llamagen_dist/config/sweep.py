"""``kind: sweep``: one program, many configs."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from llamagen_dist.config.section import CountInt, PositiveInt, Section

Values = Annotated[tuple[Any, ...], Field(min_length=1)]


class SweepConfig(Section):
    """``kind: sweep``, read by ``llamagen sweep``. Its points: every entry of ``list`` with every row of ``zip`` with
    every combination of ``grid``. Each is trained (sampled, …) in a folder of its own under --out."""

    kind: Literal["sweep"]
    title: str
    module: str
    """The program, for example ``llamagen_dist.train_gpt``."""
    config: Path
    """What all points have in common: a YAML file, relative to this one."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Dotted keys laid on it for all points; ``key=value`` on the command line goes on top."""
    grid: dict[str, Values] = Field(default_factory=dict)
    """Dotted key -> values: every combination."""
    zip: dict[str, Values] = Field(default_factory=dict)
    """Dotted key -> values that go together: the first of each, the second of each …"""
    list: dict[str, dict[str, Any]] | tuple[dict[str, Any], ...] = ()
    """Points written out, each as dotted keys; with names of your own as a mapping: name -> keys."""
    name: str | None = None
    """Of a point and its folder, with {dotted.key} for a value. Empty: made from the keys that differ."""
    at_once: PositiveInt | None = None
    """On a cluster, at most so many points run at the same time; empty: as many as find room."""
    nodes: PositiveInt | None = None
    """Of each point, on a cluster; empty: the profile's."""
    gpus_per_node: CountInt | None = None
    """Empty: the profile's."""
    ranks: PositiveInt = 1
    """Of each point, on this machine (``--cluster local``)."""

    @model_validator(mode="after")
    def _has_points(self) -> "SweepConfig":
        if not (self.grid or self.zip or self.list):
            raise ValueError("give points: grid, zip or list")
        lengths = {key: len(values) for key, values in self.zip.items()}
        if len({*lengths.values()}) > 1:
            said = ", ".join(f"{key} has {length}" for key, length in lengths.items())
            raise ValueError(f"zip: its keys go together and need equally many values ({said})")
        return self
