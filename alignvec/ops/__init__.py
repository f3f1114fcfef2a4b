"""The torch.library operators: schemas, fake kernels, gradients, and which backend runs them.

Those with vectors take the batch-major activations of a layer, the `k` vectors present in it, the column of each vector
in the coefficient table, and the live table itself. A schema carries operands as `str[] specs` and `Tensor[] parts`,
the tensors of all of them in one list (`kernels.operands.parse`); deltas of one-dimensional parameters are one tensor
[k, features]. Nothing that shapes a graph depends on a value of the table or on its number of rows, so compiled and
captured graphs follow later writes.
"""

from alignvec.ops.embedding import embedding
from alignvec.ops.linear import linear, linear_group, linear_input_grad
from alignvec.ops.mix import materialise, mix
from alignvec.ops.norm import layer_norm, rms_norm
from alignvec.ops.publish import publish
from alignvec.ops.step import add_rms_norm, decode_attention, gated, rotary_append

__all__ = [
    "add_rms_norm",
    "decode_attention",
    "embedding",
    "gated",
    "layer_norm",
    "linear",
    "linear_group",
    "linear_input_grad",
    "materialise",
    "mix",
    "publish",
    "rms_norm",
    "rotary_append",
]
