"""The beginning of a step: staged coefficients become the live ones."""

from __future__ import annotations

import torch
from torch import Tensor

from alignvec.coefficients import publish_lock

torch.library.define(
    "alignvec::publish", "(Tensor staged_table, Tensor staged_rows, Tensor(a!) table, Tensor(b!) rows) -> ()"
)
publish = torch.ops.alignvec.publish


@torch.library.impl("alignvec::publish", "CompositeExplicitAutograd")
def _publish(staged_table: Tensor, staged_rows: Tensor, table: Tensor, rows: Tensor) -> None:
    """Copy the staged coefficients over the live ones."""
    with publish_lock:
        table.copy_(staged_table)
        rows.copy_(staged_rows)


@torch.library.register_fake("alignvec::publish")
def _publish_fake(staged_table: Tensor, staged_rows: Tensor, table: Tensor, rows: Tensor) -> None:
    return None
