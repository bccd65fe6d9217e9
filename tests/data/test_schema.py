"""What schema.json may say, and what a run says to the rest before it trains."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data import own
from torchrec_mdr.data.schema import Division, Schema, SparseFeature
from torchrec_mdr.train import main

Content = dict[str, Any]


def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Trains on a folder that is refused; gives the sentence."""
    out = folder.parent / "run"
    assert main([f"--dataset={folder}/", f"--output_dir={out}"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    assert not out.exists(), "the run has begun"
    return said.err


def put(*place: str | int, value: Any) -> Callable[[Content], None]:
    """Sets a field, found by keys and places in lists."""

    def change(content: Any) -> None:
        for key in place[:-1]:
            content = content[key]
        content[place[-1]] = value

    return change


def drop(*place: str | int) -> Callable[[Content], None]:
    """Takes a field out."""

    def change(content: Any) -> None:
        for key in place[:-1]:
            content = content[key]
        del content[place[-1]]

    return change


def add(field: str, value: Any) -> Callable[[Content], None]:
    return lambda content: content[field].append(value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (put("divisions", 0, "domain_names", value=[1, 2, 3]), "'shop': a domain's name must be a text that is not"),
        (put("divisions", 0, "domain_names", value=["a", "b", "a"]), "'shop': two domains are named 'a'; rename one"),
        (put("divisions", 0, "domain_names", value=["a", "b"]), "'shop' has 3 domains but 2 names; name each domain"),
        (put("divisions", 0, "domain_names", value="abc"), "'shop': the domains' names must be a list, not \"abc\""),
        (put("divisions", 0, "num_domains", value=0), "'shop': num_domains must be a whole number of at least 1"),
        (put("divisions", 1, "num_domains", value="2"), "'device': num_domains must be a whole number .*, not \"2\""),
        (put("divisions", value=[]), "divisions must list at least one division, each with name and num_domains"),
        (put("divisions", value=None), "divisions must be a list, not null"),
        (put("divisions", 0, value="shop"), r"divisions\[0\] must be an object with the fields name, num_domains, not"),
        (put("divisions", 0, "names", value=["a"]), r"divisions\[0\] has the unknown field 'names'; it may have name"),
        (drop("divisions", 0, "name"), r"divisions\[0\] lacks the field 'name'; it needs name, num_domains"),
        (add("divisions", {"name": "shop", "num_domains": 3}), "division 'shop' is listed twice in divisions; take"),
        (put("sparse_features", 1, "num_embeddings", value="12"), "'item': num_embeddings must be a .*, not \"12\""),
        (put("sparse_features", 1, "num_embeddings", value=12.0), "'item': num_embeddings must be a .*, not 12.0"),
        (put("sparse_features", 1, "num_embeddings", value=0), "'item': num_embeddings must be .* at least 1, not 0"),
        (put("sparse_features", 1, "num_embeddings", value=-3), "'item': num_embeddings must be .* at least 1, not -3"),
        (put("sparse_features", 1, "num_embeddings", value=True), "'item': num_embeddings must be .*, not true"),
        (put("sparse_features", 1, "num_embeddings", value=None), "'item': num_embeddings must be .*, not null"),
        (put("sparse_features", 1, "multi_hot", value="no"), "'item': multi_hot must be true or false, not \"no\""),
        (put("sparse_features", 1, "size", value=3), r"sparse_features\[1\] has the unknown field 'size'; it may have"),
        (put("sparse_features", 1, "name", value=7), "a sparse feature's name must be a text that is not empty, not 7"),
        (drop("sparse_features", 0, "num_embeddings"), r"sparse_features\[0\] lacks the field 'num_embeddings'"),
        (put("sparse_features", value=None), "sparse_features must be a list, not null"),
        (put("sparse_features", value={"name": "a"}), "sparse_features must be a list, not {"),
        (add("sparse_features", {"name": "user", "num_embeddings": 3}), "'user' is listed twice in sparse_features"),
        (add("dense_features", "price"), "feature 'price' is listed twice in dense_features; take one out"),
        (add("dense_features", "user"), "feature 'user' is in sparse_features and in dense_features; take it out"),
        (add("dense_features", "label"), "the label 'label' is also a feature, in dense_features; take it out there"),
        (put("label", value="item"), "the label 'item' is also a feature, in sparse_features; take it out there"),
        (put("label", value="domain_shop"), "the label 'domain_shop' is also the column of division 'shop'; rename"),
        (put("label", value=None), "label must be a text that is not empty, not null"),
        (put("dense_features", value="price"), 'dense_features must be a list, not "price"'),
        (put("dense_features", value=[3]), "a dense feature's name must be a text that is not empty, not 3"),
        (put("rows", value=1000), "rows must be an object with the fields train, validation, test, not 1000"),
        (put("rows", "test", value=200.0), "rows.test must be a whole number of at least 0, not 200.0"),
        (drop("rows", "validation"), "rows lacks the field 'validation'; it needs train, validation, test"),
        (drop("rows"), "the file lacks the field 'rows'; it needs version, dataset, label, sparse_features, "),
        (drop("version"), "the file lacks the field 'version'"),
        (put("version", value=2), "version must be 1, not 2; correct it, or prepare the data set anew"),
    ],
)
def test_what_is_wrong_in_schema_json_is_named_with_its_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Content], None], sentence: str
) -> None:
    content = own.write(tmp_path / "mine")
    change(content)
    (tmp_path / "mine" / "schema.json").write_text(json.dumps(content))
    said = run(tmp_path / "mine", capsys)
    assert f"{tmp_path}/mine/schema.json: " in said.replace("//", "/")
    pytest.raises(ValueError, Schema.load, str(tmp_path / "mine")).match(sentence)
    assert "NoneType" not in said and "Error" not in said


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{", "is not valid JSON"),
        (b"[]", "the file must be an object with the fields version, dataset, "),
        ("{'ä': 1}".encode("latin-1"), "is no text in UTF-8"),
        (None, "is no prepared data set: it has no schema.json"),
    ],
)
def test_a_file_that_is_no_schema_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, sentence: str
) -> None:
    own.write(tmp_path / "mine")
    path = tmp_path / "mine" / "schema.json"
    path.write_bytes(content) if content is not None else path.unlink()
    assert sentence in run(tmp_path / "mine", capsys)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_split_without_rows_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], split: str
) -> None:
    content = own.write(tmp_path / "mine")
    content["rows"][split] = 0
    (tmp_path / "mine" / "schema.json").write_text(json.dumps(content))
    assert f"split '{split}' has no rows, and training needs some in each of train," in run(tmp_path / "mine", capsys)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_files_that_are_not_the_schemas_are_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], split: str
) -> None:
    content = own.write(tmp_path / "mine")
    schema = tmp_path / "mine" / "schema.json"
    schema.write_text(json.dumps(content | {"dense_features": ["price", "weight"]}))
    assert "train.parquet has no column 'weight', which schema.json names; correct it" in run(tmp_path / "mine", capsys)
    content["rows"] = dict(content["rows"], **{split: 77})
    schema.write_text(json.dumps(content))
    assert f"{split}.parquet: the split has {own.ROWS[split]} rows, schema.json says 77" in run(
        tmp_path / "mine", capsys
    )
    (tmp_path / "mine" / f"{split}.parquet").unlink()
    assert f"has neither {split}.parquet nor Parquet files in {split}/" in run(tmp_path / "mine", capsys)


@pytest.mark.parametrize("names", [None, ["ä", "$1_to_$5", "b"]])
def test_a_schema_comes_back_as_it_was_saved(tmp_path: Path, names: list[str] | None) -> None:
    divisions = (Division("shop", 3, names), Division("device", 2))
    features = (SparseFeature("a/b", 3), SparseFeature("c.d", 4, multi_hot=True))
    schema = Schema("d", "y", features, ("x",), divisions, {"train": 1, "validation": 0, "test": 2}, {"seed": 1})
    schema.save(str(tmp_path))
    assert Schema.load(str(tmp_path)) == schema
    assert json.loads((tmp_path / "schema.json").read_text())["divisions"][0]["domain_names"] == names


def test_names_may_be_left_out(tmp_path: Path) -> None:
    content = own.write(tmp_path)
    del content["divisions"][0]["domain_names"]
    content["divisions"][1]["domain_names"] = []
    (tmp_path / "schema.json").write_text(json.dumps(content))
    assert [division.domain_names for division in Schema.load(str(tmp_path)).divisions] == [("0", "1", "2"), ("0", "1")]


def test_numpys_whole_numbers_are_numbers(tmp_path: Path) -> None:
    divisions = (Division("shop", np.int64(3)),)
    schema = Schema("d", "y", (SparseFeature("a", np.int32(7)),), (), divisions, dict.fromkeys(own.ROWS, 1))
    schema.save(str(tmp_path))
    assert Schema.load(str(tmp_path)) == schema


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("shop",), "division 'shop' needs a number of domains, or their names"),
        (("shop", "3"), 'num_domains must be a whole number of at least 1, not "3"'),
        (("shop", True), "num_domains must be a whole number of at least 1, not true"),
        (("", 3), 'a division\'s name must be a text that is not empty, not ""'),
        (("shop", 1, [5]), "a domain's name must be a text that is not empty, not 5"),
        (("shop", None, ["a", "a"]), "two domains are named 'a'"),
    ],
)
def test_impossible_divisions_are_refused(arguments: tuple[Any, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Division(*arguments)
