"""Prepared data and raw tables in an object store: the same as on disk, byte for byte."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
import torch

from tests.data import raw, tiny
from tests.data.test_tables import ROWS, WRITERS, read
from tests.storage.server import BUCKET, environment, s3_server
from torchrec_mdr import prepare as command
from torchrec_mdr import train
from torchrec_mdr.data.datasets.synthetic import Synthetic
from torchrec_mdr.data.importing.options import ImportOptions
from torchrec_mdr.data.importing.prepare import import_rows
from torchrec_mdr.data.loader import DomainLoader
from torchrec_mdr.data.record_batches import RecordBatches
from torchrec_mdr.data.schema import SPLITS, Schema
from torchrec_mdr.data.tables import open_table
from torchrec_mdr.data.writer import write_batches
from torchrec_mdr.prepare import prepare
from torchrec_mdr.storage import (
    borrowed_copy,
    exclusive,
    files_below,
    mutex,
    put_folder,
    read_bytes,
    remove,
    scratch_folder,
    write_bytes,
    write_text,
)
from torchrec_mdr.storage.handlers import FsspecHandler


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket, for this process alone."""
    monkeypatch.setenv("MDR_STORE_CACHE", str(tmp_path / "node"))
    return f"memory://{uuid.uuid4().hex}"


def batches(folder: str, epochs: int = 2, **options: Any) -> list[tuple[torch.Tensor, ...]]:
    schema = Schema.load(folder)
    names = [division.name for division in schema.divisions]
    loader = DomainLoader(folder, schema, "train", names, 100, seed=3, shuffle=True, **options)
    return [
        (batch.labels, batch.dense_features, batch.sparse_features.values(), batch.domains.ids)
        for epoch in range(epochs)
        for batch in loader.batches(epoch)
    ]


def same(ours: list[tuple[torch.Tensor, ...]], others: list[tuple[torch.Tensor, ...]]) -> bool:
    pairs = zip(ours, others, strict=True)
    return all(torch.equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))


def contents(folder: str | Path) -> dict[str, bytes]:
    return {name: read_bytes(f"{folder}/{name}") for name in files_below(str(folder))}


def on_node(tmp_path: Path) -> int:
    """Bytes that the node's cache takes on the disk, of files of some size."""
    files = [path.stat() for path in (tmp_path / "node").rglob("*") if path.is_file()]
    return sum(512 * found.st_blocks for found in files if found.st_size > 100)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("gigabytes", ["1", "1e-6"])
@pytest.mark.parametrize(
    "options",
    [{}, {"memory_bytes": 0, "shuffle_rows": 480}, {"memory_bytes": 0, "domains": [1, 2], "rank": 1, "world_size": 2}],
)
def test_a_loader_reads_the_same_rows(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], gigabytes: str, parts: int
) -> None:
    folder, _ = tiny.write(tmp_path / "data", tiny.columns(2400), multi_hot=False, parts=parts, row_group_size=50)
    put_folder(folder, store, last="schema.json")
    monkeypatch.setenv("MDR_STORE_CACHE_GB", gigabytes)
    assert same(batches(store, **options), batches(folder, **options))
    assert (on_node(tmp_path) > 0) == (gigabytes == "1")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mdr-")]


def test_a_rank_reads_its_share_once(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = tiny.write(tmp_path / "data", tiny.columns(2400), parts=24, row_group_size=50)
    put_folder(folder, store, last="schema.json")
    asked: list[tuple[str, int, int]] = []
    plain = FsspecHandler.read_range
    monkeypatch.setattr(FsspecHandler, "read_range", lambda self, *place: (asked.append(place), plain(self, *place))[1])
    for _ in range(2):
        batches(store, rank=1, world_size=24, memory_bytes=0)
    rows = [place for place in asked if place[1] == 4]  # row groups start behind four magic bytes, footers do not
    assert {path for path, *_ in rows} == {f"{store}/train/part-00001.parquet"}
    assert max(Counter(place for place in asked if place in rows).values()) == 1


def test_arrow_files_in_a_store(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = tiny.write(tmp_path / "data", tiny.columns(240))
    table = pl.read_parquet(f"{folder}/train.parquet").to_arrow()
    os.remove(f"{folder}/train.parquet")
    write_batches(folder, "train", table.cast(pa.schema(table.schema)).to_batches())
    put_folder(folder, store, last="schema.json")
    monkeypatch.setenv("MDR_STORE_CACHE_GB", "1e-6")
    without_room = batches(store)
    monkeypatch.setenv("MDR_STORE_CACHE_GB", "1")
    assert same(without_room, batches(folder)) and same(batches(store), batches(folder))


def test_what_fails_in_the_background_is_said_where_it_is_read(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = tiny.write(tmp_path / "data", tiny.columns(2400), parts=3, row_group_size=50)
    put_folder(folder, store, last="schema.json")
    plain = FsspecHandler.read_range

    def fails(self: FsspecHandler, path: str, start: int, stop: int) -> bytes:
        if start == 4 and "00002" in path:
            raise PermissionError(13, "access denied (Forbidden); check the credentials")
        return plain(self, path, start, stop)

    with monkeypatch.context() as patch:
        patch.setattr(FsspecHandler, "read_range", fails)
        with pytest.raises(ValueError, match=f"^{store}/train/part-00002.parquet cannot be read: access denied"):
            batches(store, memory_bytes=0)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mdr-")]
    schema = Schema.load(store)
    loader = DomainLoader(store, schema, "train", [schema.divisions[0].name], 100, shuffle=True, memory_bytes=0)
    write_bytes(f"{store}/train/part-00002.parquet", read_bytes(f"{store}/train/part-00002.parquet"))
    with pytest.raises(ValueError, match=r"part-00002.parquet was replaced while it was read; start again"):
        list(loader.batches(0))


def test_a_batch_taken_early_ends_the_threads(store: str, tmp_path: Path) -> None:
    folder, _ = tiny.write(tmp_path / "data", tiny.columns(2400), row_group_size=50)
    put_folder(folder, store, last="schema.json")
    schema = Schema.load(store)
    loader = DomainLoader(
        store, schema, "train", [schema.divisions[0].name], 100, shuffle=True, memory_bytes=0, shuffle_rows=480
    )
    taken = loader.batches(0)
    next(taken)
    taken.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mdr-")]


@pytest.mark.parametrize("name", WRITERS)
def test_raw_files_of_each_kind(store: str, tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    write_bytes(f"{store}/{name}", (tmp_path / name).read_bytes())
    assert read(f"{store}/{name}").equals(read(tmp_path / name))
    damaged = (tmp_path / name).read_bytes()[:-15] + b'\n"\xff,\xff,'
    (tmp_path / name).write_bytes(damaged)
    write_bytes(f"{store}/{name}", damaged)
    with pytest.raises(ValueError) as plain:
        read(tmp_path / name)
    with pytest.raises(ValueError, match=f"^{store}/{name} (cannot be read: |is not in UTF-8)") as ours:
        read(f"{store}/{name}")
    assert ("not in UTF-8" in str(ours.value)) == (not name.endswith((".gz", ".parquet")))
    said, there = str(ours.value).replace(f"{store}/{name}", "FILE"), str(plain.value)
    assert said.split(":")[-1] == there.replace(str(tmp_path / name), "FILE").split(":")[-1]


def test_folders_and_globs_in_a_store_are_those_on_disk(store: str, tmp_path: Path) -> None:
    local = tmp_path / "raw"
    for day in (2, 1):
        for name in ("a.parquet", "deep/b.parquet", ".hidden/c.parquet", "_d.parquet"):
            path = local / "rows" / f"day={day}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            ROWS.with_columns(pl.lit(name).alias("file")).write_parquet(path)
    (local / "rows" / "_SUCCESS").touch()
    put_folder(str(local), store, last="")
    for pattern in ("rows", "rows/", "rows/d*", "rows/*/*.parquet", "**/*.parquet", "rows/day=[1]/?.parquet", "r*"):
        assert read(f"{store}/{pattern}").equals(read(f"{local}/{pattern}")), pattern
    assert open_table([f"{store}/rows"]).place(4) == f"{store}/rows/day=1/deep/b.parquet, row 1 (from 0)"
    for pattern, said in (("rows/*.csv", "there is no file"), ("nothing", "there is no file")):
        with pytest.raises(ValueError, match=f"--input: {said} {store}"):
            open_table([f"{store}/{pattern}"])


def test_raw_files_may_be_more_than_the_cache_holds(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = raw.rows(4000)
    for part in range(4):
        rows.slice(1000 * part, 1000).write_parquet(tmp_path / f"{part}.parquet")
        write_bytes(f"{store}/{part}.parquet", (tmp_path / f"{part}.parquet").read_bytes())
    most = (tmp_path / "0.parquet").stat().st_size * 2.5
    monkeypatch.setenv("MDR_STORE_CACHE_GB", str(most / 1e9))
    table = open_table([store])
    assert table.count() == 4000 and not on_node(tmp_path), "their ends say that"
    assert pl.concat(list(table.batches())).equals(rows)
    assert on_node(tmp_path) <= most


def own_rows(folder: str, output: str) -> str:
    options = ImportOptions(input=[f"{folder}/*.parquet"], label="clicked", domain="shop", report=True)
    return import_rows(options, output, progress=False).folder


def test_own_rows_from_store_to_store(store: str, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    raw.rows().write_parquet(tmp_path / "raw" / "a.parquet")
    put_folder(str(tmp_path / "raw"), f"{store}/raw", last="")
    before = contents(f"{store}/raw")
    assert own_rows(f"{store}/raw", f"{store}/made/") == f"{store}/made"
    own_rows(str(tmp_path / "raw"), str(tmp_path / "made"))
    ours, plain = contents(f"{store}/made"), contents(tmp_path / "made")
    schema = ours.pop("schema.json").decode().replace(store, str(tmp_path))
    assert schema == plain.pop("schema.json").decode() and ours == plain
    assert not [path for path in (tmp_path / "node").iterdir() if path.name.startswith("scratch")]
    with pytest.raises(ValueError, match=f"the output folder {store}/made is in use; name a new or empty one"):
        own_rows(f"{store}/raw", f"{store}/made")
    with pytest.raises(ValueError, match=f"the output folder {store}/raw is in use"):  # no schema.json, but not ours
        own_rows(f"{store}/raw", f"{store}/raw")
    assert contents(f"{store}/raw") == before


def test_what_a_killed_upload_left_is_cleaned(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    output, small = f"{store}/data", {"rows": 200, "num_domains": 2}
    put = FsspecHandler._open

    def killed(self: FsspecHandler, path: str, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if path.endswith("validation.parquet"):
            raise OSError(5, "the store fails")
        return put(self, path, mode, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(FsspecHandler, "_open", killed)
        with pytest.raises(ValueError, match=f"{output}/validation.parquet cannot be written: the store fails"):
            prepare("synthetic", output=output, **small)
    assert "schema.json" not in files_below(output) and "train.parquet" in files_below(output)
    write_text(f"{output}/old", "of the killed one")
    monkeypatch.setattr(mutex, "BEAT_SECONDS", 0.2)
    with exclusive(f"{output}/.lock"), pytest.raises(ValueError, match="is being written by another process"):
        prepare("synthetic", output=output, **small)
    prepare("synthetic", output=output, **small)
    assert files_below(output) == ["schema.json", "test.parquet", "train.parquet", "validation.parquet"]


def test_the_cache_of_prepared_data(
    store: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MDR_CACHE", f"{store}/cache")
    written: list[str] = []
    write = Synthetic.write
    monkeypatch.setattr(Synthetic, "write", lambda self, folder: (written.append(folder), write(self, folder))[1])

    def made() -> str:
        return prepare("synthetic", rows=500, num_domains=2)

    with ThreadPoolExecutor(3) as pool:
        folders = {future.result() for future in [pool.submit(made) for _ in range(3)]}
    assert len(folders) == 1 and len(written) == 1
    folder = folders.pop()
    assert folder.startswith(f"{store}/cache/synthetic-scenario-")
    remove(f"{folder}/test.parquet")
    with caplog.at_level(logging.WARNING):
        assert made() == folder and len(written) == 2
    assert caplog.text.count("has lost its split 'test', and is prepared anew") == 1
    assert len(contents(folder)) == 4


def test_record_batches_stay_on_this_machine(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MDR_CACHE", f"{store}/cache")
    folder, schema = tiny.write(tmp_path / "data", tiny.columns(240))
    rows = pa.Table.from_batches(pl.read_parquet(f"{folder}/train.parquet").to_arrow().to_batches())
    with RecordBatches(schema, {split: rows.to_batches() for split in SPLITS}) as data:
        assert same(batches(data.folder), batches(folder)) and data.folder.startswith(str(tmp_path / "node"))
    assert not os.path.exists(data.folder) and not files_below(store)


def test_scratch_is_not_of_the_cache(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MDR_STORE_CACHE_GB", "1e-5")
    write_bytes(f"{store}/a", bytes(5000))
    with scratch_folder() as scratch:
        Path(scratch, "large").write_bytes(bytes(100_000))
        with borrowed_copy(f"{store}/a") as copy:
            assert os.path.getsize(copy) == 5000
        assert os.path.exists(f"{scratch}/large")
    left = tmp_path / "node" / "scratch-of-a-killed-process"
    left.mkdir()
    with scratch_folder():
        assert not left.exists()


def test_access_denied_is_said_before_anything_is_made(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def denied(self: FsspecHandler, path: str, *rest: Any, **more: Any) -> Any:
        raise PermissionError(13, "access denied (Forbidden); check the credentials")

    monkeypatch.setattr(Synthetic, "write", lambda self, folder: pytest.fail("prepared"))
    for name in ("_type", "find", "_open", "create"):
        monkeypatch.setattr(FsspecHandler, name, denied)
    assert command.main(["--dataset=synthetic", f"--output={store}/data"]) == 2
    monkeypatch.setenv("MDR_CACHE", f"{store}/cache")
    assert command.main(["--dataset=synthetic"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 2 and all(line.startswith(f"error: {store}/") and "access denied" in line for line in said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dataset=synthetic", "--output=nowhere://b/x"], "nowhere:// is no kind of path that is known"),
        (["--dataset=synthetic", "--output=memory://"], "memory:// names no bucket"),
        (["--input=memory://nobody/x", "--output={out}"], "--input: there is no file memory://nobody/x"),
        (["--dataset=movielens-1m", "--data_dir=memory://nobody"], "the file memory://nobody/ratings.dat is missing"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    given = [argument.format(out=tmp_path / "out") for argument in arguments]
    extra = ["--label=clicked", "--domain=shop"] if "--input" in given[0] else []
    assert command.main([*given, *extra]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and said in error[0] and not (tmp_path / "out").exists()


def test_a_real_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MDR_STORE_CACHE", str(tmp_path / "node"))
    with s3_server() as settings:
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        (tmp_path / "raw").mkdir()
        raw.rows().write_parquet(tmp_path / "raw" / "a.parquet")
        base = f"s3://{BUCKET}/{uuid.uuid4().hex}"
        put_folder(str(tmp_path / "raw"), f"{base}/raw", last="")
        own_rows(f"{base}/raw", f"{base}/made")
        own_rows(str(tmp_path / "raw"), str(tmp_path / "made"))
        ours, plain = contents(f"{base}/made"), contents(tmp_path / "made")
        assert {**ours, "schema.json": b""} == {**plain, "schema.json": b""}
        assert same(batches(f"{base}/made", 1, memory_bytes=0), batches(str(tmp_path / "made"), 1, memory_bytes=0))
        capsys.readouterr()
        assert command.main(["--dataset=synthetic", "--output=s3://nobody-has-it/x"]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert said == ["error: s3://nobody-has-it/x cannot be read: there is no such file, folder or bucket"]
        assert train.main(["--dataset=s3://nobody-has-it/x/", f"--output_dir={tmp_path}/run"]) == 2
        assert "is no prepared data set: there is no bucket s3://nobody-has-it" in capsys.readouterr().err
        assert train.main([f"--dataset=s3://{BUCKET}/x/", f"--output_dir={tmp_path}/run"]) == 2
        assert f"s3://{BUCKET}/x is no prepared data set: it has no schema.json" in capsys.readouterr().err


@pytest.mark.full
def test_two_processes_prepare_once(tmp_path: Path) -> None:
    code = (
        "import logging; logging.basicConfig(level=logging.INFO)\n"
        "from torchrec_mdr.data.datasets.synthetic import Synthetic\n"
        "write = Synthetic.write\n"
        "Synthetic.write = lambda self, folder: (print('prepared'), write(self, folder))[1]\n"
        "from torchrec_mdr.prepare import prepare\n"
        "print(prepare('synthetic', rows=50_000, num_domains=4))\n"
    )
    with s3_server() as settings:
        runs = []
        for node in range(2):
            own = {"MDR_CACHE": f"s3://{BUCKET}/cache", "MDR_STORE_CACHE": str(tmp_path / str(node))}
            runs.append(
                subprocess.Popen(
                    [sys.executable, "-c", code], env={**environment(settings), **own}, stdout=-1, stderr=-1, text=True
                )
            )
        said = [run.communicate(timeout=600) for run in runs]
        assert [run.returncode for run in runs] == [0, 0], said
        lines = [out.splitlines() for out, _ in said]
        assert lines[0][-1] == lines[1][-1] and sum("prepared" in out for out in lines) == 1, said
