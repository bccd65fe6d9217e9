"""Plans for clusters that are not at hand: against arithmetic by hand, and against what a real run holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.stage_runs import whole
from tests.distributed.test_banks import METHOD, SHOPS, runtime_of
from tests.helpers import DIM, build_backbone, schema_of
from tests.ranks import RankPool
from torchrec_mdr import plan
from torchrec_mdr.distributed.bank_sharding import BankTraining
from torchrec_mdr.distributed.planning import Cluster, Load, plan_stage
from torchrec_mdr.distributed.sharding import EmbeddingConfig
from torchrec_mdr.model import MultiDomainModel
from torchrec_mdr.training.prepared_stage import prepare_stage

SIZES = "--table_rows 1000000,2000 --num_domains 100000 --num_dense 3".split()
MODEL = "--backbone dlrm --backbone_options.hidden [16,8] --method_options.rank 2 --embeddings.dim 8".split()
# a domain's, A, B and bias of 11 -> 16 and of 16 -> 8, and 2 spare ones: 8 come from the dense arch, 3 from products
NUMBERS = 2 * (11 + 16) + 16 + 2 + 2 * (16 + 8) + 8


def lines(text: str) -> dict[tuple[str, int], list[str]]:
    """The printed table's lines by stage and number of ranks."""
    rows = [line.split() for line in text.splitlines()[3:]]
    return {(row[0], int(row[1])): row[2:] for row in rows}


def test_the_table_is_what_arithmetic_gives(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SIZES, *MODEL, "--gpus", "8,16", "--hbm=40GB", "--batch_size=16000", "--distinct", "900"]
    assert plan.main([*arguments, "--embeddings.sharding=table_wise"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("mlora on dlrm, 100,000 domains, banks sharded; 1,002,000 embedding rows of 8; 16,000 ")
    found = lines(printed)
    assert list(found) == [("pretrain", 8), ("pretrain", 16), ("adapt", 8), ("adapt", 16)]
    for ranks in (8, 16):
        assert found["pretrain", ranks][0] == "yes" and found["pretrain", ranks][2] == "0.000"
        fits, tables, banks, *_ = found["adapt", ranks]
        own = 100_000 / ranks * (4 * NUMBERS + 2 * 4)  # row-wise Adagrad: one number of state a row and layer
        assert fits == "yes" and abs(float(banks) * 1e9 - own) < 0.6e6
        assert 0 < float(tables) * 1e9 < 1.3 * 4 * 8 * 1_002_000
        away = (ranks - 1) / ranks
        of_banks = away * 900 * (2 * 8 + 2 * 4 * NUMBERS)  # ids and rows of both layers, and the rows' gradients
        of_tables = float(found["adapt", ranks][8]) * 1e6 - of_banks  # embeddings of this rank's rows, ids
        assert abs(of_tables - away * 16000 / ranks * 2 * (8 + 4 * 8)) < 2e4


@pytest.mark.parametrize(("domains", "distinct"), [(100_000, 900), (1000, 400)])
def test_a_top_k_gate_sends_k_experts_a_domain(domains: int, distinct: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Up to all that there are; its adapt stage sends one, as each row goes through its domain's own."""
    own = [*SIZES, *MODEL, "--num_domains", str(domains), "--distinct", str(distinct), "--gpus=8", "--hbm=40GB"]
    own += ["--method=moe_mlora", "--batch_size=16000", "--banks=sharded", "--method_options.top_k"]
    sent = {}
    for chosen in (1, 4):
        assert plan.main([*own, str(chosen)]) == 0
        found = lines(capsys.readouterr().out)
        sent[chosen] = {stage: float(found[stage, 8][8]) * 1e6 for stage in ("adapt", "gate")}
    assert sent[1]["adapt"] == sent[4]["adapt"]
    more = min(4 * distinct, domains) - distinct
    expected = 7 / 8 * more * (2 * 8 + 2 * 4 * NUMBERS)  # ids and rows of both layers, and the rows' gradients
    assert abs(sent[4]["gate"] - sent[1]["gate"] - expected) < 2e4


def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--table_rows=1000", "--num_domains=1000000000", *MODEL, "--gpus=8", "--hbm=1GB"]
    assert plan.main([*arguments, "--batch_size", "4096"]) == 1
    out, error = capsys.readouterr()
    assert lines(out)["adapt", 8] == ["no"] and lines(out)["pretrain", 8][0] == "yes"
    assert error.startswith("adapt on 8: Unable to find a plan")
    numbers = NUMBERS - 4  # with one table, 9 numbers come in
    assert f"weights alone take {4 * numbers / 8:.1f} GB a rank" in error


def test_sizes_take_no_memory_and_replicated_banks_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SIZES, *MODEL, "--gpus=8", "--banks=replicated", "--num_domains", "10000000000"]
    assert plan.main(arguments) == 1
    assert lines(capsys.readouterr().out)["adapt", 8] == ["no"]


def held(domain_ids: int) -> int:
    """Bytes of the tables and banks that this rank holds, with their optimizer's state."""
    runtime = runtime_of(METHOD, "rowwise_adagrad", True)
    state = runtime.state(frozenset(runtime.groups.values())) | runtime.fused_tensors()
    pieces = [s.tensor for t in state.values() if hasattr(t, "local_shards") for s in t.local_shards()]
    assert whole(state)
    return sum(piece.numel() * piece.element_size() for piece in pieces)


def test_a_plan_holds_on_real_ranks(two_ranks: RankPool) -> None:
    model = MultiDomainModel(build_backbone("dlrm"), METHOD, SHOPS, banks="sharded")
    prepare_stage(model, "adapt")
    load = Load(48, 9, trains_tables=False, trains_dense=False, looks_up_banks=True)
    config, banks = EmbeddingConfig(DIM, "sgd", "table_wise"), BankTraining("rowwise_adagrad")
    planned = plan_stage(model, config, banks, load, Cluster(2, 10**9, 10**9, 2, "cpu"))
    assert planned.kinds == {"table_wise": len(schema_of().sparse_features), "row_wise": 2}
    assert planned.tables + planned.banks == max(two_ranks.run(held, 0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hbm=80"], "--hbm must be a size such as 80GB or 512GiB, not '80'"),
        (["--gpus=8,x"], "--gpus must be whole numbers above 0 with commas between, not '8,x'"),
        (["--gpus=12"], "--gpus 12 does not fill machines of 8; give a multiple, or --gpus_per_node"),
        (["--gpus=99999999"], "--gpus 99999999 is more than 16384"),
        (["--device=tpu"], "--device must be cuda or cpu, not 'tpu'"),
        (["--num_domains=0"], "--num_domains must be at least 1, not 0"),
        (["--table_rows=0"], "--table_rows must be whole numbers above 0"),
        (["--batch_size=9", "--gpus=16"], "--batch_size 9 gives not each of 16 ranks a row"),
        (["--banks=sharded", "--method=star"], "Star with sharded banks: "),
        (["--nonsense=1"], "nonsense"),
    ],
)
def test_bad_input_ends_in_a_sentence(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([*SIZES, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_data_set_that_is_not_prepared_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--dataset", "synthetic"]) == 2
    assert "--dataset synthetic is no folder of prepared data; name one, or sizes by" in capsys.readouterr().err
