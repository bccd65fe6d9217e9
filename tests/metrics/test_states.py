"""Collecting rows: as every metric of torchmetrics does it, and on several ranks."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from torchmetrics import Metric, MetricCollection

from tests.metrics.rows import NAMES, Rows, add, compute, label_places, make_rows
from tests.ranks import RankPool
from torchrec_mdr.metrics import DomainMetrics, Metrics, domain_metrics

FURTHER = {"places": label_places}


MEASURE = """
import resource, sys, torch
from tests.metrics.rows import add, make_rows
from torchrec_mdr.metrics import DomainMetrics
torch.set_num_threads(1)
count = int(sys.argv[1])
def most():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
metrics = DomainMetrics("abcd")
for seed in range(count // 10_000):
    add(metrics, make_rows(10_000, seed, decimals=6), 10_000)
    if not seed:
        metrics.compute()
        before = most()
metrics.compute()
print((most() - before) / count)
"""


def collected(rows: Rows) -> DomainMetrics:
    metrics = DomainMetrics(NAMES, FURTHER)
    add(metrics, rows)
    return metrics


def without_a_look_at_labels(metrics: DomainMetrics, rows: Rows) -> None:
    """Adds rows as an accelerator's are added, where looking at labels would mean to wait."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(domain_metrics, "_check_labels", lambda bad_labels: None)
        add(metrics, rows)


# Torchmetrics' conventions


def test_reset_forgets() -> None:
    metrics = collected(make_rows(100, seed=1))
    metrics.compute()
    metrics.reset()
    add(metrics, make_rows(300))
    assert metrics.compute() == compute(make_rows(300), metrics=FURTHER)


def test_forward_gives_the_batch_and_keeps_all_rows() -> None:
    first, second = make_rows(100, seed=1), make_rows(50, seed=2)
    metrics = DomainMetrics(NAMES, FURTHER)
    assert metrics(*first) == compute(first, metrics=FURTHER)
    assert metrics(*second) == compute(second, metrics=FURTHER)
    both = tuple(torch.cat(columns) for columns in zip(first, second, strict=True))
    assert metrics.compute() == compute(both, metrics=FURTHER)  # type: ignore[arg-type]


@pytest.mark.parametrize("column", [0, 1])
def test_forward_of_a_bad_batch_loses_no_row(column: int) -> None:
    metrics, bad = collected(make_rows(300)), make_rows(10)
    bad[column][3] = float("nan")
    with pytest.raises(ValueError, match="NaN|nan"):
        metrics(*bad)
    assert metrics.compute() == compute(make_rows(300), metrics=FURTHER)


def test_copies_and_pickles_go_their_own_way() -> None:
    metrics = collected(make_rows(300))
    copies: list[DomainMetrics] = [deepcopy(metrics), pickle.loads(pickle.dumps(metrics))]
    metrics.reset()
    for copy in copies:
        assert copy.compute() == compute(make_rows(300), metrics=FURTHER)
        add(copy, make_rows(10))
        assert copy.compute().rows == 310


def test_in_a_collection_of_torchmetrics() -> None:
    collection = MetricCollection({"domains": DomainMetrics(NAMES)})
    logits, labels, domain_ids = make_rows(100)
    collection.update(logits=logits, labels=labels, domain_ids=domain_ids)
    assert collection.compute() == {"domains": compute(make_rows(100))}
    assert isinstance(collection["domains"], Metric) and not collection["domains"].full_state_update


@pytest.mark.parametrize("logit", [torch.float32, torch.float64])
def test_tensors_that_are_filled_anew_change_nothing(logit: torch.dtype) -> None:
    logits, labels, domain_ids = make_rows(100)
    rows = logits.to(logit), labels.to(torch.uint8), domain_ids.int()  # the types that rows are kept in
    metrics = DomainMetrics(NAMES)
    metrics.update(*rows)
    expected = metrics.compute()
    for column in rows:
        column.zero_()
    assert metrics.compute() == expected == compute(make_rows(100))


def test_a_row_is_kept_in_nine_bytes() -> None:
    metrics, rows = DomainMetrics(NAMES), make_rows(10_000)
    add(metrics, rows, 1000)
    for _ in range(2):
        kept = (metrics.logits, metrics.labels, metrics.domain_ids, metrics.weights)
        assert sum(own.untyped_storage().nbytes() for state in kept for own in state) <= 9 * 10_000 + 4 * 10
        metrics.compute()  # after which they lie in one piece


def test_computing_takes_some_forty_bytes_a_row() -> None:
    """In a process of its own, whose most memory nobody else has raised."""
    command = [sys.executable, "-c", MEASURE, "2000000"]
    found = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "MALLOC_ARENA_MAX": "1"}
    )
    assert float(found.stdout) < 80  # all columns at once took 170


def test_an_update_elsewhere_waits_for_nothing() -> None:
    # the meta device has no values: whoever asks for one fails
    metrics = DomainMetrics(NAMES).to("meta")
    metrics.update(*(column.to("meta") for column in make_rows(100)))
    metrics.update(*(column.to("meta") for column in make_rows(0)))
    assert all(piece.is_meta for state in (metrics.logits, metrics.labels, metrics.domain_ids) for piece in state)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_update_on_a_gpu_waits_for_nothing() -> None:
    rows = [column.cuda() for column in make_rows(300)]
    metrics = DomainMetrics(NAMES, FURTHER).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics.update(*rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert metrics.compute().auc == compute(make_rows(300)).auc
    rows[1][7] = 0.3
    metrics.update(*rows)
    with pytest.raises(ValueError, match="row 7 .* label 0.3"):
        metrics.compute()


def test_labels_that_nobody_looked_at_are_refused_later() -> None:
    metrics, bad = collected(make_rows(300)), make_rows(100)
    bad[1][64 + 5], bad[1][64 + 9] = 0.3, 2.0
    without_a_look_at_labels(metrics, bad)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"row 5 of a batch .* label 0\.3$"):
            metrics.compute()


# Ranks


def share_of(rows: Rows, share: list[int]) -> Rows:
    start = sum(share[: dist.get_rank()])
    logits, labels, domain_ids = (column[start : start + share[dist.get_rank()]] for column in rows)
    return logits, labels, domain_ids


def compute_share(rows: Rows, share: list[int]) -> Metrics:
    return compute(share_of(rows, share), metrics=FURTHER)


@pytest.mark.parametrize("share", [[150, 150], [290, 10], [0, 300], [300, 0]])
def test_two_ranks_equal_one_bitwise(two_ranks: RankPool, share: list[int]) -> None:
    rows = make_rows(300)
    expected = compute(rows, metrics=FURTHER)
    assert two_ranks.run(compute_share, rows, share) == [expected, expected]


def test_two_ranks_without_rows(two_ranks: RankPool) -> None:
    empty = DomainMetrics(NAMES, FURTHER).compute()
    assert two_ranks.run(compute_share, make_rows(0), [0, 0]) == [empty, empty]


def compute_in_types(rows: Rows, types: list[torch.dtype]) -> Metrics:
    logits, labels, domain_ids = share_of(rows, [150, 150])
    of_rank = types[dist.get_rank()]
    return compute((logits.to(of_rank), labels.to(of_rank), domain_ids), metrics=FURTHER)


def test_ranks_may_hold_different_types(two_ranks: RankPool) -> None:
    logits, labels, domain_ids = make_rows(300)
    rows = logits.bfloat16().double(), labels, domain_ids
    expected = compute(rows, metrics=FURTHER)
    assert two_ranks.run(compute_in_types, rows, [torch.bfloat16, torch.float64]) == [expected, expected]


def compute_with_weights(rows: Rows, weights: torch.Tensor) -> Metrics:
    logits, labels, domain_ids = share_of(rows, [150, 150])
    mine = weights[150:] if dist.get_rank() else None  # the first rank's rows have none
    metrics = DomainMetrics(NAMES)
    metrics.update(logits, labels, domain_ids, mine)
    return metrics.compute()


def test_rows_of_one_rank_may_have_weights_and_those_of_another_none(two_ranks: RankPool) -> None:
    rows = make_rows(300)
    weights = torch.ones(300)
    weights[150:] = torch.rand(150, generator=torch.Generator().manual_seed(0))
    expected = compute((*rows, weights))
    assert expected != compute(rows)
    assert two_ranks.run(compute_with_weights, rows, weights) == [expected, expected]


def go_on_after_a_result(rows: Rows) -> Metrics:
    metrics = collected(share_of(rows, [100, 100]))
    metrics.compute()
    if dist.get_rank() == 0:  # the other rank has seen nothing new
        add(metrics, share_of(rows, [300, 0]))
    return metrics.compute()


def test_a_rank_that_has_seen_nothing_new_takes_part(two_ranks: RankPool) -> None:
    columns = make_rows(300)
    rows = tuple(torch.cat([column[:200], column]) for column in columns)
    expected = compute(rows, metrics=FURTHER)  # type: ignore[arg-type]
    assert two_ranks.run(go_on_after_a_result, columns) == [expected, expected]


def errors_and_after(rows: Rows, share: list[int]) -> tuple[list[str], Metrics]:
    """The error of each of two attempts on this rank, and what good rows give after a reset."""
    metrics = DomainMetrics(NAMES, FURTHER)
    without_a_look_at_labels(metrics, share_of(rows, share))
    messages = []
    for _ in range(2):
        with pytest.raises(ValueError) as error:
            metrics.compute()
        messages.append(str(error.value))
    metrics.reset()
    add(metrics, share_of(make_rows(300), share))
    return messages, metrics.compute()


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (0, float("nan"), "logits of 1 of 300 evaluated rows"),
        (1, 2.0, "row 35 of a batch (counted from 0) has the label 2"),
        (2, 4, "domain id 4 is outside"),
    ],
)
def test_every_rank_raises_the_same_error(two_ranks: RankPool, column: int, value: float, message: str) -> None:
    rows = make_rows(300)
    rows[column][299] = value
    first, second = two_ranks.run(errors_and_after, rows, [200, 100])
    assert first == second and message in first[0][0] and first[0][0] == first[0][1]
    assert first[1] == compute(make_rows(300), metrics=FURTHER)


def forward_then_compute(rows: Rows) -> tuple[Metrics, Metrics]:
    """What forward gives on this rank, after a bad batch that was let go; and what all ranks' rows give."""
    metrics, mine = DomainMetrics(NAMES), share_of(rows, [200, 100])
    bad = mine[0], mine[1] + 1, mine[2]
    with pytest.raises(ValueError):
        metrics(*bad)
    return metrics(*mine), metrics.compute()


def test_forward_gives_this_ranks_batch_and_compute_all_rows(two_ranks: RankPool) -> None:
    rows = make_rows(300)
    shares = tuple(column[:200] for column in rows), tuple(column[200:] for column in rows)
    expected = [(compute(share), compute(rows)) for share in shares]  # type: ignore[arg-type]
    assert two_ranks.run(forward_then_compute, rows) == expected
