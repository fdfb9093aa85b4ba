"""One interface over what runs the optimizer: plain torch or DDP here, DeepSpeed ZeRO in deepspeed_engine.py."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llamagen_dist.checkpoint.entries import Entry, buffers, replicated
from llamagen_dist.config import OptimSection
from llamagen_dist.parallel.topology import Topology
from llamagen_dist.tracking.throughput import Clock
from llamagen_dist.training import optim as optimizers
from llamagen_dist.training.guards import check_gradient


class Engine(Protocol):
    """Gradients accumulate over ``backward`` calls until ``step``."""

    module: nn.Module
    plain: nn.Module

    def backward(self, loss: Tensor) -> None: ...

    def step(self, images_seen: int) -> Tensor: ...

    def entries(self) -> list[Entry]: ...

    def scalars(self) -> dict[str, float]: ...

    def load_scalars(self, scalars: Mapping[str, float]) -> None: ...


class TorchEngine:
    """One process, or DDP when the topology has several data-parallel ranks.

    module: what training calls (DDP-wrapped if there are several ranks); plain: the bare module, whose parameter names
    the checkpoint uses. called: a module around ``module`` whose forward is to be run instead. Initial weights are
    those of rank 0. group, optimizer_group: file families in the checkpoint. clock: is told what DDP waits.
    """

    def __init__(
        self,
        module: nn.Module,
        optim: OptimSection,
        topology: Topology,
        *,
        called: nn.Module | None = None,
        group: str = "weights",
        optimizer_group: str = "optimizer",
        clock: Clock | None = None,
    ) -> None:
        self.clock = clock or Clock(topology.device)
        self.plain = module.to(topology.device)
        self.optim, self.topology = optim, topology
        self.group, self.optimizer_group = group, optimizer_group
        self.module: nn.Module = called if called is not None else self.plain
        if topology.dp > 1:
            devices = [topology.device] if topology.device.type == "cuda" else None
            self.module = DistributedDataParallel(self.module, device_ids=devices, process_group=topology.dp_group)
        self.optimizer = optimizers.build(self.plain, optim)
        for p in self.plain.parameters():
            if p.requires_grad:
                self.optimizer.state[p] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of ``loss`` (already divided by the number of micro-batches)."""
        if self.topology.dp == 1:
            loss.backward()
            return
        with self.clock.backward(loss):
            loss.backward()

    def step(self, images_seen: int) -> Tensor:
        """Clip, set the learning rate of this position, update, clear. Returns the gradient norm before clipping.

        Raises NonFiniteError before the update; the norm is the same on every rank, so all raise together.
        """
        parameters = [p for p in self.plain.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        check_gradient(norm, self.topology, self.group)
        if self.optim.clip > 0:
            nn.utils.clip_grads_with_norm_(parameters, self.optim.clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = optimizers.learning_rate(self.optim, images_seen)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.detach()

    def entries(self) -> list[Entry]:
        """Weights, buffers and Adam moments; every rank holds all of them."""
        found: list[Entry] = []
        for name, p in self.plain.named_parameters():
            found.append(replicated(self.group, name, p))
            if p.requires_grad:
                for moment in ("exp_avg", "exp_avg_sq"):
                    found.append(replicated(self.optimizer_group, f"{moment}/{name}", self.optimizer.state[p][moment]))
        return found + buffers(self.group, self.plain)

    def scalars(self) -> dict[str, float]:
        return {f"{self.optimizer_group}.step": float(next(iter(self.optimizer.state.values()))["step"])}

    def load_scalars(self, scalars: Mapping[str, float]) -> None:
        for state in self.optimizer.state.values():
            state["step"].fill_(scalars[f"{self.optimizer_group}.step"])
