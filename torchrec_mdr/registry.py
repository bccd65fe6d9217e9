"""What exists under which name: ours, listed here, and what other packages bring as entry points.

A package adds a method, say, without a line here::

    [project.entry-points."torchrec_mdr.methods"]
    my_method = "my_package.my_method:MyMethod"
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any


class Registry(Mapping[str, Any]):
    """Objects by name. Each is imported when it is first asked for.

    Args:
        kind (str): what they are, for errors.
        ours (dict[str, str]): this package's, as `module:attribute`.

    Raises:
        KeyError: there is no such name.
        ValueError: an object cannot be imported.

    Example::

        >>> METHODS["mlora"].__name__, METHODS.name_of(METHODS["mlora"])
        ('MLoRA', 'mlora')
        >>> METHODS.check("lora", "--method")
        Traceback (most recent call last):
        ...
        ValueError: --method 'lora' is unknown; choose one of mlora, multilora, single_lora, moe_mlora, single, mix, ...
    """

    def __init__(self, kind: str, ours: dict[str, str]) -> None:
        self.kind = kind
        self._ours = ours

    @cached_property
    def _known(self) -> dict[str, EntryPoint]:
        """Ours and those of other packages; a name of ours stays ours."""
        group = f"torchrec_mdr.{self.kind}s"
        others = {point.name: point for point in entry_points(group=group)}
        return others | {name: EntryPoint(name, value, group) for name, value in self._ours.items()}

    def __getitem__(self, name: str) -> Any:
        point = self._known[name]
        try:
            return point.load()
        except (ImportError, AttributeError) as error:
            raise ValueError(f"{self.kind} '{name}' ({point.value}) cannot be imported: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter([*self._ours, *(name for name in sorted(self._known) if name not in self._ours)])

    def __len__(self) -> int:
        return len(self._known)

    def name_of(self, found: Any) -> str:
        """The name of one of the objects."""
        value = f"{found.__module__}:{found.__qualname__}"
        for name, point in self._known.items():
            if point.value.replace(" ", "") == value:
                return name
        for name in self:  # an entry point may name an object by where it is imported to
            if self[name] is found:
                return name
        raise ValueError(f"{value} is no registered {self.kind}")

    def check(self, name: object, option: str, hint: str = "") -> None:
        """Raises ValueError for a name that nothing has; option is what names it."""
        if name not in self._known:
            raise ValueError(f"{option} '{name}' is unknown; choose one of {', '.join(self) or 'none'}{hint}")


METHODS = Registry(
    "method",
    {
        "mlora": "torchrec_mdr.methods.mlora:MLoRA",
        "multilora": "torchrec_mdr.methods.multilora:MultiLoRA",
        "single_lora": "torchrec_mdr.methods.multilora:SingleLoRA",
        "moe_mlora": "torchrec_mdr.methods.moe_mlora:MoEMLoRA",
        "single": "torchrec_mdr.baselines.single:Single",
        "mix": "torchrec_mdr.baselines.mix:Mix",
        "finetune": "torchrec_mdr.baselines.finetune:Finetune",
        "shared_bottom": "torchrec_mdr.baselines.shared_bottom:SharedBottom",
        "mmoe": "torchrec_mdr.baselines.mmoe:MMoE",
        "ple": "torchrec_mdr.baselines.ple:PLE",
        "star": "torchrec_mdr.baselines.star:Star",
        "hamur": "torchrec_mdr.baselines.hamur:Hamur",
        "plate": "torchrec_mdr.baselines.plate:Plate",
    },
)
BACKBONES = Registry(
    "backbone",
    {
        "mlp": "torchrec_mdr.backbones.mlp:MLPConfig",
        "dlrm": "torchrec_mdr.backbones.dlrm:DLRMConfig",
        "dlrm_dcn": "torchrec_mdr.backbones.dlrm_dcn:DLRMDCNConfig",
        "wdl": "torchrec_mdr.backbones.wdl:WDLConfig",
        "deepfm": "torchrec_mdr.backbones.deepfm:DeepFMConfig",
        "nfm": "torchrec_mdr.backbones.nfm:NFMConfig",
        "autoint": "torchrec_mdr.backbones.autoint:AutoIntConfig",
        "pnn": "torchrec_mdr.backbones.pnn:PNNConfig",
        "dcn": "torchrec_mdr.backbones.dcn:DCNConfig",
        "fibinet": "torchrec_mdr.backbones.fibinet:FiBiNETConfig",
        "xdeepfm": "torchrec_mdr.backbones.xdeepfm:XDeepFMConfig",
    },
)
DATASETS = Registry(
    "dataset",
    {
        "synthetic": "torchrec_mdr.data.datasets.synthetic:Synthetic",
        "movielens-1m": "torchrec_mdr.data.datasets.movielens_1m:MovieLens1M",
        "movielens-100k": "torchrec_mdr.data.datasets.movielens_100k:MovieLens100K",
        "amazon-2014": "torchrec_mdr.data.datasets.amazon_2014:Amazon2014",
        "amazon-2018": "torchrec_mdr.data.datasets.amazon_2018:Amazon2018",
        "amazon-6": "torchrec_mdr.data.datasets.amazon_6:Amazon6",
        "ali-ccp": "torchrec_mdr.data.datasets.ali_ccp:AliCCP",
        "taobao-themes": "torchrec_mdr.data.datasets.taobao:TaobaoThemes",
        "kuairand-pure": "torchrec_mdr.data.datasets.kuairand:KuaiRandPure",
        "douban": "torchrec_mdr.data.datasets.douban:Douban",
        "criteo": "torchrec_mdr.data.datasets.criteo:Criteo",
    },
)
# metrics beside those that every evaluation has, all of other packages; see torchrec_mdr.metrics.GroupMetric
METRICS = Registry("metric", {})
# what a stage may ask for beside training; see torchrec_mdr.training.hooks
HOOKS = Registry("hook", {"leave_one_out": "torchrec_mdr.experiments.leave_one_out.hook:LeaveOneOut"})
