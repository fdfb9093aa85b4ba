"""The GPT as a Task: micro-batches through an engine, validation with and without the condition."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llamagen_dist import prng
from llamagen_dist.build import compile_blocks
from llamagen_dist.config import GPTConfigFile
from llamagen_dist.data.batch import TokenBatch
from llamagen_dist.models.cost import total_parameters, training_flops_per_image
from llamagen_dist.models.gpt import GPT, Condition
from llamagen_dist.models.sizes import TARGET_POSITIONS
from llamagen_dist.parallel import optim as optimizers
from llamagen_dist.parallel import tensor_parallel
from llamagen_dist.parallel.clock import Clock
from llamagen_dist.parallel.deepspeed_engine import DeepSpeedEngine
from llamagen_dist.parallel.division import divide_batch
from llamagen_dist.parallel.ema import Powers
from llamagen_dist.parallel.engine import Engine, TorchEngine
from llamagen_dist.parallel.entries import TensorEntry
from llamagen_dist.parallel.topology import Topology
from llamagen_dist.planning.plan import memory_lines
from llamagen_dist.training.guards import StepGuard
from llamagen_dist.training.out_of_memory import engine_memory
from llamagen_dist.training.token_order import TokenOrder


class Objective(nn.Module):
    """The loss as a module's forward, which is where DDP and DeepSpeed hook in."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        tokens: Tensor,
        condition: Condition,
        sample_ids: Tensor | None,
        positions: Tensor | None = None,
        beta: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """``GPT.loss``; with z-loss, while training, also its mean squared log-partition."""
        loss, z = self.model.loss_and_z(tokens, condition, sample_ids, positions=positions, beta=beta)
        return loss if z is None else (loss, z)


def training_condition(model: GPT, batch: TokenBatch) -> Condition:
    """The batch's condition, with the model's null class or caption for the samples that are ``dropped``.

    The null caption is read from the model at every step, since a resume puts the checkpoint's there.

    batch: on the model's device.

    Returns labels (B,) int64, or (features (B, T, C), present (B, T) bool).
    """
    if batch.dropped is None:
        return batch.condition
    null = model.null_condition(batch.condition)
    if isinstance(batch.condition, Tensor):
        assert isinstance(null, Tensor)
        return torch.where(batch.dropped, null, batch.condition)
    features, present = batch.condition  # a dropped caption keeps its padding, as in LlamaGen
    return torch.where(batch.dropped[:, None, None], null[0], features), present


def training_beta(model: GPT, batch: TokenBatch, seed: int) -> Tensor | None:
    """(B,) fp32, how much of each sample's logits is conditional, by its position in the data: uniform in [0, 1), and 1
    where the condition is dropped, so that the null branch is a model of the data by itself. None: not of this model.
    """
    if model.beta_embedding is None:
        return None
    beta = prng.uniform(seed, "guidance-beta", batch.positions)
    return beta if batch.dropped is None else beta.masked_fill(batch.dropped, 1.0)


def build_engine(
    model: GPT, config: GPTConfigFile, topology: Topology, clock: Clock, source: tensor_parallel.Source | None = None
) -> Engine:
    """The engine the layout asks for: plain torch or DDP without ZeRO, DeepSpeed with it; Megatron-core splits both.

    model: whole; its layers are split in place.
    config: layout, precision, optimizer, batch.
    topology: the ranks.
    clock: charged with what DDP waits.
    source: the weights of a model that was built on the meta device; None: it has them already.

    Raises UserError where batch, model or compiler do not fit the layout.
    """
    batch = divide_batch(config.train, topology.dp)
    if source is not None:
        tensor_parallel.materialize(model, topology, source)
    model.recompute_every = config.compute.recompute_every
    tensor_parallel.apply(model, topology, config.parallel.sequence)
    if config.compute.compile:
        compile_blocks(model, topology.device)
    common: dict[str, Any] = {
        "called": Objective(model),
        "ema_decay": config.ema.decay,
        "powers": Powers(config.ema.widths, config.train.global_batch),
        "query_group": tensor_parallel.query_group(model.config),
    }
    if config.parallel.zero == 0:  # no buffer of a GPT ever changes: none is sent before a forward pass
        return TorchEngine(model, config.optim, topology, sync_buffers=False, clock=clock, **common)
    return DeepSpeedEngine(
        model,
        config.optim,
        topology,
        stage=config.parallel.zero,
        micro_batch=batch.micro,
        accumulation=batch.accumulation,
        precision=config.compute.precision,
        exact=source,
        **common,
    )


class GPTTask:
    """One GPT on this rank, split and sharded.

    model: the plain model, whole and with its initial weights, or on the meta device with a ``source`` of them.
    config: the run's.
    topology: the ranks.
    name: for summary.json.
    validation_batches(): this data-parallel rank's share of the held-out samples, each once.
    source: (name, full shape) -> the full fp32 tensor.
    images_seen: where the run stands: of the checkpoint that is put into it.
    """

    smaller = (
        "compute.recompute_every=1, a smaller train.micro_batch, a higher parallel.zero or parallel.tensor "
        "(llamagen plan CONFIG shows what fits)"
    )

    def __init__(
        self,
        model: GPT,
        config: GPTConfigFile,
        topology: Topology,
        name: str,
        validation_batches: Callable[[], Iterable[TokenBatch]],
        source: tensor_parallel.Source | None = None,
        images_seen: int = 0,
    ) -> None:
        self.name, self.config, self.topology = name, config, topology
        self.clock = Clock(topology.device)
        self.guard = StepGuard(topology, config.guard.skip_non_finite)
        self.zero = config.parallel.zero
        self.parameters = total_parameters(model.config)
        self.engine = build_engine(model, config, topology, self.clock, source)
        self.model: GPT = model
        self.micro = divide_batch(config.train, topology.dp).micro
        self._validation_batches = validation_batches
        tokens, train = model.config.image_tokens, config.train
        self.seed = train.seed
        self.order = None
        if model.target_positions is not None:
            self.order = TokenOrder(train.seed, tokens, train.anneal_from, train.anneal_until)
        self._stand_at(images_seen)

    def _stand_at(self, images_seen: int) -> None:
        """Compute as a run does that has seen so many images."""
        self.images_seen = images_seen
        if self.order is not None and self.model.target_positions is not None:
            self.model.target_positions.shown = not self.order.settled(images_seen)

    def step(self, batch: TokenBatch, images_seen: int) -> Mapping[str, Tensor]:
        """loss (mean nats per token of this rank's share), grad_norm (before clipping), lr; with z-loss z_loss."""
        return self._step(batch, images_seen)

    def rehearse(self, batch: TokenBatch, images_seen: int) -> None:
        with self.guard.rehearsal():
            self._step(batch, images_seen)

    def _step(self, batch: TokenBatch, images_seen: int) -> Mapping[str, Tensor]:
        self.engine.module.train()
        self._stand_at(images_seen)
        pieces = batch.split(self.micro)  # equal (divide_batch), so the mean of their mean losses is the batch's
        total, squares = (torch.zeros((), device=self.topology.device) for _ in range(2))
        for number, piece in enumerate(pieces, 1):
            piece = piece.to(self.topology.device)
            tokens, order = piece.tokens, None
            if self.order is not None and not self.order.settled(images_seen):
                order = self.order.at(piece.positions)
                tokens = tokens.gather(1, order)
            with self.engine.micro_step(last=number == len(pieces)):
                condition, beta = training_condition(self.model, piece), training_beta(self.model, piece, self.seed)
                loss = self.engine.module(tokens, condition, piece.positions, order, beta)
                loss, z = loss if isinstance(loss, tuple) else (loss, None)
                self.engine.backward(self.guard.track_loss(loss, piece.samples) / len(pieces))
            total += loss.detach() / len(pieces)
            if z is not None:
                squares += z / len(pieces)
        with self.clock.part("optimizer"):
            norm = self.engine.step(images_seen, self.guard.check_finite)
        self._stand_at(images_seen + self.config.train.global_batch)
        z_weight = self.model.config.z_loss
        return {
            "loss": total - z_weight * squares if z_weight else total,
            **({"z_loss": squares} if z_weight else {}),
            "grad_norm": norm,
            "lr": torch.tensor(optimizers.learning_rate(self.config.optim, images_seen)),
        }

    def validate(self) -> Mapping[str, float]:
        """val_loss (true condition), val_loss_null (null class or caption): mean nats per held-out token."""
        with self.engine.averaged() if self.config.validation.weights == "ema" else nullcontext():
            return self._validate()

    @torch.no_grad()
    def _validate(self) -> Mapping[str, float]:
        self.engine.module.eval()
        # weighted by samples, since the last batch and the ranks' shares may be smaller; fp64, so that the order of the
        # additions does not show in the digits that are printed
        sums = torch.zeros(3, dtype=torch.float64)
        for batch, counts in self._in_step(self._validation_batches()):
            batch = batch.to(self.topology.device)
            count = len(batch.tokens) if counts else 0
            for column, condition in enumerate((batch.condition, self.model.null_condition(batch.condition))):
                with self.clock.part("compute"):  # a sign of life for the watchdog
                    sums[column] += float(self._loss(batch.tokens, condition)) * count
            sums[2] += count
        if self.zero == 3:
            self.engine.module.empty_partition_cache()  # type: ignore[operator]  # evaluation leaves fetched weights
        sums = self.topology.sum(sums)
        return {"val_loss": float(sums[0] / sums[2]), "val_loss_null": float(sums[1] / sums[2])}

    def _loss(self, tokens: Tensor, condition: Condition) -> Tensor:
        """In evaluation mode. Only ZeRO-3 needs its engine for that: the weights are gathered on the way."""
        if self.zero == 3:
            return self.engine.module(tokens, condition, None)
        return self.model.loss(tokens, condition)

    def _in_step(self, batches: Iterable[TokenBatch]) -> Iterator[tuple[TokenBatch, bool]]:
        """(batch, whether it counts). Under ZeRO-3 every forward pass is collective, and ranks may have different
        numbers of batches: one that has run out repeats a sample that does not count until all are done."""
        if self.zero < 3:
            yield from ((batch, True) for batch in batches)
            return
        waiting = iter(batches)
        idle = self._any_sample()
        while self.topology.any_rank((batch := next(waiting, None)) is not None):
            yield (idle, False) if batch is None else (batch, True)

    def _any_sample(self) -> TokenBatch:
        c = self.model.config
        tokens = torch.zeros(1, c.image_tokens, dtype=torch.int64)
        condition: Condition = torch.zeros(1, dtype=torch.int64)
        if c.condition == "text":
            condition = (torch.zeros(1, c.prefix, c.caption_dim), torch.ones(1, c.prefix, dtype=torch.bool))
        return TokenBatch(tokens, condition, torch.zeros(1, dtype=torch.int64))

    def pictures(self, count: int) -> Mapping[str, Tensor]:
        """None: a GPT's run knows codes, and no tokenizer that would draw them."""
        return {}

    def arrays(self) -> Mapping[str, Mapping[str, NDArray[Any]]]:
        return {}

    def entries(self) -> list[TensorEntry]:
        """Without the table of target positions once the order is raster for good: that is a plain LlamaGen model."""
        entries = self.engine.entries()
        if self.order is None or not self.order.settled(self.images_seen):
            return entries
        return [entry for entry in entries if not entry.key.endswith(TARGET_POSITIONS)]

    def scalars(self) -> Mapping[str, float]:
        return self.engine.scalars()

    def load_scalars(self, scalars: Mapping[str, float]) -> None:
        self.engine.load_scalars(scalars)

    def describe(self) -> Mapping[str, Any]:
        return {
            "name": self.name,
            "params": self.parameters,
            "precision": self.config.compute.precision,
            "tokens_per_image": self.model.config.image_tokens,
            "training_flops_per_image": training_flops_per_image(self.model.config),
        }

    def memory(self) -> list[str]:
        return [
            *memory_lines(self.model.config, self.config, self.topology.world, self.micro),
            engine_memory(self.engine),
        ]
