"""alignvec: alignment vectors applied inside the matmul, dialled at inference time.

Importing this package initialises neither CUDA nor Triton.
"""

from alignvec.alignment import Alignment
from alignvec.attach import attach
from alignvec.check import check
from alignvec.convert import convert
from alignvec.decoding import Decoder, Sampling
from alignvec.errors import AlignvecError
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
