"""Muon for the matrices of the blocks, AdamW for everything else, as one optimizer.

The update of a matrix is its momentum (Nesterov), made nearly orthogonal by five Newton-Schulz steps (Jordan et al.
2024) and scaled so that its entries are about as large as AdamW's: both then share a learning rate (Liu et al., arXiv
2502.16982, section 2.2). Of a fused weight, q, k and v are matrices of their own.

That needs whole matrices, while momentum and weights stay as the layout shards them. So every matrix has a rank that
makes its update: the pieces of the momentum are sent there, put together by the split table, and the update goes back
the same way. No rank holds more than its share of the matrices at a time, and none repeats another's work.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llamagen_dist.parallel.tensor_parallel import apart, cut, full_shape, merge, split_of
from llamagen_dist.parallel.topology import Topology

MOMENTUM = 0.95
MOMENT = "momentum"
"""The key of the optimizer's state, and the checkpoint's prefix."""
ORTHOGONAL = "orthogonal"
"""The key of a parameter group that says whose it is."""
SCALE = 0.2  # the root mean square of AdamW's updates, by the paper's measurements
STEPS = 5
# of the quintic that moves every singular value in (0, 1] to about 0.7 … 1.2 in STEPS steps
A, B, C = 3.4445, -4.7750, 2.0315

Orthogonalize = Callable[[Sequence[Tensor]], None]
"""Given parameters whose ``grad`` is their momentum: it becomes their update."""


def takes(name: str) -> bool:
    """Whether Muon trains the parameter ``name``: the matrices of the blocks, which are those that can be split."""
    return name.startswith("layers.") and split_of(name) is not None


@torch.no_grad()
def orthogonalized(matrix: Tensor, computed_in: torch.dtype = torch.float32) -> Tensor:
    """(m, n) fp32 -> the same shape: its singular vectors kept, its singular values near 1, times the scale.

    computed_in: bfloat16 rounds by less than the steps leave singular values apart, but not alike on other layouts.
    """
    x = (matrix / matrix.norm().clamp(min=torch.finfo(torch.float32).tiny)).to(computed_in)
    tall = x.shape[0] > x.shape[1]
    x = x.t() if tall else x  # the products are those of the shorter side
    for _ in range(STEPS):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return (x.t() if tall else x).float() * (SCALE * max(matrix.shape) ** 0.5)


class Muon(torch.optim.AdamW):
    """AdamW that treats the parameter groups with ORTHOGONAL set by Muon.

    Built by optim.build. ``orthogonalize`` is replaced where matrices are spread over ranks.
    """

    orthogonalize: Orthogonalize

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all parameters with a gradient; of matrices it takes the gradient's memory."""
        every = self.param_groups
        for group in every:
            if group.get(ORTHOGONAL):
                self._step_matrices(group)
        # AdamW must not see them; its own code does the rest as if there were nothing else
        self.param_groups = [group for group in every if not group.get(ORTHOGONAL)]
        try:
            super().step()
        finally:
            self.param_groups = every

    def _step_matrices(self, group: Mapping[str, Any]) -> None:
        stepped = [p for p in group["params"] if p.grad is not None]
        for p in stepped:
            state = self.state[p]
            if not state:
                state |= {"step": torch.zeros((), device=p.device), MOMENT: torch.zeros_like(p)}
            state["step"] += 1
            state[MOMENT].lerp_(p.grad, 1 - MOMENTUM)
            p.grad.lerp_(state[MOMENT], MOMENTUM)
        self.orthogonalize(stepped)
        for p in stepped:
            p.mul_(1 - group["lr"] * group["weight_decay"]).add_(p.grad, alpha=-group["lr"])


@dataclass(frozen=True)
class Matrix:
    """One weight whose pieces lie on several ranks.

    name: the parameter's.
    shape: of a tensor-parallel rank's part.
    maker: the rank that makes its update.
    sizes: elements that each rank sends of it; those of one part, by data-parallel rank, are the part end to end.
    """

    name: str
    shape: tuple[int, ...]
    maker: int
    sizes: tuple[int, ...]


def deal(shapes: Mapping[str, tuple[int, ...]], ranks: int) -> dict[str, int]:
    """Which of ``ranks`` makes whose update: the most work first, each to the rank that has the least so far.

    shapes: of whole weights, by name.
    """
    cost = {name: rows * columns * min(rows, columns) for name, (rows, columns) in shapes.items()}
    load, makers = [0] * ranks, {}
    for name in sorted(cost, key=lambda name: -cost[name]):
        makers[name] = load.index(min(load))
        load[makers[name]] += cost[name]
    return makers


class Gathered:
    """Makes the updates of matrices whose pieces lie on several ranks.

    shapes: of a tensor-parallel rank's parts, by name; the same on every rank, as all that follows.
    sizes(name, maker): ``Matrix.sizes``.
    topology: the ranks.
    group: query heads per key-value head, by which q, k and v lie in a fused weight.
    computed_in: see ``orthogonalized``.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        sizes: Callable[[str, int], Iterable[int]],
        topology: Topology,
        group: int,
        computed_in: torch.dtype = torch.float32,
    ) -> None:
        self.topology, self.group, self.computed_in = topology, group, computed_in
        makers = deal(
            {name: full_shape(name, shape, topology.tensor) for name, shape in shapes.items()}, topology.world
        )
        self.matrices = [
            Matrix(name, shape, makers[name], tuple(sizes(name, makers[name]))) for name, shape in shapes.items()
        ]

    def __call__(self, pieces: Sequence[Tensor]) -> None:
        """Momentum becomes update, in place (collective).

        pieces: what this rank sends of each matrix, flat, maybe empty.
        """
        rank, world = self.topology.rank, self.topology.world
        if world == 1:
            for matrix, piece in zip(self.matrices, pieces, strict=True):
                self._make(matrix, [piece])
            return
        order = sorted(range(len(pieces)), key=lambda number: self.matrices[number].maker)
        sent = torch.cat([pieces[number] for number in order])
        mine = [matrix for matrix in self.matrices if matrix.maker == rank]
        there = [sum(m.sizes[rank] for m in self.matrices if m.maker == other) for other in range(world)]
        here = [sum(m.sizes[other] for m in mine) for other in range(world)]
        received = sent.new_empty(sum(here))
        dist.all_to_all_single(received, sent, here, there)
        by_sender = [part.split([m.sizes[other] for m in mine]) for other, part in enumerate(received.split(here))]
        for number, matrix in enumerate(mine):
            self._make(matrix, [parts[number] for parts in by_sender])
        dist.all_to_all_single(sent, received, there, here)
        for number, piece in zip(order, sent.split([pieces[number].numel() for number in order]), strict=True):
            pieces[number].copy_(piece)

    def _make(self, matrix: Matrix, pieces: Sequence[Tensor]) -> None:
        """pieces: of every rank; replaced in place."""
        tensor = self.topology.tensor
        columns = [pieces[part::tensor] for part in range(tensor)]  # of each part, by data-parallel rank
        parts = [torch.cat(list(column)).view(matrix.shape) for column in columns]
        whole = merge(matrix.name, parts, self.group)
        for one in apart(matrix.name, whole, self.group):
            one.copy_(orthogonalized(one, self.computed_in))
        for part, column in enumerate(columns):
            flat = cut(matrix.name, whole, tensor, part, self.group).flatten()
            for piece, values in zip(column, flat.split([piece.numel() for piece in column]), strict=True):
                piece.copy_(values)


def of_whole_parts(parameters: Mapping[str, Tensor], topology: Topology, group: int) -> Orthogonalize:
    """For weights that every data-parallel rank has whole (plain torch, DDP): the maker's tensor-parallel group puts
    the matrix together, and what it makes goes to the others.

    parameters: the matrices, by name.
    """

    def sizes(name: str, maker: int) -> list[int]:
        holders = range(maker // topology.tensor * topology.tensor, (maker // topology.tensor + 1) * topology.tensor)
        return [parameters[name].numel() if rank in holders else 0 for rank in range(topology.world)]

    gathered = Gathered({name: tuple(p.shape) for name, p in parameters.items()}, sizes, topology, group)

    def orthogonalize(stepped: Sequence[Tensor]) -> None:
        updates = [p.grad for p in parameters.values() if p.grad is not None]
        assert len(updates) == len(stepped) == len(parameters), "every matrix of a block has a gradient"
        gathered([u.view(-1)[: m.sizes[topology.rank]] for u, m in zip(updates, gathered.matrices, strict=True)])
        if topology.dp == 1:
            return
        under_way = [
            dist.broadcast(
                update,
                matrix.maker // topology.tensor * topology.tensor + topology.tp_rank,
                group=topology.dp_group,
                async_op=True,
            )
            for update, matrix in zip(updates, gathered.matrices, strict=True)
        ]
        for work in under_way:
            if work is not None:
                work.wait()

    return orthogonalize
