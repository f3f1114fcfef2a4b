"""Rows encoded by themselves and joined are the tensor encoded as a whole, part by part."""

from __future__ import annotations

import pytest
import torch

from alignvec import encoder, extract, formats
from alignvec.errors import AlignvecError
from alignvec.formats import auto, lossless
from alignvec.formats.spec import Encoded
from tests.storage.test_formats_lossless import same_bits

BY_ROWS = ["dense", "int8", "int4:group=32", "sign", "sign:group=32", *(f"lossless:width={w}" for w in range(2, 9))]
SHAPES = [(1, 4097), (7, 33), (5, 8), (2, 3, 77), (1, 1), (130, 1001)]


def pair(shape: tuple[int, ...], dtype: torch.dtype, share: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """A base and an aligned tensor whose weights moved, that share of them, by steps of every size."""
    base = (torch.randn(shape) * 0.02).to(dtype)
    moved = base.float() + torch.randn(shape) * 1e-4 * (torch.rand(shape) < share)
    return base, moved.to(dtype)


@pytest.mark.parametrize("format", BY_ROWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_joined_rows_are_the_whole(dtype: torch.dtype, format: str) -> None:
    for shape in SHAPES:
        base, aligned = pair(shape, dtype)
        delta = aligned.float() - base.float()
        whole = formats.encode(format, delta, base, "w", aligned=aligned)
        rows = [tensor.reshape(-1, shape[-1]).split(3) for tensor in (delta, base, aligned)]
        pieces = [formats.encode(format, d, b, "w", aligned=a) for d, b, a in zip(*rows, strict=True)]
        joined = formats.joined(iter(pieces), shape, "w")
        formats.check(joined)
        assert (joined.name, joined.shape, joined.options) == (whole.name, whole.shape, whole.options)
        assert joined.parts.keys() == whole.parts.keys()
        for part, values in whole.parts.items():
            assert joined.parts[part].dtype == values.dtype
            assert torch.equal(joined.parts[part], values), part


@pytest.mark.parametrize("share", [1.0, 0.1, 0.001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_extraction_of_few_rows_at_a_time_gives_the_aligned_model(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, share: float
) -> None:
    monkeypatch.setattr(encoder, "READ", 300)
    model = torch.nn.ParameterDict({f"w{i}": pair(shape, dtype)[0] for i, shape in enumerate(SHAPES)})
    other = torch.nn.ParameterDict(
        {
            name: (p.float() + torch.randn(p.shape) * 1e-4 * (torch.rand(p.shape) < share)).to(dtype)
            for name, p in model.items()
        }
    )
    with torch.no_grad():
        other["w4"] += 1  # so that the smallest differs, too
    vector = extract(model, other, format="lossless")
    for name in vector:
        assert same_bits(lossless.apply(vector.encoded(name), model[name].detach()), other[name].detach())
        fewest = min(formats.encode(f"lossless:width={w}", *_given(model, other, name)).nbytes for w in lossless.WIDTHS)
        assert vector.encoded(name).nbytes == fewest
        counted = auto.measure(formats.parse("lossless"), *_given(model, other, name))
        assert counted is not None
        assert counted[1] == fewest


def _given(
    model: torch.nn.ParameterDict, other: torch.nn.ParameterDict, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    base, aligned = model[name].detach(), other[name].detach()
    return aligned.float() - base.float(), base


def test_a_side_table_beyond_int32_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lossless, "MOST_ASIDE", 3)
    base = torch.ones(2, 2).bfloat16()
    pieces: list[Encoded] = [
        formats.encode("lossless:width=2", torch.full((1, 2), -3.0), row[None], "w") for row in base
    ]
    with pytest.raises(AlignvecError, match="w has too many large steps"):
        formats.joined(pieces, (2, 2), "w")


def test_a_step_that_wraps_in_16_bits_is_a_large_one() -> None:
    """From the lowest bfloat16 number to the largest it is 65279: -257 in 16 bits, beyond every field."""
    largest = torch.finfo(torch.bfloat16).max
    base = torch.tensor([[-largest, largest, 1.0]]).bfloat16()
    aligned = torch.tensor([[largest, -largest, 1.0]]).bfloat16()
    for width in lossless.WIDTHS:
        encoded = formats.encode(f"lossless:width={width}", torch.zeros(1, 3), base, aligned=aligned)
        assert encoded.parts["side_columns"].tolist() == [0, 1]
        assert same_bits(lossless.apply(encoded, base), aligned)
