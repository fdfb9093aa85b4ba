"""The element-wise parts of a block with their gradients written out: fewer passes over memory, and less of it kept.

Compiled code gets the plain formulas instead (``torch.compile`` fuses those itself); both are tested to agree.
Sequences of operations run sample by sample on a CPU, so that what lies between them stays in its cache.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (…, dim) normalised in fp32, cast back, then scaled. Keeps x and one number a row."""
    if torch.compiler.is_compiling():
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).type_as(x) * weight
    out: Tensor = _RMSNorm.apply(x, weight, eps)
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
        for some, its_inverse, its_out in _samples(x, inverse, out):
            if its_out.dtype == torch.float32:
                torch.mul(some, its_inverse, out=its_out).mul_(weight)
            else:
                torch.mul((some * its_inverse).type_as(x), weight, out=its_out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        to_x, wide_weight = torch.empty_like(x), weight.float()
        to_weight = torch.zeros_like(wide_weight)
        for some, gradient, its_inverse, its_out in _samples(x, gradients[0], inverse, to_x):
            normed = some * its_inverse  # fp32, as all that follows
            product = normed * gradient
            to_weight += product.flatten(0, -2).sum(0)
            along = (product @ wide_weight).div_(x.shape[-1])
            wide = torch.mul(gradient, wide_weight, out=product)
            torch.mul(wide.addcmul_(normed, along.unsqueeze(-1), value=-1.0), its_inverse, out=its_out)
        return to_x, to_weight.type_as(weight), None


def gated(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) x b. Keeps a and b; silu(a) is computed again for the gradient."""
    if torch.compiler.is_compiling():
        return F.silu(a) * b
    out: Tensor = _Gated.apply(a, b)
    return out


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return F.silu(a).mul_(b)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        to_a, to_b = torch.empty_like(a), torch.empty_like(b)
        for gradient, its_a, its_b, its_to_a, its_to_b in _samples(gradients[0], a, b, to_a, to_b):
            torch.mul(F.silu(its_a), gradient, out=its_to_b)
            torch.ops.aten.silu_backward.grad_input(gradient * its_b, its_a, grad_input=its_to_a)
        return to_a, to_b


@contextmanager
def derived(product: Tensor, a: Tensor, b: Tensor) -> Iterator[None]:
    """In here autograd keeps nothing where it would keep ``product``, which is gated(a, b): it is computed again when
    it is needed. Worth it because a and b are kept anyway."""
    place, a, b = product.untyped_storage().data_ptr(), a.detach(), b.detach()

    def pack(x: Tensor) -> Tensor | torch.Size:
        return x.shape if x.untyped_storage().data_ptr() == place and x.numel() == product_size else x

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        return kept if isinstance(kept, Tensor) else F.silu(a).mul_(b).view(kept)

    product_size = product.numel()
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def split_and_rotate(fused: Tensor, table: Tensor, group: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """fused (B, S, width), rows [q | k | v], ``group`` query heads per key head -> q, k, v (B, S, heads, head_dim).

    q and k are turned by ``table`` (S, head_dim / 2, 2), or (B, S, …): pairs (2p, 2p + 1), in fp32, cast back.
    Outside of compiled code this happens in fused's own memory, which must not be used again.
    """
    unit = fused.shape[-1] // (group + 2)
    if not torch.compiler.is_compiling():
        turned = torch.view_as_complex(table).unsqueeze(-2).expand(len(fused), -1, -1, -1)
        q, k, v = _SplitAndRotate.apply(fused, turned, unit, head_dim)
        return q, k, v
    parts = fused.split([group * unit, unit, unit], dim=-1)
    q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in parts)
    return _rotated(q, table), _rotated(k, table), v


def _rotated(x: Tensor, table: Tensor) -> Tensor:
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table.unsqueeze(-3).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).type_as(x)


class _SplitAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fused: Tensor, turned: Tensor, unit: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """turned: complex64 (B, S, 1, head_dim / 2)."""
        ctx.save_for_backward(turned)
        heads = fused.detach().unflatten(-1, (-1, head_dim))
        width = fused.shape[-1] - unit
        for some, angle in _samples(heads[..., : width // head_dim, :], turned):
            _turn(some, angle, some)
        return heads[..., : (width - unit) // head_dim, :], *heads[..., (width - unit) // head_dim :, :].chunk(2, -2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (turned,) = ctx.saved_tensors
        sizes = [gradient.shape[-2] for gradient in gradients]
        whole = gradients[0].new_empty(*gradients[0].shape[:2], sum(sizes), gradients[0].shape[-1])
        to_q, to_k, to_v = whole.split(sizes, dim=-2)
        for q, its_q, k, its_k, angle in _samples(gradients[0], to_q, gradients[1], to_k, turned.conj()):
            _turn(q, angle, its_q)
            _turn(k, angle, its_k)
        to_v.copy_(gradients[2])
        return whole.flatten(-2), None, None, None


def _turn(x: Tensor, angle: Tensor, out: Tensor) -> None:
    """out = x, pairs of whose last dimension are complex numbers, times angle; out may be x."""
    if out.dtype == torch.float32:
        out.copy_(x)
        torch.view_as_complex(out.unflatten(-1, (-1, 2))).mul_(angle)
    else:
        wide = x.to(torch.float32, memory_format=torch.contiguous_format)
        torch.view_as_complex(wide.unflatten(-1, (-1, 2))).mul_(angle)
        out.copy_(wide)


def _samples(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors sample by sample on a CPU, else as they are."""
    if tensors[0].device.type == "cpu" and tensors[0].dim() > 2:
        return zip(*(tensor.unbind(0) for tensor in tensors), strict=True)
    return iter((tensors,))
