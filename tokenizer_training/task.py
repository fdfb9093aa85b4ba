"""The tokenizer as a Task: the autoencoder and, from some image on, its discriminator."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from llamagen_dist import prng
from llamagen_dist.build import compile_halves
from llamagen_dist.config import TokenizerConfigFile
from llamagen_dist.data.batch import ImageBatch
from llamagen_dist.data.images import load_images, to_floats
from llamagen_dist.data.shards import Shards
from llamagen_dist.errors import UserError
from llamagen_dist.models.quantizer import VectorQuantizer
from llamagen_dist.models.quantizers import quantizer_of
from llamagen_dist.models.vq import VQModel, to_uint8
from llamagen_dist.parallel import ema
from llamagen_dist.parallel import optim as optimizers
from llamagen_dist.parallel.clock import Clock
from llamagen_dist.parallel.engine import TorchEngine
from llamagen_dist.parallel.entries import TensorEntry
from llamagen_dist.parallel.topology import Topology
from llamagen_dist.training.fit import line_due
from llamagen_dist.training.guards import StepGuard
from llamagen_dist.training.out_of_memory import engine_memory
from tokenizer_training.codebook import CodebookHealth, kmeans, perturbation
from tokenizer_training.discriminators import build_discriminator, check_groups
from tokenizer_training.losses import GeneratorLosses, TokenizerLoss
from tokenizer_training.prefixes import prefix_lengths
from tokenizer_training.validation import Validation


class TokenizerTask:
    """model: with its initial weights; held_out: image shards to validate on.

    Before ``loss.discriminator.start_images`` the discriminator neither runs nor learns; over ``warmup_images`` from
    there on it learns alone.
    """

    zero = 0
    smaller = "compute.recompute_every=1, compute.precision=bf16, a smaller train.micro_batch"

    def __init__(self, model: VQModel, config: TokenizerConfigFile, topology: Topology, held_out: Shards) -> None:
        self.config, self.topology, self.model, self.held_out = config, topology, model, held_out
        self.clock = Clock(topology.device)
        self.guard = StepGuard(topology, config.guard.skip_non_finite)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.share = topology.per_rank_batch(config.train.global_batch)
        self.micro = config.train.micro_batch or self.share
        self.rounded = config.compute.precision == "bf16"
        last_layer = model.decoder.conv_out.weight
        self.loss = TokenizerLoss(config.loss, topology.device, last_layer, topology.mean, self.rounded)
        self.entropy = config.loss.entropy_weight > 0
        model.recompute(config.compute.recompute_every)
        if config.compute.compile:
            compile_halves(model, topology.device)
        self.memory_format = torch.channels_last if config.compute.channels_last else torch.contiguous_format
        for module in (model, self.loss.perceptual):  # before the optimizer's state, which is laid out alike
            if module is not None:
                module.to(memory_format=self.memory_format)
        # no buffer of the generator is a batch statistic: what quantizers keep is summed over the ranks once a step
        self.generator = TorchEngine(
            model, config.optim, topology, ema_decay=config.ema.decay, clock=self.clock, sync_buffers=False
        )
        if topology.dp > 1:
            model.quantize.rank_mean = self._rank_mean
        self.validation = Validation(config, topology, held_out, self.loss.perceptual)
        self.codebook = CodebookHealth(config, topology, model.quantize, topology.log0)
        self.discriminator: TorchEngine | None = None
        self.engines = [self.generator]
        """Both networks', the generator's first; only the generator's where there is never a discriminator."""
        self.adversarial_from = self.loss.adversarial_from()
        if self.adversarial_from is not None:
            d = config.loss.discriminator
            optim = config.optim if d.lr is None else config.optim.model_copy(update={"lr": d.lr})
            check_groups(d, self.share, self.micro)
            size = config.data.image_size
            network = build_discriminator(d, model.config.image_channels, size, topology.dp_group)
            self.discriminator = TorchEngine(
                network.to(memory_format=self.memory_format),
                optim,
                topology,
                group="discriminator",
                optimizer_group="discriminator_optimizer",
                clock=self.clock,
            )
            self.engines.append(self.discriminator)

    def step(self, batch: ImageBatch, images_seen: int) -> Mapping[str, Tensor]:
        """batch: this rank's images.

        Returns loss (the weighted sum), its unweighted terms, grad_norm (before clipping) and lr. The
        discriminator's backward pass on the same, detached reconstructions comes before either update, so
        that a loss or gradient that is not finite is found while no weight has changed.
        """
        if images_seen == 0 and self.config.model.codebook_init != "random":
            self._start_codebook(batch.images.to(self.topology.device))
        started = self.adversarial_from is not None and images_seen >= self.adversarial_from
        after = images_seen + self.config.train.global_batch
        step = after // self.config.train.global_batch
        lazy = step % self.config.loss.discriminator.r1_every == 0
        judged = images_seen >= self.config.loss.discriminator.joins_at
        metrics = self._step(batch, images_seen, self.discriminator if started else None, lazy, judged)
        moved = self.codebook.revive(step, lambda: self._global_rows(batch.images.to(self.topology.device)))
        if moved is not None:  # what Adam and the average know of those codes is of others
            for parameter in self.model.quantize.parameters():
                known = self.generator.optimizer.state.get(parameter, {})
                for moment in optimizers.MOMENTS if parameter.requires_grad else ():
                    known[moment][moved] = 0.0
                for average in self.generator.averages if known else ():
                    known[average][moved] = parameter.detach()[moved]
        return {**metrics, **self.codebook.line(step)} if line_due(self.config, step, after) else metrics

    def rehearse(self, batch: ImageBatch, images_seen: int) -> None:
        """With the discriminator, however late it starts, since that is the step that needs most memory."""
        # forward passes in training mode count used codes and batch statistics
        buffers = [(b, b.clone()) for engine in self.engines for b in engine.plain.buffers()]
        buffers += [(b, b.clone()) for b in self.codebook.tensors()]
        with self.guard.rehearsal():
            self._step(batch, images_seen, self.discriminator, lazy=True)
        for buffer, before in buffers:
            buffer.copy_(before)

    def _step(
        self, batch: ImageBatch, images_seen: int, against: TorchEngine | None, lazy: bool, judged: bool = True
    ) -> Mapping[str, Tensor]:
        """against: the discriminator, where it learns; lazy: whether penalties of some steps only are due; judged:
        whether the generator is trained against it yet."""
        pixels = batch.images.to(self.topology.device, memory_format=self.memory_format)
        self.model.train()
        engines = {"grad_norm": self.generator}
        if against is not None:
            engines["discriminator_grad_norm"] = against
        sums: dict[str, Tensor] = {}
        micro_batches = list(zip(pixels.split(self.micro), batch.samples.split(self.micro), strict=True))
        for number, (images, samples) in enumerate(micro_batches, 1):
            share = len(images) / len(pixels)
            with ExitStack() as micro_step:  # both networks average their gradients with the last one only
                for engine in engines.values():
                    micro_step.enter_context(engine.micro_step(last=number == len(micro_batches)))
                first = images_seen + self.topology.dp_rank * len(pixels) + (number - 1) * self.micro
                losses, reconstruction = self._generator_pass(images, against if judged else None, images_seen, first)
                self.generator.backward(self.guard.track_loss(losses.total, samples) * share)
                terms = {"loss" if name == "total" else name: value for name, value in losses._asdict().items()}
                if against is not None:
                    terms |= self._discriminator_pass(against, images, reconstruction.detach(), share, samples, lazy)
            for name, value in terms.items():
                if value is not None:
                    sums[name] = sums.get(name, 0.0) + value.detach() * share
        with self.clock.part("optimizer"):
            norms = {name: engine.gradient_norm() for name, engine in engines.items()}
            passed = self.guard.check_finite(*norms.values())
            if (pending := self.model.quantize.pending) is not None:
                if passed:  # before the update, which takes the codebook into the average
                    self.model.quantize.absorb(self.topology.sum(pending))
                pending.zero_()
            for name, engine in engines.items():
                if passed:
                    engine.update(images_seen, norms[name])
                else:
                    engine.discard()
            if against is not None and passed and self.config.loss.discriminator.lecam_weight > 0:
                logits = self.topology.mean(torch.stack([sums["logits_real"], sums["logits_fake"]]))
                against.plain.get_buffer("lecam_means").lerp_(logits, 1.0 - self.config.loss.discriminator.lecam_decay)
        sums |= {name: norm.detach() for name, norm in norms.items()}
        sums["lr"] = torch.tensor(optimizers.learning_rate(self.config.optim, images_seen))
        return sums

    def _generator_pass(
        self, images: Tensor, against: TorchEngine | None, images_seen: int, first: int = 0
    ) -> tuple[GeneratorLosses, Tensor]:
        """images_seen, first: positions in the run, of the global batch and of the first image."""
        exchange = perturbation(self.config, self.model.quantize, first)
        lengths = prefix_lengths(self.config, first, len(images))
        with self._autocast():
            reconstruction, codebook, codes = self.generator.module(
                images, entropy=self.entropy, exchange=exchange, lengths=lengths
            )
            reconstruction, logits = reconstruction.float(), None
            if against is not None:
                # The bare module, frozen: the discriminator passes the gradient on and gets none itself.
                against.plain.requires_grad_(False)
                (logits,) = against.plain(reconstruction)
                against.plain.requires_grad_(True)
        self.codebook.count(codes)
        return self.loss.generator(images, reconstruction, codebook, logits, images_seen), reconstruction

    def _discriminator_pass(
        self,
        engine: TorchEngine,
        images: Tensor,
        reconstruction: Tensor,
        share: float,
        samples: Tensor,
        lazy: bool = False,
    ) -> dict[str, Tensor]:
        penalised = images.detach().requires_grad_() if lazy and self.config.loss.discriminator.r1_weight > 0 else None
        with self._autocast():
            logits = engine.module(images if penalised is None else penalised, reconstruction)
        real, fake = (each.float() for each in logits)
        loss, terms = self.loss.discriminator(real, fake, penalised, getattr(engine.plain, "lecam_means", None))
        engine.backward(self.guard.track_loss(loss, samples) * share)
        return terms | {"logits_real": real.mean(), "logits_fake": fake.mean()}

    def _autocast(self) -> torch.autocast:
        """Around networks alone: every loss is computed outside, in fp32."""
        return torch.autocast(self.topology.device.type, torch.bfloat16, enabled=self.rounded)

    def _eager(self) -> AbstractContextManager[object]:
        """Within it nothing is compiled: another size of batch, or none of the gradients, would take a minute."""
        return torch.compiler.set_stance("force_eager") if self.config.compute.compile else nullcontext()

    def _rank_mean(self, mean: Tensor) -> Tensor:
        """Mean over the ranks. The gradient stays this rank's own: DDP averages it with the others' afterwards."""
        return mean + (self.topology.mean(mean.detach()) - mean).detach()

    @torch.no_grad()
    def _start_codebook(self, batch: Tensor) -> None:
        """Put every code on a latent of the first global batch, chosen by a keyed order over its positions.

        ``kmeans`` moves them on from there. All ranks gather the same rows in the order of the global batch, so the
        codebook does not depend on how many there are. Raises UserError if the batch has fewer latents than there are
        codes.
        """
        rows = self._global_rows(batch)
        codes = self.model.config.codebook_size
        if len(rows) < codes:
            raise UserError(
                f"model.codebook_init: {self.config.model.codebook_init} finds only {len(rows)} latents in "
                f"train.global_batch ({self.config.train.global_batch} images) for {codes} codes; raise "
                "train.global_batch or use random"
            )
        order = prng.uniform(self.config.train.seed, "codebook", torch.arange(len(rows))).argsort(stable=True)
        quantizer = self.model.quantize
        quantizer.replace(torch.arange(codes, device=rows.device), rows[order[:codes].to(rows.device)])
        if self.config.model.codebook_init == "kmeans" and isinstance(quantizer, VectorQuantizer):
            kmeans(quantizer, rows)
        self.restart_average()

    def restart_average(self) -> None:
        """The moving average begins at the weights as they are, which something else than a step has changed."""
        ema.restart(self.generator.optimizer.state)

    @torch.no_grad()
    def _global_rows(self, batch: Tensor) -> Tensor:
        """The latents of the global batch in its order, as they are compared: fp32 (N, C) (collective)."""
        with self._autocast(), self._eager():
            latents = [
                self.model.quantize.prepare(self.model.latents(part)).flatten(0, 2) for part in batch.split(self.micro)
            ]
        rows = torch.cat(latents)
        if self.topology.dp_group is not None:
            parts = [torch.empty_like(rows) for _ in range(self.topology.dp)]
            dist.all_gather(parts, rows.contiguous(), group=self.topology.dp_group)
            rows = torch.cat(parts)
        return rows

    def _validated(self) -> AbstractContextManager[None]:
        """Within it the model has the weights that are validated."""
        return self.generator.averaged() if self.config.validation.weights == "ema" else nullcontext()

    def validate(self) -> Mapping[str, float]:
        """Over the held-out images, each counted once on whatever number of ranks (see validation.py)."""
        with self._validated(), self._eager():  # batches of other sizes, and no gradient
            scores, histogram = self.validation.measure(self.model, self.clock)
            self.codebook.look(histogram)
        return scores

    @torch.no_grad()
    def pictures(self, count: int) -> Mapping[str, Tensor]:
        """``reconstructions``: the first held-out images side by side, over what became of them."""
        shown = range(min(count, len(self.held_out)))
        if not shown:
            return {}
        pixels = load_images(self.held_out, shown, self.config.data.image_size)
        self.model.eval()
        with self._validated(), self._eager():
            reconstruction, _, _ = self.model(to_floats(pixels).to(self.topology.device))
        self.model.train()
        rows = (torch.from_numpy(pixels).permute(0, 3, 1, 2), to_uint8(reconstruction).cpu())
        return {"reconstructions": torch.cat([torch.cat([*images], dim=2) for images in rows], dim=1)}

    def arrays(self) -> Mapping[str, Mapping[str, NDArray[Any]]]:
        """``codebook``: how often the held-out images used each code, and where the codes lie."""
        return {"codebook": self.codebook.looked} if self.codebook.looked else {}

    def entries(self) -> list[TensorEntry]:
        return [entry for engine in self.engines for entry in engine.entries()] + self.codebook.entries()

    def scalars(self) -> Mapping[str, float]:
        return {name: value for engine in self.engines for name, value in engine.scalars().items()}

    def load_scalars(self, scalars: Mapping[str, float]) -> None:
        for engine in self.engines:
            engine.load_scalars(scalars)

    def describe(self) -> Mapping[str, Any]:
        return {"params": self.parameters, "precision": self.config.compute.precision, **self.validation.describe()}

    def describe_quantizer(self) -> str:
        """One line: which one, its size, and which losses of its own it has."""
        quantizer = self.model.quantize
        losses = ", ".join(quantizer.losses) or "none"
        name, codes = quantizer_of(self.model.state_dict()), f"{quantizer.codebook_size:,} codes"
        return f"quantizer: {name}, {codes} ({quantizer.bits:.2f} bits each); losses of its own: {losses}"

    def memory(self) -> list[str]:
        return [engine_memory(self.generator)]
