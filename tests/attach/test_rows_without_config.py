"""Rows on modules written by hand, which have no configuration: their embeddings tell which tokens can be tried."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import alignvec
from alignvec import AlignmentVector
from alignvec.errors import RowsError


class Small(nn.Module):
    def __init__(self, flips: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.types, self.tokens = nn.Embedding(2, 8), nn.Embedding(50, 8)
        self.linear, self.head = nn.Linear(8, 12), nn.Linear(12, 50)
        self.flips = flips

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.tokens(input_ids) + self.types(input_ids % 2)
        out = self.head(self.linear(hidden.flip(0) if self.flips else hidden).tanh())
        return out.flip(0) if self.flips else out


def merged(model: Small, deltas: dict[str, Tensor], coefficient: float) -> Small:
    twin = Small(model.flips).double()
    weights = model.state_dict()
    twin.load_state_dict({n: w.double() + coefficient * deltas.get(n, torch.zeros(1)) for n, w in weights.items()})
    return twin


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_rows_of_a_module_with_embeddings(backend: str) -> None:
    model = Small()
    deltas = {name: torch.randn_like(weight) for name, weight in model.named_parameters()}
    ids = torch.randint(50, (3, 4))
    expected = [merged(model, deltas, c)(ids[row : row + 1]) for row, c in enumerate((0.0, 1.0, -0.5))]
    alignment = alignvec.attach(model, {"v": AlignmentVector(deltas)}, backend=backend)
    alignment.set_rows([{}, {"v": 1.0}, {"v": -0.5}])
    torch.testing.assert_close(model(ids).double(), torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_what_turns_the_batch_around_is_refused_or_right() -> None:
    model = Small(flips=True)
    deltas = {"linear.weight": torch.randn(12, 8)}
    ids = torch.randint(50, (2, 4))
    expected = torch.cat([merged(model, deltas, c)(ids[row : row + 1]) for row, c in enumerate((0.0, 1.0))])
    alignment = alignvec.attach(model, {"v": AlignmentVector(deltas)})
    try:
        alignment.set_rows([{}, {"v": 1.0}])
        output = model(ids)
    except RowsError:
        return
    torch.testing.assert_close(output.double(), expected, atol=1e-4, rtol=1e-4)


def test_a_module_without_tokens_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    alignment = alignvec.attach(model, {"v": AlignmentVector({"0.weight": torch.ones(4, 4)})})
    with pytest.raises(RowsError, match="Sequential has no vocabulary"):
        alignment.set_rows([{}, {"v": 1.0}])
