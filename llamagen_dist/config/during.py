"""``evaluation`` of a GPT's run: how its checkpoints are scored while it trains, and what starts that."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from llamagen_dist.config.section import Images, Pictures, PositiveFloat, PositiveInt, Section


class EvaluationSection(Section):
    """Pictures are drawn with a checkpoint (``eval.sample``) and scored against real ones (``eval.evaluate``), by
    programs of their own that ``llamagen launch``, ``sweep`` and ``pipeline`` start beside or after the training, or
    ``llamagen evaluate`` by hand. The training never waits for them, nor fails with them."""

    every_images: Images = 0
    """The first checkpoint at or after every multiple of this is scored, and the last one of the run; 0: every
    checkpoint. Whatever ``checkpoint.keep_last`` says, it is kept until it has been scored, or its evaluation failed;
    the disk must have room for those that wait."""
    sample: Path
    """How pictures are drawn: a YAML file of ``kind: sample`` …"""
    evaluate: Path
    """… and how they are scored: one of ``kind: evaluate``, such as configs/eval/quick-5k.yaml."""
    tokenizer: Path | None = None
    """Instead of that of ``sample``."""
    reference: Path | None = None
    """Instead of that of ``evaluate``: real images, or their statistics."""
    images: Pictures | None = None
    """Instead of those of ``sample``. FID depends on their number: scores of a run are of equally many."""
    keep_pictures: bool = False
    """Keep the .npz of the pictures once they are scored; their grid.png and record.json are kept anyway."""
    here: Literal["after", "beside"] = "after"
    """On this machine: ``after`` the training's ranks have ended, with all there is; or ``beside`` them as soon as a
    checkpoint is there, at the lowest priority and without GPUs, though in the same memory."""
    ranks: PositiveInt = 1
    """Processes of an evaluation on this machine."""
    cluster: Path | None = None
    """On a cluster: the profile of an evaluation's own jobs (slurm/NAME.yaml). Training jobs submit them."""
    ep_fid: tuple[PositiveFloat, ...] = Field(default=(10.0, 5.0, 2.0))
    """The k of EP_FID@k in the report: after how many epochs and images FID was first k or lower."""
