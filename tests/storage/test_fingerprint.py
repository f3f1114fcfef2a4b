"""The checksum depends on the values alone: not on dtype, pieces, layout or device."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from alignvec.errors import AlignvecError
from alignvec.fingerprint import ROW, BaseIdentity, Checksum, checksum, identify

CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]
SIZES = [0, 1, 5, ROW - 1, ROW, ROW + 1, 3 * ROW, 3 * ROW + 7]


@pytest.mark.parametrize("size", SIZES)
def test_pieces_do_not_matter(size: int) -> None:
    values = torch.randn(size)
    whole = checksum(values)

    @settings(max_examples=10, deadline=None)
    @given(st.lists(st.integers(1, 2 * ROW), min_size=1, max_size=8))
    def check(pieces: list[int]) -> None:
        digest = Checksum()
        start = 0
        for piece in [*pieces, size]:
            digest.update(values[start : start + piece])
            start += piece
        assert digest.hexdigest() == whole

    check()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_and_device_do_not_matter(dtype: torch.dtype, device: str) -> None:
    values = torch.randn(7, 5003).bfloat16()
    assert checksum(values.to(device, dtype)) == checksum(values)


def test_layout_does_not_matter() -> None:
    values = torch.randn(300, 201).bfloat16()
    assert checksum(values.t().contiguous().t()) == checksum(values)
    assert checksum(torch.randn(9).expand(4, 9)) != checksum(values)
    assert checksum(values.flatten()[3:]) == checksum(values.flatten()[3:].clone())


@pytest.mark.parametrize("size", [1, 40, ROW + 3])
def test_any_change_shows(size: int) -> None:
    values = torch.randn(size).bfloat16()
    before = checksum(values)
    for index in {0, size // 2, size - 1}:
        other = values.clone()
        other.view(torch.int16)[index] ^= 1
        assert checksum(other) != before
    assert checksum(torch.cat([values, torch.zeros(1, dtype=torch.bfloat16)])) != before


def test_order_shows() -> None:
    values = torch.randn(3 * ROW)
    rows, columns = values.view(3, ROW), values.view(3, -1, 4)
    assert len({checksum(values), checksum(rows.flip(0)), checksum(columns.flip(1))}) == 3


def test_differences_name_the_tensors() -> None:
    tensors = {"a": torch.randn(3), "b": torch.randn(2, 2), "c": torch.randn(4)}
    mine = identify(tensors, {"hidden_size": 8, "_name_or_path": "x"})
    assert mine.differences(identify({n: t.double() for n, t in tensors.items()}, {"hidden_size": 8})) == []
    other = identify({"a": tensors["a"] + 1, "b": torch.randn(4), "d": torch.randn(1)}, {"hidden_size": 9})
    assert mine.differences(other) == [
        "config hidden_size: 8 in the first, 9 in the second",
        "a: other values",
        "b: shape [2, 2] in the first, [4] in the second",
        "c: missing in the second",
        "d: missing in the first",
    ]
    assert "a: other values" not in mine.differences(other, values=False)


def test_identity_of_a_model_lists_tied_weights_once_and_survives_json() -> None:
    model = nn.ModuleDict(
        {"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False), "count": nn.BatchNorm1d(2)}
    )
    model["head"].weight = model["embed"].weight
    identity = identify(model)
    assert list(identity.tensors) == ["embed.weight", "count.weight", "count.bias"]
    assert BaseIdentity.from_json(json.loads(json.dumps(identity.to_json()))) == identity


@pytest.mark.parametrize("broken", [None, [], {"config": {}}, {"config": {}, "tensors": {"a": {"shape": 3}}}])
def test_malformed_json_is_refused(broken: object) -> None:
    with pytest.raises(AlignvecError, match="identity is malformed"):
        BaseIdentity.from_json(broken)


def test_identity_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        identify({"a": torch.randn(2)}).config = {}  # type: ignore[misc]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.float16])
def test_values_rounded_to_float16_are_known_by_their_own_checksum(dtype: torch.dtype) -> None:
    values = torch.cat([torch.randn(70001) * size for size in (1e-9, 1e-7, 1e-5, 1e-2, 1.0)]).to(dtype)
    mine = identify({"w": values})
    narrow = identify({"w": values.to(torch.float16)})
    half = values.to(torch.float16)
    assert mine.tensors["w"].float16 == checksum(half.view(torch.bfloat16) if dtype == torch.float16 else half)
    assert (mine.tensors["w"].checksum == narrow.tensors["w"].checksum) == (dtype == torch.float16)
    assert mine.differences(narrow) == narrow.differences(mine) == []
    other = values.to(torch.float16)
    other[-1] += 0.01
    assert mine.differences(identify({"w": other})) == ["w: other values"]
    saved = {"shape": [1], "dtype": "float32", "checksum": "y"}
    early = BaseIdentity.from_json({"config": {}, "tensors": {"w": saved}})
    assert early.tensors["w"].float16 is None
    assert early.to_json()["tensors"]["w"] == saved
    assert BaseIdentity.from_json(mine.to_json()).tensors["w"].float16 == mine.tensors["w"].float16
