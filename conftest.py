"""What pytest collects."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("triton") else ["torchrec_mdr/ops/triton/*.py"]
