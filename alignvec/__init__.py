"""alignvec: alignment vectors applied inside the matmul, dialled at inference time.

Importing this package imports neither torch nor transformers, and initialises neither CUDA nor Triton: a name is loaded
when it is first used. The operators of ``torch.ops.alignvec`` are registered then, too: a program that only loads an
exported or compiled model which calls them has to ``import alignvec.ops``.
"""

import sys
from typing import TYPE_CHECKING

from alignvec.errors import AlignvecError
from alignvec.lazy import Package

if TYPE_CHECKING:
    from alignvec.alignment import Alignment
    from alignvec.attach import attach
    from alignvec.check import check
    from alignvec.convert import convert
    from alignvec.decoding import Decoder, Sampling
    from alignvec.extract import extract
    from alignvec.merge import merge
    from alignvec.peft import from_peft, to_peft
    from alignvec.planner.explain import plan
    from alignvec.vector import AlignmentVector, load

__version__ = "0.1.0"
__all__ = [
    "Alignment",
    "AlignmentVector",
    "AlignvecError",
    "Decoder",
    "Sampling",
    "attach",
    "check",
    "convert",
    "extract",
    "from_peft",
    "load",
    "merge",
    "plan",
    "to_peft",
]

_LAZY = {  # the module that each name is loaded from
    "Alignment": "alignvec.alignment",
    "AlignmentVector": "alignvec.vector",
    "Decoder": "alignvec.decoding",
    "Sampling": "alignvec.decoding",
    "attach": "alignvec.attach",
    "check": "alignvec.check",
    "convert": "alignvec.convert",
    "extract": "alignvec.extract",
    "from_peft": "alignvec.peft",
    "load": "alignvec.vector",
    "merge": "alignvec.merge",
    "plan": "alignvec.planner.explain",
    "to_peft": "alignvec.peft",
}

sys.modules[__name__].__class__ = Package
