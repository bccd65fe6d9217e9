"""`AdapterLinear.adapted` on a frozen linear layer, against the layer alone and against other ways to adapt it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.report import Goal, Line, Report, run
from benchmarks.timing import device, interleave
from torchrec_mdr.adapters.bank import LoRABank
from torchrec_mdr.adapters.linear import AdapterLinear
from torchrec_mdr.ops.groups import DomainGroups

LEAST_SECONDS = 0.02
Pass = Literal["forward", "forward+backward", "first layer"]
Sizes = tuple[int, int, int]
# the batch and the layers that the goals speak of; bounds of the forward pass by the most domains they hold for
GOAL_BATCH = 4096
FORWARD_GOALS: dict[Sizes, dict[int, float]] = {
    (1024, 512, 16): {20: 1.15, 300: 1.30, 1000: 1.60},
    (256, 128, 8): {20: 1.60},
}
BACKWARD_DOMAINS, BACKWARD_GOAL = 20, 0.80


@dataclass(frozen=True)
class Options:
    """What is measured.

    Args:
        domains: numbers of domains.
        layers: in_features, out_features and rank of each layer.
        batch_sizes: rows.
        orders: whether rows come sorted by domain, as the loader gives them.
        passes: forward without autograd; forward+backward with the gradient of the input, as in a hidden layer; or
            without it, as in the first adapted layer over frozen embeddings (`first layer`).
        dtype: of activations and weights; the grouped kernel serves float32 on CPU alone, bfloat16 on CUDA, too.
        rounds: of each variant.
        most_seconds: of each variant in all; a slow one has fewer rounds, but at least three.
        quick: two numbers of domains, one layer, sorted rows, few rounds.
    """

    domains: tuple[int, ...] = (2, 20, 300, 1000)
    layers: tuple[Sizes, ...] = ((1024, 512, 16), (256, 128, 8))
    batch_sizes: tuple[int, ...] = (4096,)
    orders: tuple[Literal["sorted", "unsorted"], ...] = ("sorted", "unsorted")
    passes: tuple[Pass, ...] = ("forward", "forward+backward", "first layer")
    dtype: Literal["float32", "bfloat16"] = "float32"
    rounds: int = 30
    most_seconds: float = 5.0
    quick: bool = False


class Layers:
    """One layer in all variants, with rows to feed it. All but `linear` give the same result.

    Args:
        sizes (Sizes): in_features, out_features, rank.
        batch_size (int): B.
        num_domains (int): N.
        is_sorted (bool): whether rows come sorted by domain.
        dtype (torch.dtype): of everything.
    """

    def __init__(self, sizes: Sizes, batch_size: int, num_domains: int, is_sorted: bool, dtype: torch.dtype) -> None:
        in_features, out_features, rank = sizes
        torch.manual_seed(0)
        bank = LoRABank(num_domains, in_features, out_features, rank)
        nn.init.normal_(bank.lora_B)
        nn.init.normal_(bank.bias)
        self.bank = bank.to(device(), dtype)
        self.linear = nn.Linear(in_features, out_features, device=device(), dtype=dtype)
        base = nn.Linear(in_features, out_features, device=device(), dtype=dtype).requires_grad_(False)
        base.load_state_dict(self.linear.state_dict())
        self.layer = AdapterLinear.from_linear(base, self.bank)
        self.x = torch.randn(batch_size, in_features, device=device(), dtype=dtype)
        self.gradient = torch.randn(batch_size, out_features, device=device(), dtype=dtype)
        ids = torch.randint(num_domains, (batch_size,))
        ids = ids.sort().values if is_sorted else ids
        make = DomainGroups.from_sorted_ids if is_sorted else DomainGroups.from_ids
        self.groups = make(ids, num_domains).to(device())
        self.counts = torch.bincount(ids, minlength=num_domains).tolist()
        # a module per domain is what loops train, and their backward would be quadratic with slices of a stack
        self.own = [
            [weight.detach().clone().requires_grad_() for weight in weights]
            for weights in zip(self.bank.lora_A, self.bank.up_table(), strict=True)
        ]

    @property
    def variants(self) -> dict[str, tuple[Callable[[Tensor], Tensor], list[Tensor]]]:
        """By name: what gives the output for an input [B, in_features], and what trains in it."""
        bank: list[Tensor] = list(self.bank.parameters())
        present = [weight for weights, count in zip(self.own, self.counts, strict=True) if count for weight in weights]
        return {
            "adapted": (lambda x: self.layer.adapted(x, self.groups), bank),
            "linear": (self.linear, list(self.linear.parameters())),
            "gather": (self.gather, bank),
            "masked": (self.masked, bank),
            "loop": (self.loop, present),
        }

    def gather(self, x: Tensor) -> Tensor:
        """Every row gets a copy of its domain's matrices."""
        ids, bank = self.groups.ids, self.bank
        z = torch.bmm(bank.lora_A.index_select(0, ids), x.unsqueeze(2))
        own = bank.up_table().index_select(0, ids)
        adapter = torch.baddbmm(own[:, -1:], z.mT, own[:, :-1]).squeeze(1)
        return F.linear(x, self.layer.weight, self.layer.bias) + adapter

    def masked(self, x: Tensor) -> Tensor:
        """Every row goes through all domains' adapters in one dense product; all but its own are masked out."""
        ids, bank = self.groups.ids, self.bank
        mask = F.one_hot(ids, bank.num_adapters).to(x.dtype)
        z = F.linear(x, bank.lora_A.flatten(0, 1)).unflatten(1, (bank.num_adapters, bank.rank)) * mask.unsqueeze(2)
        z = torch.cat([z, mask.unsqueeze(2)], 2)
        return F.linear(x, self.layer.weight, self.layer.bias) + z.flatten(1) @ bank.up_table().flatten(0, 1)

    def loop(self, x: Tensor) -> Tensor:
        """A Python loop over the domains that are present, each with its rows in one piece."""
        parts = zip(self.groups.group(x).split(self.counts), self.own, strict=True)
        adapter = torch.cat([torch.addmm(b[-1], F.linear(part, a), b[:-1]) for part, (a, b) in parts if len(part)])
        return F.linear(x, self.layer.weight, self.layer.bias) + self.groups.ungroup(adapter)

    def calls(self, which: Pass) -> dict[str, Callable[[], object]]:
        """What is timed."""
        return {name: self._call(forward, weights, which) for name, (forward, weights) in self.variants.items()}

    def _call(self, forward: Callable[[Tensor], Tensor], weights: list[Tensor], which: Pass) -> Callable[[], object]:
        if which == "forward":
            return torch.no_grad()(lambda: forward(self.x))
        x = self.x.clone().requires_grad_(which == "forward+backward")
        wanted = [*weights, x] if x.requires_grad else weights
        return lambda: torch.autograd.grad(forward(x), wanted, self.gradient)


def goal(which: Pass, sizes: Sizes, batch_size: int, num_domains: int) -> Goal | None:
    """What is asked of `adapted` against the linear, whatever the order of the rows."""
    if batch_size != GOAL_BATCH or sizes not in FORWARD_GOALS:
        return None
    if which == "forward":
        bounds = [bound for most, bound in FORWARD_GOALS[sizes].items() if num_domains <= most]
        return Goal("<=", bounds[0]) if bounds else None
    return Goal("<=", BACKWARD_GOAL) if num_domains <= BACKWARD_DOMAINS else None


def measure(options: Options) -> Report:
    """Times a frozen linear with a bank of adapters against the linear alone and against other ways to adapt it.

    Forward, the linear runs frozen; with a backward, the alternative is training the whole linear, and all other
    variants train the adapters. How rows fall into groups is known beforehand, as the loader finds it out once a batch.
    """
    if options.quick:
        options = replace(options, domains=(20, 1000), layers=options.layers[:1], orders=("sorted",), rounds=10)
    report = Report("adapter", "time", options)
    cases = list(product(options.layers, options.batch_sizes, options.domains, options.orders))
    for sizes, batch_size, num_domains, order in tqdm(cases, desc="adapter", unit="case", disable=None):
        layers = Layers(sizes, batch_size, num_domains, order == "sorted", getattr(torch, options.dtype))
        for which in options.passes:
            timings = interleave(layers.calls(which), options.rounds, 2, LEAST_SECONDS, options.most_seconds)
            case: dict[str, str | int] = {
                "layer": f"{sizes[0]}->{sizes[1]} r{sizes[2]}",
                "batch": batch_size,
                "domains": num_domains,
                "rows": order,
                "pass": which,
            }
            against = "linear" if which == "forward" else "full fine-tuning"
            wanted = goal(which, sizes, batch_size, num_domains)
            context = {"ms": timings.milliseconds("adapted")}
            report.add(Line(case, "adapted", against, timings.ratio("adapted", "linear"), wanted, context))
            for other in ("gather", "masked", "loop"):
                report.add(Line(case, "adapted", other, timings.ratio("adapted", other), context=context))
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    return run("adapter", measure, Options, arguments)


if __name__ == "__main__":
    sys.exit(main())
