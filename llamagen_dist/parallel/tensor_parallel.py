"""Tensor parallelism from outside: one table says how each weight of the finished plain model is split.

The table drives everything that must agree: swapping Megatron-core's layers in (names and order of the parameters
stay), cutting full weights into a rank's part, and merging parts for a checkpoint. What it does not name is replicated.
"""

import re
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llamagen_dist.config import UserError
from llamagen_dist.models.gpt import GPT, GPTConfig
from llamagen_dist.parallel.topology import Topology


@dataclass(frozen=True)
class Split:
    """kind: ``vocab``, ``column`` or ``row``; dim: the dimension cut; parts: blocks cut one by one ([q|k|v]: 3)."""

    kind: str
    dim: int
    parts: int = 1


TABLE: tuple[tuple[str, Split], ...] = (
    (r"tok_embeddings\.weight", Split("vocab", 0)),
    (r"layers\.\d+\.attention\.wqkv\.weight", Split("column", 0, parts=3)),
    (r"layers\.\d+\.attention\.wo\.weight", Split("row", 1)),
    (r"layers\.\d+\.feed_forward\.w[13]\.weight", Split("column", 0)),
    (r"layers\.\d+\.feed_forward\.w2\.weight", Split("row", 1)),
    (r"output\.weight", Split("column", 0)),
)


def split_of(name: str) -> Split | None:
    """How the parameter ``name`` is split, or None where every tensor-parallel rank holds it whole."""
    return next((split for pattern, split in TABLE if re.fullmatch(pattern, name)), None)


def cut(name: str, full: Tensor, tensor: int, rank: int) -> Tensor:
    """The part of a full tensor that tensor-parallel rank ``rank`` of ``tensor`` holds."""
    split = split_of(name)
    if split is None or tensor == 1:
        return full
    parts = full.chunk(split.parts, split.dim)
    return torch.cat([part.chunk(tensor, split.dim)[rank] for part in parts], split.dim).contiguous()


def merge(name: str, pieces: list[Tensor]) -> Tensor:
    """The inverse of ``cut``: pieces in rank order -> the full tensor."""
    split = split_of(name)
    if split is None or len(pieces) == 1:
        return pieces[0]
    chunked = [piece.chunk(split.parts, split.dim) for piece in pieces]
    return torch.cat([piece[i] for i in range(split.parts) for piece in chunked], split.dim).contiguous()


def check(config: GPTConfig, tensor: int) -> None:
    """Raise UserError if the model cannot be split ``tensor`` ways, with the sizes that would work."""
    limits = {"heads": config.n_head, "feed-forward width": config.ffn_dim, "vocabulary": config.vocab_size}
    bad = [f"{name} {size}" for name, size in limits.items() if size % tensor]
    if bad:
        fits = [n for n in range(1, config.n_head + 1) if all(size % n == 0 for size in limits.values())]
        raise UserError(
            f"parallel.tensor: {tensor} does not divide this model's {' and '.join(bad)}; "
            f"sizes that work: {', '.join(map(str, fits))}"
        )


def apply(model: GPT, topology: Topology) -> GPT:
    """Replace the split layers of a finished plain model by Megatron-core's, in place, with their part of the weights.

    Every rank must hold the same full weights. Nothing happens at tensor size 1.
    """
    if topology.tensor == 1:
        return model
    check(model.config, topology.tensor)
    from megatron.core import ModelParallelConfig
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        gather_from_tensor_model_parallel_region,
        vocab_parallel_cross_entropy,
    )
    from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

    mcore = ModelParallelConfig(
        tensor_model_parallel_size=topology.tensor,
        use_cpu_initialization=True,
        params_dtype=torch.float32,
        perform_initialization=False,
    )

    # mcore adds an _extra_state to state dicts, which strict loading of LlamaGen's names would refuse
    class Column(ColumnParallelLinear):
        get_extra_state = nn.Module.get_extra_state
        set_extra_state = nn.Module.set_extra_state

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[0]

    class Row(RowParallelLinear):
        get_extra_state = nn.Module.get_extra_state
        set_extra_state = nn.Module.set_extra_state

        def forward(self, x: Tensor) -> Tensor:
            # mcore's reduction returns its own input, but reduces a contiguous copy of it
            return super().forward(x.contiguous())[0]

    def swapped(kind: str, old: nn.Linear | nn.Embedding) -> nn.Module:
        if isinstance(old, nn.Embedding):
            return VocabParallelEmbedding(
                old.num_embeddings, old.embedding_dim, init_method=nn.init.zeros_, config=mcore
            )
        options = {"config": mcore, "init_method": nn.init.zeros_, "bias": False}
        if kind == "column":
            return Column(old.in_features, old.out_features, gather_output=False, **options)
        return Row(old.in_features, old.out_features, input_is_parallel=True, skip_bias_add=False, **options)

    order = [name for name, _ in model.named_parameters()]
    for name, p in list(model.named_parameters()):
        split = split_of(name)
        if split is None:
            continue
        path = name.removesuffix(".weight")
        parent = model.get_submodule(path.rpartition(".")[0])
        old = getattr(parent, path.rpartition(".")[2])
        new = swapped(split.kind, old)
        getattr(new, "_load_state_dict_pre_hooks").clear()  # noqa: B009 - nn.Module types it as a tensor
        weight = new.get_parameter("weight")
        with torch.no_grad():
            weight.copy_(cut(name, p, topology.tensor, topology.tp_rank))
        for attribute in ("tensor_model_parallel", "partition_dim", "partition_stride"):
            if hasattr(weight, attribute):
                delattr(weight, attribute)
        # without this mark DeepSpeed takes the part for a replica and the gradient norm comes out too small
        set_tensor_model_parallel_attributes(weight, True, split.dim, 1)
        setattr(parent, path.rpartition(".")[2], new)
    assert [name for name, _ in model.named_parameters()] == order, "swapping changed the parameters' order"

    def token_nll(logits: Tensor, tokens: Tensor) -> Tensor:
        return vocab_parallel_cross_entropy(logits.float().contiguous(), tokens)

    model.token_nll = token_nll
    model.gather_vocabulary = lambda logits: gather_from_tensor_model_parallel_region(logits.contiguous())
    return model


def gather_full(name: str, part: Tensor, topology: Topology, writer: int) -> Tensor | None:
    """Merge the parts of one tensor on global rank ``writer`` (collective over writer's tensor-parallel group).

    Ranks outside that group return None at once.
    """
    if topology.tensor == 1 or split_of(name) is None:
        return part
    if writer // topology.tensor != topology.dp_rank:
        return None
    mine = topology.rank == writer
    pieces = [torch.empty_like(part) for _ in range(topology.tensor)] if mine else None
    dist.gather(part.contiguous(), pieces, dst=writer, group=topology.tp_group)
    return merge(name, pieces) if pieces is not None else None
