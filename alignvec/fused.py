"""Fused projections: sibling layers that read the same tensor, computed in one launch by the first that is called.

The others take their results from it, each once, and only when they are given the very same tensor, unchanged. Modules,
parameters and hooks stay as they are. Nothing is fused while gradients are recorded or torch.compile traces (it sees
the layers side by side), nor in inference mode, where a tensor does not tell whether it was changed.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from alignvec import ops
from alignvec.foreign import ByRow

if TYPE_CHECKING:
    from alignvec.modules import AlignedLinear
    from alignvec.steps import Step

# Names of children of one module that multiply the same input.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"), ("w1", "w3"))
TOKENS = 64  # beyond, a launch is long enough to stand alone
MISSES = 2  # times in a row that results were left behind: these siblings do not share their input


@dataclass
class _Pending:
    """Results that wait for their layers, and what they are of."""

    x: Tensor
    state: tuple[Any, ...]
    results: dict[AlignedLinear, Tensor]


class Fused:
    """Layers that are computed together."""

    def __init__(self, members: Sequence[AlignedLinear]) -> None:
        self.members = tuple(members)
        self._misses = 0
        self._local = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> Fused:
        twin = Fused(())
        memo[id(self)] = twin
        twin.members = tuple(copy.deepcopy(member, memo) for member in self.members)
        return twin

    def take(self, member: AlignedLinear, x: Tensor) -> Tensor | None:
        """The result of `member` for x [..., in_features]; None when it has to be computed alone."""
        if self._misses >= MISSES or torch.is_grad_enabled() or x.is_inference():
            return None
        step = self.members[0].edit.coefficients.step
        if step is None or step.calls is not None or isinstance(x, ByRow):
            return None
        state = self._state(x, step)
        pending: _Pending | None = getattr(self._local, "pending", None)
        if pending is not None:
            if pending.x is x and pending.state == state and member in pending.results:
                result = pending.results.pop(member)
                if not pending.results:
                    self._local.pending, self._misses = None, 0
                return result
            self._local.pending = None
            self._misses += 1
        if self._misses >= MISSES or not self._ready(x, step):
            return None
        results = self._compute(x, step)
        result = results.pop(member)
        self._local.pending = _Pending(x, state, results)
        return result

    def _state(self, x: Tensor, step: Step) -> tuple[Any, ...]:
        """What has to be the same for a result to be that of another call."""
        stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
        return x._version, step, stream

    def _parameter(self, name: str) -> list[nn.Parameter | None]:
        return [member._parameters[name] for member in self.members]

    def _ready(self, x: Tensor, step: Step) -> bool:
        """Whether all can be computed now: few tokens in the batch's order, and no layer's weight elsewhere."""
        biases = {bias is None for bias in self._parameter("bias")}
        edits = [member.edit for member in self.members]
        return (
            len(biases) == 1
            and x.numel() <= TOKENS * x.shape[-1]
            and all(weight is not None and weight.device == x.device for weight in self._parameter("weight"))
            and all(edit.device == x.device for edit in edits)
            and (step.rows == 1 or all(edit.takes_rows(step, x) for edit in edits))
        )

    def _compute(self, x: Tensor, step: Step) -> dict[AlignedLinear, Tensor]:
        edits = [member.edit for member in self.members]
        deltas = [edit.deltas["weight"] for edit in edits]
        y = ops.linear_group(
            x,
            self._parameter("weight"),
            [bias for bias in self._parameter("bias") if bias is not None],
            [spec for own in deltas for spec in own.specs],
            [len(own.specs) for own in deltas],
            [part for own in deltas for part in own.parts],
            [edit.stack("bias") for edit in edits],
            [edit.columns for edit in edits],
            *step.on(x.device),
            None,
            *edits[0].choices,
        )
        sizes = [edit.deltas["weight"].operands[0].shape[0] for edit in edits]
        return dict(zip(self.members, y.split(sizes, -1), strict=True))


def fuse(children: Mapping[str, AlignedLinear]) -> None:
    """Fuse those of a module's children that are siblings by name and fit together."""
    for names in SIBLINGS:
        members = [children[name] for name in names if name in children]
        members = [member for member in members if "weight" in member.edit.deltas]
        if len(members) > 1 and len({member.in_features for member in members}) == 1:
            fused = Fused(members)
            for member in members:
                member.edit.fused = fused
