from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from tests.data import own, raw
from torchrec_mdr.adapter import main as adapter_main
from torchrec_mdr.adapters.context import Route
from torchrec_mdr.data.features import FeaturePlan
from torchrec_mdr.data.features.plan import UNKNOWN
from torchrec_mdr.data.writer import split_path
from torchrec_mdr.evaluate import evaluate
from torchrec_mdr.evaluate import main as evaluate_main
from torchrec_mdr.inference import Run, Scorer, export, load_run
from torchrec_mdr.inference.run_data import TrainingRows, data_of, unknown_ids
from torchrec_mdr.inference.scoring import RunScorer, features
from torchrec_mdr.predict import main, predict
from torchrec_mdr.train import train

SHOPS = "backbone.sparse_arch.embedding_bag_collection.embedding_bags.t_shop.weight"  # the domain is a feature
SMALL: dict[str, Any] = {
    "batch_size": 256,
    "backbone_options.hidden": [8, 4],
    "stages.pretrain.epochs": 1,
    "stages.adapt.epochs": 1,
    "stages.adapt.learning_rate": 0.02,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw rows in a file, whose last tenth is the test split, and a run of MLoRA on them."""
    path = tmp_path_factory.mktemp("predict")
    rows = raw.rows()
    rows.write_parquet(path / "rows.parquet")
    imported = raw.prepare([path / "rows.parquet"], path, split="time:time:0.8,0.1", exclude=["request"])
    train(imported.folder, str(path / "run"), method="mlora", **SMALL)
    return path


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return load_run(str(folder / "run"))


def metrics(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return content


def test_a_runs_test_rows_give_its_auc_again(folder: Path, run: Run) -> None:
    rows = pl.read_parquet(folder / "rows.parquet")
    test = rows[-run.schema.rows["test"] :]
    wanted = metrics(folder / "run")
    scores = predict(run, test.drop("clicked"))
    assert scores is not None and scores["reason"].null_count() == len(test)
    assert roc_auc_score(test["clicked"], scores["score"]) == pytest.approx(wanted["test"]["auc"], abs=1e-6)
    assert log_loss(test["clicked"], scores["score"]) == pytest.approx(wanted["test"]["logloss"], abs=1e-6)
    again = evaluate(run, test)
    assert again["left_out"] == 0
    for mine, theirs in ((again["model"], wanted["test"]), (again["backbone"], wanted["test_backbone"])):
        assert mine["auc"] == pytest.approx(theirs["auc"], abs=1e-6) and mine["rows"] == theirs["rows"]
        for name, domain in theirs["domains"].items():
            assert mine["domains"][name]["auc"] == pytest.approx(domain["auc"], abs=1e-6)


def row_by_row(run: Run, plan: FeaturePlan, rows: pl.DataFrame) -> list[float | None]:
    """The oracle: each row alone; the backbone where the domain is unknown."""
    found: list[float | None] = []
    for row in rows.iter_slices(1):
        encoded = plan.encode(row)
        if encoded.errors[0] is not None:
            found.append(None)
            continue
        dense, sparse = features(encoded.columns, run.schema)
        domain = int(encoded.columns["domain_shop"][0])
        shops = run.model.get_parameter(SHOPS)
        drawn = shops.detach().clone()
        with torch.no_grad(), run.model.routed(Route.DOMAIN if domain >= 0 else Route.BASE):
            shops[UNKNOWN] = drawn.mean(0)
            logit = run.model(dense, sparse, torch.tensor([max(domain, 0)]))
            shops.copy_(drawn)
        found.append(float(torch.sigmoid(logit.double())))
    return found


# a property of any rows: their order, their number, and nothing of one in another
@pytest.mark.parametrize(("seed", "ending"), [(0, "parquet"), (1, "csv")])
def test_rows_keep_order_and_number_whatever_is_in_them(
    folder: Path, run: Run, tmp_path: Path, seed: int, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchrec_mdr.data.tables.RawTable.batches.__defaults__", (17, None), raising=False)
    rng = np.random.default_rng(seed)
    rows = raw.rows(60, seed + 5).with_columns(pl.col("price").cast(pl.String), number=pl.arange(60))
    bad, strange = rng.random(60) < 0.2, rng.random(60) < 0.3
    rows = rows.with_columns(
        pl.when(pl.Series(bad)).then(pl.lit("inf")).otherwise("price").alias("price"),
        pl.when(pl.Series(strange)).then(pl.lit("new shop")).otherwise("shop").alias("shop"),
    ).drop("clicked")
    source = tmp_path / f"rows.{ending}"
    (rows.write_parquet if ending == "parquet" else rows.write_csv)(source)
    target = tmp_path / f"scores.{ending}"
    scorer = RunScorer.__init__
    monkeypatch.setattr(RunScorer, "__init__", lambda self, run: scorer(self, run, batch_size=7))
    assert main([f"--run={folder / 'run'}", "--input", str(source), f"--output={target}", "--keep", "number"]) == 0
    scores = pl.read_parquet(target) if ending == "parquet" else pl.read_csv(target)
    assert scores.columns == ["number", "score", "unknown_domain", "reason"]
    assert scores["number"].to_list() == list(range(60))
    wanted = row_by_row(run, FeaturePlan.load(run.folder), rows)
    assert [score is None for score in scores["score"]] == bad.tolist() == [score is None for score in wanted]
    for mine, other in zip(scores["score"], wanted, strict=True):
        assert mine == other or mine == pytest.approx(other, abs=1e-6)
    assert [name == "shop" for name in scores["unknown_domain"]] == strange.tolist()
    assert all(
        ("'price': 'inf' is no finite number" in (reason or "")) == b
        for reason, b in zip(scores["reason"], bad, strict=True)
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([source.name, target.name])


def test_an_unknown_domain_scores_bitwise_as_the_backbone(run: Run) -> None:
    rows = raw.rows(50, 9).with_columns(shop=pl.lit("new shop"))
    encoded = FeaturePlan.load(run.folder).encode(rows)
    strange, base = RunScorer(run)(encoded), RunScorer(run)(encoded, Route.BASE)
    assert np.array_equal(strange.logits, base.logits) and strange.unknown.to_list() == ["shop"] * 50
    known = FeaturePlan.load(run.folder).encode(raw.rows(50, 9))
    assert not np.array_equal(RunScorer(run)(known).logits, strange.logits)


def test_a_path_may_be_one_of_pathlib(run: Run, tmp_path: Path) -> None:
    raw.rows(40).write_parquet(tmp_path / "rows.parquet")
    wanted = predict(run, str(tmp_path / "rows.parquet"))
    assert wanted is not None and wanted.equals(predict(run, tmp_path / "rows.parquet"))
    with pytest.raises(ValueError, match="the table is no frame that can be read: .*; give a polars or pandas frame"):
        predict(run, [{"shop": "cart"}])


def test_an_option_that_is_missing_has_its_dashes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--run=somewhere", "--input", "rows.csv"]) == 2
    assert capsys.readouterr().err == "error: the following arguments are required: --output (all options: --help)\n"
    assert adapter_main(["put"]) == 2
    assert "required: file, --bundle (all options" in capsys.readouterr().err


def test_labelled_rows_that_are_bad_or_strange_are_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = raw.rows(300, 4)
    shops = rows["shop"].set(pl.arange(0, 300, eager=True) < 100, "new shop")
    clicked = rows["clicked"].cast(pl.String).set(pl.arange(0, 300, eager=True).is_in([3, 200]), "maybe")
    rows = rows.with_columns(shop=shops, clicked=clicked)
    rows.write_csv(tmp_path / "rows.csv")
    output = tmp_path / "metrics.json"
    given = [f"--run={folder / 'run'}", "--input", str(tmp_path / "rows.csv"), f"--output={output}"]
    assert evaluate_main(given) == 0
    said, found = capsys.readouterr().out, json.loads(output.read_text())
    assert "(unknown)" in said and "2 rows are left out; the first: " in said
    assert "rows.csv, row 3 (from 0): column 'clicked': 'maybe' is no label" in found["first_left_out"]
    model, backbone = found["model"]["domains"]["(unknown)"], found["backbone"]["domains"]["(unknown)"]
    assert model == backbone and model["rows"] == 99 and found["model"]["rows"] == 298
    assert evaluate_main([*given[:-1], f"--output={tmp_path / 'rows.csv'}"]) == 2
    assert "is one of the files of --input" in capsys.readouterr().err
    assert (tmp_path / "rows.csv").read_text() == rows.write_csv()


# methods without a backbone that was trained for all rows refuse, and Mix needs none
@pytest.mark.parametrize(("method", "scores"), [("star", False), ("mix", True), ("finetune", True)])
def test_a_method_without_a_backbone_says_why_a_row_has_no_score(
    folder: Path, tmp_path: Path, method: str, scores: bool
) -> None:
    train(str(folder / "made"), str(tmp_path / "run"), method=method, **SMALL)
    found = predict(str(tmp_path / "run"), pl.concat([raw.rows(10), raw.rows(10).with_columns(shop=pl.lit("new"))]))
    assert found is not None and found["score"].is_null().to_list() == [False] * 10 + [not scores] * 10
    why = f"the domain is unknown to training, and method '{method}' has no backbone"
    assert all((why in (reason or "")) != scores for reason in found["reason"][10:])


def test_rows_that_are_prepared_already_are_taken_as_they_are(folder: Path, run: Run) -> None:
    prepared = pl.read_parquet(split_path(data_of(run).folder, "test"))
    test = pl.read_parquet(folder / "rows.parquet")[-len(prepared) :]
    raw_scores, scores = predict(run, test.drop("clicked")), predict(run, prepared)
    assert raw_scores is not None and scores is not None
    assert scores["score"].to_list() == raw_scores["score"].to_list()


def test_runs_on_data_of_another_kind_take_prepared_rows(tmp_path: Path) -> None:
    own.write(tmp_path / "mine")
    result = train(str(tmp_path / "mine"), str(tmp_path / "run"), method="mlora", **SMALL)
    assert result is not None
    test = pl.read_parquet(tmp_path / "mine" / "test.parquet")
    again = evaluate(str(tmp_path / "run"), test)
    assert again["model"]["auc"] == pytest.approx(result["test"]["auc"], abs=1e-6)
    domain = next(name for name in test.columns if name.startswith("domain_"))
    some = test.with_columns(pl.when(pl.arange(len(test)) == 1).then(99).otherwise(domain).alias(domain))
    found = predict(str(tmp_path / "run"), some)
    assert found is not None and found["unknown_domain"].is_not_null().to_list() == [i == 1 for i in range(len(test))]
    with pytest.raises(ValueError, match="the run has no features.yaml that would make it from"):
        predict(str(tmp_path / "run"), raw.rows(10))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--run=nowhere"], "nowhere holds no run: it has no config.yaml"),
        (["--output=scores.txt"], r"--output scores\.txt must end with \.parquet or \.csv"),
        (["--keep", "colour"], "--keep names the column 'colour', which the rows lack; they have user_id, item"),
        (["--input", "none.csv"], "there is no file none.csv"),
        (["--input", "short.csv"], "short.csv has no column 'shop'"),
        (["--output=short.csv", "--input", "short.csv"], "--output short.csv is one of the files of --input"),
        (["--output=./rows.parquet"], "--output ./rows.parquet is one of the files of --input; name another one"),
        (["--keep", "tags"], "--keep names 'tags', which holds lists, and CSV holds none"),
    ],
)
def test_bad_input_gets_one_sentence_and_leaves_no_file(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    raw.rows(10).with_columns(tags=[["a"]]).write_parquet("rows.parquet")
    raw.rows(10).drop("shop").write_csv("short.csv")
    before = sorted(path.name for path in tmp_path.iterdir())
    common = [f"--run={folder / 'run'}", "--input", "rows.parquet", "--output=scores.csv"]
    assert main([*common, *given]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    with pytest.raises(ValueError, match=words):
        raise ValueError(said)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.fixture(scope="module")
def bundle(folder: Path, run: Run) -> str:
    export(run, str(folder / "bundle"), compiled=False)
    return str(folder / "bundle")


def test_a_bundle_scores_raw_rows_as_its_run_does(run: Run, bundle: str, tmp_path: Path) -> None:
    rows = raw.rows(60, 5).with_columns(pl.col("price").cast(pl.String), number=pl.arange(60)).drop("clicked")
    rows = rows.with_columns(
        pl.when(pl.col("number") % 7 == 0).then(pl.lit("inf")).otherwise("price").alias("price"),
        pl.when(pl.col("number") % 5 == 0).then(pl.lit("new shop")).otherwise("shop").alias("shop"),
    )
    source, target = tmp_path / "rows.parquet", tmp_path / "scores.parquet"
    rows.write_parquet(source)
    assert main([f"--bundle={bundle}", "--input", str(source), f"--output={target}", "--keep", "number"]) == 0
    mine, wanted = pl.read_parquet(target), predict(run, rows, keep=["number"])
    assert wanted is not None
    for name in ("number", "unknown_domain", "reason"):
        assert mine[name].to_list() == wanted[name].to_list()
    # an id that no training row had is the table's mean in a bundle, in a run that of an unknown domain alone
    unseen = {name: number for name, number in unknown_ids(run, TrainingRows(run))[1].items() if name != "shop"}
    encoded = FeaturePlan.load(run.folder).encode(rows).columns
    same = [all(row[name] != number for name, number in unseen.items()) for row in encoded.iter_rows(named=True)]
    strange = wanted["unknown_domain"].is_not_null() & wanted["score"].is_not_null() & pl.Series(same)
    assert sum(same) > 20 and strange.sum() > 5
    for good, one, other in zip(same, mine["score"], wanted["score"], strict=True):
        assert (one is None) == (other is None)
        assert not good or one is None or one == pytest.approx(other, abs=1e-6)


def test_a_domain_taken_out_of_a_bundle_is_said_to_be_unknown(run: Run, bundle: str, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    scorer = Scorer(str(tmp_path / "bundle"))
    rows = raw.rows(50, 9)
    name = rows["shop"][0]
    scorer.remove(str(name))
    scores, before = predict(scorer, rows), predict(Scorer(bundle), rows)
    assert scores is not None and before is not None
    gone = (rows["shop"] == name).to_list()
    assert [one == "shop" for one in scores["unknown_domain"]] == gone
    assert [one != other for one, other in zip(scores["score"], before["score"], strict=True)] == gone


def test_a_domain_that_was_put_under_a_new_name_is_scored_by_its_adapter(bundle: str, run: Run, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    rows = raw.rows(50, 9)
    name = str(rows["shop"][0])
    scorer = Scorer(str(tmp_path / "bundle"))
    copied = scorer.store.load("shop", name, 1)
    scorer.put(replace(copied, info=replace(copied.info, domain="new shop")))
    renamed = pl.col("shop").replace({name: "new shop"})
    after = predict(scorer, rows.with_columns(renamed))
    assert after is not None
    assert after["unknown_domain"].null_count() == after["reason"].null_count() == len(rows)
    mine = (rows["shop"] == name).to_numpy()
    dense, sparse = features(FeaturePlan.load(bundle).encode(rows.with_columns(renamed)).columns, run.schema)
    wanted = scorer.score(dense, sparse, ["new shop"] * 50).probabilities.numpy()
    assert (after["score"].to_numpy() == wanted).tolist() == mine.tolist()
    scorer.remove("new shop")
    gone = predict(scorer, rows.with_columns(renamed))
    assert gone is not None and gone["unknown_domain"].is_not_null().to_list() == mine.tolist()
    assert (gone["score"] == after["score"]).to_list() == (~mine).tolist()
