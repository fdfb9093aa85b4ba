"""DeepSpeed ZeRO behind the Engine interface, with Megatron's groups when the model is split."""

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llamagen_dist.config import OptimSection
from llamagen_dist.parallel import ema, muon
from llamagen_dist.parallel import optim as optimizers
from llamagen_dist.parallel.buckets import LARGEST_BUCKET
from llamagen_dist.parallel.entries import Sharding, TensorEntry, all_entries
from llamagen_dist.parallel.tensor_parallel import Source, cut, full_shape, merge, split_of
from llamagen_dist.parallel.topology import Topology
from llamagen_dist.parallel.zero_state import ZeroState


def numel_by_module(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Elements per block (``layers.3``) and per module outside the blocks, from the parameters' shapes by name."""
    numel: dict[str, int] = {}
    for name, shape in shapes.items():
        words = name.split(".")
        module = ".".join(words[:2]) if words[0] == "layers" else words[0]
        numel[module] = numel.get(module, 0) + math.prod(shape)
    return numel


class _ModelParallelUnit:
    """Our groups under the names DeepSpeed asks for."""

    def __init__(self, topology: Topology) -> None:
        from megatron.core import parallel_state

        self._t = topology
        self._data_group = parallel_state.get_data_parallel_group()

    def get_model_parallel_world_size(self) -> int:
        return self._t.tensor

    def get_model_parallel_rank(self) -> int:
        return self._t.tp_rank

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._t.tp_group

    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_world_size(self) -> int:
        return self._t.dp

    def get_data_parallel_rank(self) -> int:
        return self._t.dp_rank

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._data_group


def _join(topology: Topology) -> Any:
    """Import DeepSpeed and let it adopt the process group; returns the module."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if topology.device.type == "cuda" else "cpu")
    # single-process groups are enough for the rendezvous variables it insists on
    for name, value in {
        "RANK": topology.rank,
        "WORLD_SIZE": topology.world,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 29500,
    }.items():
        os.environ.setdefault(name, str(value))
    # once per collective and rank, about names that DeepSpeed will have to change, would bury a job's log
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    if topology.device.type == "cpu":
        # its shared-memory gloo extension takes a minute of C++ compilation and is not needed
        deepspeed.ops.__compatible_ops__ = {}
    if not dist.is_initialized():
        dist.init_process_group(
            "gloo" if topology.device.type == "cpu" else "nccl", rank=0, world_size=1, store=dist.HashStore()
        )
    deepspeed.init_distributed(
        dist_backend="gloo" if topology.device.type == "cpu" else "nccl",
        verbose=False,
        auto_mpi_discovery=False,
    )
    return deepspeed


class DeepSpeedEngine:
    """ZeRO stage 1, 2 or 3 over the data-parallel ranks of ``topology``.

    module: plain GPT whose split layers are already in place, weights fp32.
    optim: optimizer, clipping and schedule.
    topology: the ranks.
    stage: 1 shards the optimizer state, 2 gradients too, 3 weights too.
    micro_batch: images per rank and forward pass.
    accumulation: forward passes per optimizer step.
    called: a module around ``module`` whose forward is run instead.
    precision: ``bf16``: bfloat16 weights and activations, fp32 masters, gradient sums and reductions.
    ema_decay: 0 keeps no average.
    powers: further averages.
    query_group: query heads per key-value head.
    exact: gives the fp32 weights again, by name and full shape, once the module's have been rounded; None: a copy of
        them is kept until then.
    """

    def __init__(
        self,
        module: nn.Module,
        optim: OptimSection,
        topology: Topology,
        *,
        stage: int,
        micro_batch: int,
        accumulation: int,
        called: nn.Module | None = None,
        precision: Literal["fp32", "bf16"] = "fp32",
        ema_decay: float = 0.0,
        powers: ema.Powers = ema.NONE,
        query_group: int = 1,
        exact: Source | None = None,
    ) -> None:
        deepspeed = _join(topology)
        self.optim, self.topology, self.stage, self.ema_decay = optim, topology, stage, ema_decay
        self.powers, self.averages = powers, ema.kept(ema_decay, powers)
        self.query_group = query_group
        self.plain = module.to(topology.device)
        self.shapes = {name: tuple(p.shape) for name, p in self.plain.named_parameters()}
        copies = {}
        if precision == "bf16" and exact is None:
            copies = {name: p.detach().to("cpu", copy=True) for name, p in self.plain.named_parameters()}
        optimizer = optimizers.build(self.plain, optim)
        self._engine, _, _, _ = deepspeed.initialize(
            model=called if called is not None else self.plain,
            optimizer=optimizer,
            config=self._settings(precision, micro_batch, accumulation),
            mpu=_ModelParallelUnit(topology) if topology.tensor > 1 else None,
            dist_init_required=False,
        )
        self.module: nn.Module = self._engine
        self.state = ZeroState(self._engine.optimizer, self.plain, stage, topology, self.averages)
        if isinstance(optimizer, muon.Muon):
            narrow = precision == "bf16" and topology.device.type == "cuda"
            optimizer.orthogonalize = self.state.orthogonalize(
                self.shapes, query_group, torch.bfloat16 if narrow else torch.float32
            )
        if precision == "bf16":
            self._unround(copies, exact)

    def _unround(self, copies: Mapping[str, Tensor], exact: Source | None) -> None:
        """DeepSpeed makes its fp32 masters from weights it has rounded to bf16 before: give them their digits back.

        Else a bf16 run would start from other weights than the fp32 run of the same seed.
        """
        t = self.topology
        for name, p in self.plain.named_parameters():
            if exact is None:
                part = copies[name]
            else:
                whole = exact(name, full_shape(name, self.shapes[name], t.tensor))
                part = cut(name, whole, t.tensor, t.tp_rank, self.query_group)
            for kind in (None, *self.averages):
                self.state.set(p, kind, part.to(t.device, torch.float32))
        self.state.publish()

    def _settings(self, precision: str, micro_batch: int, accumulation: int) -> dict[str, Any]:
        numel = sum(math.prod(shape) for shape in self.shapes.values())
        # its default buckets are 2 GB whatever the model; one of the model's own size is all that can ever be used
        bucket = min(LARGEST_BUCKET, numel)
        zero: dict[str, Any] = {"stage": self.stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
        if self.stage == 3:
            # one block computes while the next is fetched; what was used is freed at once, or nothing would be saved
            live = 2 * max(numel_by_module(self.shapes).values())
            zero |= {
                "stage3_prefetch_bucket_size": min(bucket, live // 2),
                "stage3_max_live_parameters": live,
                "stage3_max_reuse_distance": 0,
                # vectors stay whole on every rank (gathering one costs more than it saves), matrices are sharded
                "stage3_param_persistence_threshold": max(
                    (s[0] for s in self.shapes.values() if len(s) == 1), default=0
                ),
            }
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "train_batch_size": micro_batch * accumulation * self.topology.dp,
            "gradient_clipping": self.optim.clip,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 1 << 60,
        }
        if precision == "bf16":  # sums and reductions in fp32, or the layout would decide what is rounded away
            settings["bf16"] = {"enabled": True}
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
            settings["communication_data_type"] = "fp32"
        return settings

    def micro_step(self, last: bool) -> AbstractContextManager[object]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of ``loss`` (already divided by the number of micro-batches)."""
        self._engine.backward(loss, scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # counts the micro-step; nothing is updated

    def step(self, images_seen: int, check_finite: Callable[[Tensor], bool]) -> Tensor:
        """Clip, update, clear; returns the gradient norm before clipping (replicated weights counted once).

        The norm is known only inside DeepSpeed's step. Where it is not finite, on all ranks alike since it is reduced
        over them, DeepSpeed itself leaves weights and moments alone (0.19.8: all stages, fp32 and bf16), so
        ``check_finite`` can come after it.
        """
        optimizers.set_learning_rate(self._engine.optimizer.param_groups, self.optim, images_seen)
        self._engine.step()
        # left on the device: ``check_finite`` waits for it together with the losses
        norm = torch.as_tensor(self._engine.get_global_grad_norm()).detach().to(torch.float32, copy=True)
        if check_finite(norm):
            ema.update(self.state.states, self.ema_decay)
            self.powers.update(self.state.states, images_seen)
        return norm

    @contextmanager
    def averaged(self) -> Iterator[None]:
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        ema.exchange(self.state.states)
        self.state.publish()  # rounds the masters to the weights as the end of a step does

    def entries(self) -> list[TensorEntry]:
        """fp32 masters, averages and Adam moments, gathered one at a time over data- and tensor-parallel ranks."""
        return all_entries(self.plain, self._entry, self.averages, partial(optimizers.moments, self.optim))

    def _entry(self, group: str, key: str, name: str, p: Tensor, kind: str | None) -> TensorEntry:
        t = self.topology
        part_shape = self.shapes[name]  # under ZeRO-3 the parameter itself is empty between its uses

        def owners(writer: int) -> list[tuple[int, int]]:
            # a replicated weight is taken from the writer's own column of data-parallel ranks, a split one from all
            columns = [writer % t.tensor] if split_of(name) is None else range(t.tensor)
            return [(d * t.tensor + c, size) for c in columns for d, size in self.state.sizes(p)]

        def merged(parts: list[Tensor]) -> Tensor:
            # first the data-parallel pieces of each tensor-parallel part, end to end; then the parts, by the table
            each = len(self.state.sizes(p))
            whole = [torch.cat(parts[i : i + each]).view(part_shape) for i in range(0, len(parts), each)]
            return merge(name, whole, self.query_group)

        def write(full: Tensor) -> None:
            self.state.set(p, kind, cut(name, full, t.tensor, t.tp_rank, self.query_group).to(t.device))

        shape = full_shape(name, part_shape, t.tensor)
        local = partial(self.state.local, p, kind)
        return TensorEntry(group, key, shape, local, write, sharding=Sharding(owners, merged))

    def scalars(self) -> dict[str, float]:
        return {"optimizer.step": self.state.adam_step()}

    def load_scalars(self, scalars: Mapping[str, float]) -> None:
        """The last act of a resume: Adam's step count, then the masters become the module's weights."""
        self.state.set_adam_step(scalars["optimizer.step"])
        self.state.publish()

    def held_bytes(self) -> dict[str, int]:
        return self.state.held_bytes(self.plain)
