"""The fp32 state DeepSpeed holds for a parameter (master, moments, averages): whole out, whole in, at any ZeRO stage.

DeepSpeed flattens its masters and shares them out over the data-parallel ranks. Its public ``safe_*`` calls find a
parameter's piece again; what they do not cover (state before the first step, publishing masters that were written) uses
the optimizer's attributes, for the tested version.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llamagen_dist.parallel import muon
from llamagen_dist.parallel import optim as optimizers
from llamagen_dist.parallel.topology import Topology


class ZeroState:
    """One rank's partition of masters, moments and averages, addressed by parameter.

    optimizer: DeepSpeed's, of an engine for ``module``.
    module: whose parameters the state belongs to.
    stage: of ZeRO, 1, 2 or 3.
    topology: the ranks that share the state.
    averages: keys of the moving averages to keep as well.
    """

    def __init__(
        self, optimizer: Any, module: nn.Module, stage: int, topology: Topology, averages: Sequence[str]
    ) -> None:
        self._zero, self._stage, self._topology, self._averages = optimizer, stage, topology, averages
        self._inner: torch.optim.Optimizer = optimizer.optimizer
        self._module = module
        groups = self._inner.param_groups
        if stage == 3:
            self.flats: list[Tensor] = list(optimizer.fp32_partitioned_groups_flat)
            groups = [groups[optimizer.sub_group_to_group_id[i]] for i in range(len(self.flats))]
        else:
            self.flats = [p for group in groups for p in group["params"]]  # one of each group
        self._by_muon = [flat for flat, g in zip(self.flats, groups, strict=True) if g.get(muon.ORTHOGONAL)]
        # torch's Adam makes its state in the first step; a resume writes into it before that
        for flat in self.flats:
            moments = (muon.MOMENT,) if any(flat is one for one in self._by_muon) else optimizers.MOMENTS
            self._inner.state[flat] = optimizers.fresh_state(flat, moments)
            self._inner.state[flat] |= {key: flat.detach().clone() for key in averages}
        if stage < 3:  # links every parameter to its span of the state just made, which DeepSpeed does once
            optimizer._lazy_init_hp_params_optimizer_state()
        self._spans = self._find_spans(list(module.parameters()))

    @property
    def states(self) -> Mapping[Tensor, dict[str, Any]]:
        """Flat fp32 partition of this rank -> its state."""
        return self._inner.state

    def local(self, p: Tensor, kind: str | None) -> Tensor:
        """This rank's piece of a parameter's fp32 tensor: a flat, live view without padding, maybe empty.

        p: a parameter of the module.
        kind: None for the master, else a key of the optimizer's state.

        DeepSpeed's own calls for whole tensors all-reduce them, which costs several times what sending the pieces to
        one rank does, and grows with the number of ranks.
        """
        return self._piece(p, kind)[: self._spans[p][self._topology.dp_rank][1]]

    def sizes(self, p: Tensor) -> list[tuple[int, int]]:
        """(data-parallel rank, elements) of all pieces that are not empty; one behind the other they are the whole."""
        return [(d, size) for d, (_, size) in enumerate(self._spans[p]) if size]

    def _piece(self, p: Tensor, kind: str | None) -> Tensor:
        """As ``local``, but under ZeRO-3 with the padding at the end."""
        from deepspeed import utils

        if self._stage == 3:
            return utils.safe_get_local_fp32_param(p) if kind is None else utils.safe_get_local_optimizer_state(p, kind)
        mapping = p._hp_mapping  # type: ignore[attr-defined]
        return torch.empty(0, device=p.device) if mapping is None else mapping.get_hp_fragment(kind)

    def _find_spans(self, parameters: Sequence[Tensor]) -> dict[Tensor, list[tuple[int, int]]]:
        """For each parameter (first element, number of elements) of every data-parallel rank's piece (collective)."""
        t = self._topology
        if self._stage == 3:
            # every parameter is cut into equal shares, the last ones padded, or all padding where it is tiny
            spans_of = {}
            for p in parameters:
                share, numel = p.ds_tensor.numel(), p.ds_numel  # type: ignore[attr-defined]
                spans_of[p] = [(min(share * d, numel), max(0, min(share, numel - share * d))) for d in range(t.dp)]
            return spans_of
        # stages 1 and 2 flatten all parameters into one row and cut that into equal partitions, so a parameter may lie
        # in one rank's partition, across a border, or on ranks far from this one: only its owners know where
        mappings = [p._hp_mapping for p in parameters]  # type: ignore[attr-defined]
        mine = [(0, 0) if m is None else (m.lp_fragment_address.start, m.lp_fragment_address.numel) for m in mappings]
        spans: list[Any] = [mine]
        if t.dp_group is not None:
            spans = [None] * t.dp
            dist.all_gather_object(spans, mine, group=t.dp_group)
        return {p: [of_rank[number] for of_rank in spans] for number, p in enumerate(parameters)}

    def set(self, p: Tensor, kind: str | None, full: Tensor) -> None:
        """Write a parameter's fp32 tensor; every data-parallel rank gives the same one and keeps its share.

        p, kind: as in ``local``.
        full: fp32, this tensor-parallel rank's whole part, on the device.
        """
        from deepspeed import utils

        if self._stage < 3:
            if kind is None:
                utils.safe_set_full_fp32_param(p, full)
            else:
                utils.safe_set_full_optimizer_state(p, full, kind)
            return
        # ZeRO-3 has a call for the local piece only: cut it out here, padded as DeepSpeed pads it
        share: int = p.ds_tensor.numel()  # type: ignore[attr-defined]
        padded = full.new_zeros(share * self._topology.dp)
        padded[: full.numel()] = full.flatten()
        mine = padded[share * self._topology.dp_rank : share * (self._topology.dp_rank + 1)]
        if kind is None:
            utils.safe_set_local_fp32_param(p, mine)
        else:
            utils.safe_set_local_optimizer_state(p, mine, kind)

    def orthogonalize(
        self, shapes: Mapping[str, tuple[int, ...]], group: int, computed_in: torch.dtype
    ) -> muon.Orthogonalize:
        """What makes Muon's updates of the pieces that lie in this rank's partitions.

        shapes: of this tensor-parallel rank's parts, by name.
        group: query heads per key-value head.
        computed_in: of the Newton-Schulz steps.
        """
        t = self._topology
        matrices = {name: p for name, p in self._module.named_parameters() if muon.takes(name)}
        makers = []
        for flat in self._by_muon:
            momentum = self._inner.state[flat][muon.MOMENT]
            # below stage 3 all matrices lie in one partition, or in none of this rank; at stage 3 pieces are never
            # empty, and the storage tells whose they are
            here = {
                name: p
                for name, p in matrices.items()
                if self._stage < 3
                or self._piece(p, muon.MOMENT).untyped_storage().data_ptr() == momentum.untyped_storage().data_ptr()
            }
            pieces = [self.local(p, muon.MOMENT) for p in here.values()]
            spans = [slice(piece.storage_offset(), piece.storage_offset() + piece.numel()) for piece in pieces]

            def sizes(name: str, maker: int, here: Mapping[str, Tensor] = here) -> list[int]:
                by_rank = dict(self.sizes(here[name]))
                return [by_rank.get(rank // t.tensor, 0) for rank in range(t.world)]

            shapes_here = {name: shapes[name] for name in here}
            makers.append((flat, spans, muon.Gathered(shapes_here, sizes, t, group, computed_in)))

        def orthogonalize(stepped: Sequence[Tensor]) -> None:
            for flat, spans, gathered in makers:
                if any(flat is one for one in stepped):
                    assert flat.grad is not None
                    gathered([flat.grad[span] for span in spans])

        return orthogonalize

    def adam_step(self) -> float:
        """Steps that Adam has made, the same for all partitions."""
        return float(self._inner.state[self.flats[0]]["step"])

    def set_adam_step(self, step: float) -> None:
        for flat in self.flats:
            self._inner.state[flat]["step"].fill_(step)

    @torch.no_grad()
    def publish(self) -> None:
        """Masters that were written become the weights that the model computes with (collective)."""
        zero = self._zero
        if self._stage < 3:
            zero.update_lp_params()  # casts this rank's partition and all-gathers the rest
            return
        # What DeepSpeed's stage 3 does at the end of a step, which it has no call for: cast the masters into the flat
        # weights and let every parameter's shard view them. The whole weights are gathered when they are next used,
        # except the small ones that stay whole (persistent): those are cut and gathered again now.
        for i, flat in enumerate(zero.fp32_partitioned_groups_flat):
            zero.fp16_partitioned_groups_flat[i].copy_(flat)
            views = zero.unflatten(zero.fp16_partitioned_groups_flat[i], zero.fp16_partitioned_groups[i])
            for partition, view in zip(zero.fp16_partitioned_groups[i], views, strict=True):
                partition.data = view.data
        if zero.persistent_parameters:
            zero.persistent_parameters[0].partition(zero.persistent_parameters)
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def held_bytes(self, module: nn.Module) -> dict[str, int]:
        """Bytes of weights, gradients, masters, moments and averages on this rank; shared storage is counted once."""
        weights = {}  # storage -> bytes: parameters are views of one flat buffer, and in fp32 of the masters
        for p in module.parameters():
            for tensor in (p, getattr(p, "ds_tensor", None)):
                if tensor is not None and tensor.numel():
                    storage = tensor.untyped_storage()
                    weights[storage.data_ptr()] = storage.nbytes()
        own = {flat.untyped_storage().data_ptr() for flat in self.flats}
        states = [self._inner.state[flat] for flat in self.flats]
        return {
            "weights": sum(size for at, size in weights.items() if at not in own),
            "gradients": sum(p.grad.nbytes for p in module.parameters() if p.grad is not None),
            "masters": sum(flat.untyped_storage().nbytes() for flat in self.flats),
            "moments": optimizers.moment_bytes(states),
            "ema": sum(state[key].nbytes for state in states for key in self._averages),
        }
