"""Dropout against what it must be in the mean, element by element, and in its gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchrec_mdr.adapters.dropout import FastDropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_every_element_is_dropped_alone_with_probability_p(p: float) -> None:
    torch.manual_seed(0)
    x = torch.rand(400, 1001) + 1
    dropped = FastDropout(p)(x) == 0
    # six standard deviations
    bound = 6 * (p * (1 - p)) ** 0.5
    assert abs(dropped.float().mean() - p) < bound * (400 * 1001) ** -0.5
    assert (dropped.float().mean(0) - p).abs().max() < bound * 400**-0.5
    assert (dropped.float().mean(1) - p).abs().max() < bound * 1001**-0.5
    # the four elements that share a draw know nothing of each other, nor rows of each other
    centred = dropped.flatten().double() - p
    for distance in (1, 2, 3, 4, 1001):
        correlation = (centred[distance:] * centred[:-distance]).mean() / (p * (1 - p))
        assert abs(correlation) < 6 * centred.numel() ** -0.5


def test_what_is_kept_is_scaled_and_so_is_its_gradient() -> None:
    x = torch.rand(64, 33).requires_grad_()
    y = FastDropout(0.25)(x)
    kept = y != 0
    torch.testing.assert_close(y[kept], x[kept] / 0.75)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, kept / 0.75)


def test_it_is_repeatable_and_draws_anew() -> None:
    module, x = FastDropout(0.5), torch.ones(100)
    torch.manual_seed(5)
    first, second = module(x), module(x)
    torch.manual_seed(5)
    assert torch.equal(module(x), first) and not torch.equal(first, second)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_ends_are_pytorchs(p: float) -> None:
    x = torch.randn(7, 3)
    assert torch.equal(FastDropout(p)(x), nn.Dropout(p)(x))
    assert torch.equal(FastDropout(0.5).eval()(x), x)
    assert FastDropout(0.5)(torch.empty(0, 4)).shape == (0, 4)
