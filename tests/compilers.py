"""The compilers of torch.compile that run here: on a CPU inductor needs a C++ compiler."""

import os
import shutil

import pytest
import torch

_HAS_CPP = any(map(shutil.which, filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++"))))
_CAN = torch.cuda.is_available() or _HAS_CPP

BACKENDS = (
    "aot_eager",
    pytest.param(
        "inductor", marks=pytest.mark.skipif(not _CAN, reason="inductor needs a C++ compiler, and none is here")
    ),
)
