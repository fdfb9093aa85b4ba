"""DeepSpeed ZeRO behind the Engine interface, with Megatron's groups when the model is split."""

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llamagen_dist.checkpoint.entries import Entry, buffers
from llamagen_dist.config import OptimSection
from llamagen_dist.parallel.tensor_parallel import cut, gather_full, split_of
from llamagen_dist.parallel.topology import Topology
from llamagen_dist.training import optim as optimizers
from llamagen_dist.training.guards import check_gradient

MOMENTS = ("exp_avg", "exp_avg_sq")


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
    """ZeRO stage 1 or 2 over the data-parallel ranks of ``topology``; fp32.

    module: plain GPT whose split layers are already in place; called: a module around it whose forward is run
    instead. micro_batch: images per rank and forward pass;
    accumulation: forward passes per optimizer step.
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
    ) -> None:
        deepspeed = _join(topology)
        self.optim, self.topology = optim, topology
        self.plain = module.to(topology.device)
        self.shapes = {name: tuple(p.shape) for name, p in self.plain.named_parameters()}
        # its default bucket is 2 GB whatever the model; one bucket of the model's own size is all that can ever be used
        bucket = min(500_000_000, sum(p.numel() for p in self.plain.parameters()))
        settings = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "train_batch_size": micro_batch * accumulation * topology.dp,
            "gradient_clipping": optim.clip,
            "zero_optimization": {
                "stage": stage,
                "reduce_bucket_size": bucket,
                "allgather_bucket_size": bucket,
            },
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 1 << 60,
        }
        self._engine, _, _, _ = deepspeed.initialize(
            model=called if called is not None else self.plain,
            optimizer=optimizers.build(self.plain, optim),
            config=settings,
            mpu=_ModelParallelUnit(topology) if topology.tensor > 1 else None,
            dist_init_required=False,
        )
        self.module: nn.Module = self._engine
        self._make_optimizer_state()

    def _make_optimizer_state(self) -> None:
        """Adam's state exists only after the first step; a resume has to write into it before."""
        inner = self._engine.optimizer.optimizer
        for group in inner.param_groups:
            for p in group["params"]:
                inner.state[p] = {
                    "step": torch.zeros(()),
                    **{m: torch.zeros_like(p, dtype=torch.float32) for m in MOMENTS},
                }
        self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of ``loss`` (already divided by the number of micro-batches)."""
        self._engine.backward(loss, scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # counts the micro-step; nothing is updated

    def step(self, images_seen: int) -> Tensor:
        """Clip, update, clear; returns the gradient norm before clipping (replicated weights counted once).

        Raises NonFiniteError on all ranks: DeepSpeed itself leaves the weights alone when the norm is not finite.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = optimizers.learning_rate(self.optim, images_seen)
        self._engine.step()
        norm = torch.as_tensor(float(self._engine.get_global_grad_norm()))
        check_gradient(norm, self.topology, "model")
        return norm

    def entries(self) -> list[Entry]:
        """fp32 masters and Adam moments, gathered one parameter at a time over data- and tensor-parallel ranks."""
        from deepspeed.utils import (
            safe_get_full_fp32_param,
            safe_get_full_optimizer_state,
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
        )

        t = self.topology
        found: list[Entry] = []
        for name, p in self.plain.named_parameters():
            shape = self._full_shape(name)

            def read(writer: int, name: str = name, p: Tensor = p) -> Tensor | None:
                return gather_full(name, safe_get_full_fp32_param(p), t, writer)

            def write(full: Tensor, name: str = name, p: Tensor = p) -> None:
                safe_set_full_fp32_param(p, cut(name, full, t.tensor, t.tp_rank).to(t.device))

            found.append(Entry("weights", name, shape, read, write))
            for moment in MOMENTS:

                def read_moment(writer: int, name: str = name, p: Tensor = p, moment: str = moment) -> Tensor | None:
                    return gather_full(name, safe_get_full_optimizer_state(p, moment), t, writer)

                def write_moment(full: Tensor, name: str = name, p: Tensor = p, moment: str = moment) -> None:
                    safe_set_full_optimizer_state(p, cut(name, full, t.tensor, t.tp_rank).to(t.device), moment)

                found.append(Entry("optimizer", f"{moment}/{name}", shape, read_moment, write_moment))
        return found + buffers("weights", self.plain)

    def _full_shape(self, name: str) -> tuple[int, ...]:
        split, shape = split_of(name), list(self.shapes[name])
        if split is not None:
            shape[split.dim] *= self.topology.tensor
        return tuple(shape)

    def scalars(self) -> dict[str, float]:
        state = self._engine.optimizer.optimizer.state
        return {"optimizer.step": float(next(iter(state.values()))["step"])}

    def load_scalars(self, scalars: Mapping[str, float]) -> None:
        """The last act of a resume: Adam's step count, then the masters become the module's weights."""
        for state in self._engine.optimizer.optimizer.state.values():
            state["step"].fill_(scalars["optimizer.step"])
        self._engine.optimizer.update_lp_params()

    def held_bytes(self) -> dict[str, int]:
        """Bytes this rank really holds: weights, and the optimizer's own state (masters aside)."""
        inner = self._engine.optimizer.optimizer
        moments = sum(s[m].nbytes for s in inner.state.values() for m in MOMENTS)
        return {"weights": sum(p.nbytes for p in self.plain.parameters()), "moments": moments}
