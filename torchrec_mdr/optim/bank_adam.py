"""Adam for adapter banks, a row at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchrec_mdr.adapters.bank import Bank
from torchrec_mdr.ops import triton
from torchrec_mdr.ops.cpu_kernels import row_contiguous
from torchrec_mdr.ops.low_rank import FactorList, GradientFactors
from torchrec_mdr.ops.products import count_rows, outer

try:
    from torchrec_mdr.ops import _adam
except ImportError:  # built with ops/csrc/rows.cpp, whose absence ops/cpu_kernels.py reports
    _adam = None  # type: ignore[assignment]


def _is_supported(param: Tensor) -> bool:
    """Whether the compiled code is there and takes this parameter."""
    return _adam is not None and param.device.type == "cpu" and param.dtype == torch.float32


def _on_gpu(param: Tensor) -> bool:
    """Whether our own kernels on CUDA take this parameter."""
    return not _is_supported(param) and param.dtype == torch.float32 and triton.is_supported(param)


class BankAdam(torch.optim.Optimizer):
    """Adam on banks, where a row moves only in steps whose gradients come from rows of its domain.

    Plain Adam moves every row in every step by its momentum, so a domain's adapter would depend on how often other
    domains come up (docs/departures.md). Moments, step counts and weight decay are a row's own here; rows that take
    part move as Adam moves them (Kingma and Ba, Algorithm 1). A row takes part where one of its bank's gradients is not
    zero, however many backward passes they are the sum of.

    Args:
        banks (Iterable[Bank]): the banks that train; each of their parameters that requires a gradient does.
        lr (float): learning rate.
        weight_decay (float): L2 added to gradients.
        betas (tuple[float, float]): decay of the moments.
        eps (float): added to the root of the second moment.
        fused (bool): take gradients as the factors that they are products of, where a backward pass can leave them
            (one rank), as TorchRec's fused optimizers take gradients: parameters then have no ``.grad``, so
            nothing else may look at it. Where a thousand adapters move in every step, writing gradients would be a
            good part of it.
    """

    def __init__(
        self,
        banks: Iterable[Bank],
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        fused: bool = False,
    ) -> None:
        self.banks = list(banks)
        self.frozen: dict[int, Tensor] = {}  # bool [num_adapters] by id of the bank, rows that must not move any more
        groups = [{"params": [p for p in bank.parameters(recurse=False) if p.requires_grad]} for bank in self.banks]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})
        self.factors: dict[nn.Parameter, FactorList] = {}
        self.biases: dict[nn.Parameter, nn.Parameter] = {}  # whose gradients a table's factors hold, too
        if fused and not (dist.is_initialized() and dist.get_world_size() > 1):  # ranks add up gradients, not factors
            for table, bias in (pair for bank in self.banks for pair in bank.factored_tables()):
                self._ask_for_factors(table, bias)

    def _ask_for_factors(self, table: nn.Parameter, bias: nn.Parameter | None) -> None:
        trains = [p.requires_grad and (_is_supported(p) or _on_gpu(p)) for p in (table, bias) if p is not None]
        if not all(trains):
            return
        self.factors[table] = FactorList()
        self.factors[table].ask_for(table)
        if bias is not None:
            self.biases[table] = bias

    def freeze(self, bank: Bank, rows: Tensor) -> None:
        """Keeps rows of a bank, bool [num_adapters], from moving in the steps to come."""
        self.frozen[id(bank)] = rows

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step from the gradients at hand."""
        assert closure is None, "BankAdam takes no closure"
        for bank, group in zip(self.banks, self.param_groups, strict=True):
            present = self._present(bank, group["params"])
            if present is None:
                continue
            if id(bank) in self.frozen:
                present = present & ~self.frozen[id(bank)]
            for param in group["params"]:
                if param.grad is not None or self.factors.get(param):
                    self._update(param, present, group)
        self._forget_factors()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets gradients and factors of gradients."""
        super().zero_grad(set_to_none)
        self._forget_factors()

    def _forget_factors(self) -> None:
        for factors in self.factors.values():
            factors.clear()

    def _present(self, bank: Bank, params: Iterable[nn.Parameter]) -> Tensor | None:
        """Bool [num_adapters], the rows that take part in the step; None where no gradient has come."""
        present: Tensor | None = None
        for param in params:
            for factors in self.factors.get(param, ()):
                mask = count_rows(factors.groups) > 0
                present = mask if present is None else present | mask
            if param.grad is None:
                continue
            if _on_gpu(param):
                from torchrec_mdr.ops.triton import adam

                present = param.new_zeros(param.shape[0], dtype=torch.bool) if present is None else present
                adam.mark_rows(param.grad, present)
            else:
                mask = (param.grad != 0).flatten(1).any(1)
                present = mask if present is None else present | mask
        return present

    def _update(self, param: nn.Parameter, present: Tensor, group: dict[str, Any]) -> None:
        state = self.state_of(param)
        factors, bias = self.factors.get(param) or FactorList(), self.biases.get(param)
        if len(factors) == 1 and param.grad is None and (bias is None or bias.grad is None):
            self._update_from_factors(param, bias, factors[0], group, present)
            return
        for own in factors:
            total = outer(*own)
            if bias is not None:
                _add_gradient(bias, total[:, -1])
                total = total[:, :-1].mT
            _add_gradient(param, total)
        if param.grad is None:
            return
        if _on_gpu(param):
            from torchrec_mdr.ops.triton import adam

            adam.update(param, param.grad, state, group, present)
            return
        (self._update_present if _is_supported(param) else self._update_all)(param, param.grad, state, group, present)

    def state_of(self, param: Tensor) -> dict[str, Tensor]:
        """Steps [num_adapters] and moments of a parameter, made where there are none yet."""
        state: dict[str, Tensor] = self.state[param]
        if not state:
            state["step"] = torch.zeros(param.shape[0], device=param.device)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        return state

    def _update_from_factors(
        self, table: Tensor, bias: Tensor | None, factors: GradientFactors, group: dict[str, Any], present: Tensor
    ) -> None:
        """Adam on the rows of a table, and of its bias, whose gradient is never written."""
        if _on_gpu(table):
            from torchrec_mdr.ops.triton import adam

            biases = None if bias is None else self.state_of(bias)
            adam.update_from_factors(table, self.state_of(table), bias, biases, factors, group, present)
            return
        (z, x), groups = (row_contiguous(rows) for rows in factors[:2]), factors.groups
        matrices = z.data_ptr(), z.stride(0), x.data_ptr(), x.stride(0)
        permutation = 0 if groups.permutation is None else groups.permutation.data_ptr()
        given = (*matrices, permutation, groups.offsets.data_ptr(), z.shape[1], x.shape[1])
        last = (0, 0, 0, 0) if bias is None else _addresses(bias, self.state_of(bias))
        self._step(table, self.state_of(table), group, present, 0, given, last)

    def _update_present(
        self, param: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any], present: Tensor
    ) -> None:
        """Adam on the rows that are present, by compiled code."""
        grad = torch.empty_like(param).copy_(grad) if grad.stride() != param.stride() else grad
        self._step(param, state, group, present, grad.data_ptr())

    @staticmethod
    def _step(param: Tensor, state: dict[str, Tensor], group: dict[str, Any], present: Tensor, *gradient: Any) -> None:
        assert present.is_contiguous()
        _adam.step(
            (*_addresses(param, state), present.data_ptr(), param.shape[0], param[0].numel()),
            (group["lr"], *group["betas"], group["eps"], group["weight_decay"]),
            torch.get_num_threads(),
            *gradient,
        )

    @staticmethod
    def _update_all(
        param: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any], present: Tensor
    ) -> None:
        """Adam on all rows, of which those that are absent stay as they are: picking rows would wait for the device."""
        beta1, beta2 = group["betas"]
        shape = (-1,) + (1,) * (param.dim() - 1)
        if group["weight_decay"]:
            grad = grad + group["weight_decay"] * param
        first, second, step = state["exp_avg"], state["exp_avg_sq"], state["step"]
        mask = present.to(param.dtype).view(shape)
        step.add_(present)
        first.add_((grad - first) * ((1.0 - beta1) * mask))
        second.add_((grad * grad - second) * ((1.0 - beta2) * mask))
        correction1 = (1.0 - beta1**step).clamp(min=1e-30).view(shape)
        correction2 = (1.0 - beta2**step).clamp(min=1e-30).view(shape)
        update = (first / correction1) / ((second / correction2).sqrt_().add_(group["eps"]))
        param.sub_((update * mask).mul_(group["lr"]))


def _add_gradient(param: nn.Parameter, grad: Tensor) -> None:
    param.grad = grad if param.grad is None else param.grad + grad


def _addresses(param: Tensor, state: dict[str, Tensor]) -> tuple[int, ...]:
    """Where values, moments and steps lie, all in the same order: row by row."""
    tensors = [param, state["exp_avg"], state["exp_avg_sq"]]
    in_rows = all(tensor.is_contiguous() or tensor.mT.is_contiguous() for tensor in tensors)
    assert in_rows and len({tensor.stride() for tensor in tensors}) == 1, "moments lie as their parameter does"
    assert {tensor.dtype for tensor in (*tensors, state["step"])} == {torch.float32}
    return (*(tensor.data_ptr() for tensor in tensors), state["step"].data_ptr())
