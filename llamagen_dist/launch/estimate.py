"""About how long a stage takes here: FLOPs over this machine's matrix-product rate, plus overheads."""

import functools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamagen_dist.config import (
    EvaluateConfig,
    ExtractConfig,
    GPTConfigFile,
    ReconstructConfig,
    SampleConfig,
    TokenizerConfigFile,
    TokenizerModelSection,
)
from llamagen_dist.config.ladder import rungs
from llamagen_dist.console import Screen, duration
from llamagen_dist.launch.stages import Plan, Stage
from llamagen_dist.process import cores

if TYPE_CHECKING:
    from torch import nn

    from llamagen_dist.models.gpt import GPTConfig

# Measured on two cores of 72 GFLOP/s each with two ranks, as CPU seconds per rank (which other programs on the machine
# do not change): the quickstart's own programs with 1 and with 20 to 100 steps, the difference being the cost of steps.
GPT_START_S = 8.0  # submission to first step: imports of torch, DeepSpeed and Megatron-core
START_S = 5.0  # the same without the last two
GPT_EFFICIENCY = 0.6  # fitted by hand to four sizes from 30 k to 1 M parameters under ZeRO-1: ...
GPT_STEP_S = 0.02  # ... of FLOPs / (rate x efficiency) + steps x (this
GPT_LAYER_STEP_S = 0.01  # + layers x this)
TOKENIZER_EFFICIENCY = 0.19  # the small autoencoder with its discriminator running for half of the images
EXTRACT_EFFICIENCY = 0.2  # reading and writing shards included
PACK_IMAGES_PER_CORE_S = 1000.0  # 28 x 28 PNGs
DECODE_EFFICIENCY = 0.2  # the tokenizer in eval.reconstruct and behind the sampler
SAMPLE_EFFICIENCY = 0.25  # one token at a time
INCEPTION_FLOPS = 11.4e9  # per image; convolutions reach more than the rate of matrix products
INCEPTION_EFFICIENCY = 0.95
CLASSIFIER_IMAGES_PER_CORE_S = 3000.0
OTHER_S = 5.0  # the report


@dataclass(frozen=True)
class Estimate:
    """sizes: what the stage works on, in words. seconds: about how long; None where nothing is known."""

    sizes: str
    seconds: float | None


@dataclass(frozen=True)
class Tokens:
    """What a GPT stage must know of the tokens it will be given."""

    vocab_size: int
    per_image: int
    classes: int = 0
    """0 where it is not known yet: the class embedding is then left out of the count."""


class Estimator:
    """Measures the machine once, then estimates stages; what one stage will make, later ones use."""

    def __init__(self, plan: Plan) -> None:
        self.rate = matmul_rate()
        self._tokenizer = next((s.config for s in plan.stages if isinstance(s.config, TokenizerConfigFile)), None)
        points = [point.stage for s in plan.stages if s.sweep for point in s.sweep.points]
        ladders = [s.config for s in (*plan.stages, *points) if isinstance(s.config, GPTConfigFile)]
        self._gpts = {rung.run_dir: rung for config in ladders for _, rung in rungs(config)}

    def stage(self, stage: Stage) -> Estimate:
        if stage.sweep is not None:
            seconds = [self.stage(point.stage).seconds for point in stage.sweep.points]
            known = [one for one in seconds if one is not None]
            return Estimate(f"{len(seconds)} points", sum(known) if len(known) == len(seconds) else None)
        if isinstance(stage.config, GPTConfigFile):
            return self._gpt(stage.config)
        if isinstance(stage.config, TokenizerConfigFile):
            return self._train_tokenizer(stage.config)
        if isinstance(stage.config, ExtractConfig):
            return self._extract(stage.config, stage.images)
        if isinstance(stage.config, SampleConfig):
            return self._sample(stage.config)
        if isinstance(stage.config, ReconstructConfig):
            return self._reconstruct(stage.config, stage.images)
        if isinstance(stage.config, EvaluateConfig):
            return self._evaluate(stage.config)
        if stage.images is not None:
            return Estimate(f"{stage.images:,} images", 1.0 + stage.images / (PACK_IMAGES_PER_CORE_S * cores()))
        return Estimate("", OTHER_S)

    def _seconds(self, flops: float, efficiency: float) -> float:
        return START_S + flops / (self.rate * efficiency)

    def _train_tokenizer(self, config: TokenizerConfigFile) -> Estimate:
        """Forward and backward (twice the forward) of the autoencoder; the losses are in the efficiency."""
        parameters, encode, decode = autoencoder_cost(config.model, config.data.image_size)
        images = config.train.images
        return Estimate(
            f"{parameters / 1e6:.2f} M parameters, {images:,} images",
            self._seconds(3.0 * (encode + decode) * images, TOKENIZER_EFFICIENCY),
        )

    def _extract(self, config: ExtractConfig, images: int | None) -> Estimate:
        crops = {"center": 1, "center_flip": 2, "ten_crop": 10 * len(config.crop_ranges)}[config.crops]
        count = images if images is not None else _manifest_count(config.images)
        if count is None or self._tokenizer is None:
            return Estimate(f"{crops} crops per image", None)
        _, encode, _ = autoencoder_cost(self._tokenizer.model, config.image_size)
        return Estimate(f"{count:,} images x {crops} crops", self._seconds(encode * count * crops, EXTRACT_EFFICIENCY))

    def _gpt(self, config: GPTConfigFile) -> Estimate:
        """Training FLOPs of models/cost.py over the measured rate, plus overheads per step and per layer."""
        tokens = self._tokens(config.data.train)
        if tokens is None:
            return Estimate(f"{config.train.images:,} images", None)
        from llamagen_dist.models.cost import total_parameters, training_flops_per_image

        seconds, sizes, images = GPT_START_S, [], 0
        for _, rung in rungs(config):
            model = _model(rung, tokens)
            steps = rung.train.images // rung.train.global_batch
            seconds += training_flops_per_image(model) * rung.train.images / (self.rate * GPT_EFFICIENCY)
            seconds += steps * (GPT_STEP_S + GPT_LAYER_STEP_S * model.n_layer)
            sizes.append(total_parameters(model))
            images += rung.train.images
        span = f"{_count(min(sizes))} to {_count(max(sizes))}" if len(sizes) > 1 else _count(sizes[0])
        runs = f"{len(sizes)} GPTs, " if len(sizes) > 1 else ""
        text = f"{runs}{span} parameters, {images:,} images x {tokens.per_image} tokens"
        return Estimate(text, seconds)

    def _sample(self, config: SampleConfig) -> Estimate:
        """The model's forward FLOPs, twice under guidance, and the decoder's for every picture of every set."""
        gpt = self._gpts.get(config.checkpoint)
        tokens = None if gpt is None else self._tokens(gpt.data.train)
        pictures = config.images * len(config.sets)
        sizes = f"{pictures:,} pictures"
        if gpt is None or tokens is None or self._tokenizer is None:
            return Estimate(sizes, None)
        from llamagen_dist.models.cost import training_flops_per_image

        forward = training_flops_per_image(_model(gpt, tokens)) / 3 * (2 if config.cfg_scale > 1 else 1)
        _, _, decode = autoencoder_cost(self._tokenizer.model, self._tokenizer.data.image_size)
        drawn = config.images * forward / SAMPLE_EFFICIENCY if "model" in config.sets else 0.0
        return Estimate(sizes, START_S + (drawn + pictures * decode / DECODE_EFFICIENCY) / self.rate)

    def _reconstruct(self, config: ReconstructConfig, images: int | None) -> Estimate:
        count = config.limit or images or _manifest_count(config.images)
        if count is None or self._tokenizer is None:
            return Estimate("", None)
        _, encode, decode = autoencoder_cost(self._tokenizer.model, self._tokenizer.data.image_size)
        return Estimate(f"{count:,} images", self._seconds((encode + decode) * count, DECODE_EFFICIENCY))

    def _evaluate(self, config: EvaluateConfig) -> Estimate:
        """Every set of images goes through the Inception network once, and the classifier is trained on the ranks."""
        paths = {path for pair in config.pairs().values() for path in (pair.images, pair.reference)}
        sizes = f"{len(paths)} sets of {'all' if config.limit is None else f'{config.limit:,}'} images"
        if config.limit is None:
            return Estimate(sizes, None)
        seconds = 0.0
        if set(config.metrics) - {"class_agreement"}:
            seconds += len(paths) * config.limit * INCEPTION_FLOPS / (self.rate * INCEPTION_EFFICIENCY)
        if config.classifier is not None:
            seconds += config.classifier.images / (CLASSIFIER_IMAGES_PER_CORE_S * cores())
        return Estimate(sizes, START_S + seconds)

    def _tokens(self, shards: str | Path) -> Tokens | None:
        """From the token shards if they are there, else from the tokenizer that the same pipeline trains."""
        found = _manifest(shards)
        if found is not None:
            rows, columns = found["grid"]
            return Tokens(found["vocab_size"], rows * columns, len(found.get("classes") or []))
        if self._tokenizer is None:
            return None
        from llamagen_dist.build import vq_config

        model = vq_config(self._tokenizer.model)
        packed = _manifest(self._tokenizer.data.train) or {}
        per_image = (self._tokenizer.data.image_size // model.downsampling) ** 2
        return Tokens(model.codebook_size, per_image, len(packed.get("classes") or []))


def _model(config: GPTConfigFile, tokens: Tokens) -> "GPTConfig":
    from llamagen_dist.build import gpt_config

    return gpt_config(
        config.model, vocab_size=tokens.vocab_size, image_tokens=tokens.per_image, num_classes=tokens.classes
    )


@functools.cache
def autoencoder_cost(section: TokenizerModelSection, size: int) -> tuple[int, int, int]:
    """(parameters, FLOPs to encode, FLOPs to decode) for one image of side ``size``, on the meta device."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from llamagen_dist.build import build_vq

    with torch.device("meta"):
        model = build_vq(section)
        image = torch.zeros(1, 3, size, size)
    parameters = sum(p.numel() for p in model.parameters())

    def flops(module: "nn.Module", given: torch.Tensor) -> tuple[int, torch.Tensor]:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            made = module(given)
        return int(counter.get_total_flops()), made

    encode, hidden = flops(model.encoder, image)
    decode, _ = flops(model.decoder, hidden)
    return parameters, encode, decode


def matmul_rate(seconds: float = 0.3, size: int = 512) -> float:
    """FLOP/s of fp32 matrix products: the best burst of one thread, times the cores this process may use.

    One thread, because threads that wait for each other measure what else the machine is doing.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    left, right = torch.rand(size, size), torch.rand(size, size)
    best, deadline = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        began = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - began)
    torch.set_num_threads(threads)
    return cores() * 2.0 * size**3 / best


def show(plan: Plan) -> None:
    """Print the stages, what they work on, and about how long they take here."""
    from rich.table import Table

    from llamagen_dist.launch.pipeline import is_finished

    estimator = Estimator(plan)
    table = Table(title=f"{plan.title} -> {plan.out}")
    for heading in ("", "stage", "ranks", "program", "size"):
        table.add_column(heading, overflow="fold")
    table.add_column("about", justify="right")
    total, unknown = 0.0, False
    for number, stage in enumerate(plan.stages, start=1):
        estimate = estimator.stage(stage)
        if is_finished(plan.out, stage):
            about = "finished"
        else:
            about = "?" if estimate.seconds is None else duration(estimate.seconds)
            total += estimate.seconds or 0.0
            unknown = unknown or estimate.seconds is None
        table.add_row(str(number), stage.name, str(stage.ranks), stage.module, estimate.sizes, about)
    screen = Screen()
    screen.console.print(table, soft_wrap=False)
    screen.say(
        f"about {duration(total)}{' and the stages marked ?' if unknown else ''} in all, for {cores()} cores at "
        f"{estimator.rate / 1e9:.0f} GFLOP/s (matrix products, just measured). Nothing was started."
    )


def _count(number: float) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:.0f}"


def _manifest(shards: str | Path) -> dict[str, Any] | None:
    path = Path(shards) / "manifest.json"  # nothing remote is fetched for an estimate
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def _manifest_count(shards: str | Path) -> int | None:
    found = _manifest(shards)
    return None if found is None else int(found["count"])
