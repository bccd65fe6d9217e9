"""The context through which adapters learn the rows' domains."""

from __future__ import annotations

import pytest
import torch

from torchrec_mdr.adapters.context import DomainContext, DomainState, Route
from torchrec_mdr.ops.groups import BatchDomains


def test_a_state_is_there_for_one_pass_only() -> None:
    context, state = DomainContext(), DomainState(Route.BASE, BatchDomains.from_ids(torch.tensor([0]), [1]))
    with context.open(state):
        assert context.state is state
    with pytest.raises(RuntimeError, match="outside its MultiDomainModel"):
        context.state  # noqa: B018


def test_an_error_within_a_pass_closes_it() -> None:
    context, state = DomainContext(), DomainState(Route.BASE, BatchDomains.from_ids(torch.tensor([0]), [1]))
    with pytest.raises(KeyError), context.open(state):
        raise KeyError
    with context.open(state):
        assert context.state is state
