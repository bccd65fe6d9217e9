"""Bundles, adapters and scores in an object store: the same as on disk, whole or not there, and never lost."""

from __future__ import annotations

import io
import itertools
import logging
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from tests.inference.models import rows_for
from tests.inference.runs import finished, other_adapters
from tests.storage.proxy import proxy
from tests.storage.runs import forget_stores
from tests.storage.server import BUCKET, environment, s3_server
from torchrec_mdr import adapter, evaluate, merge, plan, predict, prepare, train, verify
from torchrec_mdr import export as command
from torchrec_mdr.inference import Run, Scorer, export, read_adapter
from torchrec_mdr.inference import scorer as scorer_module
from torchrec_mdr.inference.score_file import ScoreFile
from torchrec_mdr.inference.store import AdapterStore
from torchrec_mdr.storage import (
    exists,
    local_copy,
    ls,
    read_bytes,
    read_json,
    remove,
    replace,
    stamp,
    write_bytes,
    write_json,
    write_text,
)
from torchrec_mdr.storage import files as files_module
from torchrec_mdr.storage.handlers import FsspecHandler
from torchrec_mdr.storage.paths import handler


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket, for this process alone."""
    monkeypatch.setenv("MDR_STORE_CACHE", str(tmp_path / "node"))
    return f"memory://{uuid.uuid4().hex}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finished(tmp_path_factory.mktemp("runs") / "run", "mlora", "--backbone=dlrm")


def scores(scorer: Scorer, run: Run) -> torch.Tensor:
    return scorer.score(*rows_for(run.model, 33)).calibrated


def test_a_bundle_serves_from_a_store(run: Run, store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, local = f"{store}/bundle", str(tmp_path / "bundle")
    for folder in (bundle, local):
        assert command.main([f"--run={run.folder}", f"--output={folder}/", "--eager", "--calibrate"]) == 0
    assert sorted([*ls(bundle)]) == sorted(path.name for path in Path(local).iterdir())
    theirs, ours = Scorer(bundle), Scorer(local)
    assert torch.equal(scores(theirs, run), scores(ours, run))
    file = f"{store}/cart.safetensors"
    write_bytes(file, other_adapters(run, 5)[1].to_bytes())
    assert adapter.main(["put", file, f"--bundle={bundle}"]) == 0
    assert ours.put(file) == 2
    before = AdapterStore(bundle).load("scenario", "cart", 1)
    theirs.refresh()
    assert torch.equal(scores(theirs, run), scores(ours, run)) and theirs.list() == ours.list()
    for arguments in (["rollback", "cart"], ["pin", "home"], ["remove", "search"]):
        for folder in (bundle, local):
            assert adapter.main([*arguments, f"--bundle={folder}"]) == 0
    theirs.refresh()
    assert torch.equal(scores(theirs, run), scores(ours, run)) and theirs.list() == ours.list()
    assert before.info == AdapterStore(bundle).load("scenario", "cart", 1).info
    assert adapter.main(["verify", f"--bundle={bundle}"]) == 0
    content = bytearray(read_bytes(f"{bundle}/backbone.safetensors"))
    content[-1] ^= 1
    write_bytes(f"{bundle}/backbone.safetensors", bytes(content))
    capsys.readouterr()
    assert adapter.main(["verify", f"--bundle={bundle}"]) == 2
    assert f"error: {bundle}/backbone.safetensors is not what was exported" in capsys.readouterr().err


def test_a_store_that_knows_the_least_serves_too(run: Run, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stamp", "size", "create", "replace", "read_range", "find"):  # what a handler of one's own may lack
        monkeypatch.delattr(FsspecHandler, name)
    monkeypatch.setattr(scorer_module, "WATCH_SECONDS", 0.0)
    bundle = f"{store}/bundle"
    export(run, bundle, compiled=False)
    scorer = Scorer(bundle)
    before = scores(scorer, run)
    assert AdapterStore(bundle).put(other_adapters(run, 5)[0]) == 2
    assert not torch.equal(scores(scorer, run), before)
    assert scorer.rollback("home") == 1
    assert torch.equal(scores(scorer, run), before)


def test_half_a_bundle_does_not_count_and_is_cleaned(
    run: Run, store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, given = f"{store}/bundle", [f"--run={run.folder}", "--eager"]
    with monkeypatch.context() as patched:
        put = files_module.put_file

        def fails(local: str, path: str) -> None:
            if path.endswith("schema.json"):
                raise ValueError(f"{path} cannot be written: the store fails")
            put(local, path)

        patched.setattr(files_module, "put_file", fails)
        assert command.main([*given, f"--output={bundle}"]) == 2
    assert f"error: {bundle}/schema.json cannot be written" in capsys.readouterr().err
    assert "backbone.safetensors" in ls(bundle) and ".lock" not in ls(bundle)
    write_text(f"{bundle}/adapters/scenario/old/000007.safetensors", "left by another export")
    with pytest.raises(ValueError, match=f"^{bundle} holds a half-written bundle: manifest.json comes last"):
        Scorer(bundle)
    assert command.main([*given, f"--output={bundle}"]) == 0
    assert ls(f"{bundle}/adapters/scenario") == ["cart", "home", "search"]
    Scorer(bundle)
    # what is no half of a bundle is left alone
    write_text(f"{store}/mine/notes.txt", "notes")
    for folder in (bundle, f"{store}/mine"):
        assert command.main([*given, f"--output={folder}"]) == 2
        assert f"error: the bundle's folder {folder} is in use" in capsys.readouterr().err
    with ThreadPoolExecutor(1) as pool:
        write_text(f"{store}/new/.lock", "another machine's")
        answer, beat = pool.submit(command.main, [*given, f"--output={store}/new"]), 0
        while not answer.done():
            write_text(f"{store}/new/.lock", f"another machine's, beat {(beat := beat + 1)}")
            time.sleep(0.05)
    assert answer.result() == 2
    assert f"error: another process writes to the bundle's folder {store}/new" in capsys.readouterr().err


def test_the_watch_asks_one_head_a_second(run: Run, store: str, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    bundle = f"{store}/bundle"
    export(run, bundle, compiled=False)
    monkeypatch.setattr(scorer_module, "WATCH_SECONDS", 0.3)
    scorer = Scorer(bundle)
    first = scores(scorer, run)
    asked: list[float] = []
    info = MemoryFileSystem.info
    with monkeypatch.context() as patched:
        patched.setattr(
            MemoryFileSystem, "info", lambda self, path: (asked.append(time.monotonic()), info(self, path))[1]
        )
        patched.setattr(MemoryFileSystem, "_open", lambda *given, **rest: pytest.fail("nothing has changed"))
        with ThreadPoolExecutor(3) as pool:
            while len(asked) < 3:
                list(pool.map(lambda _: scores(scorer, run), range(6)))
    assert all(later - sooner >= 0.3 for sooner, later in itertools.pairwise(asked))
    AdapterStore(bundle).put(other_adapters(run, 5)[0])
    time.sleep(0.3)
    changed = scores(scorer, run)
    assert not torch.equal(changed, first) and scorer.list()[0]["version"] == 2
    # a store that fails costs no answer
    AdapterStore(bundle).rollback("scenario", "home")

    def fails(*given: Any, **rest: Any) -> Any:
        raise OSError(5, "unplugged")

    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr(MemoryFileSystem, "info", fails)
        time.sleep(0.3)
        assert torch.equal(scores(scorer, run), changed)
    assert "scores go on by what served last" in caplog.text and bundle in caplog.text
    time.sleep(0.3)
    assert torch.equal(scores(scorer, run), first)


def test_a_version_is_never_written_over(run: Run, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = f"{store}/bundle"
    export(run, bundle, compiled=False, resident=1)
    store_of = AdapterStore(bundle)
    another = store_of.path("scenario", "home", 2)
    write_bytes(another, b"what a process put whose lock had run out")
    with monkeypatch.context() as patched:
        patched.setattr(store_of, "_next", lambda *given: 2)  # which it was a moment ago
        assert store_of.put(other_adapters(run, 5)[0]) == 3
    assert read_bytes(another) == b"what a process put whose lock had run out"
    # one that stood still for too long changes nothing
    write = AdapterStore._write_version
    with monkeypatch.context() as patched:

        def slow(self: AdapterStore, *given: Any) -> bool:
            write_text(f"{bundle}/.lock", "another's by now")
            return write(self, *given)

        patched.setattr(AdapterStore, "_write_version", slow)
        with pytest.raises(ValueError, match=f"^the lock {bundle}/.lock has become another process's"):
            store_of.put(other_adapters(run, 6)[0])
    remove(f"{bundle}/.lock")
    # nor does one whose lock another took, used and gave back unseen
    path = f"{bundle}/current.json"
    others = read_json(path) | {"generation": 70}
    with monkeypatch.context() as patched:

        def meanwhile(self: AdapterStore, *given: Any) -> bool:
            write_json(path, others)
            return write(self, *given)

        patched.setattr(AdapterStore, "_write_version", meanwhile)
        with pytest.raises(ValueError, match=f"^{path} has been changed by another process; do it again"):
            store_of.put(other_adapters(run, 6)[0])
    assert read_json(path) == others
    assert store_of.current().serving["scenario"]["home"].version == 3
    assert store_of.put(other_adapters(run, 7)[1]) == 2
    # adapters come into memory as they are used, one at a time here
    whole = Scorer(bundle, False)
    other = f"{store}/all"
    export(run, other, compiled=False)
    for own in (other_adapters(run, 5)[0], other_adapters(run, 7)[1]):
        AdapterStore(other).put(own)
    torch.testing.assert_close(scores(whole, run), scores(Scorer(other), run), rtol=1e-6, atol=1e-6)
    assert whole.resident() == 1


@pytest.mark.parametrize("ending", [".parquet", ".csv"])
def test_a_file_of_scores_is_there_whole_or_not(run: Run, store: str, tmp_path: Path, ending: str) -> None:
    rows = str(Path(run.folder, "data", "test.parquet"))
    path, local = f"{store}/scores{ending}", str(tmp_path / f"scores{ending}")
    for output in (path, local):
        assert predict.main([f"--run={run.folder}", "--input", rows, f"--output={output}", "--keep", "a"]) == 0
    assert read_bytes(path) == Path(local).read_bytes() and ls(store) == [f"scores{ending}"]
    with pytest.raises(RuntimeError), ScoreFile(local) as file:
        file.write(pl.DataFrame({"score": [0.5]}))
        raise RuntimeError("midway")
    assert read_bytes(path) == Path(local).read_bytes() and not exists(f"{local}.writing")
    written = f"{store}/metrics.json"
    assert evaluate.main([f"--run={run.folder}", "--input", rows, f"--output={written}"]) == 0
    assert set(read_json(written)) >= {"model", "backbone"}


def test_what_goes_wrong_is_one_sentence(
    run: Run, store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = str(Path(run.folder, "data", "test.parquet"))
    nothing = f"{store}/nothing"
    for main, arguments, words in (
        (adapter.main, ["list", f"--bundle={nothing}"], f"{nothing} holds no bundle: it has no manifest.json"),
        (command.main, ["--again", f"--output={nothing}"], f"{nothing} holds no bundle"),
        (predict.main, [f"--bundle={nothing}", "--input", rows, f"--output={store}/s.csv"], f"{nothing} holds no b"),
        (predict.main, [f"--run={nothing}", "--input", rows, f"--output={store}/s.csv"], f"{nothing} holds no run"),
        (merge.main, [f"--run={run.folder}", "--domain=cart", "--output=ftb://x/y"], "ftb:// is no kind of path"),
        (adapter.main, ["put", f"{nothing}.st", f"--bundle={nothing}"], f"{nothing}.st cannot be read"),
    ):
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {words}") and said.count("\n") == 1

    def denied(*given: Any, **rest: Any) -> Any:
        raise PermissionError(13, "Access Denied")

    bundle = f"{store}/bundle"
    export(run, bundle, compiled=False)
    write_bytes(f"{store}/cart.st", other_adapters(run, 5)[1].to_bytes())
    opened = MemoryFileSystem._open
    monkeypatch.setattr(
        MemoryFileSystem,
        "_open",
        lambda self, path, mode="rb", **rest: (denied if "r" not in mode else opened)(self, path, mode, **rest),
    )
    for main, arguments, path in (
        (adapter.main, ["put", f"{store}/cart.st", f"--bundle={bundle}"], f"{bundle}/.lock"),
        (command.main, [f"--run={run.folder}", f"--output={store}/b", "--eager"], f"{store}/b/.lock"),
        (predict.main, [f"--run={run.folder}", "--input", rows, f"--output={store}/s.csv"], f"{store}/s.csv"),
        (merge.main, [f"--run={run.folder}", "--domain=cart", f"--output={store}/m.pt"], f"{store}/m.pt"),
    ):
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert said.splitlines()[-1].startswith(f"error: {path}") and "access denied" in said
    monkeypatch.setattr(MemoryFileSystem, "info", denied)
    monkeypatch.setattr(MemoryFileSystem, "_open", denied)
    assert adapter.main(["list", f"--bundle={bundle}"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {bundle}/manifest.json cannot be read: access denied")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The environment that leads to an S3 server, by which this process goes."""
    with s3_server() as settings:
        for name, value in {**settings, "MDR_STORE_CACHE": str(tmp_path / "node")}.items():
            monkeypatch.setenv(name, value)
        forget_stores()
        yield settings
        forget_stores()


def test_two_writers_of_one_file_are_told_apart(server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"s3://{BUCKET}/one"
    write_bytes(path, b"a")
    first = stamp(path) or ""
    assert replace(path, b"b", first) and not replace(path, b"c", first) and read_bytes(path) == b"b"
    second, fs = stamp(path) or "", handler(path).fs
    monkeypatch.setattr(fs, "info", lambda path, look=fs.info: (look(path), fs.pipe_file(path, b"another's"))[0])
    assert not replace(path, b"d", second) and read_bytes(path) == b"another's"


def test_a_real_server(run: Run, server: dict[str, str], tmp_path: Path) -> None:
    bundle, local, file = f"s3://{BUCKET}/bundle", str(tmp_path / "bundle"), f"s3://{BUCKET}/cart.safetensors"
    for folder in (bundle, local):
        assert command.main([f"--run={run.folder}", f"--output={folder}", "--eager"]) == 0
    theirs, ours = Scorer(bundle), Scorer(local)
    assert torch.equal(scores(theirs, run), scores(ours, run))
    first = read_bytes(f"{bundle}/adapters/scenario/cart/000001.safetensors")
    write_bytes(file, other_adapters(run, 5)[1].to_bytes())
    for folder in (bundle, local):
        assert adapter.main(["put", file, f"--bundle={folder}"]) == 0
    theirs.refresh()
    assert torch.equal(scores(theirs, run), scores(ours, run)) and theirs.list() == ours.list()
    # threads that put at once lose nothing
    one = other_adapters(run, 6)[0]
    with ThreadPoolExecutor(4) as pool:
        versions = list(pool.map(lambda _: AdapterStore(bundle).put(one), range(4)))
    assert sorted(versions) == [2, 3, 4, 5] and AdapterStore(bundle).verify() == []
    current = AdapterStore(bundle).current()
    assert current.generation == 6 and [one[0] for one in current.serving["scenario"]["home"].before] == [1, 2, 3, 4]
    assert read_bytes(f"{bundle}/adapters/scenario/cart/000001.safetensors") == first
    # a file of scores that is not finished leaves the one before
    rows, path = str(Path(run.folder, "data", "test.parquet")), f"s3://{BUCKET}/scores.parquet"
    assert predict.main([f"--bundle={bundle}", "--input", rows, f"--output={path}"]) == 0
    before = read_bytes(path)
    for output in (path, f"s3://{BUCKET}/new.parquet"):
        with pytest.raises(RuntimeError), ScoreFile(output) as made:
            made.write(pl.DataFrame({"score": [0.5]}))
            raise RuntimeError("midway")
    assert read_bytes(path) == before
    assert ls(f"s3://{BUCKET}") == ["bundle", "cart.safetensors", "scores.parquet"]
    with pytest.raises(ValueError, match=r"^s3://none/scores.csv\S* cannot be written: there is no such"):
        ScoreFile("s3://none/scores.csv")


@pytest.mark.full
def test_faults_cost_no_adapter(
    run: Run, server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(scorer_module, "WATCH_SECONDS", 0.0)
    bundle, local = f"s3://{BUCKET}/bundle", str(tmp_path / "bundle")
    with proxy(server["AWS_ENDPOINT_URL"], share=0.05, seed=7) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL", between.address)
        for folder in (bundle, local):
            export(run, folder, compiled=False)
        theirs, ours = Scorer(bundle), Scorer(local)
        for seed in range(8):
            for own in other_adapters(run, seed):
                theirs.put(own)
                ours.put(own)
            assert torch.equal(scores(theirs, run), scores(ours, run))
        assert sum(between.happened.values()) - between.happened["none"] > 5, between.happened
        assert theirs.store.current().generation == ours.store.current().generation == 25
        assert theirs.store.verify() == [] and torch.equal(scores(Scorer(bundle), run), scores(ours, run))
        # a version's number may be left out, where the answer to its writing was lost
        assert all(own["version"] >= 9 for own in theirs.list())
        between.mode = "denied"
        with pytest.raises(ValueError, match=rf"^{bundle}/\.lock cannot be \w+: access denied"):
            theirs.put(other_adapters(run, 9)[0])
        assert torch.equal(scores(theirs, run), scores(ours, run))
        assert "access denied" in caplog.text
        between.mode = None
        assert theirs.put(other_adapters(run, 9)[0]) >= 10
        ours.put(other_adapters(run, 9)[0])
        assert torch.equal(scores(theirs, run), scores(ours, run))


@pytest.mark.full
def test_from_training_to_scores_in_a_store_alone(server: dict[str, str], tmp_path: Path) -> None:
    rows = pl.DataFrame(
        {
            "shop": ["Oslo", "Rome", "Kiev"] * 400,
            "item": [number % 11 for number in range(1200)],
            "price": [number % 7 / 2 for number in range(1200)],
            "clicked": [int(number % 5 < 2) for number in range(1200)],
        }
    )
    content = io.BytesIO()
    rows.write_parquet(content)
    for place in (f"s3://{BUCKET}/all", str(tmp_path)):
        write_bytes(f"{place}/rows.parquet", content.getvalue())
        given = ["--input", f"{place}/rows.parquet"]
        about = ["--label=clicked", "--domain=shop", f"--output={place}/data"]
        assert prepare.main([*given, *about]) == 0
        short = ["--stages.pretrain.epochs=1", "--stages.adapt.epochs=1", "--batch_size=128"]
        assert train.main([f"--dataset={place}/data/", f"--output_dir={place}/run", "--method=mlora", *short]) == 0
        made = [f"--run={place}/run", f"--output={place}/bundle", "--calibrate"]
        if place.startswith("s3://"):  # compiled in the store
            assert command.main([*made, "--eager"]) == command.main(["--again", f"--output={place}/bundle"]) == 0
        else:
            assert command.main(made) == 0
        assert adapter.main(["export", f"--run={place}/run", "--domain=Rome", f"--output={place}/rome.st"]) == 0
        assert adapter.main(["put", f"{place}/rome.st", f"--bundle={place}/bundle"]) == 0
        for source in ("run", "bundle"):
            kind = "--bundle" if source == "bundle" else "--run"
            assert predict.main([f"{kind}={place}/{source}", *given, f"--output={place}/{source}.csv"]) == 0
        assert evaluate.main([f"--run={place}/run", *given, f"--output={place}/metrics.json"]) == 0
        assert merge.main([f"--run={place}/run", "--domain=Rome", f"--output={place}/rome.pt"]) == 0
        assert plan.main([f"--dataset={place}/data/", "--gpus=1", "--device=cpu", "--method=mlora"]) == 0
        assert adapter.main(["verify", f"--bundle={place}/bundle"]) == verify.main([f"{place}/run"]) == 0
    for name in ("run.csv", "bundle.csv", "metrics.json"):
        assert read_bytes(f"s3://{BUCKET}/all/{name}") == Path(tmp_path, name).read_bytes(), name
    places = str(tmp_path), f"s3://{BUCKET}/all"
    ours, theirs = (read_adapter(f"{place}/rome.st") for place in places)
    assert ours.info == theirs.info and all(
        torch.equal(ours.tensors[name], theirs.tensors[name]) for name in ours.tensors
    )
    merged, other = (torch.load(local_copy(f"{place}/rome.pt")) for place in places)
    assert merged.keys() == other.keys() and all(torch.equal(merged[name], other[name]) for name in merged)
    assert not Path("s3:").exists()


PUTS = """
import sys
from torchrec_mdr.inference import read_adapter
from torchrec_mdr.inference.store import AdapterStore
bundle, file, count = sys.argv[1:]
for _ in range(int(count)):
    AdapterStore(bundle).put(read_adapter(file))
"""


@pytest.mark.full
def test_processes_that_put_at_once_lose_nothing(run: Run, server: dict[str, str]) -> None:
    bundle = f"s3://{BUCKET}/bundle"
    export(run, bundle, compiled=False)
    for own in other_adapters(run, 5):
        write_bytes(f"s3://{BUCKET}/{own.info.domain}.st", own.to_bytes())

    def putting(domain: str, count: int) -> subprocess.Popen[bytes]:
        command_line = [sys.executable, "-c", PUTS, bundle, f"s3://{BUCKET}/{domain}.st", str(count)]
        return subprocess.Popen(command_line, env=environment(server))

    started, victim = [putting(name, 4) for name in ("home", "home", "cart")], putting("search", 1000)
    # one that is killed while it holds the lock costs the others its lease, and nothing else
    while not (exists(f"{bundle}/adapters/scenario/search/000003.safetensors") and held_by(bundle) == victim.pid):
        assert victim.poll() is None
        time.sleep(0.02)
    victim.kill()
    victim.wait()
    assert [one.wait() for one in started] == [0, 0, 0]
    store_of = AdapterStore(bundle)
    serving = store_of.current().serving["scenario"]
    assert [serving["home"].version, serving["cart"].version] == [9, 5]
    assert len(serving["home"].before) == 8 and serving["search"].version >= 2
    assert store_of.verify() == []


def held_by(bundle: str) -> int | None:
    try:
        return int(read_json(f"{bundle}/.lock")["pid"])
    except ValueError:
        return None
