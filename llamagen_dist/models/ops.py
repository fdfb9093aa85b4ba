"""The element-wise parts of a block with their gradients written out: fewer passes over memory, and less of it kept.

Of every operation the plain formula comes first. It is what the operation means, and what compiled code uses, since
torch.compile fuses and differentiates it itself. Behind it stands the same by hand, for eager code: autograd would
keep every intermediate and pass over memory once for each. Both are tested to agree, and the written gradients against
finite differences (tests/unit/test_gpt_training.py).

On a CPU sequences of operations run sample by sample (``_samples``), so that what lies between them stays in its cache;
names ending in ``_i`` are of one sample there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# --- RMSNorm ---


def rms_norm_formula(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()  # the mean of squares of 4096 bf16 numbers would have two digits
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).type_as(x) * weight


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (…, dim) normalised in fp32, cast back, then scaled by weight (dim,). Keeps x and one number a row, where
    autograd would keep x in fp32, its normalised form and the scale of every row."""
    if torch.compiler.is_compiling():
        return rms_norm_formula(x, weight, eps)
    out: Tensor = _RMSNorm.apply(x, weight, eps)
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        # |x|^2 / dim is the mean of squares. vector_norm sums in fp32 in one pass over x, where the formula makes a
        # copy in fp32 and squares it; the root that it takes is undone, on one number a row
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
        for x_i, inverse_i, out_i in _samples(x, inverse, out):
            if out_i.dtype == torch.float32:
                torch.mul(x_i, inverse_i, out=out_i).mul_(weight)
            else:  # rounded to x's type before the weight, as the formula says
                torch.mul((x_i * inverse_i).type_as(x), weight, out=out_i)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """With n = x / rms(x) and g = gradient x weight: the gradient of x is (g - n mean(g n)) / rms(x).

        The second term is what changing x changes in rms(x) itself. That of the weight is the sum of gradient x n over
        all positions.
        """
        x, weight, inverse = ctx.saved_tensors
        grad_x, wide_weight = torch.empty_like(x), weight.float()
        grad_weight = torch.zeros_like(wide_weight)
        for x_i, gradient_i, inverse_i, grad_x_i in _samples(x, gradients[0], inverse, grad_x):
            normed = x_i * inverse_i  # fp32, as all that follows
            product = normed * gradient_i
            grad_weight += product.flatten(0, -2).sum(0)
            mean = (product @ wide_weight).div_(x.shape[-1])  # mean(g n), as a matrix-vector product over the last axis
            scaled = torch.mul(gradient_i, wide_weight, out=product)  # g, in memory that is not needed any more
            torch.mul(scaled.addcmul_(normed, mean.unsqueeze(-1), value=-1.0), inverse_i, out=grad_x_i)
        return grad_x, grad_weight.type_as(weight), None


# --- SwiGLU's gate ---


def gated_formula(a: Tensor, b: Tensor) -> Tensor:
    return F.silu(a) * b


def gated(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) x b. Keeps a and b; silu(a), as large again, is computed once more for the gradient."""
    if torch.compiler.is_compiling():
        return gated_formula(a, b)
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
        grad_a, grad_b = torch.empty_like(a), torch.empty_like(b)
        for gradient_i, a_i, b_i, grad_a_i, grad_b_i in _samples(gradients[0], a, b, grad_a, grad_b):
            # d/db = silu(a), computed once more rather than kept; d/da = b silu'(a), which torch has as an operation
            torch.mul(F.silu(a_i), gradient_i, out=grad_b_i)
            torch.ops.aten.silu_backward.grad_input(gradient_i * b_i, a_i, grad_input=grad_a_i)
        return grad_a, grad_b


@contextmanager
def recomputed(product: Tensor, a: Tensor, b: Tensor) -> Iterator[None]:
    """In here autograd keeps nothing where it would keep ``product``: it is computed again when it is needed.

    Worth it because a and b are kept anyway, for gated's own gradient, and w2 would keep the product beside them.

    product: gated(a, b).
    """
    a, b = a.detach(), b.detach()
    # Referenced until the end of the block, so that no other tensor can get its memory and be taken for it; and no
    # longer, since autograd keeps ``pack`` itself as long as the graph.
    reference = [product]
    del product

    def pack(x: Tensor) -> Tensor | torch.Size:
        return x.shape if is_whole(x, reference[0]) else x

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        return kept if isinstance(kept, Tensor) else F.silu(a).mul_(b).view(kept)

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        reference.clear()


def is_whole(x: Tensor, product: Tensor) -> bool:
    """Whether x is all of ``product`` in its order, in whatever shape: a linear layer saves its input flattened.

    Not so for a cast (autocast), a copy or another view of it, which are saved as they are.
    """
    # several views share an address and a size; contiguous, they also have the same numbers in the same order
    return (
        x.data_ptr() == product.data_ptr()
        and x.dtype == product.dtype
        and x.numel() == product.numel()
        and x.is_contiguous()
        and product.is_contiguous()
    )


# --- q, k and v from their common projection, rotated ---


class HeadNorms(NamedTuple):
    """QK-norm: weights (head_dim,) of the RMSNorm of every head of q and of k, before the rotation."""

    q: Tensor
    k: Tensor
    eps: float


def split_and_rotate_formula(
    fused: Tensor, table: Tensor, group: int, head_dim: int, norms: HeadNorms | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    # [q | k | v] in the ratio group : 1 : 1, on a tensor-parallel rank too, which has its share of each
    kv_width = fused.shape[-1] // (group + 2)
    parts = fused.split([group * kv_width, kv_width, kv_width], dim=-1)
    q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in parts)
    if norms is not None:
        q, k = rms_norm_formula(q, norms.q, norms.eps), rms_norm_formula(k, norms.k, norms.eps)
    return _rotated(q, table), _rotated(k, table), v


def _rotated(x: Tensor, table: Tensor) -> Tensor:
    # interleaved pairs, as the released weights need them; many other models pair element p with p + head_dim / 2
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table.unsqueeze(-3).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).type_as(x)


def split_and_rotate(
    fused: Tensor, table: Tensor, group: int, head_dim: int, norms: HeadNorms | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, S, heads, head_dim) of each position, q and k rotated in fp32 and cast back.

    fused: (B, S, width), rows [q | k | v]. Outside of compiled code and without norms all three lie in its memory,
        rotated in place, and it must not be used again; autograd would keep it beside two copies.
    table: (S, head_dim / 2, 2) or (B, S, …), cos and sin of the pairs (2p, 2p + 1).
    group: query heads per key head.
    norms: of q and k, None: they are only rotated.
    """
    if torch.compiler.is_compiling():
        return split_and_rotate_formula(fused, table, group, head_dim, norms)
    rotary = torch.view_as_complex(table).unsqueeze(-2).expand(len(fused), -1, -1, -1)
    if norms is not None:
        q, k, v = _NormAndRotate.apply(fused, rotary, (fused.shape[-1] // (group + 2), head_dim), *norms)
        return q, k, v
    q, k, v = _SplitAndRotate.apply(fused, rotary, fused.shape[-1] // (group + 2), head_dim)
    return q, k, v


class _SplitAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fused: Tensor, rotary: Tensor, kv_width: int, head_dim: int) -> tuple[Tensor, ...]:
        """rotary: complex64 (B, S, 1, head_dim / 2): a pair is a complex number, and turning it one product."""
        ctx.save_for_backward(rotary)
        heads = fused.detach().unflatten(-1, (-1, head_dim))
        # q and k lie side by side, so one pass rotates both. They may be overwritten: a linear layer's gradient needs
        # its input and weight, not its output, so nobody reads fused again
        rotated = (fused.shape[-1] - kv_width) // head_dim
        queries = rotated - kv_width // head_dim
        for heads_i, rotary_i in _samples(heads[..., :rotated, :], rotary):
            _rotate(heads_i, rotary_i, heads_i)
        return heads[..., :queries, :], *heads[..., queries:, :].chunk(2, -2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """A rotation's gradient is the rotation back: by the conjugate. (By zero, of a prefix, it is zero too.)"""
        (rotary,) = ctx.saved_tensors
        # the three gradients are written side by side, as the one gradient that the projection's backward pass takes
        sizes = [gradient.shape[-2] for gradient in gradients]
        whole = gradients[0].new_empty(*gradients[0].shape[:2], sum(sizes), gradients[0].shape[-1])
        grad_q, grad_k, grad_v = whole.split(sizes, dim=-2)
        for q_i, grad_q_i, k_i, grad_k_i, back_i in _samples(gradients[0], grad_q, gradients[1], grad_k, rotary.conj()):
            _rotate(q_i, back_i, grad_q_i)
            _rotate(k_i, back_i, grad_k_i)
        grad_v.copy_(gradients[2])
        return whole.flatten(-2), None, None, None


class _NormAndRotate(torch.autograd.Function):
    """As _SplitAndRotate, q and k normalised per head before. What they were is kept for that, so they get memory of
    their own, beside one number a head and position."""

    @staticmethod
    def forward(
        ctx: Any, fused: Tensor, rotary: Tensor, widths: tuple[int, int], q_weight: Tensor, k_weight: Tensor, eps: float
    ) -> tuple[Tensor, ...]:
        """widths: of k, or v, and of a head."""
        kv_width, head_dim = widths
        heads = fused.detach().unflatten(-1, (-1, head_dim))
        x = heads[..., : heads.shape[-2] - kv_width // head_dim, :]
        queries = x.shape[-2] - kv_width // head_dim
        weight = _per_head(q_weight, k_weight, queries, x.shape[-2])
        out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
        inverse = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        for x_i, inverse_i, rotary_i, out_i in _samples(x, inverse, rotary, out):
            torch.linalg.vector_norm(x_i, dim=-1, keepdim=True, dtype=torch.float32, out=inverse_i)
            inverse_i.square_().div_(head_dim).add_(eps).rsqrt_()
            if out_i.dtype == torch.float32:
                torch.mul(x_i, inverse_i, out=out_i).mul_(weight)
            else:  # rounded to x's type before the weight, as the formula says
                torch.mul((x_i * inverse_i).type_as(x), weight, out=out_i)
            _rotate(out_i, rotary_i, out_i)
        ctx.save_for_backward(fused, rotary, inverse, q_weight, k_weight)
        return out[..., :queries, :], out[..., queries:, :], heads[..., x.shape[-2] :, :]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Rotated back, then as _RMSNorm.backward for every head."""
        fused, rotary, inverse, q_weight, k_weight = ctx.saved_tensors
        sizes = [gradient.shape[-2] for gradient in gradients]
        queries, rotated = sizes[0], sizes[0] + sizes[1]
        heads = fused.unflatten(-1, (-1, gradients[0].shape[-1]))
        weight = _per_head(q_weight, k_weight, queries, rotated).float()
        whole, grad_weight = heads.new_empty(heads.shape), torch.zeros_like(weight)
        back = rotary.conj()
        per_sample = _samples(heads[..., :rotated, :], inverse, back, *gradients[:2], whole[..., :rotated, :])
        for x_i, inverse_i, back_i, q_i, k_i, grad_i in per_sample:
            gradient_i = torch.empty_like(x_i, dtype=torch.float32, memory_format=torch.contiguous_format)
            _rotate(q_i, back_i, gradient_i[..., :queries, :])
            _rotate(k_i, back_i, gradient_i[..., queries:, :])
            normed = x_i * inverse_i
            product = normed * gradient_i
            grad_weight += product.flatten(0, -3).sum(0)
            mean = product.mul_(weight).mean(-1, keepdim=True)
            torch.mul(gradient_i.mul_(weight).addcmul_(normed, mean, value=-1.0), inverse_i, out=grad_i)
        whole[..., rotated:, :].copy_(gradients[2])
        grad_q, grad_k = (part.sum(0) for part in grad_weight.split([queries, sizes[1]]))
        return whole.flatten(-2), None, None, grad_q.type_as(q_weight), grad_k.type_as(k_weight), None


def _per_head(q_weight: Tensor, k_weight: Tensor, queries: int, rotated: int) -> Tensor:
    """(rotated, head_dim): a norm's weight for each of the ``queries`` heads of q and the rest, of k."""
    return torch.cat([q_weight.expand(queries, -1), k_weight.expand(rotated - queries, -1)])


def _rotate(x: Tensor, rotary: Tensor, out: Tensor) -> None:
    """out = x, pairs of whose last dimension are complex numbers, times rotary; out may be x."""
    if out.dtype == torch.float32:
        out.copy_(x)
        torch.view_as_complex(out.unflatten(-1, (-1, 2))).mul_(rotary)
    else:  # there are no complex numbers of two bf16
        wide = x.to(torch.float32, memory_format=torch.contiguous_format)
        torch.view_as_complex(wide.unflatten(-1, (-1, 2))).mul_(rotary)
        out.copy_(wide)


def _samples(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors sample by sample on a CPU, else as they are: a GPU has no cache to stay in, and launches cost.

    Samples of a single position (sampling) are too small to be worth an operation each.
    """
    if tensors[0].device.type == "cpu" and tensors[0].dim() > 2 and tensors[0].shape[1] > 1:
        return zip(*(tensor.unbind(0) for tensor in tensors), strict=True)
    return iter((tensors,))
