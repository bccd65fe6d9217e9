"""Ids that nobody has numbered: what a CPU can check of it; TorchRec's own hashing is in tests/gpu."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from tests.distributed.stage_runs import whole
from tests.distributed.test_banks import SHOPS, State, losses_of, rows_of, runtime_of, steps
from tests.helpers import build_backbone, random_rows
from tests.ranks import RankPool
from torchrec_mdr.adapters.context import Route
from torchrec_mdr.backbones.tables import materialize_tables
from torchrec_mdr.distributed.evicted_rows import reset_domains
from torchrec_mdr.distributed.zero_collision import FEATURE, ZeroCollisionDomains
from torchrec_mdr.methods import MLoRA, MoEMLoRA, SingleLoRA
from torchrec_mdr.model import MultiDomainModel


def test_training_on_a_cpu_is_refused_before_memory_is_taken() -> None:
    with pytest.raises(ValueError, match="trains on CUDA alone, since TorchRec has no kernel for cpu; take Hashed"):
        ZeroCollisionDomains(10**14, device="cpu")
    with pytest.raises(ValueError, match="at least one domain, not 0"):
        ZeroCollisionDomains(0, device="cpu", read_only=True)


def test_ids_that_were_learnt_are_looked_up_by_torchrec_and_others_have_no_domain() -> None:
    domains = ZeroCollisionDomains(64, device="cpu", read_only=True)
    ids = torch.tensor([10**15, 7, -(2**62), 3])
    features = {FEATURE: JaggedTensor(ids, lengths=torch.ones_like(ids))}
    domains.table.reset_intrainer_bulk_eval_mode()
    places = domains.table(features)[FEATURE].values()  # where TorchRec looks first
    assert len(places.unique()) == 4
    domains.table._hash_zch_identities.data[places, 0] = ids
    for _ in range(2):  # whatever the mode
        found = domains(torch.tensor([[7, 8, -1], [10**15, 3, 9]]))
        assert found.tolist() == [[int(places[1]), -1, -1], [int(places[0]), int(places[3]), -1]]
        domains.eval()
    again = ZeroCollisionDomains(64, device="cpu", read_only=True)
    again.load_state_dict(domains.state_dict())
    assert torch.equal(again(ids), places)


class Slots(ZeroCollisionDomains):
    """Hashing in Python, with what TorchRec promises of its own: any free domain, else the least recently seen."""

    def _hashed(self, ids: Tensor, learns: bool) -> Tensor:
        identities, seen = self.table._hash_zch_identities[:, 0], self.table._hash_zch_metadata[:, 0]
        found = []
        for one in ids.tolist():
            own = (identities == one).nonzero().flatten().tolist()
            if not own and learns:
                free = (identities == -1).nonzero().flatten().tolist()
                oldest = int(seen.argmin())
                if free or seen[oldest] < self.steps:
                    own = [free[-1] if free else oldest]
                    if not free:
                        self.table._evicted_indices.append(torch.tensor(own))
            if own and learns:
                identities[own[0]], seen[own[0]] = one, int(self.steps)
            found.append(own[0] if own else -1)
        return torch.tensor(found, dtype=torch.int64)


def learning() -> tuple[list[list[int]], list[list[int]], State]:
    """Domains of this rank's ids in four steps and of all in evaluation, what was evicted, and the tables of ids."""
    domains = Slots(4, device="cpu", read_only=True)
    domains.read_only = False
    evicted: list[list[int]] = []
    domains.on_evicted(lambda gone: evicted.append(gone.tolist()))
    own = [[[100, -1, 200], [300, 200], [500], [600, 100]], [[200, 300], [-1], [400, 500], [700, 800, 900]]]
    found = [domains(torch.tensor(ids)).tolist() for ids in own[dist.get_rank()]]
    with torch.no_grad():
        found.append(domains(torch.arange(100, 1000, 100)).tolist())
    domains.eval()
    found.append(domains(torch.tensor([1000, 700])).tolist())
    return found, evicted, dict(domains.state_dict())


def test_ranks_agree_and_the_least_recently_seen_go(two_ranks: RankPool) -> None:
    (one, evicted, state), (two, evicted_too, state_too) = two_ranks.run(learning)
    assert evicted == evicted_too and all(torch.equal(value, state_too[name]) for name, value in state.items())
    of = dict(zip((100, 200, 300), (one[0][0], one[0][2], two[0][1]), strict=True))
    assert one[0][1] == -1 and two[1] == [-1] and two[0][0] == of[200]
    assert one[1] == [of[300], of[200]] and two[2][1] == one[2][0]  # an id keeps its domain, on any rank
    # step 3: 400 gets the free one, and 500 that of 100, seen in the first step alone
    assert evicted[0] == [of[100]] == [two[2][1]] and len(set(of.values()) | {two[2][0]}) == 4
    # step 4 has five ids for four domains: one of them, the last of all, goes without
    assert sorted(evicted[1]) == [0, 1, 2, 3] and sorted(one[3] + two[3]) == [-1, 0, 1, 2, 3]
    assert one[4] == two[4] and sum(domain >= 0 for domain in one[4]) == 4 and one[5] == two[5] and one[5][0] == -1
    assert int(state["steps"]) == 4


def resetting(sharded: bool) -> tuple[State, State, State, State, Tensor]:
    """Rows and optimizer state before and after two shops begin anew; and how far these are from the backbone."""
    runtime = runtime_of(MLoRA(rank=2), "adagrad", sharded)
    if sharded:
        list(losses_of(runtime, "adagrad", True, steps()))
        optimizers = [runtime.sharded.fused_optimizer]
    else:
        list(runtime.train(rows.batch([9], len(rows)) for rows in steps()))
        optimizers = list(runtime.stage_optimizer.by_name.values())
    before, state_before = rows_of(runtime.model), states(runtime, sharded)
    gone = torch.tensor([1, 6])
    reset_domains(runtime.sharded, gone, optimizers, seed=5)
    rows = random_rows(40, SHOPS)
    batch = rows.batch([9], 40)
    logits = []
    for route in (Route.DOMAIN, Route.BASE):
        with runtime.model.routed(route):
            logits += [scored.logits for scored in runtime.evaluate(iter([batch]))]
    adapted = (logits[0] != logits[1]).flatten()
    reset = torch.isin(rows.domains[:, 0], gone)
    return before, rows_of(runtime.model), state_before, states(runtime, sharded), adapted == ~reset


def states(runtime: object, sharded: bool) -> State:
    if sharded:
        return whole(runtime.fused_tensors())
    found = {}
    for name, optimizer in runtime.stage_optimizer.by_name.items():
        for place, roles in enumerate(optimizer.state.values()):
            own = {
                role: value for role, value in roles.items() if isinstance(value, Tensor) and value.shape[:1] == (9,)
            }
            found |= {f"{name}{place}{role}": value.clone() for role, value in own.items()}
    return found


@pytest.mark.parametrize(("sharded", "ranks"), [(False, 1), (True, 1), (True, 2)])
def test_evicted_domains_begin_anew_and_others_stay(
    sharded: bool, ranks: int, one_rank: RankPool, two_ranks: RankPool
) -> None:
    pool = one_rank if ranks == 1 else two_ranks
    kept = torch.tensor([domain not in (1, 6) for domain in range(9)])
    results = pool.run(resetting, sharded)
    for before, after, state_before, state_after, right in results:
        assert right.all() and len(before) == 2
        for name, rows in after.items():
            assert torch.equal(rows[kept], before[name][kept]) and (rows[~kept] != before[name][~kept]).any(1).all()
            assert torch.equal(rows, results[0][1][name])
        assert state_before and state_before.keys() == state_after.keys()
        for name, values in state_after.items():
            assert torch.equal(values[kept], state_before[name][kept]), name
            assert not values[~kept].any() and state_before[name][~kept].any(), name


def test_what_cannot_begin_anew_is_refused() -> None:
    for method, backbone, message in (
        (SingleLoRA(rank=2), "mlp", "which cannot begin anew while others go on"),
        (MoEMLoRA(rank=2), "dlrm", "has a gate that knows its domain, which cannot begin anew"),
    ):
        model = MultiDomainModel(materialize_tables(build_backbone(backbone)), method, SHOPS)
        with pytest.raises(ValueError, match=message):
            reset_domains(model, torch.tensor([1]))
