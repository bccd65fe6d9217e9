from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.data import tiny
from torchrec_mdr.data.batch import DomainBatch
from torchrec_mdr.data.loader import DomainLoader
from torchrec_mdr.data.schema import Schema
from torchrec_mdr.data.shuffle import Folds

DIVISIONS = ["scenario", "segment"]
ROWS = 1003

Folder = tuple[str, Schema]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return tiny.write(tmp_path_factory.mktemp("loader") / "tiny", tiny.columns(ROWS))


def load(folder: Folder, batch_size: int = 64, **options: Any) -> DomainLoader:
    return DomainLoader(*folder, "train", DIVISIONS, batch_size, **{"shuffle": True, **options})


def rows(batch: DomainBatch) -> list[int]:
    """The numbers of a batch's rows, in its order."""
    found: list[int] = batch.sparse_features["row"].values().tolist()
    return found


def global_batches(folder: Folder, world_size: int, epoch: int = 0, **options: Any) -> list[set[int]]:
    """Rows of each batch over all ranks, with the shares checked against each other."""
    ranks = [
        list(load(folder, rank=rank, world_size=world_size, **options).batches(epoch)) for rank in range(world_size)
    ]
    result = []
    for shares in zip(*ranks, strict=True):
        sizes = [len(share.labels) for share in shares]
        assert max(sizes) - min(sizes) <= 1
        assert all(share.global_rows == sum(sizes) for share in shares)
        found = [row for share in shares for row in rows(share)]
        assert len(set(found)) == len(found)
        result.append(set(found))
    return result


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_every_row_comes_once_an_epoch(folder: Folder, world_size: int, shuffle: bool) -> None:
    batches = global_batches(folder, world_size, shuffle=shuffle)
    assert sorted(row for batch in batches for row in batch) == list(range(ROWS))
    assert len(batches) == -(-ROWS // 64)
    assert {len(batch) for batch in batches} <= {ROWS // len(batches), ROWS // len(batches) + 1}


@pytest.mark.parametrize("options", [{}, {"shuffle": False}, {"shuffle_rows": 200, "memory_bytes": 0}])
def test_global_batches_do_not_depend_on_the_number_of_ranks(folder: Folder, options: dict[str, Any]) -> None:
    one = global_batches(folder, 1, epoch=3, **options)
    for world_size in (2, 4, 8):
        assert global_batches(folder, world_size, epoch=3, **options) == one


@pytest.mark.parametrize("shuffle_rows", [72, 200, 1003, 5000])
@pytest.mark.parametrize("world_size", [1, 2])
def test_rows_reread_by_windows_are_the_rows_kept_in_memory(folder: Folder, shuffle_rows: int, world_size: int) -> None:
    for rank in range(world_size):
        options = {"rank": rank, "world_size": world_size, "shuffle_rows": shuffle_rows}
        kept = list(load(folder, **options).batches(1))
        reread = list(load(folder, **options, memory_bytes=0).batches(1))
        assert [rows(batch) for batch in kept] == [rows(batch) for batch in reread]
    batches = global_batches(folder, world_size, shuffle_rows=shuffle_rows, memory_bytes=0)
    assert sorted(row for batch in batches for row in batch) == list(range(ROWS))


def test_the_order_is_set_by_seed_and_epoch_alone(folder: Folder) -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        return [rows(batch) for batch in load(folder, seed=seed).batches(epoch)]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_shuffled_batches_mix_near_and_far_rows(folder: Folder) -> None:
    batch = rows(next(load(folder, batch_size=200).batches(0)))
    # a batch of an unshuffled lane would hold neighbours only
    assert sum(row + 1 in batch for row in batch) < 80
    assert max(batch) - min(batch) > 800


@pytest.mark.parametrize("options", [{}, {"shuffle_rows": 100}, {"shuffle_rows": 100, "memory_bytes": 0}])
@pytest.mark.parametrize("start", [0, 1, 7, 15, 16])
def test_resuming_gives_the_tail_of_the_whole(folder: Folder, start: int, options: dict[str, Any]) -> None:
    loader = load(folder, **options)
    whole = [rows(batch) for batch in loader.batches(2)]
    assert [rows(batch) for batch in loader.batches(2, start=start)] == whole[start:]
    assert [rows(batch) for batch in loader.batches(2, start=start, stop=start + 3)] == whole[start : start + 3]


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("multi_hot", [False, True])
def test_batches_hold_the_columns_of_their_rows(tmp_path: Path, multi_hot: bool, parts: int) -> None:
    table = tiny.columns(500, multi_hot)
    folder = tiny.write(tmp_path / "data", table, multi_hot, parts)
    keys = ["row", "tags", "item"] if multi_hot else ["row", "item"]
    for batch in load(folder, batch_size=128, world_size=2, rank=1, shuffle_rows=200, memory_bytes=0).batches(0):
        found = rows(batch)
        assert batch.sparse_features.keys() == keys
        assert batch.sparse_features.values().dtype == torch.int64
        assert batch.sparse_features.lengths().dtype == torch.int32
        assert batch.sparse_features["item"].values().tolist() == table["item"][found].tolist()
        if multi_hot:
            tags = batch.sparse_features["tags"]
            bags = [bag.tolist() for bag in torch.split(tags.values(), tags.lengths().tolist())]
            assert bags == [table["tags"][row].as_py() for row in found]
        assert batch.labels.tolist() == table["label"][found].tolist()
        dense = np.stack([table["price"], table["age"]], axis=1).astype(np.float32)
        assert batch.dense_features.tolist() == dense[found].tolist()
        assert batch.domains.ids[:, 0].tolist() == table["domain_scenario"][found].tolist()
        assert batch.domains.ids[:, 1].tolist() == table["domain_segment"][found].tolist()


def test_rows_are_sorted_and_grouped_by_their_combination_of_domains(folder: Folder) -> None:
    for batch in load(folder).batches(0):
        ids = batch.domains.ids.tolist()
        assert ids == sorted(ids)
        for division, groups in enumerate(batch.domains.groups):
            assert groups.permutation is None
            start = 0
            for group, stop in enumerate(groups.offsets.tolist()):
                adapter = group if groups.adapter_ids is None else int(groups.adapter_ids[group])
                assert all(row[division] == adapter for row in ids[start:stop])
                start = stop
            assert start == len(ids)


def test_rows_of_one_combination_keep_their_shuffled_order(folder: Folder) -> None:
    one, two = (load(folder, seed=seed).batches(0) for seed in (0, 0))
    for first, second in zip(one, two, strict=True):
        assert torch.equal(first.sparse_features.values(), second.sparse_features.values())
    batch = rows(next(load(folder, batch_size=ROWS).batches(0)))
    assert batch != sorted(batch)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_evaluation_with_fewer_rows_than_ranks_gives_empty_shares(tmp_path: Path, count: int) -> None:
    folder = tiny.write(tmp_path / "few", tiny.columns(count))
    ranks = [list(load(folder, shuffle=False, rank=rank, world_size=4).batches(0)) for rank in range(4)]
    assert {len(batches) for batches in ranks} == {min(count, 1)}
    assert sorted(row for batches in ranks for batch in batches for row in rows(batch)) == list(range(count))
    for batch in ranks[3]:
        assert batch.sparse_features.stride() == 0
        assert batch.dense_features.shape == (0, 2)
        assert batch.domains.ids.shape == (0, 2)
        assert batch.domains.groups[0].offsets.tolist() == [0] * tiny.SIZES["scenario"]
        assert batch.global_rows == count


@pytest.mark.parametrize(("count", "batch_size", "world_size"), [(5, 4, 4), (7, 5, 3), (9, 4, 2), (4, 4, 4)])
def test_each_rank_has_a_row_in_each_training_batch(
    tmp_path: Path, count: int, batch_size: int, world_size: int
) -> None:
    folder = tiny.write(tmp_path / "few", tiny.columns(count))
    ranks = [
        list(load(folder, batch_size=batch_size, rank=rank, world_size=world_size).batches(0))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert min(len(batch.labels) for batches in ranks for batch in batches) >= 1
    assert sorted(row for batches in ranks for batch in batches for row in rows(batch)) == list(range(count))


def test_too_few_rows_for_the_ranks_are_refused(tmp_path: Path, folder: Folder) -> None:
    few = tiny.write(tmp_path / "few", tiny.columns(3))
    with pytest.raises(ValueError, match="3 selected rows of split 'train' .* each of 4 ranks a row; select more"):
        load(few, world_size=4)
    with pytest.raises(ValueError, match="batches of 2 cannot give each of 4 ranks"):
        load(folder, batch_size=2, world_size=4)
    with pytest.raises(ValueError, match="batch size must be at least 1, not 0"):
        load(folder, batch_size=0)


@pytest.mark.parametrize("memory_bytes", [0, 1 << 30])
def test_a_selection_of_domains(folder: Folder, memory_bytes: int) -> None:
    table = tiny.columns(ROWS)
    wanted = np.flatnonzero(np.isin(table["domain_scenario"], [1, 3])).tolist()
    loader = load(folder, domains=[3, 1], memory_bytes=memory_bytes, shuffle_rows=200)
    assert sorted(row for batch in loader.batches(0) for row in rows(batch)) == wanted
    assert loader.num_rows == len(wanted)
    assert (
        loader.domain_counts("scenario").tolist() == np.bincount(table["domain_scenario"][wanted], minlength=4).tolist()
    )
    assert (
        loader.domain_counts("segment").tolist() == np.bincount(table["domain_segment"][wanted], minlength=3).tolist()
    )
    with pytest.raises(ValueError, match=r"domains \[4\] must name at least one of division 'scenario', 0 to 3"):
        load(folder, domains=[4])


def test_folds_are_disjoint_and_complete(folder: Folder) -> None:
    parts = [(0,), (1, 4), (2, 3)]
    found = [
        [row for batch in load(folder, folds=Folds(5, keep, seed=7)).batches(0) for row in rows(batch)]
        for keep in parts
    ]
    assert sorted(row for part in found for row in part) == list(range(ROWS))
    for keep, part in zip(parts, found, strict=True):
        share = len(keep) / 5
        assert abs(len(part) / ROWS - share) < 4 * (share * (1 - share) / ROWS) ** 0.5
    again = [row for batch in load(folder, folds=Folds(5, (0,), seed=8)).batches(0) for row in rows(batch)]
    assert set(again) != set(found[0])


def test_folds_do_not_depend_on_files_or_selection(tmp_path: Path, folder: Folder) -> None:
    parts = tiny.write(tmp_path / "parts", tiny.columns(ROWS), parts=4, row_group_size=17)
    one, several = (
        sorted(row for batch in load(data, folds=Folds(5, (2,))).batches(0) for row in rows(batch))
        for data in (folder, parts)
    )
    assert one == several
    both = load(folder, folds=Folds(5, (2,)), domains=[1])
    domains = tiny.columns(ROWS)["domain_scenario"]
    assert sorted(row for batch in both.batches(0) for row in rows(batch)) == [r for r in one if domains[r] == 1]


def test_files_in_parts_give_the_same_batches(tmp_path: Path, folder: Folder) -> None:
    parts = tiny.write(tmp_path / "parts", tiny.columns(ROWS), parts=4, row_group_size=100)
    assert [rows(b) for b in load(parts).batches(0)] == [rows(b) for b in load(folder).batches(0)]


def test_a_rank_reads_only_row_groups_of_its_lanes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchrec_mdr.data.reader import SplitReader

    folder = tiny.write(tmp_path / "groups", tiny.columns(2400), row_group_size=50)
    read: list[int] = []
    whole = SplitReader.rows
    monkeypatch.setattr(
        SplitReader, "rows", lambda self, group, *rest: (read.append(group.number), whole(self, group, *rest))[1]
    )
    load(folder, rank=1, world_size=24)
    assert read == [2, 3]


def test_the_thread_ends_with_the_iterator(folder: Folder) -> None:
    def alive() -> int:
        return sum(thread.name == "mdr-prefetch" for thread in threading.enumerate())

    loader = load(folder, prefetch_batches=1)
    batches = loader.batches(0)
    next(batches)
    # one batch waits and the thread holds the next: it cannot have ended
    assert alive() == 1
    for _ in batches:
        pass
    assert alive() == 0
    batches = loader.batches(0)
    next(batches)
    assert alive() == 1
    del batches
    gc.collect()
    assert alive() == 0


def test_without_a_thread_the_batches_are_the_same(folder: Folder) -> None:
    threaded, plain = (load(folder, prefetch_batches=depth).batches(0) for depth in (4, 0))
    assert [rows(batch) for batch in threaded] == [rows(batch) for batch in plain]


def test_divisions_in_another_order(folder: Folder) -> None:
    loader = DomainLoader(*folder, "train", ["segment"], 128, shuffle=True)
    table = tiny.columns(ROWS)
    for batch in loader.batches(0):
        assert batch.domains.ids[:, 0].tolist() == table["domain_segment"][rows(batch)].tolist()
        assert batch.domains.groups[0].num_adapters == 3


def test_thousands_of_domains(tmp_path: Path) -> None:
    from torchrec_mdr.prepare import prepare

    path = prepare("synthetic", cache_dir=str(tmp_path), rows=5000, num_domains=10_000, num_auxiliary_domains=50)
    loader = DomainLoader(path, Schema.load(path), "train", DIVISIONS, 1000)
    for batch in loader.batches(0):
        ids = batch.domains.ids.tolist()
        assert ids == sorted(ids)


@pytest.mark.parametrize("shuffle_rows", [200, 5000])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_rows_place_is_the_same_in_every_epoch(folder: Folder, shuffle_rows: int, world_size: int) -> None:
    for rank in range(world_size):
        loader = load(folder, rank=rank, world_size=world_size, shuffle_rows=shuffle_rows)
        found = []
        for epoch in (0, 1):
            row_at: dict[int, int] = {}
            for batch in loader.batches(epoch):
                assert batch.row_positions is not None
                row_at |= dict(zip(batch.row_positions.tolist(), rows(batch), strict=True))
            found.append(row_at)
        assert found[0] == found[1] and sorted(found[0]) == list(range(loader.num_resident_rows or 0))


def test_rows_that_are_reread_have_no_place(folder: Folder) -> None:
    loader = load(folder, shuffle_rows=200, memory_bytes=0)
    assert loader.num_resident_rows is None and next(loader.batches(0)).row_positions is None


@pytest.mark.parametrize("world_size", [1, 2])
def test_static_shapes_give_batches_and_groups_of_one_size(folder: Folder, world_size: int) -> None:
    batches = global_batches(folder, world_size, static_shapes=True)
    assert [len(batch) for batch in batches] == [64] * (ROWS // 64)
    assert len(set.union(*batches)) == 64 * (ROWS // 64), "no row comes twice"
    assert set.union(*batches) != set.union(*global_batches(folder, world_size, epoch=1, static_shapes=True))
    ours, usual = (next(load(folder, static_shapes=static).batches(0)) for static in (True, False))
    assert {len(batch.domains.groups[1].offsets) for batch in load(folder, static_shapes=True).batches(0)} == {
        usual.domains.groups[0].num_adapters * usual.domains.groups[1].num_adapters
    }
    other = ours.domains.groups[1]
    assert other.adapter_ids is not None
    sizes = torch.diff(other.offsets, prepend=other.offsets.new_zeros(1)).long()
    assert torch.equal(other.adapter_ids.repeat_interleave(sizes), other.ids), "each group is its rows' adapter's"


def test_static_shapes_want_equal_shares(folder: Folder) -> None:
    with pytest.raises(ValueError, match="the same size on each of 2 ranks"):
        load(folder, batch_size=63, world_size=2, static_shapes=True)
    with pytest.raises(ValueError, match="2000 is no batch size for that"):
        load(folder, batch_size=2000, static_shapes=True)
