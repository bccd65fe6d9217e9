"""Sharded banks against replicated ones: the same model, trained by TorchRec's fused optimizers on rows of tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed.stage_runs import environment, whole
from tests.helpers import DIM, Rows, build_backbone, random_rows, randomise, with_others_changed
from tests.ranks import RankPool
from torchrec_mdr.adapters.bank import LoRABank
from torchrec_mdr.adapters.bank_rows import RowLayout
from torchrec_mdr.adapters.bank_tables import table_of
from torchrec_mdr.adapters.context import Route
from torchrec_mdr.baselines.mix import Mix
from torchrec_mdr.baselines.star import Star
from torchrec_mdr.data.schema import Division
from torchrec_mdr.distributed import checkpoint
from torchrec_mdr.distributed.bank_sharding import BankOptimizer, BankTraining, init_banks
from torchrec_mdr.distributed.sharding import EmbeddingConfig
from torchrec_mdr.methods import Method, MLoRA, MoEMLoRA, MultiLoRA
from torchrec_mdr.methods.stage import ADAPTERS
from torchrec_mdr.model import MultiDomainModel
from torchrec_mdr.ops.groups import BatchDomains
from torchrec_mdr.training.config import StageConfig
from torchrec_mdr.training.prepared_stage import prepare_stage
from torchrec_mdr.training.stage_runtime import StageRuntime

SHOPS = (Division("shop", 9),)
METHOD = MLoRA(rank=2)
RATE = 0.1
State = dict[str, Tensor]


@dataclass
class Outcome:
    """What a rank saw.

    Args:
        states (list[dict[str, Tensor]]): rows by table, before the first step and after each.
        losses (list[float]): of each step, on this rank.
        logits (Tensor): of this rank's rows of the last batch, in evaluation mode after training.
        fused (dict[str, Tensor]): state of the fused optimizer, in whole.
    """

    states: list[State]
    losses: list[float]
    logits: Tensor
    fused: State


def steps(count: int = 3, divisions: tuple[Division, ...] = SHOPS) -> list[Rows]:
    """Rows of some steps: shop 8 comes in none, shop 7 in the first alone."""
    batches = []
    for step in range(count):
        rows = random_rows(48, divisions, seed=step)
        rows = rows.pick(rows.domains[:, 0] < (8 if step == 0 else 7))
        batches.append(rows)
    return batches


def share(rows: Rows) -> Rows:
    """This rank's: with two ranks, the first third."""
    first = len(rows) // 3
    if dist.get_world_size() == 1:
        return rows
    return rows.pick(slice(first) if dist.get_rank() == 0 else slice(first, None))


def divisions_of(method: Method) -> tuple[Division, ...]:
    return (*SHOPS, Division("gender", 2)) if isinstance(method, MultiLoRA) else SHOPS


def runtime_of(method: Method, optimizer: BankOptimizer, sharded: bool, place: int = -1) -> StageRuntime:
    """A stage's runtime, the last one's; dense tensors random by name, and banks the same in both forms."""
    divisions = divisions_of(method)
    stage = method.stages(divisions)[place]
    model = MultiDomainModel(build_backbone("dlrm"), method, divisions, banks="sharded" if sharded else "replicated")
    config = StageConfig(learning_rate=RATE, embedding_learning_rate=RATE, weight_decay=0.0)
    tables = EmbeddingConfig(DIM, "sgd", "table_wise")
    runtime = StageRuntime(model, stage, config, tables, None, 7, environment(), bank_optimizer=optimizer)
    state = {n: t for n, t in runtime.state(frozenset(runtime.groups.values())).items() if "bank_tables" not in n}
    randomise({n: t for n, t in state.items() if "embedding_bag" not in n}, seed=1)
    if sharded:
        fill_tables(runtime.model)
    runtime.model.set_route(stage.route, stage.division, stage.expert_passes - 1)
    return runtime


@torch.no_grad()
def fill_tables(model: MultiDomainModel) -> None:
    """Rows that hold what :func:`randomise` gives replicated banks."""
    tables = model.bank_tables
    assert tables is not None
    for name, value in tables.state_dict().items():
        layout = tables.layouts[name.split(".")[-2]]
        path = "backbone." + name.split(".")[-2].replace("/", ".")
        bank = {role: torch.empty(0) for role in layout.roles}
        num = value.size(0)
        for role, part in layout.cut(torch.zeros(num, layout.width)).items():
            bank[role] = torch.zeros(part.shape)
        randomise(named := {f"{path}.{role}": tensor for role, tensor in bank.items()}, seed=1)
        rows = layout.join({role: named[f"{path}.{role}"] for role in bank})
        for shard in value.local_shards():
            first = shard.metadata.shard_offsets[0]
            shard.tensor.copy_(rows[first : first + len(shard.tensor)])


def rows_of(model: MultiDomainModel) -> State:
    """All rows of sharded banks by table, from all ranks; of replicated ones, as tables would hold them."""
    if model.bank_tables is not None:
        return {name.split(".")[-2]: value for name, value in whole(model.bank_tables.state_dict()).items()}
    banks = {n: b for n, b in model.backbone.named_modules() if isinstance(b, LoRABank)}
    return {
        table_of(n): RowLayout.of(b).join({r: t.detach() for r, t in b.row_tensors().items()}) for n, b in banks.items()
    }


def train(
    optimizer: BankOptimizer,
    sharded: bool,
    batches: list[Rows],
    method: Method = METHOD,
    frozen: Tensor | None = None,
    place: int = -1,
) -> Outcome:
    """Trains a stage of a method, the last one; replicated banks by a plain optimizer in the place of BankAdam."""
    runtime = runtime_of(method, optimizer, sharded, place)
    states, losses = [rows_of(runtime.model)], []
    if frozen is not None:
        runtime.prepared.freeze_domains(frozen)
    for loss in losses_of(runtime, optimizer, sharded, batches):
        losses.append(loss)
        states.append(rows_of(runtime.model))
    (scored,) = runtime.evaluate(share(rows).batch(runtime.model.router.sizes, len(rows)) for rows in batches[-1:])
    return Outcome(states, losses, scored.logits, whole(runtime.fused_tensors()))


def losses_of(runtime: StageRuntime, optimizer: BankOptimizer, sharded: bool, batches: list[Rows]) -> Iterator[float]:
    sizes = runtime.model.router.sizes
    if sharded:
        yield from (float(out.loss) for out in runtime.train(share(rows).batch(sizes, len(rows)) for rows in batches))
        return
    by_name = runtime.stage_optimizer.by_name
    own = [by_name["dense"]] if "dense" in by_name else []
    if "banks" in by_name:
        by_name["banks"].factors.clear()  # so that gradients are written
        banks = [p for bank in runtime.prepared.banks.values() for p in bank.parameters(recurse=False)]
        plain = {"sgd": torch.optim.SGD(banks, RATE), "adagrad": torch.optim.Adagrad(banks, RATE, eps=1e-8)}
        own.append(plain[optimizer])
    runtime.prepared.train(runtime.sharded)
    for rows in batches:
        runtime.sharded.zero_grad()
        loss, output = runtime.sharded(rows.batch(sizes, len(rows)))
        loss.backward()
        for one in own:
            one.step()
        yield float(output.loss)


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
@pytest.mark.parametrize(
    ("method", "place", "moves"),
    [
        (METHOD, -1, 2),
        (replace(METHOD, schedule="joint"), -1, 2),
        (MultiLoRA(rank=2), 1, 2),  # adapts along shops
        (MultiLoRA(rank=2), 2, 2),  # along genders
        (MultiLoRA(rank=2), 3, 0),  # fuses
        (MultiLoRA(rank=2, schedule="joint"), -1, 4),
        (MoEMLoRA(rank=2, experts_per_domain=2), 1, 2),
        (MoEMLoRA(rank=2, experts_per_domain=2, top_k=4), 2, 0),  # the gate, which chooses before the pass
    ],
)
def test_sharded_banks_equal_replicated_ones(
    method: Method, place: int, moves: int, optimizer: BankOptimizer, one_rank: RankPool, two_ranks: RankPool
) -> None:
    batches = steps(3, divisions_of(method))
    expected: Outcome = one_rank.run(train, optimizer, False, batches, method, None, place)[0]
    assert sum(not torch.equal(expected.states[-1][name], first) for name, first in expected.states[0].items()) == moves
    for pool in (one_rank, two_ranks):
        found: list[Outcome] = pool.run(train, optimizer, True, batches, method, None, place)
        for outcome in found:
            for mine, theirs in zip(outcome.states, expected.states, strict=True):
                assert mine.keys() == theirs.keys()
                for name, rows in mine.items():
                    torch.testing.assert_close(rows, theirs[name], rtol=1e-4, atol=2e-6)
        torch.testing.assert_close(torch.cat([o.logits for o in found]), expected.logits, rtol=1e-4, atol=1e-5)
        mean = torch.tensor([o.losses for o in found]).mean(0)
        torch.testing.assert_close(mean, torch.tensor(expected.losses), rtol=1e-5, atol=1e-6)


def test_a_domain_depends_on_its_own_rows_alone(two_ranks: RankPool) -> None:
    batches = steps()
    changed = [with_others_changed(rows, 0, 2, seed=50 + i) for i, rows in enumerate(batches)]
    one, other = (two_ranks.run(train, "rowwise_adagrad", True, rows)[0] for rows in (batches, changed))
    assert len(one.fused) == 2
    for before, after, changed_after in (
        (one.states[0], one.states[-1], other.states[-1]),
        (None, one.fused, other.fused),
    ):
        for name, rows in after.items():
            assert torch.equal(rows[2], changed_after[name][2]), name
            assert not torch.equal(rows[1], changed_after[name][1]), name
            assert before is None or not torch.equal(rows[2], before[name][2])


def test_rows_of_domains_that_do_not_come_stay(two_ranks: RankPool) -> None:
    outcome: Outcome = two_ranks.run(train, "rowwise_adagrad", True, steps())[0]
    for name in outcome.states[0]:
        start, first, *_, last = (state[name] for state in outcome.states)
        assert torch.equal(last[8], start[8])  # comes never
        assert not torch.equal(first[7], start[7]) and torch.equal(last[7], first[7])  # comes in the first step
    assert all(not state[8].any() and state[:8].all() for state in outcome.fused.values())


def test_frozen_domains_stay(two_ranks: RankPool) -> None:
    frozen = torch.zeros(9, dtype=torch.bool)
    frozen[[1, 4]] = True
    kept: Outcome = two_ranks.run(train, "rowwise_adagrad", True, steps(), METHOD, frozen)[0]
    free: Outcome = two_ranks.run(train, "rowwise_adagrad", True, steps())[0]
    for name, start in kept.states[0].items():
        moved = (kept.states[-1][name] != start).any(1)
        assert moved.tolist() == [domain not in (1, 4, 8) for domain in range(9)]
        assert torch.equal(kept.states[-1][name][~frozen], free.states[-1][name][~frozen])
    assert all(not state[frozen].any() for state in kept.fused.values())


def initial_rows(seed: int) -> tuple[State, Tensor, Tensor]:
    """Rows of new sharded banks, the adapted logits of some rows, and the backbone's own."""
    runtime = runtime_of(METHOD, "sgd", True)
    init_banks(runtime.sharded, seed)
    rows, logits = share(random_rows(48, SHOPS)), []
    for route in (Route.DOMAIN, Route.BASE):
        with runtime.model.routed(route):
            (scored,) = runtime.evaluate(iter([rows.batch([9], 48)]))
        logits.append(scored.logits)
    return rows_of(runtime.model), *logits


def test_initial_values_are_those_of_replicated_banks(one_rank: RankPool, two_ranks: RankPool) -> None:
    rows, adapted, base = one_rank.run(initial_rows, 3)[0]
    assert torch.equal(adapted, base)
    for other, _, _ in (two_ranks.run(initial_rows, 3)[1], one_rank.run(initial_rows, 4)[0]):
        same = [torch.equal(table, rows[name]) for name, table in other.items()]
        assert same in ([True, True], [False, False])
    assert torch.equal(two_ranks.run(initial_rows, 3)[0][0][next(iter(rows))], next(iter(rows.values())))
    for name, (wide, out) in zip(rows, ((14, 10), (10, 5)), strict=True):
        bound = (6.0 / (wide + 2)) ** 0.5  # Glorot's, as LoRABank has it
        down, rest = rows[name][:, : 2 * wide], rows[name][:, 2 * wide :]
        assert rest.shape[1] == -(-(3 * out + 2 * wide) // 4) * 4 - 2 * wide and not rest.any()
        assert 0.9 * bound < down.abs().max() <= bound and len(down.unique(dim=0)) == 9
        assert abs(float(down.mean())) < 0.15 * bound


def test_batches_without_known_domains_are_the_backbones(two_ranks: RankPool) -> None:
    for adapted, base in two_ranks.run(unknown_domains):
        assert torch.equal(adapted, base)


def unknown_domains() -> tuple[Tensor, Tensor]:
    """Adapted logits of rows without a domain, of none at all on the second rank; and the backbone's."""
    runtime = runtime_of(METHOD, "sgd", True)
    rows = random_rows(10, SHOPS).pick(slice(0, 10 if dist.get_rank() == 0 else 0))
    rows = replace(rows, domains=torch.full_like(rows.domains, -1))
    batch = replace(rows.batch([9], 10), domains=BatchDomains(rows.domains, (), (9,)))
    logits = []
    for route in (Route.DOMAIN, Route.BASE):
        with runtime.model.routed(route):
            (scored,) = runtime.evaluate(iter([batch]))
        logits.append(scored.logits)
    return logits[0], logits[1]


def saved(folder: str) -> tuple[State, State]:
    """Trains a little and writes rows and optimizer state."""
    runtime = runtime_of(METHOD, "rowwise_adagrad", True)
    list(losses_of(runtime, "rowwise_adagrad", True, steps(2)))
    checkpoint.save(folder, runtime.state(frozenset({ADAPTERS})) | runtime.fused_tensors(), {})
    return rows_of(runtime.model), whole(runtime.fused_tensors())


def loaded(folder: str) -> tuple[State, State]:
    """Rows and optimizer state in a new runtime."""
    runtime = runtime_of(METHOD, "rowwise_adagrad", True)
    checkpoint.load(folder, runtime.state(frozenset({ADAPTERS})) | runtime.fused_tensors())
    return rows_of(runtime.model), whole(runtime.fused_tensors())


def test_checkpoints_load_on_another_number_of_ranks(tmp_path: Path, one_rank: RankPool, two_ranks: RankPool) -> None:
    for writer, reader in ((two_ranks, one_rank), (one_rank, two_ranks)):
        written = writer.run(saved, str(tmp_path / str(writer.world_size)))[0]
        for read in reader.run(loaded, str(tmp_path / str(writer.world_size))):
            for mine, theirs in zip(read, written, strict=True):
                assert mine.keys() == theirs.keys() and len(mine) == 2
                assert all(torch.equal(rows, theirs[name]) for name, rows in mine.items())


@pytest.mark.parametrize(
    ("method", "backbone", "divisions", "message"),
    [
        (Star(), "mlp", 1, "Star with sharded banks: .* which no table can hold; take replicated banks"),
        (MultiLoRA(), "mlp", 2, "MultiLoRA with sharded banks: .* has norms per domain, which no table can hold"),
        (Mix(), "dlrm", 1, "Mix has no banks of adapters that tables could hold; take replicated banks"),
    ],
)
def test_what_no_table_can_hold_is_refused(method: Method, backbone: str, divisions: int, message: str) -> None:
    several = (*SHOPS, Division("gender", 2))[:divisions]
    with pytest.raises(ValueError, match=message):
        MultiDomainModel(build_backbone(backbone), method, several, banks="sharded")


@pytest.mark.parametrize("options", [{"per_layer": True}, {"gate_input": "domain_and_input"}])
def test_a_top_k_gate_that_cannot_choose_before_the_pass_is_refused(
    options: dict[str, object], one_rank: RankPool
) -> None:
    with pytest.raises(
        ValueError, match="with sharded banks, a top-k gate chooses before the pass: it sees the domain"
    ):
        one_rank.run(train, "sgd", True, steps(1), MoEMLoRA(rank=2, top_k=2, **options))


def test_adam_on_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match="--bank_optimizer adam needs a GPU, since fbgemm has no fused Adam on CPU"):
        BankTraining("adam").fused_params(torch.device("cpu"))


def test_tables_of_very_many_domains_take_no_memory_before_they_are_sharded() -> None:
    huge = (Division("shop", 10**12),)  # more than any machine has room for
    model = MultiDomainModel(build_backbone("dlrm"), METHOD, huge, banks="sharded")
    assert model.bank_tables is not None and all(table.is_meta for table in model.bank_tables.parameters())
    with pytest.raises(ValueError, match="a fused optimizer trains: put the model into DistributedModelParallel"):
        prepare_stage(model, "adapt").optimizer(model, lr=0.1)
