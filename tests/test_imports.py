"""What an installation without extras can import."""

from __future__ import annotations

import subprocess
import sys

EXTRAS = ("polars", "matplotlib", "jinja2", "sklearn", "pandas", "aiohttp")


def test_training_and_serving_need_no_extra() -> None:
    modules = "train, export, adapter, merge, verify, inference, launch.mdr"
    imports = "import torchrec_mdr, " + ", ".join(f"torchrec_mdr.{name.strip()}" for name in modules.split(","))
    code = f"import sys\nsys.modules.update(dict.fromkeys({EXTRAS!r}))\n{imports}\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
