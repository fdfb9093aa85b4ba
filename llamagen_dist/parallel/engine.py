"""One interface over what runs the optimizer: plain torch or DDP here, DeepSpeed ZeRO in deepspeed_engine.py."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llamagen_dist.config import OptimSection
from llamagen_dist.parallel import ema
from llamagen_dist.parallel import optim as optimizers
from llamagen_dist.parallel.clock import Clock
from llamagen_dist.parallel.entries import Sharding, TensorEntry, all_entries, replicated
from llamagen_dist.parallel.tensor_parallel import cut, full_shape, merge, split_of
from llamagen_dist.parallel.topology import Topology


class Engine(Protocol):
    """Gradients accumulate over ``backward`` calls until ``step``.

    module: what is called to train and to validate; plain: the model itself, whose parameter names the checkpoint uses.
    """

    module: nn.Module
    plain: nn.Module

    def micro_step(self, last: bool) -> AbstractContextManager[object]:
        """Around forward and backward of one micro-batch; gradients need not be averaged before the last one."""
        ...

    def backward(self, loss: Tensor) -> None: ...

    def step(self, images_seen: int, check_finite: Callable[[Tensor], bool]) -> Tensor:
        """One update with the gradients so far, which are then gone; returns their norm before clipping.

        Only where ``check_finite(norm)`` (collective) agrees; otherwise weights and optimizer state stay as they are.
        """
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """Within it the module computes with the moving average of its weights (collective; needs an ``ema_decay``).

        Afterwards all is as before, to the last bit."""
        ...

    def entries(self) -> list[TensorEntry]: ...

    def scalars(self) -> dict[str, float]: ...

    def load_scalars(self, scalars: Mapping[str, float]) -> None: ...

    def held_bytes(self) -> dict[str, int]:
        """Bytes this rank really holds for weights, gradients, masters, moments and ema (0 where none are kept)."""
        ...


class _WithIdle(nn.Module):
    """A module and a parameter that nothing uses, without which DDP advises at every start to tell it of none."""

    def __init__(self, called: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.called, self.idle = called, nn.Parameter(torch.zeros(1, device=device))

    def forward(self, *inputs: object, **named: object) -> object:
        return self.called(*inputs, **named)


class TorchEngine:
    """One process, or DDP when the topology has several data-parallel ranks; fp32, tensor parallelism allowed.

    Initial weights are those of rank 0.

    module: the bare module (``plain``), whose parameter names the checkpoint uses; ``self.module`` is what training
        calls, wrapped in DDP if there are several ranks.
    optim: optimizer, clipping and schedule.
    topology: the ranks.
    called: a module around ``module`` whose forward is to be run instead.
    group, optimizer_group: file families in the checkpoint.
    ema_decay: 0 keeps no average.
    powers: further averages.
    query_group: query heads per key-value head, for weights split by tensor parallelism.
    sync_buffers: rank 0's buffers are sent to all before every forward pass (batch statistics).
    clock: charged with what DDP waits for its all-reduces.
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
        ema_decay: float = 0.0,
        powers: ema.Powers = ema.NONE,
        query_group: int = 1,
        sync_buffers: bool = True,
        clock: Clock | None = None,
    ) -> None:
        self.clock = clock or Clock(topology.device)
        self.plain = module.to(topology.device)
        self.optim, self.topology, self.ema_decay, self.query_group = optim, topology, ema_decay, query_group
        self.powers, self.averages = powers, ema.kept(ema_decay, powers)
        self.group, self.optimizer_group = group, optimizer_group
        self.module: nn.Module = called if called is not None else self.plain
        if topology.dp > 1:
            self.module = DistributedDataParallel(
                _WithIdle(self.module, topology.device),
                device_ids=[topology.device] if topology.device.type == "cuda" else None,
                process_group=topology.dp_group,
                broadcast_buffers=sync_buffers,
                gradient_as_bucket_view=True,
                # It keeps the buckets of the first step. DDP would rebuild them after it, and a gradient's position in
                # its bucket decides in which order more than two ranks' shares of it are added up: the first step after
                # a resume would not be bit-equal to the same step of an uninterrupted run.
                find_unused_parameters=True,
            )
        self.optimizer = optimizers.build(self.plain, optim, topology, query_group)
        for name, p in self.plain.named_parameters():
            if p.requires_grad:
                self.optimizer.state[p] = optimizers.fresh_state(p, optimizers.moments(optim, name))
            if p.requires_grad or self.averages:
                self.optimizer.state[p] |= {key: p.detach().clone() for key in self.averages}

    def micro_step(self, last: bool) -> AbstractContextManager[object]:
        if isinstance(self.module, DistributedDataParallel) and not last:
            return self.module.no_sync()
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of ``loss`` (already divided by the number of micro-batches)."""
        if self.topology.dp == 1:
            loss.backward()
            return
        with self.clock.backward(loss):
            loss.backward()

    def step(self, images_seen: int, check_finite: Callable[[Tensor], bool]) -> Tensor:
        norm = self.gradient_norm()
        if check_finite(norm):
            self.update(images_seen, norm)
        else:
            self.discard()
        return norm.detach()

    def discard(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def update(self, images_seen: int, norm: Tensor) -> None:
        """Clip by ``norm`` (what ``gradient_norm`` returned), set this position's learning rate, update, clear."""
        parameters = [p for p in self.plain.parameters() if p.grad is not None]
        if self.optim.clip > 0:
            nn.utils.clip_grads_with_norm_(parameters, self.optim.clip, norm)
        optimizers.set_learning_rate(self.optimizer.param_groups, self.optim, images_seen)
        self.optimizer.step()
        self.discard()
        ema.update(self.optimizer.state, self.ema_decay)
        self.powers.update(self.optimizer.state, images_seen)

    def gradient_norm(self) -> Tensor:
        """Over the whole model: parts of split weights add up over the tensor-parallel ranks, copies count once."""
        named = [(name, p.grad) for name, p in self.plain.named_parameters() if p.grad is not None]
        if self.topology.tensor == 1:
            return nn.utils.get_total_norm([gradient for _, gradient in named])
        copies = nn.utils.get_total_norm([g for name, g in named if split_of(name) is None])
        # squares add up over disjoint parts; the copies are equal on all ranks and must not be added tp times
        parts = nn.utils.get_total_norm([g for name, g in named if split_of(name) is not None]).square()
        dist.all_reduce(parts, group=self.topology.tp_group)
        return (copies.square() + parts).sqrt()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        ema.exchange(self.optimizer.state)
        try:
            yield
        finally:
            ema.exchange(self.optimizer.state)

    def entries(self) -> list[TensorEntry]:
        """Weights, buffers, Adam moments and moving averages, merged over the tensor-parallel ranks."""
        return all_entries(self.plain, self._entry, self.averages, self._moments, self.group, self.optimizer_group)

    def _moments(self, name: str) -> tuple[str, ...]:
        return optimizers.moments(self.optim, name)

    def _entry(self, group: str, key: str, name: str, p: Tensor, kind: str | None) -> TensorEntry:
        t, tensor = self.topology, p if kind is None else self.optimizer.state[p][kind]
        if t.tensor == 1 or split_of(name) is None:
            return replicated(group, key, tensor)

        def write(full: Tensor) -> None:
            with torch.no_grad():
                tensor.copy_(cut(name, full, t.tensor, t.tp_rank, self.query_group))

        shape, numel = tuple(tensor.shape), tensor.numel()

        def owners(writer: int) -> list[tuple[int, int]]:
            # all data-parallel ranks hold the same parts: the writer's own tensor-parallel group, which are neighbours
            first = writer // t.tensor * t.tensor
            return [(rank, numel) for rank in range(first, first + t.tensor)]

        sharding = Sharding(owners, lambda parts: merge(name, [part.view(shape) for part in parts], self.query_group))
        return TensorEntry(
            group, key, full_shape(name, shape, t.tensor), lambda: tensor.detach().flatten(), write, sharding=sharding
        )

    def scalars(self) -> dict[str, float]:
        return {f"{self.optimizer_group}.step": next(float(s["step"]) for s in self._states() if "step" in s)}

    def _states(self) -> Collection[dict[str, Any]]:
        """Of trained parameters, and the averages of those that are not."""
        return self.optimizer.state.values()

    def load_scalars(self, scalars: Mapping[str, float]) -> None:
        for state in self._states():
            if "step" in state:
                state["step"].fill_(scalars[f"{self.optimizer_group}.step"])

    def held_bytes(self) -> dict[str, int]:
        parameters = list(self.plain.parameters())
        states = self._states()
        return {
            "weights": sum(p.nbytes for p in parameters),
            "gradients": sum(p.grad.nbytes for p in parameters if p.grad is not None),
            "masters": 0,
            "moments": optimizers.moment_bytes(states),
            "ema": sum(state[key].nbytes for state in states for key in self.averages),
        }
