"""Vectors that do not fit the base that an adapter is written for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

from alignvec import AlignmentVector, formats
from alignvec.errors import AlignvecError
from alignvec.peft import to_peft
from tests.models import tiny

NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("rows", [1, 3])
def test_deltas_of_other_shapes_than_the_base_s_are_refused(rows: int, tmp_path: Path) -> None:
    """One row would be added to all rows of the base's tensor, three are an error of torch's."""
    model = tiny()
    shape = dict(model.named_parameters())[NAME].shape
    fits = formats.encode("low-rank:rank=2", torch.randn(shape))
    for name, delta in (
        ("model.embed_tokens.weight", torch.ones(rows, model.config.hidden_size)),
        ("model.norm.weight", torch.ones(rows)),
        ("model.layers.0.self_attn.k_proj.weight", formats.encode("low-rank:rank=1", torch.ones(rows, shape[1]))),
    ):
        with pytest.raises(AlignvecError, match=rf"delta {name} is \[{rows}.* has \[.*: give the vector's own base"):
            to_peft(AlignmentVector({NAME: fits, name: delta}), tmp_path / "adapter", model)
    assert list(tmp_path.iterdir()) == []
