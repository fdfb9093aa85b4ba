"""The five mistakes behind most numbers that nobody can reproduce, recognised from the data and named.

What is certain is refused, unless the config accepts it by name; what is likely is warned of. Both stand in the record,
and results with and without a mistake are not compared.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from llamagen_dist.config.evaluate import Mistake
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation import originals
from llamagen_dist.evaluation.image_sets import ImageSet
from llamagen_dist.evaluation.inception_score import ADM_SPLIT


@dataclass(frozen=True)
class Found:
    """One mistake in one set."""

    set: str
    mistake: Mistake
    what: str
    """What shows it, and what to do."""
    certain: bool

    def record(self) -> dict[str, str]:
        return {key: value for key, value in asdict(self).items() if key != "certain"}


def refuse(found: list[Found], accepted: tuple[Mistake, ...]) -> None:
    """Raises UserError for mistakes that are certain and not accepted, a line each."""
    lines = [
        f"{one.set}: {one.mistake}: {one.what} (accept=[{one.mistake}] measures it all the same, and says so)"
        for one in found
        if one.certain and one.mistake not in accepted
    ]
    if lines:
        raise UserError("\n".join(lines))


def of_reconstructions(
    name: str,
    images: tuple[ImageSet, NDArray[np.int64]],
    reference: tuple[ImageSet, NDArray[np.int64] | None],
    declared: bool | None,
    made_by: Mapping[str, Any] | None,
    provenance: Mapping[str, Any],
) -> Iterator[Found]:
    """``wrong_reference`` and ``uncropped_originals``.

    images, reference: the open set and which of it are compared; None of a reference with statistics alone.
    declared: whether the pictures are said to be reconstructions; None: nobody says.
    made_by, provenance: see ``passport``.
    """
    if declared is False:
        return
    source, (where, candidates) = (made_by or {}).get("images"), reference
    if candidates is None or where.statistics:
        if declared:
            height, width = images[0].stored_size
            yield from of_statistics(name, where, source, (width, height), provenance)
        return
    if source is not None and source == provenance.get("fingerprint"):
        return  # the very shards that were reconstructed
    verdict, numbers = originals.compare(*images, where, candidates) if declared else _only_pairs(images, reference)
    training = provenance.get("split") == "train"
    if verdict == "other images" or (verdict == "unclear" and declared and training):
        yield Found(
            name,
            "wrong_reference",
            f"{where.path}{' (training images)' if training else ''} does not seem to hold the originals of "
            f"{images[0].path}: {numbers}; rFID against other images does not show what the tokenizer costs; "
            "give the images that were reconstructed",
            certain=verdict == "other images" and training,
        )
    if verdict == "cropped otherwise":
        yield Found(
            name,
            "uncropped_originals",
            f"{where.path} holds the originals of {images[0].path}, but not cropped as these were: {numbers}; crop "
            "both alike (image_size=, eval.reference and eval.reconstruct crop the centre as ADM does)",
            certain=True,
        )


def of_statistics(
    name: str, where: ImageSet, source: str | None, cropped: tuple[int, int], provenance: Mapping[str, Any]
) -> Iterator[Found]:
    """The same of stored statistics, which shows before there are reconstructions.

    source: fingerprint of the image shards that are reconstructed; None: nobody says.
    cropped: (width, height) of what is reconstructed, before it is scaled down.
    """
    behind = f"{where.path} holds statistics of {provenance.get('name')}"
    known = provenance.get("cropped") or provenance.get("size")  # files of before did not scale
    if known is not None and tuple(known) != cropped:
        theirs, ours = (" x ".join(map(str, sides)) for sides in (known, cropped))
        yield Found(
            name,
            "uncropped_originals",
            f"{behind} cropped to {theirs} pixels, but {ours} are reconstructed; crop both alike (eval.reference "
            f"image_size={cropped[0]}, with the resize_to of this evaluation)",
            certain=True,
        )
    fingerprint = provenance.get("fingerprint")
    if source is not None and source == fingerprint:
        return  # of the very shards that are reconstructed
    if provenance.get("split") == "train":
        yield Found(
            name,
            "wrong_reference",
            f"rFID compares reconstructions with their own originals, but {behind}, which are training images "
            "(LlamaGen's VQ-16 reads 4.28 there instead of 2.19); give the originals, or statistics that "
            "eval.reference makes of them",
            certain=True,
        )
    else:
        why = "of other image shards" if source and fingerprint else "and nothing shows that these are the originals"
        yield Found(name, "wrong_reference", f"{behind}, {why} of the reconstructions", certain=False)


def _only_pairs(
    images: tuple[ImageSet, NDArray[np.int64]], reference: tuple[ImageSet, NDArray[np.int64] | None]
) -> tuple[originals.Verdict, str]:
    """For pictures that nobody calls reconstructions: being unlike the reference is no mistake, a crop of it is."""
    chosen, candidates = images[1], reference[1]
    if candidates is None or len(chosen) != len(candidates):
        return "unclear", ""
    verdict, numbers = originals.compare(*images, reference[0], candidates, search=False)
    return (verdict if verdict == "cropped otherwise" else "unclear"), numbers


def order_of_classes(name: str, labels: NDArray[np.int64] | None, pool: Tensor | None) -> Iterator[Found]:
    """``class_order``, of pictures whose Inception Score is averaged over consecutive splits.

    labels: int64 [n] in the order of the file. pool: features [n, d] in that order, for pictures without labels.
    """
    if labels is not None and len(labels) > ADM_SPLIT:
        share = np.unique(labels, return_counts=True)[1] / len(labels)
        starts = range(0, len(labels), ADM_SPLIT)
        seen = np.mean([len(np.unique(labels[start : start + ADM_SPLIT])) for start in starts])
        shuffled = np.mean([(1 - (1 - share) ** min(ADM_SPLIT, len(labels) - start)).sum() for start in starts])
        if seen < 0.8 * shuffled:
            counts = f"{seen:.0f} of {len(share)} classes, and would hold {shuffled:.0f} shuffled"
            what = f"a split of {ADM_SPLIT} holds {counts}"
            yield Found(name, "class_order", f"{what}; {_ORDERED}", certain=True)
    elif labels is None and pool is not None and len(pool) > ADM_SPLIT:
        wide = pool.double()
        steps = float((wide[1:] - wide[:-1]).square().sum(1).mean())
        apart = 2 * float(wide.var(0).sum())
        if steps < 0.9 * apart:
            what = f"neighbours in the file are more alike than any two ({steps:.3g} of {apart:.3g} squared distance)"
            yield Found(name, "class_order", f"{what}; {_ORDERED}", certain=False)


_ORDERED = (
    "the pictures are ordered by class, so no split sees all classes and the score comes out far too low (VAR's: 62 "
    "instead of 300); shuffle them, or use inception_score=whole, which knows no order"
)


def duplicates(name: str, digests: NDArray[np.uint8]) -> Iterator[Found]:
    """``duplicates``: pictures with the same pixels. digests: uint8 [n, 32], one sha256 per picture."""
    keys = np.ascontiguousarray(digests).view("V32").ravel()
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[inverse] != np.arange(len(keys)))
    if not len(again):
        return
    lags, counts = np.unique(again - first[inverse[again]], return_counts=True)
    lag, often = int(lags[counts.argmax()]), int(counts.max())
    example = f"the first is picture {again[0]}, which equals picture {first[inverse[again[0]]]}"
    what = f"{len(again)} of {len(keys)} pictures repeat an earlier one bit for bit ({example})"
    if often > 1 and often >= 0.9 * len(again):
        what += f"; {often} of them lie {lag} behind it, as repeated seeds or a part that was written twice do"
    yield Found(name, "duplicates", f"{what}; every picture needs noise of its own", certain=False)


def range_of_ssim(claimed: float, right: float, doubled: float) -> str:
    """Which data range an SSIM from elsewhere was computed with, for the same pictures and originals.

    right, doubled: the SSIM here with data range 1, and with 2 on pixels from 0 to 1 (LlamaGen's call).
    """
    tolerance = 0.1 * (doubled - right)
    if abs(claimed - doubled) <= tolerance < abs(claimed - right):
        return (
            f"ssim_range: {claimed:.4f} was computed with data range 2 on pixels from 0 to 1, which reads too high "
            f"(as LlamaGen's published values do): the SSIM of these pictures is {right:.4f}"
        )
    if abs(claimed - right) <= tolerance:
        return f"{claimed:.4f} agrees with the SSIM of these pictures, {right:.4f} (data range 1)"
    return f"{claimed:.4f} is neither the SSIM of these pictures ({right:.4f}) nor that with range 2 ({doubled:.4f})"
