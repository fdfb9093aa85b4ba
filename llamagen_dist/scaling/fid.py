"""FID beside the loss: a second fit, of FID, asked what the models of the first would have."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llamagen_dist.errors import UserError
from llamagen_dist.scaling.basis import Basis
from llamagen_dist.scaling.bootstrap import quantiles
from llamagen_dist.scaling.laws import Floats

CAVEAT = (
    "FID is of the guidance scale, the sampler and the reference images as much as of the model: these figures hold "
    "for sampling as in the runs of the fit, with guidance chosen as there; decide by the loss"
)
_FAR: Mapping[str, float] = {"params": 10, "tokens": 10, "flops": 10, "val_loss": 1}
"""So many times beyond what the fit saw is an extrapolation; a curve over the loss ends where its losses do."""
_LOSSES = 64  # of the distribution of a new run's loss, at which FID is drawn


@dataclass(frozen=True, eq=False)
class FidLaw:
    """basis: a fit of FID."""

    basis: Basis

    @classmethod
    def of(cls, fid: Basis, loss: Basis) -> "FidLaw":
        """Raises UserError: a fit of something else, or of the losses of other tokens than those of ``loss``."""
        metric, path = fid.fit.points.metric, fid.source["path"]
        if not ("fid" in metric.lower() or (metric == "loss" and fid.fit.law.name.startswith("fid"))):
            raise UserError(
                f"--fid-fit {path}: a fit of {metric}, not of FID; make one with llamagen scaling fit --metric fid, "
                "or --form fid"
            )
        if "val_loss" in fid.fit.law.columns and fid.stated and loss.stated:
            ours, theirs = (f"{one.like.image_tokens} tokens of {one.like.vocab_size} codes" for one in (loss, fid))
            if ours != theirs:
                raise UserError(
                    f"--fid-fit {path}: its losses are of images of {theirs}, those of {loss.source['path']} of {ours}"
                )
        return cls(fid)

    def beside(
        self, size: float, worth: Floats, flops: Floats, loss: float, losses: Floats | None, band: Sequence[float]
    ) -> dict[str, Any]:
        """``fid`` of a new model, ``fid_ci95`` where both fits have resamples, and ``fid_extrapolated``, along what.

        size: parameters, as the fit counts them. worth, flops [2]: fresh tokens that its tokens are worth and the FLOPs
        for as many, at the most that repeats can be worth and as they count. loss: predicted; losses [r, 2]: what it
        may be, by ``worth``; band: its 95 %, which other forms may have widened.
        """
        fit, resampled = self.basis.fit, self.basis.resampled
        known = {"flops": flops} if "flops" in fit.points.also else {}  # else 6 N D, as its points were counted
        counted = {name: values[1] for name, values in known.items()}
        asked = {"params": size, "tokens": worth[1], "flops": flops[1], "val_loss": loss}
        row: dict[str, Any] = {
            "fid": float(fit.predict(size, worth[1], **counted, val_loss=loss)),
            "fid_extrapolated": [name for name, value in asked.items() if self._beyond(name, value)],
        }
        if resampled is not None and losses is not None:
            # The two fits are resampled apart: every refit of FID meets the whole distribution of the loss.
            drawn = np.quantile(losses, (np.arange(_LOSSES) + 0.5) / _LOSSES, axis=0)
            drawn = resampled.draws(fit, np.array(size), worth, {**known, "val_loss": drawn})
            low, high = quantiles(drawn.reshape(-1, 2))
            said = fit.predict(size, worth[1], **counted, val_loss=np.array(band))
            row["fid_ci95"] = [float(min(*low, said.min())), float(max(*high, said.max()))]
        return row

    def _beyond(self, name: str, value: float) -> bool:
        points = self.basis.fit.points
        if name not in self.basis.fit.law.columns:
            return False
        seen = points.also[name] if name == "val_loss" else getattr(points, name)
        return not seen.min() / _FAR[name] <= value <= seen.max() * _FAR[name]

    def warnings(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """What to know of the FIDs of ``rows`` of advice."""
        texts = [CAVEAT, *(f"FID: {text}" for text in (*self.basis.notes, *self.basis.fit.warnings))]
        if self.basis.refused:
            texts.append(f"no bands of FID: {self.basis.refused}")
        for name in dict.fromkeys(name for row in rows for name in row["fid_extrapolated"]):
            far = "" if _FAR[name] == 1 else f"more than {_FAR[name]:g} times "
            texts.append(f"FID is extrapolated: {name} lies {far}beyond what the fit of FID saw")
        return texts
