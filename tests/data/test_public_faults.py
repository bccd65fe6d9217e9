"""What is wrong with a public data set's files or options is said in one sentence; and their defaults."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.data.public_forms import (
    criteo_line,
    made,
    review,
    write_ali_ccp,
    write_amazon_2014,
    write_douban,
    write_kuairand,
    write_lines,
    write_taobao,
)
from torchrec_mdr.prepare import main, prepare
from torchrec_mdr.training.options import parse


def spoil(path: Path, line: int, old: str, new: str) -> None:
    lines = path.read_text().splitlines()
    assert old in lines[line - 1]
    lines[line - 1] = lines[line - 1].replace(old, new, 1)
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("dataset", "file", "line", "old", "new", "message"),
    [
        ("taobao-themes", "theme_click_log.csv", 3, ",", ",,", "theme_click_log.csv, line 3: 7 fields where 6 are exp"),
        (
            "taobao-themes",
            "theme_click_log.csv",
            1,
            "theme_id",
            "x",
            "theme_click_log.csv has no column 'theme_id'; it",
        ),
        ("taobao-themes", "user_embedding.csv", 5, "3.0 ", "", "user_embedding.csv, line 5: emb is '3.00"),
        ("douban", "users_cleaned.txt", 2, "0", "", "users_cleaned.txt, line 2: UID is missing, not a text; restore"),
        ("kuairand-pure", "user_features_pure.csv", 1, "fans_user_num,", "x,", "no column 'fans_user_num'; its first"),
        (
            "ali-ccp",
            "sample_skeleton_test.csv",
            7,
            ",k",
            ",q",
            r"line 7: key is 'q\d+', not a line of common_features_t",
        ),
        (
            "ali-ccp",
            "sample_skeleton_train.csv",
            2,
            ",",
            ";",
            "line 2: number of fields is '5', not 6 .id, click, purc",
        ),
        (
            "ali-ccp",
            "common_features_train.csv",
            4,
            "\x03",
            "",
            "line 4: features is '.*', not entries of a field, a v",
        ),
    ],
)
def test_a_fault_is_named(
    tmp_path: Path,
    dataset: str,
    file: str,
    line: int,
    old: str,
    new: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    writers: dict[str, Any] = {
        "taobao-themes": write_taobao,
        "douban": write_douban,
        "kuairand-pure": write_kuairand,
        "ali-ccp": write_ali_ccp,
    }
    writers[dataset](tmp_path / "raw")
    spoil(tmp_path / "raw" / file, line, old, new)
    options = ["--taobao_themes.themes=2"] if dataset == "taobao-themes" else []
    arguments = [f"--dataset={dataset}", f"--data_dir={tmp_path / 'raw'}", f"--output={tmp_path / 'out'}", *options]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"reviewerID": "u", "asin": "i", "overall": 6, "unixReviewTime": 1}', "line 2: overall is '6', not 1 to 5"),
        ('{"reviewerID": "u", "asin": "i", "overall": 5', "line 2: overall is missing, not 1 to 5"),
        ('{"reviewerID": "u", "overall": 5, "unixReviewTime": 1}', "line 2: asin is missing, not a text"),
    ],
)
def test_a_faulty_review_is_named(tmp_path: Path, line: str, message: str) -> None:
    write_amazon_2014(tmp_path / "raw")
    write_lines(tmp_path / "raw" / "reviews_Beauty_5.json.gz", [json.dumps(review("u", "i", 5, "2014-01-01")), line])
    with pytest.raises(ValueError, match=f"reviews_Beauty_5.json.gz, {message}"):
        made(tmp_path, "amazon-2014", tmp_path / "raw")


def test_a_criteo_line_with_fields_too_few_is_named(tmp_path: Path) -> None:
    rng = random.Random(7)
    lines = ["\t".join(criteo_line(rng)) for _ in range(3)]
    write_lines(tmp_path / "raw" / "train.txt", [*lines, lines[0].rsplit("\t", 1)[0]])
    with pytest.raises(ValueError, match=r"train.txt, line 4: number of fields is '39', not 40 \(click, I1"):
        made(tmp_path, "criteo", tmp_path / "raw")


def test_a_damaged_gz_is_named(tmp_path: Path) -> None:
    write_amazon_2014(tmp_path / "raw")
    path = tmp_path / "raw" / "reviews_Beauty_5.json.gz"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="reviews_Beauty_5.json.gz cannot be read: .*; restore the original file"):
        made(tmp_path, "amazon-2014", tmp_path / "raw")


@pytest.mark.parametrize(
    ("dataset", "file", "origin"),
    [
        ("amazon-2014", "reviews_Clothing_Shoes_and_Jewelry_5.json.gz", "https://jmcauley"),
        ("amazon-2018", "AMAZON_FASHION_5.json.gz", "https://nijianmo"),
        ("amazon-6", "Musical_Instruments_5.json.gz", "https://nijianmo"),
        ("ali-ccp", "sample_skeleton_train.csv", "https://tianchi"),
        ("taobao-themes", "theme_click_log.csv", "https://tianchi"),
        ("kuairand-pure", "log_standard_4_08_to_4_21_pure.csv", "https://kuairand"),
        ("douban", "bookreviews_cleaned.txt", "https://www.kaggle"),
        ("criteo", "train.txt", "https://huggingface"),
    ],
)
def test_a_missing_file_is_named_with_its_origin(tmp_path: Path, dataset: str, file: str, origin: str) -> None:
    with pytest.raises(ValueError, match=f"the file {tmp_path}/{file} is missing; .* which come from {origin}"):
        prepare(dataset, data_dir=str(tmp_path), output=str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("amazon-2018", {"categories": ["All_Beauty"]}, "needs two or more different categories, not All_Beauty"),
        ("taobao-themes", {"themes": 1}, "needs themes of at least 2, not 1"),
        ("kuairand-pure", {"tabs": "1,main"}, "needs tabs as numbers with commas between them, not '1,main'"),
        ("criteo", {"division": "C3"}, "has no division 'C3'; choose one of C9, C6"),
        ("criteo", {"min_count": 0}, "needs min_count of at least 1, not 0"),
    ],
)
def test_impossible_options_are_refused(tmp_path: Path, dataset: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(dataset, data_dir=str(tmp_path), output=str(tmp_path / "out"), **options)


@pytest.mark.parametrize(
    ("dataset", "method", "hidden", "option"),
    [
        ("amazon-2014", "multilora", [1024, 512, 256, 64], ("rank", [16, 16, 8, 8])),
        ("ali-ccp", "multilora", [1024, 512, 512, 256, 256, 64, 64], ("rank", [32, 32, 32, 16, 16, 8, 8])),
        ("taobao-themes", "mlora", [256, 128, 64], ("alpha", 256)),
    ],
)
def test_published_sizes_are_the_defaults(
    dataset: str, method: str, hidden: list[int], option: tuple[str, Any]
) -> None:
    for recipe in ("recommended", "paper"):
        options = parse([f"--dataset={dataset}", f"--method={method}", f"--recipe={recipe}", "--data_dir=x"])
        assert list(options.backbone.hidden) == hidden  # type: ignore[attr-defined]
        assert getattr(options.method, option[0]) == option[1]
    for method in ("mix", "moe_mlora", "star"):
        for backbone in ("mlp", "dlrm", "dcn"):
            parse([f"--dataset={dataset}", f"--method={method}", f"--backbone={backbone}", "--data_dir=x"])
