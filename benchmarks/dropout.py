"""Dropout as the hidden layers use it, against PyTorch's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from benchmarks.report import Line, Report, run
from benchmarks.timing import device, interleave
from torchrec_mdr.adapters.dropout import FastDropout

LEAST_SECONDS = 0.02


@dataclass(frozen=True)
class Options:
    """What is measured.

    Args:
        widths: of the layer whose output is dropped.
        batch_sizes: rows.
        p: share that is dropped.
        rounds: of each variant.
        quick: one case, few rounds.
    """

    widths: tuple[int, ...] = (64, 256, 1024)
    batch_sizes: tuple[int, ...] = (1024, 8192)
    p: float = 0.5
    rounds: int = 20
    quick: bool = False


def measure(options: Options) -> Report:
    """Times a mask's draw and its product, forward and backward; on a GPU both variants are the same kernel."""
    if options.quick:
        options = replace(options, widths=(256,), batch_sizes=(1024,), rounds=5)
    report = Report("dropout", "time", options)
    for batch_size in options.batch_sizes:
        for width in options.widths:
            x = torch.randn(batch_size, width, device=device(), requires_grad=True)
            gradient = torch.randn_like(x)
            variants = {"FastDropout": FastDropout(options.p), "nn.Dropout": nn.Dropout(options.p)}
            calls = {name: _call(module, x, gradient) for name, module in variants.items()}
            timings = interleave(calls, options.rounds, 2, LEAST_SECONDS)
            context = {"ms": timings.milliseconds("FastDropout")}
            case: dict[str, str | int] = {"batch": batch_size, "width": width}
            report.add(
                Line(case, "FastDropout", "nn.Dropout", timings.ratio("FastDropout", "nn.Dropout"), context=context)
            )
    return report


def _call(module: nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(module(x), x, gradient)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    return run("dropout", measure, Options, arguments)


if __name__ == "__main__":
    sys.exit(main())
