"""Tensor parallelism from outside: one table says how each weight of the finished plain model is split.

The table drives everything that must agree: swapping Megatron-core's layers in (names and order of the parameters
stay), cutting full weights into a rank's part, and merging parts for a checkpoint. What it does not name is replicated.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llamagen_dist.models.gpt import GPT, GPTConfig
from llamagen_dist.parallel import sequence_parallel
from llamagen_dist.parallel.division import check_split
from llamagen_dist.parallel.topology import Topology

Source = Callable[[str, tuple[int, ...]], Tensor]
"""(name, full shape) -> the full fp32 tensor, on any device: initial weights, or those of a checkpoint."""


@dataclass(frozen=True)
class Split:
    """How one weight is cut.

    kind: ``vocab`` (embedding rows), ``column`` (output features) or ``row`` (input features).
    dim: the dimension that is cut.
    fused: whether that is [q | k | v], each of which is cut by itself.
    """

    kind: str
    dim: int
    fused: bool = False


# Column layers, then a row layer: each rank computes its own heads, or its own part of the feed-forward width, from the
# whole input, and one all-reduce after the row layer adds the ranks' parts up. New weights of an attention go here.
TABLE: tuple[tuple[str, Split], ...] = (
    (r"tok_embeddings\.weight", Split("vocab", 0)),
    (r"layers\.\d+\.attention\.wqkv\.weight", Split("column", 0, fused=True)),
    (r"layers\.\d+\.attention\.wo\.weight", Split("row", 1)),
    (r"layers\.\d+\.feed_forward\.w[13]\.weight", Split("column", 0)),
    (r"layers\.\d+\.feed_forward\.w2\.weight", Split("row", 1)),
    (r"output\.weight", Split("column", 0)),
)


def split_of(name: str) -> Split | None:
    """How the parameter ``name`` is split, or None where every tensor-parallel rank holds it whole."""
    return next((split for pattern, split in TABLE if re.fullmatch(pattern, name)), None)


def _blocks(split: Split, size: int, group: int) -> list[int]:
    """Sizes of the pieces of a dimension of ``size`` that are cut one by one; group: query heads per key head."""
    if not split.fused:
        return [size]
    unit = size // (group + 2)
    return [group * unit, unit, unit]


def apart(name: str, full: Tensor, group: int = 1) -> tuple[Tensor, ...]:
    """The matrices that a weight which can be split consists of, as views: q, k and v of a fused one, else itself.

    name, full, group: as in ``cut``.
    """
    split = split_of(name)
    assert split is not None, name
    return full.split(_blocks(split, full.shape[split.dim], group), split.dim)


def cut(name: str, full: Tensor, tensor: int, rank: int, group: int = 1) -> Tensor:
    """The part of a full tensor that tensor-parallel rank ``rank`` of ``tensor`` holds.

    name: LlamaGen's, of the parameter.
    full: the whole tensor, of any type.
    group: query heads per key-value head (n_head / n_kv_head), by which q, k and v lie in a fused weight.
    """
    split = split_of(name)
    if split is None or tensor == 1:
        return full
    blocks = apart(name, full, group)
    return torch.cat([block.chunk(tensor, split.dim)[rank] for block in blocks], split.dim).contiguous()


def merge(name: str, pieces: list[Tensor], group: int = 1) -> Tensor:
    """The inverse of ``cut``: pieces in rank order -> the full tensor."""
    split = split_of(name)
    if split is None or len(pieces) == 1:
        return pieces[0]
    blocks = [apart(name, piece, group) for piece in pieces]
    return torch.cat([b[i] for i in range(len(blocks[0])) for b in blocks], split.dim).contiguous()


def query_group(config: GPTConfig) -> int:
    """Query heads per key-value head."""
    return config.n_head // config.kv_heads


def materialize(model: GPT, topology: Topology, source: Source) -> GPT:
    """Give a model built on the meta device its weights, a parameter at a time and only this rank's part of each.

    So a rank never holds more than its share and one full tensor.

    model: plain, on the meta device; changed in place.
    topology: the ranks.
    source: (name, full shape) -> the full fp32 tensor, of parameters and saved buffers.
    """
    group = query_group(model.config)
    model.make_buffers(0)
    saved = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in saved:
            buffer.copy_(source(name, tuple(buffer.shape)))
    for name, p in list(model.named_parameters()):
        path, _, last = name.rpartition(".")
        full = source(name, tuple(p.shape))
        part = cut(name, full, topology.tensor, topology.tp_rank, group)
        # a copy, since a view of a larger tensor, or of a file, would keep that alive
        setattr(model.get_submodule(path), last, nn.Parameter(part.to(topology.device, torch.float32, copy=True)))
    return model


def apply(model: GPT, topology: Topology, sequence: bool = False) -> GPT:
    """Replace the split layers of a finished plain model by Megatron-core's, in place; nothing at tensor size 1.

    model: with full weights, the same on every rank, or this rank's parts already (``materialize``).
    topology: the ranks.
    sequence: also split what lies between these layers along the sequence.

    Raises UserError where the model's sizes do not divide.
    """
    if topology.tensor == 1:
        return model
    check_split(model.config, topology.tensor)
    order = [name for name, _ in model.named_parameters()]
    layers = _MegatronLayers(topology, model.config, sequence)
    for name, p in list(model.named_parameters()):
        split = split_of(name)
        if split is not None:
            path, _, last = name.removesuffix(".weight").rpartition(".")
            parent = model.get_submodule(path)
            setattr(parent, last, layers.swapped(name, split, getattr(parent, last), p))
    assert [name for name, _ in model.named_parameters()] == order, "swapping changed the parameters' order"
    heads = model.config.n_head // topology.tensor
    blocks: Any = model.layers
    for block in blocks:
        block.attention.first_head = heads * topology.tp_rank
    if sequence:
        sequence_parallel.install(model, topology)
    else:
        sequence_parallel.share_input_reduction(model, topology)
    sequence_parallel.share_head_norms(model, topology)
    layers.use_split_vocabulary(model)
    return model


class _MegatronLayers:
    """Makes the split modules for one topology; Megatron-core is imported here and nowhere at module level."""

    def __init__(self, topology: Topology, config: GPTConfig, sequence: bool) -> None:
        from megatron.core import ModelParallelConfig
        from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

        self.topology, self.group = topology, query_group(config)
        self.config = ModelParallelConfig(
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
                if sequence:
                    partial = nn.functional.linear(x, self.weight)
                    return sequence_parallel.reduce_scatter(partial, topology)
                # mcore's reduction returns its own input, but reduces a contiguous copy of it
                return super().forward(x.contiguous())[0]

        self.column, self.row = Column, Row

    def swapped(self, name: str, split: Split, old: nn.Module, weight: Tensor) -> nn.Module:
        """The split module to put where ``old`` is, with this rank's part of ``weight`` (which may be one already)."""
        from megatron.core.tensor_parallel import VocabParallelEmbedding
        from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

        new: nn.Module
        options = {"config": self.config, "init_method": nn.init.zeros_}
        if isinstance(old, nn.Embedding):
            new = VocabParallelEmbedding(old.num_embeddings, old.embedding_dim, **options)
            full = (old.num_embeddings, old.embedding_dim)
        else:
            assert isinstance(old, nn.Linear)
            full = (old.out_features, old.in_features)
            if split.kind == "column":
                # every column layer but the head shares its input's gradient reduction with its neighbour (hooks)
                shared = name != "output.weight"
                new = self.column(
                    full[1], full[0], gather_output=False, bias=False, disable_grad_reduce=shared, **options
                )
            else:
                new = self.row(full[1], full[0], input_is_parallel=True, skip_bias_add=False, bias=False, **options)
        getattr(new, "_load_state_dict_pre_hooks").clear()  # noqa: B009 - nn.Module types it as a tensor
        own = new.get_parameter("weight")
        whole = tuple(weight.shape) == full
        t = self.topology
        with torch.no_grad():
            own.copy_(cut(name, weight, t.tensor, t.tp_rank, self.group) if whole else weight)
        for attribute in ("tensor_model_parallel", "partition_dim", "partition_stride"):
            if hasattr(own, attribute):
                delattr(own, attribute)  # the constructor may have set them, and the call below refuses to do so twice
        # without this mark DeepSpeed takes the part for a replica and the gradient norm comes out too small
        set_tensor_model_parallel_attributes(own, True, split.dim, 1)
        return new

    def use_split_vocabulary(self, model: GPT) -> None:
        """The loss from this rank's slice of the logits; they are made whole (without a gradient) where asked for."""
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

        def token_nll(logits: Tensor, tokens: Tensor) -> Tensor:
            return vocab_parallel_cross_entropy(logits.float().contiguous(), tokens)

        def log_partition(logits: Tensor) -> Tensor:
            largest = logits.detach().amax(dim=-1)
            torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=self.topology.tp_group)
            parts = (logits - largest[:, None]).exp().sum(dim=-1)
            return largest + sequence_parallel.total(parts, self.topology).log()

        # mcore's own gathering allocates on a GPU, whatever the tensors are on
        def gather(logits: Tensor) -> Tensor:
            parts = [
                torch.empty_like(logits, memory_format=torch.contiguous_format) for _ in range(self.topology.tensor)
            ]
            torch.distributed.all_gather(parts, logits.detach().contiguous(), group=self.topology.tp_group)
            return torch.cat(parts, dim=-1)

        model.token_nll, model.log_partition = token_nll, log_partition
        model.gather_vocabulary = gather


def full_shape(name: str, part: tuple[int, ...], tensor: int) -> tuple[int, ...]:
    """The shape of the whole tensor of which every rank holds a part of shape ``part``."""
    split, shape = split_of(name), list(part)
    if split is not None:
        shape[split.dim] *= tensor
    return tuple(shape)
