"""What a command line comes to: files, options, and the defaults of data, method and backbone."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.data import own
from torchrec_mdr.data.datasets.base import Choice, Dataset
from torchrec_mdr.methods import MoEMLoRA
from torchrec_mdr.registry import BACKBONES, DATASETS, METHODS
from torchrec_mdr.train import main
from torchrec_mdr.training.config import StageConfig
from torchrec_mdr.training.options import Options, parse

MOVIELENS = ["--dataset=movielens-1m", "--data_dir=somewhere"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def store(path: str, **options: Any) -> str:
    Path(path).write_text(yaml.safe_dump({name.replace("__", "."): value for name, value in options.items()}))
    return f"--config={path}"


def labels(options: Options) -> tuple[str, str, str]:
    """What the run is called; it is what was built, and what is written."""
    run = options.run
    assert METHODS[run.method] is type(options.method) and BACKBONES[run.backbone] is type(options.backbone)
    written = yaml.safe_load(options.resolved)
    assert (written["method"], written["backbone"], written["recipe"]) == (run.method, run.backbone, run.recipe)
    return run.method, run.backbone, run.recipe


def test_all_files_count_and_the_later_wins() -> None:
    files = [store("a.yaml", method="star", seed=1), store("b.yaml", seed=3)]
    both = parse(files)
    assert labels(both)[0] == "star" and both.run.seed == 3
    assert parse(files[::-1]).run.seed == 1
    assert labels(parse([*files, store("c.yaml", method="mix")]))[0] == "mix"
    separate = parse(["--config", "a.yaml", "--config", "b.yaml"])
    assert separate.resolved == both.resolved


@pytest.mark.parametrize("file_first", [True, False])
def test_options_win_over_files_wherever_they_stand(file_first: bool) -> None:
    file = store("c.yaml", method="mlora", backbone="dcn", recipe="paper", batch_size=8, stages__adapt__epochs=2)
    given = ["--method", "star", "--backbone=wdl", "--recipe=recommended", "--batch_size=16"]
    options = parse([file, *given] if file_first else [*given, file])
    assert labels(options) == ("star", "wdl", "recommended")
    assert options.run.batch_size == 16 and options.run.stages.adapt.epochs == 2


def test_the_last_of_several_values_counts() -> None:
    options = parse(["--method=star", "--method", "mix", "--seed=1", "--seed=2"])
    assert labels(options)[0] == "mix" and options.run.seed == 2


def test_what_a_file_chooses_decides_which_options_there_are() -> None:
    file = store(
        "a.yaml", method="multilora", backbone="dcn", method_options={"fusion": "add"}, backbone_options__dropout=0.3
    )
    options = parse([file, "--stages.fuse.epochs=9"])
    assert asdict(options.method)["fusion"] == "add" and isinstance(options.backbone, BACKBONES["dcn"])
    assert options.run.stages.fuse.epochs == 9 and options.run.auxiliary_division == "segment"


@pytest.mark.parametrize("given", [[], ["--method=multilora", "--recipe=paper", *MOVIELENS], ["--backbone=dlrm"]])
def test_what_is_written_runs_again_as_it_is(given: list[str]) -> None:
    options = parse([*given, "--stages.adapt.hooks=[leave_one_out]", "--domains=[0]", "--output_dir=~/x"])
    Path("config.yaml").write_text(options.resolved)
    again = parse(["--config=config.yaml"])
    assert again == options
    assert again.run.output_dir == str(Path.home() / "x")


def test_the_label_of_a_run_is_what_was_built() -> None:
    own.write(Path("mine"))
    files = [store("a.yaml", method="mix", batch_size=64), store("b.yaml", seed=3, stages__pretrain__epochs=1)]
    assert main([*files, "--dataset=./mine/", "--output_dir=run"]) == 0
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert (metrics["method"], metrics["seed"]) == ("mix", 3)
    assert [stage["name"] for stage in metrics["stages"]] == ["train"], "mix has one stage, mlora two"
    assert yaml.safe_load(Path("run/config.yaml").read_text())["method"] == "mix"


@pytest.mark.parametrize("given", [["--method=star", "--help"], ["--method=star", *MOVIELENS, "--print_config"]])
def test_help_and_print_config_show_the_chosen_defaults(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(given)
    shown = capsys.readouterr().out
    assert end.value.code == 0
    if "--help" in given:
        shown = " ".join(shown.split())
        assert "default: star" in shown and "--method_options.auxiliary_hidden" in shown
        assert "(type: int, default: 300000)" in shown, "the data set's own options"
    else:
        assert yaml.safe_load(shown) == yaml.safe_load(parse(given[:-1]).resolved)


def test_print_config_counts_files(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse([store("a.yaml", method="star", seed=5), "--print_config", "--batch_size=7"])
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["method"], shown["seed"], shown["batch_size"]) == ("star", 5, 7)


# Defaults belong to the data


def test_own_data_take_their_first_division_and_neutral_settings() -> None:
    """README's line for one's own data, and the shortest one."""
    own.write(Path("my_data"))
    plain = parse(["--dataset", "./my_data/"])
    line = parse(["--dataset", "./my_data/", "--stage", "adapt", "--init_checkpoint", "backbone.pt"])
    assert (line.run.stage, line.run.init_checkpoint) == ("adapt", "backbone.pt")
    for options in (plain, line):
        run = options.run
        assert (run.division, run.auxiliary_division, run.protocol, options.dataset) == ("shop", None, None, {})
        stages = vars(run.stages)
        assert all(stage == run.stages.pretrain for name, stage in stages.items() if name != "gate")
        assert replace(run.stages.gate, learning_rate=1e-3) == run.stages.pretrain
        stage = run.stages.pretrain
        assert stage.weight_decay == stage.ema_decay == 0 and stage.hooks == [] and stage.embedding_l2 <= 0.1
        assert stage.backbone_noise and options.backbone == BACKBONES["mlp"](dropout=0.0)
        # 600 rows: many small steps an epoch, and epochs enough between validations and before patience runs out
        assert (run.batch_size, stage.ema_rows, stage.validation_rows, stage.patience_rows) == (64, 300, 3000, 15000)


def test_the_papers_recipe_holds_for_own_data_too() -> None:
    own.write(Path("my_data"))
    run = parse(["--dataset", "./my_data/", "--recipe=paper", "--method=mlora"]).run
    assert (run.batch_size, run.stages.adapt.monitor, run.stages.adapt.validation_rows) == (1024, "mean_domain_auc", 0)


def test_a_gate_starts_with_the_own_experts_on_data_that_nothing_was_chosen_on() -> None:
    own.write(Path("my_data"))

    def start(*given: str) -> str:
        method = parse([*given, "--method=moe_mlora"]).method
        assert isinstance(method, MoEMLoRA)
        return method.gate_start

    assert start("--dataset=./my_data/") == start("--dataset=douban") == "own"
    for recipe_of_its_own in (MOVIELENS, ["--dataset=synthetic"], ["--dataset=amazon-2018"]):
        assert start(*recipe_of_its_own) == "random"
    for dataset in ("./my_data/", "douban", *MOVIELENS[:1]):
        given = [dataset] if dataset.startswith("--") else ["--dataset", dataset]
        assert start(*given, "--recipe=paper") == "random"


def test_own_data_give_their_next_division_to_methods_that_combine_several() -> None:
    own.write(Path("my_data"), divisions={"shop": 3, "device": 2, "hour": 4})

    def divisions(*given: str) -> tuple[Any, Any]:
        run = parse(["--dataset=./my_data/", "--method=multilora", *given]).run
        return run.division, run.auxiliary_division

    assert divisions() == ("shop", "device")
    assert divisions("--division=device") == ("device", "shop")
    assert divisions("--division", "hour", "--auxiliary_division=[device,shop]") == ("hour", ["device", "shop"])
    assert divisions(store("a.yaml", division="device")) == ("device", "shop")


def test_movielens_brings_the_papers_protocols_and_divisions() -> None:
    def chosen(*given: str) -> tuple[Any, ...]:
        run = parse([*MOVIELENS, *given]).run
        return run.protocol, run.division, run.auxiliary_division, run.embeddings.dim, run.batch_size

    assert chosen() == ("mlora", "gender", None, 8, 1024)
    assert chosen("--method=multilora") == ("multilora", "age3", "gender", 16, 4096)
    assert chosen("--method=multilora", "--protocol=mlora") == ("mlora", "gender", "age", 8, 1024)
    assert chosen("--method=multilora", "--division=gender") == ("multilora", "gender", "age3", 16, 4096)
    assert chosen("--method=star", "--recipe=paper") == ("multilora", "age3", None, 16, 4096)


def test_recipes_of_movielens() -> None:
    def stage(name: str, *given: str) -> dict[str, Any]:
        return asdict(getattr(parse([*MOVIELENS, *given]).run.stages, name))

    paper = stage("adapt", "--recipe=paper")
    assert paper == asdict(StageConfig(30, 1e-3, embedding_l2=1e-5, patience=3, monitor="mean_domain_auc"))
    own_stage = stage("adapt")
    changed = {name: value for name, value in own_stage.items() if value != paper[name]}
    assert changed == {
        "learning_rate": 1e-4,
        "ema_decay": 0.99,
        "patience": 4,
        "validations_per_epoch": 4,
        "backbone_noise": False,
        "hooks": ["leave_one_out"],
    }
    penalties = {
        ("mlp", "mlora"): 2.0,
        ("mlp", "multilora"): 8.0,
        ("nfm", "mlora"): 0.02,
        ("dlrm", "mlora"): 0.2,
        ("dlrm", "multilora"): 0.08,
    }
    for (backbone, protocol), penalty in penalties.items():
        assert stage("pretrain", f"--backbone={backbone}", f"--protocol={protocol}")["embedding_l2"] == penalty
    # rows cannot be left out of tables whose ids are not in the data; whole copies of the backbone train with its noise
    assert stage("adapt", "--method=plate")["hooks"] == []
    assert stage("adapt", "--method=finetune")["backbone_noise"]


def test_a_backbone_takes_the_defaults_that_it_has_options_for() -> None:
    paper = [*MOVIELENS, "--recipe=paper", "--protocol=mlora"]
    assert parse(paper).backbone == BACKBONES["mlp"](hidden=(256, 128, 64), dropout=0.5)
    assert parse([*paper, "--backbone=dlrm"]).backbone == BACKBONES["dlrm"](hidden=(256, 128, 64))


@dataclass(frozen=True)
class Visits(Dataset):
    """A data set of somebody else's, which has neither files nor protocols nor a choice of divisions."""

    shops: int = 3

    @classmethod
    def default_divisions(cls, protocol: str | None) -> tuple[str, ...]:
        return "shop", "device"

    @classmethod
    def defaults(cls, choice: Choice) -> dict[str, Any]:
        return {
            "batch_size": 64,
            "stages.pretrain.epochs": 2,
            "stages.adapt.epochs": 1 if choice.recipe == "paper" else 3,
        }

    def write(self, folder: str) -> None:
        own.write(Path(folder), divisions={"device": 2, "shop": self.shops})


@pytest.fixture
def visits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    point = EntryPoint("visits", f"{__name__}:Visits", "torchrec_mdr.datasets")
    monkeypatch.setitem(DATASETS._known, "visits", point)
    monkeypatch.setenv("MDR_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("visits")
def test_a_data_set_of_another_package_has_what_it_says() -> None:
    options = parse(["--dataset=visits", "--method=multilora"])
    assert (options.run.division, options.run.auxiliary_division) == ("shop", "device")
    assert options.run.batch_size == 64 and options.run.stages.adapt.epochs == 3 and options.dataset == {"shops": 3}
    assert parse(["--dataset=visits", "--recipe=paper"]).run.stages.adapt.epochs == 1
    assert main(["--dataset=visits", "--dataset_options.shops=4", "--output_dir=run"]) == 0
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert metrics["dataset"] == "visits" and metrics["divisions"] == ["shop"]
    assert len(metrics["test"]["domains"]) == 4
    (made,) = Path("cache").iterdir()
    assert made.name.startswith("visits-")


@pytest.mark.usefixtures("visits")
@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--data_dir=x"], "data set 'visits' is made here and reads no files; leave out --data_dir"),
        (["--protocol=mlora"], "--protocol 'mlora' is unknown to data set 'visits'; leave it out"),
        (["--dataset_options.rows=3"], "dataset_options.rows"),
        (["--division=hour"], "data set 'mine' has no division 'hour'; it has device, shop"),
    ],
)
def test_a_data_set_of_another_package_refuses_what_it_has_not(
    given: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--dataset=visits", *given]) == 2
    assert sentence in capsys.readouterr().err


def test_the_command_that_prepares_knows_it_too(visits: None, capsys: pytest.CaptureFixture[str]) -> None:
    from torchrec_mdr.prepare import main as prepare

    assert prepare(["--dataset=visits", "--visits.shops=5", "--output=made"]) == 0
    assert json.loads(Path("made/schema.json").read_text())["divisions"][1]["num_domains"] == 5
    assert prepare(["--dataset=visits", "--division=shop"]) == 2
    assert "no choice of its natural division; leave out --division" in capsys.readouterr().err
