"""Numbered pictures of a trained GPT: what eval.sample writes into files, and what an evaluation scores without any.

Picture i has class (or caption) i modulo their number and noise of its own. It is always computed at position i modulo
``batch`` of a batch that is full, so its bytes depend on nothing else: neither on how many are drawn nor on the ranks.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from llamagen_dist.config import DrawSection
from llamagen_dist.data.shards import Shards
from llamagen_dist.errors import UserError
from llamagen_dist.parallel import tensor_parallel
from llamagen_dist.parallel.topology import Topology
from llamagen_dist.planning.memory import Layout, drawn_picture
from llamagen_dist.sampling import pictures
from llamagen_dist.sampling.batch import largest_batch
from llamagen_dist.sampling.compiled import CompiledSteps
from llamagen_dist.sampling.conditions import conditions
from llamagen_dist.sampling.guidance import misguided
from llamagen_dist.sampling.int8 import quantize
from llamagen_dist.sampling.load import (
    WEIGHTS,
    check_first_tokens,
    load_gpt,
    load_tokenizer,
    maker_of,
    open_checkpoint,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class NumberedPictures:
    """The GPT and the tokenizer of a config, loaded (collective) and on their device.

    together: pictures in a batch; where the config says ``auto``, of ``fitting_batch``, before anything is drawn.
    Raises UserError: not there, not of each other, the GPT cannot be split over ``tensor`` ranks, no compiler.
    """

    def __init__(self, config: DrawSection, topology: Topology) -> None:
        self.config = config
        checkpoint = open_checkpoint(config.checkpoint, "checkpoint", topology, WEIGHTS[config.weights])
        self.tokenizer = load_tokenizer(
            config.tokenizer,
            config.tokenizer_model,
            sizes="tokenizer_model",
            topology=topology,
            made=maker_of(checkpoint),
        )
        check_first_tokens(self.tokenizer, config.first_tokens, "first_tokens")
        self.gpt = load_gpt(checkpoint, self.tokenizer, config.model, config.image_size)
        for scale, beta in config.guidances():
            if (reason := misguided(self.gpt.config, scale, beta)) is not None:
                raise UserError(f"checkpoint: {checkpoint.path}: {reason}")
        if (why := self.gpt.config.unsplittable(config.tensor)) is not None:
            raise UserError(f"tensor: {why}")
        self.conditions = conditions(self.gpt, self.tokenizer, config.captions, config.text_encoder, topology.device)
        model = tensor_parallel.apply(self.gpt.model, topology)
        if config.quantize is not None:
            quantize(model, topology)
        model.to(topology.device, DTYPES[config.precision])
        self.tokenizer.model.to(topology.device)
        self._steps = CompiledSteps(model) if config.compile else None
        self.together = config.batch
        self.settings = _settings(config)

    def redrawn(self, **changes: Any) -> "NumberedPictures":
        """The same GPT drawing with other settings or another seed: keys of its config and their values."""
        other = copy.copy(self)
        other.config = self.config.model_copy(update=changes)
        other.settings = _settings(other.config)
        return other

    def labels(self, numbers: Tensor) -> Tensor:
        """int64 [n]: which class or caption each picture has."""
        return numbers % self.conditions.count

    def seeds(self, numbers: Tensor) -> Tensor:
        """int64 [n]: whose noise each picture is drawn from."""
        return pictures.sample_seeds(self.config.seed, numbers)

    def fitting_batch(self, count: int, topology: Topology) -> int:
        """How many of ``count`` pictures memory has room for at once (collective). Raises UserError where not one."""
        layout = Layout(tensor=self.config.tensor, precision=self.config.precision)
        shape = self.gpt.config, layout, self.tokenizer.model.config, self.gpt.image_size
        parts = drawn_picture(*shape, guided=self.settings.cfg_scale > 1, window=self.settings.window)
        return largest_batch(parts, count, topology)

    def tokens(self, numbers: Tensor) -> Tensor:
        """int64 [n, N]. numbers: int64 [n], a whole batch of consecutive ones."""
        condition = self.conditions.at(self.labels(numbers))
        return pictures.model_tokens(self.gpt.model, condition, self.seeds(numbers), self.settings, self._steps)

    def batch(self, numbers: Tensor) -> NDArray[Any]:
        """uint8 [n, S, S, 3]; see ``tokens``."""
        return pictures.decode_tokens(self.tokenizer.model, self.tokens(numbers))

    def identity(self, count: int, sets: Sequence[str], tokens: Shards | None = None) -> dict[str, Any]:
        """Everything that decides the bytes of ``count`` pictures in each of ``sets``, as JSON can hold it.

        tokens: the shards whose histogram a set is drawn from.
        """
        config = self.config
        return {
            "checkpoint_sha256": self.gpt.checkpoint.identity,
            "tokenizer_sha256": self.tokenizer.sha256,
            "tokens": tokens.manifest.fingerprint() if tokens else None,
            "captions": self.conditions.identity,
            "image_size": self.gpt.image_size,
            "n": count,
            "sets": sets,
            **asdict(self.settings),
            "seed": config.seed,
            "batch": self.together,
            "precision": config.precision,
            "tensor": config.tensor,
            "quantize": config.quantize,  # None, as records of earlier versions read, which do not have these two
            "compile": config.compile or None,
        }

    def describe(self) -> dict[str, str]:
        """For records, in words."""
        return {
            "conditions": f"sample i has {self.conditions.kind} i modulo {self.conditions.count}",
            "noise": "Gumbel noise hashed from (seed, sample, token position, code)",
        }


def _settings(config: DrawSection) -> pictures.Settings:
    return pictures.Settings(**{one.name: getattr(config, one.name) for one in fields(pictures.Settings)})
