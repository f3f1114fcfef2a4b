"""Operations on sets of alignment vectors: merging, sparsifying, truncating and decorrelating them.

Every operation takes vectors by name, as `alignvec.attach` does, and reads them tensor by tensor; `streamed.Storage`
says where results go.
"""

from alignvec.surgery.cosines import Cosines, cosines
from alignvec.surgery.rank import isotropic, truncate, tsv
from alignvec.surgery.shared import remove_shared_mean
from alignvec.surgery.sparse import dare, ties, ties_parts
from alignvec.surgery.streamed import Storage

__all__ = [
    "Cosines",
    "Storage",
    "cosines",
    "dare",
    "isotropic",
    "remove_shared_mean",
    "ties",
    "ties_parts",
    "truncate",
    "tsv",
]
