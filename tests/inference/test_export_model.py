"""A bundle of a model that no run of this package has trained: TorchRec's own DLRM, in somebody's own loop."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
import torch
from sklearn.metrics import log_loss
from torch import Tensor
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.helpers import randomise
from tests.inference.models import SCENARIO, randomise_model
from torchrec_mdr.adapters import ParameterGroup
from torchrec_mdr.data.schema import Division, Schema, SparseFeature
from torchrec_mdr.inference import Scorer, export_again, export_model, take_adapter
from torchrec_mdr.methods import MLoRA
from torchrec_mdr.model import MultiDomainModel, parameter_groups
from torchrec_mdr.predict import predict

ITEM, TAGS = SparseFeature("item", 30), SparseFeature("tags", 9, multi_hot=True)
SCHEMA = Schema("mine", "label", (ITEM, TAGS), ("x", "y"), (SCENARIO,), {})


def model() -> MultiDomainModel:
    tables = [
        EmbeddingBagConfig(
            name=f"t_{own.name}", embedding_dim=8, num_embeddings=own.num_embeddings, feature_names=[own.name]
        )
        for own in (ITEM, TAGS)
    ]
    dlrm = DLRM(EmbeddingBagCollection(tables=tables), 2, [16, 8], [12, 6, 1])
    made = MultiDomainModel(dlrm, MLoRA(rank=2), [SCENARIO])
    randomise_model(made)
    return made


def rows(seed: int, count: int = 400) -> tuple[Tensor, KeyedJaggedTensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.cat([torch.ones(count, dtype=torch.int64), torch.randint(3, (count,), generator=generator)])
    items = torch.randint(30, (count,), generator=generator)
    tags = torch.randint(9, (int(lengths[count:].sum()),), generator=generator)
    features = KeyedJaggedTensor(["item", "tags"], torch.cat([items, tags]), lengths=lengths, stride=count)
    return torch.rand(count, 2, generator=generator), features, torch.randint(3, (count,), generator=generator)


@torch.no_grad()
def test_it_serves_calibrates_and_takes_adapters(tmp_path: Path) -> None:
    trained, bundle = model(), str(tmp_path / "bundle")
    dense, features, ids = rows(1)
    wanted = trained.eval()(dense, features, ids).flatten()
    trained.train()
    # labels that want a scale of two
    labels = (torch.rand(400, generator=torch.Generator().manual_seed(3)) < torch.sigmoid(2 * wanted)).float()
    export_model(trained, SCHEMA, bundle, validation=[(dense, features, ids, labels)])
    assert trained.training
    scorer = Scorer(bundle)
    scores = scorer.score(dense, features, ids)
    torch.testing.assert_close(scores.logits, wanted, rtol=2e-6, atol=2e-6)
    assert log_loss(labels, scores.probabilities) < log_loss(labels, torch.sigmoid(wanted.double()))
    adapters = parameter_groups(trained)
    randomise({n: p for n, p in trained.named_parameters() if adapters[n] is ParameterGroup.ADAPTERS}, 5)
    again = trained.eval()(dense, features, ids).flatten()
    assert scorer.put(take_adapter(trained, "cart")) == 2
    second, mine = scorer.score(dense, features, ids), ids == 1
    torch.testing.assert_close(second.logits[mine], again[mine], rtol=1e-6, atol=1e-6)
    assert torch.equal(second.logits[~mine], scores.logits[~mine])
    table = {"item": [7, 8], "tags": [[1, 2], []], "x": [0.5, 1.0], "y": [0.0, 1.0], "domain_scenario": [1, 7]}
    found = predict(scorer, pl.DataFrame(table))
    assert found is not None and found["unknown_domain"].to_list() == [None, "scenario"]
    for eager in (lambda: Scorer(bundle, compiled=False), lambda: export_again(bundle)):
        with pytest.raises(ValueError, match="has no config.yaml, by which a run's model is built again"):
            eager()


def test_what_does_not_fit_together_is_said_in_a_sentence(tmp_path: Path) -> None:
    trained = model()

    def refused(words: str, given: object = trained, schema: Schema = SCHEMA, **options: object) -> None:
        with pytest.raises(ValueError, match=words) as caught:
            export_model(given, schema, str(tmp_path / "bundle"), **options)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())

    def changed(**parts: object) -> Schema:
        return Schema(**{**vars(SCHEMA), **parts})  # type: ignore[arg-type]

    refused("made of a MultiDomainModel, not of DLRM", trained.backbone)
    refused("on meta; a bundle is made on the CPU", model().to("meta"))
    refused(
        r"divisions \(scenario\) are not the model's \(scenario\)", schema=changed(divisions=(Division("scenario", 3),))
    )
    refused(
        "'item' has 31 ids in the schema, and table 't_item' has 30",
        schema=changed(sparse_features=(SparseFeature("item", 31), TAGS)),
    )
    refused("'tags' has no ids in the schema", schema=changed(sparse_features=(ITEM,)))
    refused(
        r"does not take rows with the schema's 1 dense features and 2 sparse ones \(mat1",
        schema=changed(dense_features=("x",)),
    )
    refused("there are no validation rows to calibrate by", validation=[])
    refused("--resident must be at least 1", resident=0)
