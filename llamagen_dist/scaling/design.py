"""A sweep for a law, written out: sizes x budgets of equal FLOPs, with a learning rate per size."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from llamagen_dist.errors import UserError
from llamagen_dist.models.cost import training_flops_per_image
from llamagen_dist.models.sizes import GPTConfig
from llamagen_dist.scaling.shapes import heads

_FEWEST_STEPS = 20


@dataclass(frozen=True)
class Rates:
    """lr = value x (width / at_width)^power; power -1 for the standard parametrisation, 0 for one rate."""

    value: float
    at_width: int
    power: float

    def of(self, width: int) -> float:
        return float(f"{self.value * (width / self.at_width) ** self.power:.3g}")


def sweep_of(
    like: GPTConfig, shapes: Sequence[str], budgets: Sequence[float], rates: Rates, batch: int, config: str
) -> dict[str, Any]:
    """A ``kind: sweep`` in which every size is trained once and validated where it has spent each budget.

    At a constant learning rate each of those is the end of a shorter run, so the largest budget pays for the others.
    like: tokens, classes and options. shapes: LAYERSxWIDTH. budgets: FLOPs. batch: images per step.
    Raises UserError: a size that cannot be written so, or a budget of too few steps.
    """
    points: dict[str, dict[str, Any]] = {}
    for text in shapes:
        try:
            layers, dim = (int(part) for part in text.lower().split("x"))
            model = replace(like, n_layer=layers, n_head=heads(dim), dim=dim)
        except ValueError as error:
            raise UserError(f"--sizes {text}: write LAYERSxWIDTH, such as 12x768 ({error})") from None
        each = training_flops_per_image(model)
        images = [round(budget / each / batch) * batch for budget in sorted(budgets)]
        if images[0] < _FEWEST_STEPS * batch:
            raise UserError(
                f"{budgets[0]:g} FLOPs are {images[0] // batch} steps of a {text}, too few to learn anything; raise "
                "the smallest budget, or take smaller sizes"
            )
        points[f"l{layers}-d{dim}"] = {
            "model.n_layer": layers, "model.n_head": model.n_head, "model.dim": dim,
            "optim.lr": rates.of(dim), "train.images": images[-1], "validation.at_images": images,
        }  # fmt: skip
    # Whatever the config does otherwise: a constant rate after a short warm-up, or the budgets cannot be compared.
    return {
        "kind": "sweep",
        "title": f"{len(points)} sizes at {', '.join(f'{c:.3g}' for c in sorted(budgets))} FLOPs",
        "module": "llamagen_dist.train_gpt",
        "config": config,
        "set": {
            "train.global_batch": batch, "optim.schedule": "warmup", "optim.warmup_images": 8 * batch,
            "optim.cooldown_from": 0, "optim.cooldown_images": 0, "optim.cosine_images": 0,
            "validation.every_images": 0,
        },
        "list": points,
    }  # fmt: skip


def as_yaml(sweep: dict[str, Any]) -> str:
    return yaml.safe_dump(sweep, sort_keys=False, default_flow_style=None, width=118)
