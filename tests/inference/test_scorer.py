"""Adapters come and go while a scorer runs; rows of other domains stay bitwise what they are."""

from __future__ import annotations

import copy
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import safetensors.torch
import torch
from torch import Tensor

from tests.inference.models import rows_for
from tests.inference.runs import finished, other_adapters
from torchrec_mdr.inference.adapter_file import AdapterFile, read_adapter
from torchrec_mdr.inference.bundle import Manifest
from torchrec_mdr.inference.export import export
from torchrec_mdr.inference.hand_over import all_adapters
from torchrec_mdr.inference.run import Run
from torchrec_mdr.inference.scorer import Scorer
from torchrec_mdr.inference.store import AdapterStore

HOME, CART, SEARCH = 0, 1, 2
NORMS = ["--backbone=mlp", "--backbone_options.batch_norm=true"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        "mlora": finished(folder / "mlora", "mlora", "--backbone=dlrm"),
        "multilora": finished(folder / "multilora", "multilora", *NORMS, "--auxiliary_division=gender"),
        "moe_mlora": finished(folder / "moe_mlora", "moe_mlora", "--backbone=dlrm_dcn"),
    }


@pytest.fixture(scope="module")
def exported(runs: dict[str, Run], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundles by method; that of mlora is compiled."""
    folder = tmp_path_factory.mktemp("bundles")
    for name, run in runs.items():
        export(run, str(folder / name), compiled=name == "mlora")
    return {name: folder / name for name in runs}


@pytest.fixture
def bundles(exported: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Copies, for a test to change."""
    for name, path in exported.items():
        shutil.copytree(path, tmp_path / name)
    return {name: tmp_path / name for name in exported}


FORMS = [("mlora", True), ("mlora", False), ("multilora", False), ("moe_mlora", False)]


@pytest.mark.parametrize(("method", "compiled"), FORMS)
def test_a_bundle_scores_as_its_run_does(runs: dict[str, Run], exported: dict, method: str, compiled: bool) -> None:
    scorer = Scorer(str(exported[method]), compiled)
    for num_rows in (1, 2, 33, 4096):
        dense, features, ids = rows_for(runs[method].model, num_rows)
        with torch.no_grad():
            wanted = runs[method].model(dense, features, ids).flatten()
        scores = scorer.score(dense, features, ids)
        torch.testing.assert_close(scores.logits, wanted, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(scores.probabilities, torch.sigmoid(wanted.double()), rtol=1e-6, atol=1e-6)
        assert scores.known.all() and (scores.versions == 1).all()
        names = [
            [own.domain_names[d] for own, d in zip(runs[method].divisions, row, strict=True)] for row in ids.tolist()
        ]
        assert torch.equal(scorer.score(dense, features, names).logits, scores.logits)
    assert scorer.score(dense[:0], rows_for(runs[method].model, 0)[1], ids[:0]).logits.shape == (0,)


@pytest.mark.parametrize(("method", "compiled"), FORMS)
def test_unknown_domains_are_said_and_are_the_backbones(exported: dict, method: str, compiled: bool) -> None:
    scorer = Scorer(str(exported[method]), compiled)
    dense, features, ids = rows_for(_Divisions(scorer), 33)
    nobody = scorer.score(dense, features, torch.full_like(ids, -1))
    assert not nobody.known.any()
    for unknown in (-1, 3, 10**9):
        mixed = ids.clone()
        mixed[:5] = unknown
        scores = scorer.score(dense, features, mixed)
        assert torch.equal(scores.logits[:5], nobody.logits[:5]) and not scores.known[:5].any()
        assert scores.known[5:].all() and torch.equal(scores.logits[5:], scorer.score(dense, features, ids).logits[5:])
    names = [[None] * ids.shape[1], ["elsewhere"] * ids.shape[1]] * 16 + [[None] * ids.shape[1]]
    assert torch.equal(scorer.score(dense, features, names).logits, nobody.logits)


class _Divisions:
    """What rows are drawn for."""

    def __init__(self, scorer: Scorer) -> None:
        self.divisions = scorer.manifest.divisions


@pytest.mark.parametrize(("method", "compiled"), FORMS)
def test_life_cycle(runs: dict[str, Run], bundles: dict[str, Path], method: str, compiled: bool) -> None:
    bundle = str(bundles[method])
    scorer, other = Scorer(bundle, compiled), Scorer(bundle, compiled)
    dense, features, ids = rows_for(runs[method].model, 33)
    mine = ids[:, 0] == CART

    def logits() -> Tensor:
        """Both scorers', which agree."""
        ours, theirs = scorer.score(dense, features, ids), other.score(dense, features, ids)
        assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.versions, theirs.versions)
        assert torch.equal(ours.logits[~mine], first[~mine]) if first is not None else True
        return ours.logits

    first: Tensor | None = None
    first = logits()
    second_file = other_adapters(runs[method], seed=2)[CART]
    assert scorer.put(second_file) == 2
    second = logits()
    assert not torch.isclose(first[mine], second[mine]).any()
    assert scorer.rollback("cart") == 1 and torch.equal(logits(), first)
    with pytest.raises(ValueError, match="domain 'cart' has no version before 1"):
        scorer.rollback("cart")
    assert other.put(second_file) == 3, "a version is never used twice"
    assert torch.equal(logits(), second)
    tables = [table for name, table in scorer._residents[0].tables.items() if not name.startswith("calibration")]
    scorer.remove("cart")
    scores = scorer.score(dense, features, ids)
    nobody = torch.where(mine.unsqueeze(1), torch.tensor([-1] + [0] * (ids.shape[1] - 1)), ids)
    nobody[:, 1:] = ids[:, 1:]
    assert torch.equal(scores.logits, scorer.score(dense, features, nobody).logits)
    assert (scores.versions[mine, 0] == 0).all() and torch.equal(scores.logits[~mine], first[~mine])
    used = scorer._residents[0]._now.places
    free = [place for place in range(1, len(tables[0])) if place not in used.tolist()]
    assert all(not table[free].any() for table in tables), "freed rows are zeroed"
    with pytest.raises(ValueError, match="division 'scenario' has no adapter for domain 'cart'; put one first"):
        scorer.remove("cart")
    assert scorer.put(second_file) == 4 and torch.equal(logits(), second)
    assert [own["version"] for own in scorer.list() if own["division"] == "scenario"] == [1, 1, 4]
    assert scorer.store.verify() == []


def test_a_new_domain_is_known_by_its_name(runs: dict[str, Run], bundles: dict[str, Path]) -> None:
    scorer = Scorer(str(bundles["mlora"]))
    dense, features, ids = rows_for(runs["mlora"].model, 9)
    cart = scorer.score(dense, features, ["cart"] * 9)
    copied = AdapterStore(str(bundles["mlora"])).load("scenario", "cart", 1)
    assert not scorer.score(dense, features, ["kiosk"] * 9).known.any()
    assert scorer.put(replace(copied, info=replace(copied.info, domain="kiosk"))) == 1
    assert torch.equal(scorer.score(dense, features, ["kiosk"] * 9).logits, cart.logits)
    assert not scorer.score(dense, features, torch.full((9,), 3)).known.any(), "it has a name, and no id"
    combined = AdapterStore(str(bundles["multilora"])).load("gender", "f", 1)
    with pytest.raises(ValueError, match="division 'gender' has no domain 'x', and norms of its combinations"):
        Scorer(str(bundles["multilora"]), False).put(replace(combined, info=replace(combined.info, domain="x")))


def test_what_does_not_fit_is_refused_in_one_sentence(runs: dict[str, Run], bundles: dict, tmp_path: Path) -> None:
    scorer = Scorer(str(bundles["mlora"]), False)
    before = scorer.list()
    good = AdapterStore(str(bundles["mlora"])).load("scenario", "cart", 1)
    name = next(name for name in good.tensors if name.endswith("down"))

    def refused(adapter: AdapterFile, words: str) -> None:
        path = tmp_path / "adapter.safetensors"
        path.write_bytes(adapter.to_bytes())
        with pytest.raises(ValueError, match=words) as caught:
            scorer.put(str(path))
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)

    weight = runs["mlora"].model.backbone.over_arch.model[1].weight
    with torch.no_grad():
        weight[0, 0] += 1e-3
    refused(other_adapters(runs["mlora"], seed=0)[CART], "was trained on another backbone")
    with torch.no_grad():
        weight[0, 0] -= 1e-3
    experts = copy.deepcopy(runs["moe_mlora"])
    with torch.no_grad():  # which all domains share, so that a domain's gate goes with them
        next(own for name, own in experts.model.named_parameters() if name.endswith("lora_B")).mul_(1.001)
    gates = next(iter(all_adapters(experts)))
    with pytest.raises(ValueError, match="was trained on another backbone .* experts and fusion weights, too"):
        Scorer(str(bundles["moe_mlora"])).put(gates)
    wide = {**good.tensors, name: torch.zeros(3, good.tensors[name].shape[1])}
    refused(AdapterFile(good.info, wide), r"down' is \[3, .* and has to be \[1, .*: it is of another rank or width")
    refused(AdapterFile(good.info, {**good.tensors, "more.down": torch.zeros(1)}), "adapts 'more.down', a layer that")
    fewer = {other: tensor for other, tensor in good.tensors.items() if other != name}
    refused(AdapterFile(good.info, fewer), "lacks 'backbone.* a layer that the bundle's model has adapters for")
    refused(AdapterFile(replace(good.info, method="multilora"), good.tensors), "an adapter of multilora")
    refused(AdapterFile(replace(good.info, division="age"), good.tensors), "no division 'age'; it has scenario")
    endless = {**good.tensors, name: torch.full_like(good.tensors[name], float("nan"))}
    refused(AdapterFile(good.info, endless), "holds numbers that are not finite")
    path = tmp_path / "torn.safetensors"
    for content in (b"", b"nonsense", good.to_bytes()[:-7], safetensors.torch.save({"a": torch.zeros(1)})):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no adapter file, or a damaged one"):
            scorer.put(str(path))
    assert scorer.list() == before


def test_files_are_small_and_say_what_they_are(bundles: dict[str, Path]) -> None:
    for method in ("mlora", "multilora"):
        path = next((bundles[method] / "adapters" / "scenario" / "cart").iterdir())
        adapter = read_adapter(str(path))
        tensors = sum(tensor.nbytes for tensor in adapter.tensors.values())
        assert path.stat().st_size <= tensors + 2048 + 150 * len(adapter.tensors)
        info = adapter.info
        assert (info.method, info.division, info.domain) == (method, "scenario", "cart") and info.options["rank"] != 0
        assert info.fingerprint == Manifest.load(str(bundles[method])).fingerprint
        assert info.validation == {"auc": 0.7, "logloss": 0.5, "rows": 10}
        assert info.training_rows is not None and 0 < info.training_rows < 400


def test_a_package_that_was_lost_is_missed(bundles: dict[str, Path]) -> None:
    (bundles["mlora"] / "model.pt2").unlink()
    with pytest.raises(ValueError, match="model.pt2 is missing; compile it by"):
        Scorer(str(bundles["mlora"]))
    Scorer(str(bundles["mlora"]), compiled=False), Scorer(str(bundles["multilora"]))  # which was exported without


def test_a_bounded_number_is_resident(runs: dict[str, Run], tmp_path: Path) -> None:
    run, bundle = runs["mlora"], str(tmp_path / "bundle")
    export(run, bundle, compiled=False, resident=2)
    scorer = Scorer(bundle, False)
    dense, features, ids = rows_for(run.model, 33)
    with torch.no_grad():
        wanted = run.model(dense, features, ids).flatten()
    for _ in range(2):  # three domains in one batch, two of them in memory at a time
        torch.testing.assert_close(scorer.score(dense, features, ids).logits, wanted, rtol=1e-6, atol=1e-6)
        assert scorer.resident() == 2

    def on_disk() -> list[str]:
        places = scorer._residents[0]._now.places
        return [name for number, name in enumerate(["home", "cart", "search"]) if places[number] < 0]

    for name in ("home", "cart", "home", "search"):
        scorer.score(dense, features, [name] * 33)
    assert on_disk() == ["cart"], "the one that was not used for longest"
    scorer.pin("cart")
    for name in ("home", "search", "home", "search"):
        scorer.score(dense, features, [name] * 33)
    assert on_disk() == ["home"]
    with pytest.raises(ValueError, match="3 adapters are wanted at a time, and 2 may be in memory"):
        scorer.pin("home"), scorer.pin("search")


def test_what_a_kill_leaves_is_a_whole_version(runs: dict, exported: dict, in_memory: Path, tmp_path: Path) -> None:
    files = []
    for seed in (1, 2):
        path = tmp_path / f"{seed}.safetensors"
        path.write_bytes(other_adapters(runs["mlora"], seed)[CART].to_bytes())
        files.append(str(path))
    bundle = str(shutil.copytree(exported["mlora"], in_memory / "bundle"))
    scorer = Scorer(bundle, False)
    dense, features, ids = rows_for(runs["mlora"].model, 33)
    mine = ids[:, 0] == CART
    others = scorer.score(dense, features, ids).logits[~mine]
    allowed = [scorer.score(dense, features, ids).logits]
    for path in files:
        scorer.put(path)
        allowed.append(scorer.score(dense, features, ids).logits)
    nobody = ids.clone()
    nobody[mine] = -1
    allowed.append(scorer.score(dense, features, nobody).logits)
    adapters = [read_adapter(path) for path in files]

    def change() -> NoReturn:
        """All that changes `current.json`, until it is killed."""
        try:
            while True:
                for adapter in adapters:
                    scorer.store.put(adapter)
                scorer.store.rollback("scenario", "cart")
                scorer.store.pin("scenario", "home")
                scorer.store.remove("scenario", "cart")
        finally:  # a fork of the tests must not go on with them
            os._exit(1)

    for _ in range(10):
        before, child = AdapterStore(bundle).current().generation, os.fork()
        if not child:
            change()
        while AdapterStore(bundle).current().generation < before + 10:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "it has failed by itself"
        time.sleep(random.uniform(0.0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for found in (scorer, Scorer(bundle, False)):
            logits = found.score(dense, features, ids).logits
            assert any(torch.equal(logits, one) for one in allowed) and torch.equal(logits[~mine], others)
        assert AdapterStore(bundle).verify() == []
    assert scorer.put(files[0]) > 12


@pytest.mark.parametrize(
    ("most", "compiled"),
    [(60, False), pytest.param(2000, True, marks=[pytest.mark.full, pytest.mark.timeout(1800)])],
)
def test_a_hundred_swaps_a_second_under_load(
    runs: dict, exported: dict, in_memory: Path, most: int, compiled: bool
) -> None:
    scorer = Scorer(str(shutil.copytree(exported["mlora"], in_memory / "bundle")), compiled)
    versions = [other_adapters(runs["mlora"], seed)[CART] for seed in (1, 2)]
    dense, features, ids = rows_for(runs["mlora"].model, 64)
    mine = ids[:, 0] == CART
    answers = []
    for adapter in versions:
        scorer.put(adapter)
        answers.append(scorer.score(dense, features, ids).logits)
    assert not torch.equal(*answers)
    done, wrong, counts = threading.Event(), [], [0, 0]

    def score(place: int) -> None:
        while not done.is_set():
            try:
                scores = scorer.score(dense, features, ids)
            except Exception as error:
                wrong.append(error)
                return
            if not any(torch.equal(scores.logits, answer) for answer in answers):
                wrong.append(scores)
            if len(scores.versions[mine, 0].unique()) != 1:
                wrong.append(scores.versions)
            counts[place] += 1

    threads = [threading.Thread(target=score, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    start, swaps = time.perf_counter(), 0
    while swaps < most or (min(counts) <= 5 and not wrong):  # longer than at that rate where the machine has other work
        scorer.put(versions[swaps % 2])
        swaps += 1
        time.sleep(max(0.0, start + swaps / 100 - time.perf_counter()))
    done.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert torch.equal(scorer.score(dense, features, ids).logits, answers[(swaps - 1) % 2])


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A folder that no disk is behind, where there is one: a disk takes some milliseconds a file."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
