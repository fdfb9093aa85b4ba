"""Which rank am I, whom do I share a model with, whom do I average gradients with."""

import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from llamagen_dist.console import LOG
from llamagen_dist.errors import UserError
from llamagen_dist.parallel.division import data_ranks, per_rank_batch
from llamagen_dist.process import cores

T = TypeVar("T")


@dataclass(frozen=True)
class Topology:
    """tensor-parallel ranks are neighbours: rank = dp_rank * tensor + tp_rank. Groups are None when alone."""

    rank: int = 0
    world: int = 1
    tensor: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - torch.device is immutable
    dp_group: dist.ProcessGroup | None = None
    tp_group: dist.ProcessGroup | None = None

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tensor

    @property
    def dp_rank(self) -> int:
        return self.rank // self.tensor

    @property
    def dp(self) -> int:
        return self.world // self.tensor

    def per_rank_batch(self, global_batch: int) -> int:
        """Images per data-parallel rank in a global batch. Raises UserError where it does not divide."""
        return per_rank_batch(global_batch, self.dp)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Average over the data-parallel ranks (a new tensor; collective)."""
        return values if self.dp_group is None else self.sum(values) / self.dp

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the data-parallel ranks (a new tensor; collective)."""
        if self.dp_group is None:
            return values
        total = values.clone()
        dist.all_reduce(total, group=self.dp_group)
        return total

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """The largest of each value over all ranks (in place; collective)."""
        if self.world > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is up on any rank at all (collective)."""
        if self.world == 1:
            return flag
        return bool(self.max(torch.tensor([int(flag)], device=self.device)).item())

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank (collective). Values are pickled: for small things that are not tensors."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def broadcast_from_rank0(self, decide: Callable[[], T]) -> T:
        """What ``decide()`` returns on rank 0, on every rank (collective).

        A UserError there is raised everywhere: a rank that continued alone would wait in the next collective. The value
        is pickled.
        """
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                answer[0] = decide()
            except UserError as error:
                answer[1] = str(error)
        if self.world > 1:
            dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise UserError(answer[1])
        result: T = answer[0]
        return result

    def log0(self, text: str) -> None:
        """Print a line (through the log), once for all ranks."""
        if self.rank == 0:
            LOG.info(text)

    def set_timeouts(self, seconds: float) -> None:
        """Of every group that this rank is in, Megatron's and DeepSpeed's too, for collectives from now on."""
        if self.world > 1:
            # private, for want of a public list of groups: those that libraries made have no other handle here
            for group in list(dist.distributed_c10d._world.pg_map):
                dist.set_timeout(timedelta(seconds=seconds), group)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def record_collectives(log: Path) -> None:
    """Let NCCL's flight recorder write its last collectives to log/nccl-rank-N when one times out.

    Settings of the environment, which torch reads when it makes the groups; what is set already stays. Names and
    meanings were read in torch 2.14's headers and libraries; no GPU was at hand to run it.
    """
    for name, value in {
        "TORCH_FR_BUFFER_SIZE": "20000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": str(log.absolute() / "nccl-rank-"),
    }.items():
        os.environ.setdefault(name, value)


def device_index(local: int, visible: int) -> int:
    """Which of the devices that this process sees is its own: the only one where the launcher bound one to each rank.

    Raises UserError where there are fewer than ranks.
    """
    if visible == 1:
        return 0
    if local >= visible:
        raise UserError(
            f"rank {local} of this machine has no GPU of its own: {visible} are visible to it; start at most {visible} "
            "ranks per machine, or check CUDA_VISIBLE_DEVICES and gpus_per_node"
        )
    return local


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name)
    if text is None:
        return default
    if not text.isdecimal():
        raise UserError(
            f"{name} is {text!r} in the environment, not a number: unset RANK WORLD_SIZE LOCAL_RANK, or start the "
            "ranks with llamagen launch, torchrun or srun"
        )
    return int(text)


def ranks_of_environment(environment: Mapping[str, str]) -> tuple[int, int]:
    """(WORLD_SIZE, RANK); (1, 0) where neither is set. Raises UserError where the variables do not describe a group.

    A WORLD_SIZE that an earlier job has left in the shell would otherwise end in torch's rendezvous, with a traceback
    or, worse, a wait for ranks that nobody starts.
    """
    world, rank = _number(environment, "WORLD_SIZE", 1), _number(environment, "RANK", 0)
    if world <= 1:
        if world == 0:
            raise UserError("WORLD_SIZE is 0 in the environment; unset it, or give the number of ranks")
        return 1, 0
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {world} in the environment but {' and '.join(missing)} not: unset it for a single rank; "
            "start several with llamagen launch, torchrun or srun"
        )
    _number(environment, "MASTER_PORT", 0)
    if rank >= world:
        raise UserError(f"RANK is {rank} in the environment and WORLD_SIZE {world}: ranks count from 0 to {world - 1}")
    return world, rank


def thread_warning(threads: Sequence[int], cores: int) -> str:
    """A sentence where a node's ranks, of so many CPU threads each, want more than its ``cores``; else empty.

    Threads that take turns on a core wait for each other at every operation, which costs far more than a factor of
    their number. Ranks of one thread each have none to give up.
    """
    if sum(threads) <= cores or max(threads) == 1:
        return ""
    return (
        f"{sum(threads)} CPU threads ({len(threads)} rank{'s' * (len(threads) > 1)} of this machine) share {cores} "
        f"core{'s' * (cores > 1)}, which can make a run many times slower; before the next start: "
        f"export OMP_NUM_THREADS={max(1, cores // len(threads))}"
    )


def _warn_of_threads(topology: Topology) -> None:
    """Print ``thread_warning`` for this node, on every rank of it (collective).

    Nothing in the environment says for certain how many ranks share a node and its cores (srun may bind each to its
    own), so the ranks ask each other.
    """
    bound = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(cores())
    mine = (platform.node(), torch.get_num_threads(), sum(1 << core for core in bound))
    here = [(threads, mask) for host, threads, mask in topology.gather(mine) if host == mine[0]]
    together = 0
    for _, mask in here:
        together |= mask
    if text := thread_warning([threads for threads, _ in here], together.bit_count()):
        LOG.warning(f"rank {topology.rank}: {text}")


def start(
    tensor: int = 1, threads: int | None = None, timeout_s: float = 1800, run_dir: Path | None = None
) -> Topology:
    """Join the process group that RANK and WORLD_SIZE describe (torchrun's, srun's or our launcher's variables).

    A group that exists already is used as it is (forked test ranks).

    tensor: tensor-parallel size.
    threads: CPU threads of this rank; None leaves torch's own number.
    timeout_s: seconds, of collectives of all groups, until ``set_timeouts``.
    run_dir: where NCCL may leave its record of a collective that timed out.

    Raises UserError where ``tensor`` does not divide the ranks, where the variables describe no group, or where a rank
    has no GPU of its own.
    """
    if dist.is_initialized():
        world, rank = dist.get_world_size(), dist.get_rank()
    else:
        world, rank = ranks_of_environment(os.environ)
    if threads is not None:
        torch.set_num_threads(threads)
    data_ranks(world, tensor)  # refuses what cannot be split before any group is made
    if torch.cuda.is_available():
        local = device_index(_number(os.environ, "LOCAL_RANK", 0), torch.cuda.device_count())
        torch.cuda.set_device(local)
        device = torch.device("cuda", local)
        # same config, seed and layout: the same losses to the last bit. The CPU kernels we use are deterministic
        # anyway, and the call imports the compiler, which takes seconds.
        torch.use_deterministic_algorithms(True, warn_only=True)
        # the mode would also fill every new buffer, in case it is read before it is written, which nothing here does
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 - untyped in torch
    else:
        device = torch.device("cpu")
    if world == 1:
        alone = Topology(device=device)
        _warn_of_threads(alone)
        return alone
    if not dist.is_initialized():
        if run_dir is not None and device.type == "cuda":
            record_collectives(run_dir / "log")
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    _warn_of_threads(Topology(rank, world))
    dp_group, tp_group = dist.group.WORLD, None
    if tensor > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron-core asks for it
        parallel_state = _megatron()
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor)
        dp_group = parallel_state.get_data_parallel_group() if world > tensor else None
        tp_group = parallel_state.get_tensor_model_parallel_group()
    topology = Topology(rank, world, tensor, device, dp_group, tp_group)
    topology.set_timeouts(timeout_s)  # Megatron's groups were made with its own
    return topology


def _megatron() -> Any:
    """Megatron-core's ``parallel_state``, imported without wandb.

    Megatron-core imports wandb where it is installed, for parts that nothing here uses. It would leave two
    temporary folders wherever a rank ends without its exit handlers (killed, or stopped by the launcher).
    """
    unused = "wandb" not in sys.modules
    if unused:
        sys.modules["wandb"] = None  # type: ignore[assignment]  # an import of it raises ImportError
    try:
        from megatron.core import parallel_state
    finally:
        if unused:
            del sys.modules["wandb"]
    return parallel_state


def full_fp32() -> None:
    """On a GPU: fp32 products stay fp32 (no TF32), and convolutions are deterministic."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
