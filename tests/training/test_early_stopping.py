"""Which result of a stage is kept, and when it stops, against a loop over domains."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from torchrec_mdr.training.early_stopping import BestAboveStart, BestOverall, BestPerDomain, LogLosses, OwnedRows

DOMAINS, NAN = 5, float("nan")


@pytest.mark.parametrize("patience", [1, 2])
def test_the_best_model_overall(patience: int) -> None:
    selection, values = BestOverall(patience), [0.5, 0.6, 0.6, 0.7, 0.1, 0.2, 0.9]
    kept, best, waited = [], -1.0, 0
    for step, value in enumerate(values):
        assert selection.done == (waited >= patience)
        if selection.done:
            break
        better = selection.update(value, torch.empty(0))
        assert better == (value > best)
        best, waited = (value, 0) if better else (best, waited + 1)
        kept.append(step)
    assert kept == ([0, 1, 2] if patience == 1 else [0, 1, 2, 3, 4, 5])


def test_the_first_result_is_the_best_so_far_whatever_it_is() -> None:
    selection = BestOverall(3)
    assert selection.update(0.0, torch.empty(0)) and not selection.update(0.0, torch.empty(0))
    assert selection.info() == {"best": 0.0, "waited": 1, "times_better": 1}


def test_the_best_overall_goes_on_where_it_was() -> None:
    selection, fresh = BestOverall(2), BestOverall(2)
    selection.update(0.7, torch.empty(0))
    selection.update(0.6, torch.empty(0))
    fresh.restore(selection.info(), selection.tensors())
    assert not fresh.update(0.65, torch.empty(0)) and fresh.done


class Tensors:
    """A bank with one row a domain, and a table with several, in any order."""

    def __init__(self) -> None:
        self.bank = torch.zeros(DOMAINS, 2, 3)
        self.table = torch.zeros(8, 4)
        self.owners = torch.tensor([0, 0, 2, 1, 4, 4, 3, 1])

    def owned(self) -> dict[str, OwnedRows]:
        return {"bank": OwnedRows(self.bank, torch.arange(DOMAINS)), "table": OwnedRows(self.table, self.owners)}

    def train(self, step: int, frozen: Tensor) -> None:
        """Every domain's rows become the number of the step, unless the domain is frozen."""
        self.bank[~frozen] = step
        self.table[~frozen[self.owners]] = step

    def steps(self) -> list[float]:
        """The step that each domain's rows are of; all of them must be of the same."""
        for domain in range(DOMAINS):
            rows = torch.cat([self.bank[domain].flatten(), self.table[self.owners == domain].flatten()])
            assert (rows == rows[0]).all()
        return self.bank[:, 0, 0].tolist()


def some_results(steps: int) -> Tensor:
    torch.manual_seed(0)
    results = torch.rand(steps, DOMAINS, dtype=torch.float64)
    results[:, 0] = torch.linspace(0.1, 0.9, steps)
    results[:, 3] = NAN  # a domain with one class only
    results[:, 4] = torch.linspace(0.9, 0.1, steps)  # best at its start
    return results


def loop(results: Tensor, trains: Tensor, patience: int) -> tuple[list[float], list[list[bool]]]:
    """The step that each domain keeps, and which are frozen after each validation, one domain at a time."""
    kept, frozen = [], []
    for domain in range(DOMAINS):
        best, best_step, waited, history = float("-inf"), 0.0, 0 if trains[domain] else patience, []
        for step, value in enumerate(results[:, domain].tolist()):
            if waited < patience:
                if value > best:
                    best, best_step, waited = value, float(step), 0
                else:
                    waited += 1
            history.append(waited >= patience)
        kept.append(best_step)
        frozen.append(history)
    return kept, [list(column) for column in zip(*frozen, strict=True)]


@pytest.mark.parametrize("patience", [1, 2, 4])
@pytest.mark.parametrize("trains", [[1, 1, 1, 1, 1], [0, 1, 0, 1, 1]])
def test_each_domain_keeps_its_own_best(trains: list[int], patience: int) -> None:
    tensors, domains = Tensors(), torch.tensor(trains, dtype=torch.bool)
    selection, results = BestPerDomain(tensors.owned(), domains, patience), some_results(9)
    kept, frozen = loop(results, domains, patience)
    for step, result in enumerate(results):
        tensors.train(step, selection.frozen)
        assert selection.update(float(result.nanmean()), result)
        assert selection.frozen.tolist() == frozen[step] and selection.done == all(frozen[step])
    assert tensors.steps() != kept
    selection.put_back()
    assert tensors.steps() == kept
    assert kept[3] == 0 and kept[4] == 0  # no AUC, and best at the start
    assert [step for step, trained in zip(kept, trains, strict=True) if not trained] == [0.0] * trains.count(0)


def test_a_selection_goes_on_where_it_was() -> None:
    results, domains = some_results(9), torch.ones(DOMAINS, dtype=torch.bool)
    tensors, others = Tensors(), Tensors()
    once, first = BestPerDomain(tensors.owned(), domains, 3), BestPerDomain(others.owned(), domains, 3)
    for step, result in enumerate(results):
        tensors.train(step, once.frozen)
        once.update(0.0, result)
        if step == 4:
            saved = {name: tensor.clone() for name, tensor in first.tensors().items()}, first.info()
            others = Tensors()
            others.train(3, torch.zeros(DOMAINS, dtype=torch.bool))
            first = BestPerDomain(others.owned(), domains, 3)
            first.restore(saved[1], saved[0])
        others.train(step, first.frozen)
        first.update(0.0, result)
        assert torch.equal(once.frozen, first.frozen)
    for selection in (once, first):
        selection.put_back()
    assert tensors.steps() == others.steps() and len(set(tensors.steps())) > 1


def test_what_is_kept_is_a_copy() -> None:
    tensors = Tensors()
    selection = BestPerDomain(tensors.owned(), torch.ones(DOMAINS, dtype=torch.bool), 2)
    tensors.train(6, torch.zeros(DOMAINS, dtype=torch.bool))
    selection.put_back()  # before any validation
    assert tensors.steps() == [0.0] * DOMAINS
    selection.update(0.0, torch.full((DOMAINS,), 0.5, dtype=torch.float64))
    tensors.train(7, torch.zeros(DOMAINS, dtype=torch.bool))
    selection.put_back()
    assert tensors.steps() == [0.0] * DOMAINS


def guard(overall: float, *domains: float) -> LogLosses:
    return LogLosses(overall, torch.tensor(domains, dtype=torch.float64))


def test_a_model_whose_log_loss_runs_away_is_not_kept() -> None:
    """AUC rises all the time, log loss falls and then rises: alone AUC keeps the last, with the guard the fourth."""
    auc = [0.60, 0.65, 0.68, 0.70, 0.71, 0.72, 0.73]
    loss = [0.50, 0.48, 0.47, 0.472, 0.49, 0.60, 0.79]
    kept: dict[float | None, int] = {}
    for tolerance in (None, 0.01):
        selection = BestOverall(9, tolerance)
        for step, (value, logloss) in enumerate(zip(auc, loss, strict=True)):
            if selection.update(value, torch.empty(0), guard(logloss)):
                kept[tolerance] = step
    assert kept == {None: 6, 0.01: 3}


def test_a_start_that_training_leaves_is_kept_until_something_better_comes() -> None:
    """Neither AUC nor log loss may be worse for it, and patience looks at what comes after the start alone."""
    results = [(0.70, 0.5), (0.60, 0.9), (0.65, 0.8), (0.70, 0.49), (0.71, 0.52), (0.72, 0.48), (0.71, 0.4), (0.7, 0.4)]
    kept, waited = [], []
    selection = BestAboveStart(3, 0.01)
    for value, logloss in results:
        kept.append(selection.update(value, torch.empty(0), guard(logloss)))
        waited.append(selection.waited)
        assert selection.improved == (sum(kept) > 1) and not selection.done
        fresh = BestAboveStart(3, 0.01)
        fresh.restore(json.loads(json.dumps(selection.info())), selection.tensors())
        selection = fresh
    assert kept == [True, False, False, False, False, True, True, False]
    assert waited == [0, 0, 0, 0, 1, 0, 0, 1]


def test_a_guard_goes_on_where_it_was() -> None:
    selection, fresh = BestOverall(5, 0.01), BestOverall(5, 0.01)
    selection.update(0.7, torch.empty(0), guard(0.5))
    selection.update(0.6, torch.empty(0), guard(0.4))  # a much lower log loss takes the place of a higher AUC
    fresh.restore(selection.info(), selection.tensors())
    assert fresh.best == 0.6 and not fresh.update(0.9, torch.empty(0), guard(0.41)) and fresh.waited == 1
    assert fresh.update(0.61, torch.empty(0), guard(0.403)) and selection.improved


def test_each_domain_has_its_own_guard() -> None:
    tensors = Tensors()
    selection = BestPerDomain(tensors.owned(), torch.ones(DOMAINS, dtype=torch.bool), 9, logloss_tolerance=0.01)
    for step, (auc, loss) in enumerate([(0.6, 0.5), (0.7, 0.504), (0.8, 0.6)]):
        tensors.train(step, selection.frozen)
        # the second domain's log loss falls all the time, the third has no AUC
        losses = guard(loss, loss, 0.5 - 0.1 * step, loss, loss, loss)
        selection.update(auc, torch.tensor([auc, auc, NAN, auc, 1 - auc], dtype=torch.float64), losses)
    selection.put_back()
    assert tensors.steps() == [1.0, 2.0, 0.0, 1.0, 0.0]
