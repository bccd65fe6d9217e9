"""Prints what a C++ compiler needs to build a program on libtorch: `g++ score.cpp -o score $(python cflags.py)`."""

from __future__ import annotations

import torch
from torch.utils.cpp_extension import include_paths, library_paths

folders = library_paths()
flags = [f"-I{folder}" for folder in include_paths()]
flags += [f"-L{folder}" for folder in folders] + [f"-Wl,-rpath,{folder}" for folder in folders]
flags += [
    "-Wl,--no-as-needed",
    "-ltorch",
    "-ltorch_cpu",
    "-lc10",
    f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
]
print(" ".join(flags))
