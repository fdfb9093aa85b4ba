"""The fp32 state DeepSpeed holds for a parameter (master, moments, average): whole out, whole in, at any ZeRO stage.

DeepSpeed flattens its masters and shares them out over the data-parallel ranks. Its public ``safe_*`` calls find a
parameter's piece again; what they do not cover (state before the first step, publishing masters that were written) uses
the optimizer's attributes, for the tested version.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llamagen_dist.parallel.topology import Topology
from llamagen_dist.training import ema as averages
from llamagen_dist.training import optim as optimizers


class ZeroState:
    """optimizer: DeepSpeed's, of an engine at ``stage`` 1, 2 or 3. ema: also keep a moving average."""

    def __init__(self, optimizer: Any, stage: int, topology: Topology, ema: bool) -> None:
        self._zero, self._stage, self._topology = optimizer, stage, topology
        self._inner: torch.optim.Optimizer = optimizer.optimizer
        if stage == 3:
            self.flats: list[Tensor] = list(optimizer.fp32_partitioned_groups_flat)
        else:
            self.flats = [p for group in self._inner.param_groups for p in group["params"]]
        for flat in self.flats:
            self._inner.state[flat] = optimizers.fresh_state(flat)
            if ema:
                self._inner.state[flat][averages.KEY] = flat.detach().clone()
        if stage < 3:
            optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def states(self) -> Mapping[Tensor, dict[str, Any]]:
        """Flat fp32 partition of this rank -> its state."""
        return self._inner.state

    def get(self, p: Tensor, kind: str | None) -> Tensor:
        """The full fp32 tensor of one parameter (this tensor-parallel rank's part); kind: None for the master, else a
        key of the optimizer's state. Collective over the data-parallel ranks."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        found = safe_get_full_fp32_param(p) if kind is None else safe_get_full_optimizer_state(p, kind)
        assert found is not None, "a parameter without fp32 state"
        return found

    def set(self, p: Tensor, kind: str | None, full: Tensor) -> None:
        """The inverse; every data-parallel rank gives the same tensor and keeps its share."""
        from deepspeed import utils

        if self._stage < 3:
            if kind is None:
                utils.safe_set_full_fp32_param(p, full)
            else:
                utils.safe_set_full_optimizer_state(p, full, kind)
            return
        share: int = p.ds_tensor.numel()  # type: ignore[attr-defined]
        padded = full.new_zeros(share * self._topology.dp)
        padded[: full.numel()] = full.flatten()
        mine = padded[share * self._topology.dp_rank : share * (self._topology.dp_rank + 1)]
        if kind is None:
            utils.safe_set_local_fp32_param(p, mine)
        else:
            utils.safe_set_local_optimizer_state(p, mine, kind)

    def adam_step(self) -> float:
        return float(self._inner.state[self.flats[0]]["step"])

    def set_adam_step(self, step: float) -> None:
        for flat in self.flats:
            self._inner.state[flat]["step"].fill_(step)

    @torch.no_grad()
    def publish(self) -> None:
        """Masters that were written become the weights that the model computes with."""
        zero = self._zero
        if self._stage < 3:
            zero.update_lp_params()
            return
        for i, flat in enumerate(zero.fp32_partitioned_groups_flat):
            zero.fp16_partitioned_groups_flat[i].copy_(flat)
            views = zero.unflatten(zero.fp16_partitioned_groups_flat[i], zero.fp16_partitioned_groups[i])
            for partition, view in zip(zero.fp16_partitioned_groups[i], views, strict=True):
                partition.data = view.data
        if zero.persistent_parameters:
            zero.persistent_parameters[0].partition(zero.persistent_parameters)
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def held_bytes(self, module: nn.Module) -> dict[str, int]:
        """Bytes of weights, gradients, masters, moments and average on this rank; shared storage is counted once."""
        weights = {}
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
            "moments": sum(state[m].nbytes for state in states for m in optimizers.MOMENTS),
            "ema": sum(state[averages.KEY].nbytes for state in states if averages.KEY in state),
        }
