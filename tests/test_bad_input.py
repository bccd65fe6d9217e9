"""Bad input ends with one sentence that names the place and the mend, and exit code 2, before any training."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data import own
from tests.ports import held_port
from torchrec_mdr.prepare import main as prepare
from torchrec_mdr.train import main

SMALL = ["--dataset_options.rows=6000", "--dataset_options.num_domains=4", "--batch_size=256"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MDR_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sentence(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a run that is refused says."""
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and "results go to" not in said.out
    return said.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method=lora"], "--method 'lora' is unknown; choose one of mlora, multilora, "),
        (["--method"], "--method has no value; write --method=VALUE"),
        (["--method="], "--method has no value"),
        (["--metho=star"], "unrecognized arguments: --metho=star"),
        (["--backbone=resnet"], "--backbone 'resnet' is unknown; choose one of mlp, "),
        (["--recipe=own"], "--recipe 'own' is unknown; choose one of recommended, paper"),
        (["--protocol=mlora"], "--protocol 'mlora' is unknown to data set 'synthetic'; leave it out"),
        (["--no_such_option=1"], "no_such_option"),
        (["stray"], "stray"),
        (["--batch_size=0"], "--batch_size must be at least 1, not 0"),
        (["--batch_size=many"], "batch_size"),
        (["--batch_size=99999999999999999999"], "--batch_size must be at most 2147483647, not 99999999999999999999"),
        (["--target_modules=[]"], "--target_modules names no layer; leave it out, or name at least one"),
        (["--backbone_options.hidden=[1000000000]"], "hidden has a layer 1000000000 wide; the widest"),
        (["--adaptation_share=1"], "--adaptation_share must lie between 0 and 1, not 1.0"),
        (["--seed", "-1"], "--seed must lie between 0 and 2**63 - 1, not -1"),
        ([f"--seed={2**64}"], f"--seed must lie between 0 and 2**63 - 1, not {2**64}"),
        ([f"--seed={2**63}"], "--seed must lie between 0 and 2**63 - 1"),
        (["--output_dir="], "--output_dir is empty; leave it out, or name a folder"),
        (["--output_dir", ""], "--output_dir is empty"),
        (["--init_checkpoint="], "--init_checkpoint is empty"),
        (["--data_dir="], "--data_dir is empty"),
        (["--stages.adapt.epochs=-1"], "--stages.adapt.epochs must be at least 0, not -1"),
        (["--stages.fuse.patience=0"], "--stages.fuse.patience must be at least 1, not 0"),
        (["--stages.gate.ema_decay=1"], "--stages.gate.ema_decay must be below 1, not 1.0"),
        (["--stages.pretrain.learning_rate=-1"], "--stages.pretrain.learning_rate must be at least 0, not -1.0"),
        (["--stages.adapt.hooks=[sleep]"], "--stages.adapt.hooks: 'sleep' is unknown; choose one of leave_one_out"),
        (["--method_options.rank=0"], "rank must be at least 1"),
        (["--method_options.alpha=0"], "alpha must be at least 1"),
        (["--backbone_options.dropout=2"], "dropout must lie in [0, 1)"),
        (["--embeddings.sharding=table_wise"], "no fused Adam on CPU"),
        (["--precision=tf32"], "--precision tf32 needs an NVIDIA GPU, and there is none here; choose fp32 or bf16"),
        (["--embeddings.dim=6"], "multiple of 4"),
        (["--division=nothing"], "no division 'nothing'"),
        (["--auxiliary_division=segment"], "leave out --auxiliary_division"),
        (["--domains=[9]"], "--domains names 9, outside division 'scenario' with domains 0 to 3"),
        (["--target_modules=[nothing.*]"], "matches no module"),
        (["--stage=fuse"], "no stage 'fuse'"),
        (["--stage=adapt"], "run the stage before it"),
        (["--resume"], "no run to resume in {out}; leave out --resume"),
        (["--init_checkpoint=/nowhere"], "/nowhere does not exist"),
        (["--output_dir=nope://bucket/run"], "nope:// is no kind of path that is known"),
        (["--init_checkpoint=gs://bucket/run"], "gs:// cannot be used: the package that knows it is missing"),
        (
            ["--dataset=memory://bucket/data/"],
            "memory://bucket/data is no prepared data set: there is no bucket memory://bucket",
        ),
    ],
)
def test_an_impossible_option_is_named(
    arguments: list[str], words: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, f"--output_dir={here / 'out'}", *arguments]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("error: ") and words.format(out=here / "out") in said[-1]
    assert not any("Traceback" in line for line in said)
    assert not list(here.rglob("metrics.json")) and not list(here.rglob("step-*")), "it was seen too late"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dataset=movielens"], "a folder of prepared data is named with a slash in it"),
        (["--dataset=./nowhere/"], "./nowhere/ is no prepared data set: it has no schema.json"),
        (["--dataset="], "--dataset has no value"),
        (["--dataset=movielens-1m"], "is read from its original files; name their folder with --data_dir"),
        (
            ["--dataset=movielens-1m", "--data_dir=/nowhere"],
            "the file /nowhere/ratings.dat is missing; point",
        ),
        (
            ["--dataset=movielens-1m", "--data_dir=x", "--division=sex"],
            "no natural division 'sex'; choose one of",
        ),
        (["--dataset=./mine/", "--data_dir=x"], "./mine/ is prepared already; leave out --data_dir"),
        (
            ["--dataset=./mine/", "--protocol=mlora"],
            "--protocol 'mlora' is unknown to data set './mine/'; leave",
        ),
        (["--dataset=./mine/", "--dataset_options.rows=3"], "dataset_options"),
        (["--dataset=./mine/", "--division=hour"], "data set 'mine' has no division 'hour'; it has shop, device"),
        (["--dataset=synthetic", "--data_dir=x"], "'synthetic' is made here and reads no files; leave out --data_dir"),
    ],
)
def test_data_that_are_not_there_are_named(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own.write(Path("mine"))
    assert words in sentence([*arguments, "--output_dir=out"], capsys)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("method: star\ntitle: Größe\n".encode("latin-1"), "is no text in UTF-8"),
        ("method: star\n".encode("utf-16"), "is no text in UTF-8"),
        (b"- method\n- star\n", "holds no options, but a list; write each as a line NAME: VALUE"),
        (b"star\n", "holds no options, but a str"),
        (b"method: [", "is no file of options in YAML"),
        (b"methd: star\n", "methd"),
        (b"stages:\n  adapt:\n    epoch: 3\n", "'stages' does not accept option 'adapt.epoch'"),
        (b"method: star\nmethod_options:\n  alpha: 3\n", "'method_options' does not accept option 'alpha'"),
        (b"batch_size: many\n", "batch_size"),
        (b"method: [star]\n", "method must be a name, not ['star']"),
        (b"protocol: 3\n", "protocol must be a name, not 3"),
        (b"config: other.yaml\n", "has the option 'config'; name further files with another --config"),
        (b"3: star\n", "has the option 3, which is no name"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_file_of_options_that_cannot_be_used_is_named(
    content: bytes | None, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("good.yaml").write_text("seed: 3\n")
    if content is not None:
        Path("bad.yaml").write_bytes(content)
    said = sentence(["--config=good.yaml", "--config=bad.yaml"], capsys)
    assert "--config bad.yaml" in said and words in said


def test_a_folder_is_no_file_of_options(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Is a directory" in sentence(["--config", str(here)], capsys)


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
def test_an_output_folder_that_cannot_be_is_named(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("mine")
    said = sentence([*SMALL, f"--output_dir={place}"], capsys)
    assert f"--output_dir {place} cannot be made: " in said and "; name another folder" in said
    assert Path("file").read_text() == "mine"


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
def test_a_cache_that_cannot_be_is_named(
    place: str, capsys: pytest.CaptureFixture[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("file").write_text("mine")
    monkeypatch.setenv("MDR_CACHE", place)
    said = sentence([*SMALL, "--output_dir=out"], capsys)
    assert f"the cache folder ($MDR_CACHE) {here / place} cannot be made: " in said and "; name another folder" in said
    assert prepare(["--dataset=synthetic", "--synthetic.rows=10"]) == 2
    assert "the cache folder ($MDR_CACHE)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("file", "the output folder file is in use; name a new or empty one"),
        ("file/below", "the folder of --output .*/file cannot be made: .*; name another folder"),
        ("", "--output is empty; name a new folder"),
    ],
)
def test_a_folder_to_prepare_that_cannot_be_is_named(
    place: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").write_text("mine")
    assert prepare(["--dataset=synthetic", "--synthetic.rows=10", f"--output={place}"]) == 2
    said = capsys.readouterr().err
    assert re.search(words, said) and said.count("\n") == 1


def test_a_mistake_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchrec_mdr.training.trainer import Trainer

    def broken(self: Trainer) -> None:
        raise KeyError("no such thing")

    monkeypatch.setattr(Trainer, "run", broken)
    with pytest.raises(KeyError):
        main([*SMALL, "--output_dir=out"])


def test_a_disk_that_is_full_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    said = sentence([*SMALL, "--output_dir=out"], capsys)
    assert re.search(r"(out/run.lock|schema.json) cannot be written: No space left on device", said)


def test_the_home_folder_may_be_written_short(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torchrec_mdr.experiments.rank_divisions.__main__ import main as rank

    monkeypatch.setenv("HOME", str(here / "home"))
    monkeypatch.setenv("MDR_CACHE", "~/cache")
    own.write(here / "home" / "mine")
    (here / "home" / "a.yaml").write_text("stages.pretrain.epochs: 1\nstages.adapt.epochs: 1\n")
    common = ["--config=~/a.yaml", "--dataset=~/mine/", "--batch_size=256"]
    assert main([*common, "--output_dir", "~/runs/a"]) == 0
    start = "--init_checkpoint=~/runs/a/checkpoints/pretrain"
    assert main([*common, start, "--stage=adapt", "--output_dir=~/runs/b"]) == 0
    assert prepare(["--dataset=synthetic", "--synthetic.rows=10"]) == 0
    assert prepare(["--dataset=synthetic", "--synthetic.rows=10", "--output=~/made"]) == 0
    assert rank(["--dataset=~/mine/", "--output=~/ranking.json"]) == 0
    assert prepare(["--dataset=movielens-1m", "--data_dir=~/ml"]) == 2
    assert f"the file {here}/home/ml/ratings.dat is missing" in capsys.readouterr().err
    found = {path.name for path in (here / "home").iterdir()}
    assert found >= {"runs", "cache", "made", "ranking.json"}
    assert not (here / "~").exists()


@pytest.mark.full
def test_each_process_of_a_run_exits_with_2() -> None:
    command = [sys.executable, "-m", "torchrec_mdr.train", *SMALL, "--division=nothing"]
    with held_port() as port:
        common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes = [
            subprocess.Popen(command, env={**common, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
            for rank in range(2)
        ]
        said = [process.communicate(timeout=600)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "no division 'nothing'" in said[0] and "Traceback" not in "".join(said)


def test_torchrun_tells_the_sentence_and_lets_each_process_end_by_itself(here: Path) -> None:
    (here / "file").write_text("mine")
    program = here / "program.py"
    # the second process takes its time, and torchrun ends what is left when the first has ended
    program.write_text(
        "import os, sys, time\n"
        "from torchrec_mdr.train import main\n"
        "code = main(sys.argv[1:])\n"
        "os._exit(code) if os.environ['RANK'] == '0' else time.sleep(2)\n"
        "sys.exit(code)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(program)]
    done = subprocess.run([*command, *SMALL, "--config=file"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert re.findall(r"exitcode  : (\S+)", done.stderr) == ["2", "2"]
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "--config file holds no options, but a str; write each as" in said[0]
