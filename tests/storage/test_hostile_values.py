"""Parts that are finite and decode to infinity: refused alike when they are read, attached and merged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import alignvec
from alignvec import AlignmentVector
from alignvec.errors import AlignvecError
from alignvec.fingerprint import identify
from alignvec.formats import Encoded, check, encode

ROWS, COLUMNS = 37, 72
LARGEST = torch.finfo(torch.float32).max


class Layer(nn.Module):
    """One linear layer inside of a module."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.lin = nn.Linear(COLUMNS, ROWS, bias=False, dtype=dtype).requires_grad_(False)


def integers(name: str, code: int, scale: float) -> Encoded:
    """One code and its scale in the last row, zeros elsewhere."""
    whole = encode(name, torch.zeros(ROWS, COLUMNS))
    parts = {key: part.clone() for key, part in whole.parts.items()}
    parts["codes"][-1, 0] = code if name == "int8" else code + 8 | 0x80
    parts["scales"][-1, 0] = scale
    return Encoded(name, whole.shape, whole.options, parts)


def factors(a: Tensor, b: Tensor) -> Encoded:
    return Encoded("low-rank", (ROWS, COLUMNS), {"rank": len(a), "dtype": "float32"}, {"A": a, "B": b})


def constant(rank: int, size: float) -> Encoded:
    return factors(torch.full((rank, COLUMNS), size), torch.full((ROWS, rank), size))


def apart() -> Encoded:
    """Huge factors that never meet: no product overflows, though the largest of A times the largest of B would."""
    a, b = torch.zeros(2, COLUMNS), torch.zeros(ROWS, 2)
    a[0], b[:, 1], b[:, 0] = 1e30, 1e30, 1.0
    return factors(a, b)


def cancelling() -> Encoded:
    """Beyond the bound by norms, and finite: the last look is at the values themselves."""
    size = (0.4 * LARGEST) ** 0.5
    return factors(torch.full((2, COLUMNS), size), torch.tensor([[size, -size]]).expand(ROWS, 2).contiguous())


BAD = {
    "int8": integers("int8", 127, 2.0**121 * 1.1),
    "int8, the lowest code": integers("int8", -128, 2.0**121),
    "int4": integers("int4", 7, 2.0**126),
    "int4, the lowest code": integers("int4", -8, 2.0**125),
    "low-rank": constant(1, LARGEST**0.5 * 1.01),
    "low-rank, a sum": constant(8, LARGEST**0.5 * 0.5),
}
GOOD = {
    "int8": integers("int8", 127, 2.0**121 / 1.1),
    "int8, a scale that no code meets": integers("int8", 1, 2.0**127),
    "int4": integers("int4", 7, 2.0**125),
    "low-rank": constant(1, LARGEST**0.5 * 0.99),
    "low-rank, apart": apart(),
    "low-rank, cancelling": cancelling(),
}


@pytest.mark.parametrize("encoded", BAD.values(), ids=list(BAD))
def test_a_product_that_overflows_is_refused_wherever_it_is_used(encoded: Encoded) -> None:
    layer = Layer()
    vector = AlignmentVector({"lin.weight": encode("int8", torch.zeros(ROWS, COLUMNS))})
    vector._deltas.others["lin.weight"] = encoded  # type: ignore[union-attr]  # past the checks of its constructor
    with pytest.raises(AlignvecError, match=r"range|infinity"):
        check(encoded)
    with pytest.raises(AlignvecError, match=r"lin\.weight"):
        AlignmentVector({"lin.weight": encoded})
    with pytest.raises(AlignvecError, match=r"lin\.weight"):
        vector["lin.weight"]
    assert not isinstance(layer.lin, alignvec.modules.Aligned)


@pytest.mark.parametrize("encoded", BAD.values(), ids=list(BAD))
def test_and_attach_refuses_it_from_a_file(encoded: Encoded, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    with monkeypatch.context() as patched:
        patched.setattr("alignvec.deltas.formats.check", lambda encoded: None)
        AlignmentVector({"lin.weight": encoded}).save(tmp_path / "v")
    layer = Layer()
    with pytest.raises(AlignvecError, match=r"lin\.weight"):
        alignvec.attach(layer, {"v": tmp_path / "v"})
    assert type(layer.lin) is nn.Linear


@pytest.mark.parametrize("encoded", GOOD.values(), ids=list(GOOD))
def test_large_values_that_are_finite_are_taken(encoded: Encoded) -> None:
    vector = AlignmentVector({"lin.weight": encoded})
    assert vector["lin.weight"].isfinite().all()
    alignvec.attach(Layer(), {"v": vector})


def test_lossless_steps_between_the_ends_of_bfloat16_are_refused_as_a_delta() -> None:
    layer = Layer(torch.bfloat16)
    layer.lin.weight.fill_(-3e38)
    aligned = torch.full_like(layer.lin.weight, 3e38)
    encoded = encode("lossless", torch.zeros(ROWS, COLUMNS), layer.lin.weight, aligned=aligned)
    vector = AlignmentVector({"lin.weight": encoded}, identify(layer))
    with pytest.raises(AlignvecError, match=r"lin\.weight"):
        vector.with_base(layer)["lin.weight"]
    with pytest.raises(AlignvecError, match=r"lin\.weight: a lossless delta leaves float32's range"):
        alignvec.attach(layer, {"v": vector})
    assert type(layer.lin) is nn.Linear


def test_lossless_steps_out_of_the_numbers_name_their_tensor() -> None:
    """A vector without an identity is not compared, so that its steps may begin at other values."""
    layer = Layer(torch.bfloat16)
    layer.lin.weight.fill_(1.0)
    encoded = encode("lossless", torch.zeros(ROWS, COLUMNS), layer.lin.weight, aligned=layer.lin.weight * 1.25)
    layer.lin.weight.fill_(torch.finfo(torch.bfloat16).max)
    with pytest.raises(AlignvecError, match=r"lin\.weight: a lossless delta leads out"):
        alignvec.attach(layer, {"v": AlignmentVector({"lin.weight": encoded})})
