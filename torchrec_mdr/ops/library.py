"""The operators ``torch.ops.torchrec_mdr.*``: schemas, kernels, fake kernels and autograd formulas in one place.

What computes is the same code that eager mode calls without a dispatcher in between, see :func:`is_direct`.
torch.compile, torch.export and fake tensors see operators.

The last arguments of each say how rows fall into groups, see :class:`DomainGroups`. Ids run from -1, which is no
adapter, to num_adapters - 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchrec_mdr.ops import products, statistics
from torchrec_mdr.ops.groups import DomainGroups

NAMESPACE = "torchrec_mdr"
_GROUPS = "Tensor ids, Tensor offsets, Tensor? adapter_ids, Tensor? permutation, SymInt num_adapters"
SCHEMAS = {
    # z_ij = table[d_i, j] . x_i
    "down": f"(Tensor x, Tensor table, {_GROUPS}) -> Tensor",
    # y_i = start_i + sum_j z_ij table[d_i, j], and last for one more j
    "up": f"(Tensor z, Tensor table, Tensor? start, Tensor? last, {_GROUPS}) -> Tensor",
    # g_dj = sum of z_ij x_i over the rows of adapter d
    "outer": f"(Tensor z, Tensor x, {_GROUPS}) -> Tensor",
    # a layer of x, or base, and the adapters beside it
    "low_rank": (
        "(Tensor x, Tensor lora_A, Tensor lora_B, Tensor bias, Tensor? base, Tensor? weight, Tensor? linear_bias, "
        f"{_GROUPS}) -> (Tensor y, Tensor z)"
    ),
    # weight_d (x_i - mean_d) / sqrt(var_d + eps) + bias_d, and what its backward pass needs
    "normalise": (
        "(Tensor x, Tensor weight, Tensor bias, Tensor running_mean, Tensor running_var, float eps, float momentum, "
        f"bool training, bool relu, {_GROUPS}) -> (Tensor y, Tensor moved_mean, Tensor moved_var, Tensor centre, "
        "Tensor scale, Tensor rstd, Tensor offset, Tensor share)"
    ),
    "normalise_backward": (
        "(Tensor grad, Tensor x, Tensor centre, Tensor scale, Tensor rstd, Tensor offset, Tensor share, Tensor? gate, "
        f"{_GROUPS}) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)"
    ),
    # y_i = weight[g_i] x_i for rows that are grouped already, and the sums of y_i x_i^T of each group
    "matmul": "(Tensor x, Tensor weight, Tensor offsets) -> Tensor",
    "matmul_outer": "(Tensor y, Tensor x, Tensor offsets) -> Tensor",
}
_PLAIN = (Tensor, nn.Parameter)
_library = torch.library.Library(NAMESPACE, "DEF")


def is_direct(x: Tensor) -> bool:
    """Whether a kernel may be called without the dispatcher: nothing traces, and the tensor has memory."""
    return not torch.compiler.is_compiling() and type(x) in _PLAIN and not x.is_meta


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The type that autocast gives a plain layer's product of x, or x's own."""
    if isinstance(x, torch.fx.Proxy) or x.dtype is torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def flat(groups: DomainGroups) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int]:
    """Groups as an operator's last arguments."""
    return groups.ids, groups.offsets, groups.adapter_ids, groups.permutation, groups.num_adapters


def _groups(*arguments: Any) -> DomainGroups:
    """An operator's last arguments as groups."""
    ids, offsets, adapter_ids, permutation, num_adapters = arguments
    return DomainGroups(ids, offsets, num_adapters, adapter_ids, permutation, may_miss=True)


def _down(x: Tensor, table: Tensor, *groups: Any) -> Tensor:
    return products.down(x, table, _groups(*groups))


def _up(z: Tensor, table: Tensor, start: Tensor | None, last: Tensor | None, *groups: Any) -> Tensor:
    return products.up(z, table, _groups(*groups), start, last=last)


def _outer(z: Tensor, x: Tensor, *groups: Any) -> Tensor:
    return products.outer(z, x, _groups(*groups))


def _low_rank(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor,
    base: Tensor | None,
    weight: Tensor | None,
    linear_bias: Tensor | None,
    *groups: Any,
) -> tuple[Tensor, Tensor]:
    return products.low_rank(x, lora_A, lora_B, bias, base, weight, linear_bias, _groups(*groups), exact=False)


def _normalise(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    eps, momentum, training, relu, *groups = arguments
    moved = running_mean.clone(), running_var.clone()  # operators with a formula change nothing in place
    y, *kept = statistics.normalise(x, weight, bias, *moved, eps, momentum, training, relu, _groups(*groups))
    return y, *moved, *kept


def _normalise_backward(
    grad: Tensor,
    x: Tensor,
    centre: Tensor,
    scale: Tensor,
    rstd: Tensor,
    offset: Tensor,
    share: Tensor,
    gate: Tensor | None,
    *groups: Any,
) -> tuple[Tensor, ...]:
    kept = centre, scale, rstd, offset, share
    grad_x, grad_weight, grad_bias = statistics.normalise_backward(grad, x, *kept, gate, True, _groups(*groups))
    assert grad_x is not None, "it was wanted"
    return grad_x, grad_weight.contiguous(), grad_bias.contiguous()


def _fake_matmul(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def _fake_matmul_outer(y: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(offsets.shape[0], y.shape[1], x.shape[1])


def _fake_down(x: Tensor, table: Tensor, *groups: Any) -> Tensor:
    return x.new_empty(x.shape[0], table.shape[1])


def _fake_up(z: Tensor, table: Tensor, start: Tensor | None, last: Tensor | None, *groups: Any) -> Tensor:
    return z.new_empty(z.shape[0], table.shape[2])


def _fake_outer(z: Tensor, x: Tensor, *groups: Any) -> Tensor:
    return x.new_empty(groups[4], z.shape[1], x.shape[1])


def _fake_low_rank(x: Tensor, lora_A: Tensor, lora_B: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], lora_B.shape[1]), x.new_empty(x.shape[0], lora_A.shape[1] + 1)


def _fake_normalise(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    training = rest[5]
    share = x.new_empty(weight.shape[0], 1) if training else x.new_empty(0)
    return torch.empty_like(x), *(torch.empty_like(weight) for _ in range(6)), share


def _fake_normalise_backward(grad: Tensor, x: Tensor, centre: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(x), torch.empty_like(centre), torch.empty_like(centre)


# Formulas are written in operators, so that a compiled backward pass is one graph


def _save(*places: int) -> Any:
    """Keeps some of an operator's inputs, and how rows fall into groups, for its formula."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *_, ids, offsets, adapter_ids, permutation, num_adapters = inputs
        kept = [inputs[place] for place in places]
        extra = [output[1]] if isinstance(output, tuple) else []
        ctx.save_for_backward(ids, offsets, adapter_ids, permutation, *kept, *extra)
        ctx.num_adapters = num_adapters

    return setup


def _saved(ctx: Any) -> tuple[tuple[Any, ...], list[Tensor]]:
    ids, offsets, adapter_ids, permutation, *kept = ctx.saved_tensors
    return (ids, offsets, adapter_ids, permutation, ctx.num_adapters), kept


_NO_GROUPS = (None,) * 5


def _down_formula(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    groups, (x, table) = _saved(ctx)
    wanted = ctx.needs_input_grad
    grad_x = OPS.up(grad, table, None, None, *groups) if wanted[0] else None
    grad_table = OPS.outer(grad, x, *groups) if wanted[1] else None
    return grad_x, grad_table, *_NO_GROUPS


def _up_formula(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    groups, (z, table, start, last) = _saved(ctx)
    wanted = ctx.needs_input_grad
    grad_z = grad_start = None
    if wanted[0]:
        grad_z = OPS.down(grad, table, *groups)
        if last is not None:
            grad_z = torch.cat([grad_z, OPS.down(grad, last.unsqueeze(1), *groups)], 1)
    total = OPS.outer(z, grad, *groups) if wanted[1] or wanted[3] else None
    if wanted[2]:
        grad_start = grad.sum(0) if start.dim() == 1 else grad
    if total is None:
        return grad_z, None, grad_start, None, *_NO_GROUPS
    if last is None:
        return grad_z, total, grad_start, None, *_NO_GROUPS
    return grad_z, total[:, :-1], grad_start, total[:, -1], *_NO_GROUPS


def _low_rank_formula(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    groups, (x, lora_A, lora_B, weight, z) = _saved(ctx)
    wanted = ctx.needs_input_grad
    grad_x = grad_A = grad_B = grad_bias = grad_weight = grad_linear_bias = None
    if wanted[2] or wanted[3]:
        total = OPS.outer(z, grad, *groups)
        grad_B, grad_bias = total[:, :-1].mT, total[:, -1]
    if wanted[0] or wanted[1]:
        grad_z = OPS.down(grad, lora_B.mT, *groups)
        if wanted[1]:
            grad_A = OPS.outer(grad_z, x, *groups)
        if wanted[0]:
            grad_x = OPS.up(grad_z, lora_A, None if weight is None else grad @ weight, None, *groups)
    if wanted[5]:
        grad_weight = grad.mT @ x
    if wanted[6]:
        grad_linear_bias = grad.sum(0)
    grad_base = grad if wanted[4] else None
    return grad_x, grad_A, grad_B, grad_bias, grad_base, grad_weight, grad_linear_bias, *_NO_GROUPS


def _keep_normalise(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *others, ids, offsets, adapter_ids, permutation, num_adapters = inputs
    y, _, _, *kept = output
    relu = others[8]
    ctx.save_for_backward(ids, offsets, adapter_ids, permutation, others[0], *kept, y if relu else None)
    ctx.num_adapters = num_adapters


def _normalise_formula(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    groups, kept = _saved(ctx)
    gradients = OPS.normalise_backward(grad.contiguous(), *kept, *groups)
    return *gradients, *(None,) * 6, *_NO_GROUPS


def _keep_matmul(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _matmul_formula(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, offsets = ctx.saved_tensors
    grad_x = OPS.matmul(grad, weight.mT, offsets) if ctx.needs_input_grad[0] else None
    return grad_x, OPS.matmul_outer(grad, x, offsets) if ctx.needs_input_grad[1] else None, None


_KERNELS = {
    "down": (_down, _fake_down, _save(0, 1), _down_formula),
    "up": (_up, _fake_up, _save(0, 1, 2, 3), _up_formula),
    "outer": (_outer, _fake_outer, None, None),
    "low_rank": (_low_rank, _fake_low_rank, _save(0, 1, 2, 5), _low_rank_formula),
    "normalise": (_normalise, _fake_normalise, _keep_normalise, _normalise_formula),
    "normalise_backward": (_normalise_backward, _fake_normalise_backward, None, None),
    "matmul": (products.matmul, _fake_matmul, _keep_matmul, _matmul_formula),
    "matmul_outer": (products.matmul_outer, _fake_matmul_outer, None, None),
}


def register(name: str, schema: str, kernel: Any, fake: Any, setup: Any = None, formula: Any = None) -> None:
    """Makes an operator known.

    Args:
        name (str): in ``torch.ops.torchrec_mdr``.
        schema (str): of its arguments and results.
        kernel (Callable): computes it, on CPU and on CUDA.
        fake (Callable): gives empty results of the right form.
        setup (Callable | None): keeps what the formula needs.
        formula (Callable | None): its gradient, in operators.
    """
    _library.define(name + schema, tags=[torch.Tag.pt2_compliant_tag])
    for key in ("CPU", "CUDA"):
        _library.impl(name, kernel, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    if formula is not None:
        torch.library.register_autograd(f"{NAMESPACE}::{name}", formula, setup_context=setup, lib=_library)


for _name, _parts in _KERNELS.items():
    register(_name, SCHEMAS[_name], *_parts)
OPS = torch.ops.torchrec_mdr
