"""Arithmetic, norms, and the folder on disk."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import alignvec
from alignvec.errors import AlignvecError
from alignvec.fingerprint import identify
from alignvec.vector import AlignmentVector
from tests.storage.descriptions import Change, change_description

SHAPES = {"model.layers.0.w": (13, 7), "model.layers.1.w": (3, 5, 2), "model.norm.weight": (7,), "lm_head.weight": ()}
BASE = identify({name: torch.ones(shape) for name, shape in SHAPES.items()} | {"model.embed.weight": torch.ones(6)})


def deltas(seed: int, dtype: torch.dtype = torch.bfloat16, skip: str = "") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items() if n != skip}


def whole(vector: AlignmentVector) -> Tensor:
    """All of a vector as one float64 tensor."""
    zero = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    return torch.cat([(vector[n] if n in vector else zero[n]).double().flatten() for n in SHAPES])


@pytest.fixture(params=["memory", "disk"])
def vectors(request: pytest.FixtureRequest, tmp_path: Path) -> list[AlignmentVector]:
    """Two vectors that do not edit the same tensors."""
    pair = [AlignmentVector(deltas(0), BASE), AlignmentVector(deltas(1, skip="model.norm.weight"), BASE)]
    if request.param == "memory":
        return pair
    for i, vector in enumerate(pair):
        vector.save(tmp_path / str(i), max_shard_size=100)
    return [alignvec.load(tmp_path / str(i)) for i in range(2)]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-3, 3, width=32), min_size=2, max_size=2), st.integers(0, 9))
def test_linear_combinations(factors: list[float], seed: int) -> None:
    one, two = AlignmentVector(deltas(seed)), AlignmentVector(deltas(seed + 1))
    expected = factors[0] * whole(one) - factors[1] * whole(two)
    for result in (factors[0] * one - two * factors[1], -(two * factors[1] - one * factors[0])):
        torch.testing.assert_close(whole(result), expected, rtol=1e-6, atol=1e-6)


def test_arithmetic_from_memory_and_disk(vectors: list[AlignmentVector]) -> None:
    one, two = vectors
    torch.testing.assert_close(whole(one + two), whole(one) + whole(two), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(whole(one / 4), whole(one) / 4, rtol=0, atol=0)
    assert (one + two).names == one.names
    assert set((two + one).names) == set(one.names)
    assert (one + two).base == BASE
    assert not whole(one - one).any()


def test_dtype_rule() -> None:
    narrow, wide = AlignmentVector(deltas(0)), AlignmentVector(deltas(0, torch.float64))
    cases = {
        -narrow: torch.bfloat16,
        narrow * 1: torch.bfloat16,
        narrow * 0.5: torch.float32,
        narrow + narrow: torch.float32,
    }
    for vector, dtype in (cases | {narrow + wide: torch.float64, wide / 3: torch.float64}).items():
        assert {info.dtype for info in vector.tensors.values()} == {dtype}
        assert {delta.dtype for _, delta in vector.items()} == {dtype}
    assert torch.equal(whole(-narrow), -whole(narrow))


def test_norm_dot_cosine(vectors: list[AlignmentVector]) -> None:
    one, two = vectors
    a, b = whole(one), whole(two)
    assert one.norm() == pytest.approx(float(a.norm()), rel=1e-12)
    assert one.norm("model.layers.1.w") == pytest.approx(float(one["model.layers.1.w"].double().norm()), rel=1e-12)
    assert one.dot(two) == pytest.approx(float(a @ b), rel=1e-12)
    assert one.cosine(two) == pytest.approx(float(a @ b / a.norm() / b.norm()), rel=1e-12)
    assert one.cosine(one * -2) == pytest.approx(-1, abs=1e-12)
    assert math.isnan(one.cosine(two - two))


def test_large_tensors_are_summed_in_float64() -> None:
    vector = AlignmentVector({"w": torch.full((3_000_001,), 0.1)})
    assert vector.norm() ** 2 == pytest.approx(3_000_001 * float(torch.tensor(0.1).double()) ** 2, rel=1e-12)


def test_statistics(vectors: list[AlignmentVector]) -> None:
    rows = {row.layer: row for row in vectors[1].statistics()}
    assert list(rows) == ["embedding", "head", "norm", 0, 1]
    assert (rows["embedding"].parameters, rows["embedding"].changed, rows["embedding"].norm) == (6, 0, 0)
    assert (rows["norm"].parameters, rows["norm"].changed) == (7, 0)
    assert rows[0].norm == pytest.approx(vectors[1].norm("model.layers.0.w"))
    assert rows[0].max_abs == float(vectors[1]["model.layers.0.w"].float().abs().max())
    assert rows[0].changed == 1
    assert rows[0].relative_norm is None


def test_mapping_and_copies(vectors: list[AlignmentVector]) -> None:
    one, two = vectors
    assert "model.norm.weight" in one
    assert "model.norm.weight" not in two
    assert (len(one), list(one)) == (4, list(one.names))
    assert one.nbytes == 2 * (13 * 7 + 30 + 7 + 1)
    for twin in (copy.deepcopy(one + two), pickle.loads(pickle.dumps(one + two))):
        assert torch.equal(whole(twin), whole(one + two))
        assert twin.base == BASE
    with pytest.raises(AlignvecError, match="no delta named 'x'"):
        one["x"]
    with pytest.raises(AttributeError):
        one.nbytes = 3  # type: ignore[misc]


@pytest.mark.parametrize("shard", ["5GB", 100])
def test_round_trip(tmp_path: Path, shard: int | str) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        vector = AlignmentVector(deltas(0, dtype), BASE, source={"base": "x"})
        vector.save(tmp_path / str(dtype), max_shard_size=shard)
        loaded = alignvec.load(tmp_path / str(dtype))
        assert loaded.tensors.keys() == vector.tensors.keys()
        assert all(torch.equal(loaded[n], d) and loaded[n].dtype == d.dtype for n, d in vector.items())
        assert (loaded.base, loaded.format, loaded.source) == (BASE, "dense", {"base": "x"})
        files = list((tmp_path / str(dtype)).glob("*.safetensors"))
        assert (len(files) > 1) == (shard == 100)
        assert {name for file in files for name in load_file(file)} == set(vector.names)


def test_saving_over_itself(tmp_path: Path) -> None:
    AlignmentVector(deltas(0)).save(tmp_path / "v")
    (alignvec.load(tmp_path / "v") * 2).save(tmp_path / "v", overwrite=True)
    assert torch.equal(whole(alignvec.load(tmp_path / "v")), 2 * whole(AlignmentVector(deltas(0))))
    with pytest.raises(AlignvecError, match="not an empty folder"):
        AlignmentVector(deltas(0)).save(tmp_path / "v")


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    AlignmentVector(deltas(0)).save(tmp_path / "v")
    vector = alignvec.load(tmp_path / "v") * 0.5
    (tmp_path / "v" / "alignment_vector.safetensors").unlink()
    with pytest.raises(AlignvecError, match="cannot be read"):
        vector.save(tmp_path / "w")
    assert [path.name for path in tmp_path.iterdir()] == ["v"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused(tmp_path: Path, value: float) -> None:
    bad = deltas(0)
    bad["model.layers.1.w"][1, 2, 0] = value
    with pytest.raises(AlignvecError, match=r"delta model\.layers\.1\.w holds NaN or infinity"):
        AlignmentVector(bad)
    AlignmentVector(deltas(0)).save(tmp_path / "v")
    save_file(bad, change_description(tmp_path / "v") / "alignment_vector.safetensors")
    loaded = alignvec.load(tmp_path / "v")
    loaded["model.layers.0.w"]
    for use in (lambda: loaded["model.layers.1.w"], loaded.norm, lambda: loaded.save(tmp_path / "w")):
        with pytest.raises(AlignvecError, match=r"model\.layers\.1\.w holds NaN"):
            use()
    assert not (tmp_path / "w").exists()
    with pytest.raises(AlignvecError, match="choose a finite factor"):
        AlignmentVector(deltas(0)) * value


def test_overflow_of_a_multiple_is_refused() -> None:
    vector = AlignmentVector({"w": torch.tensor([1e30])}) * 1e30
    with pytest.raises(AlignvecError, match="delta w holds NaN or infinity"):
        vector["w"]


def test_what_does_not_belong_is_refused() -> None:
    with pytest.raises(AlignvecError, match="delta w belongs to no tensor of the base"):
        AlignmentVector({"w": torch.ones(2)}, BASE)
    with pytest.raises(AlignvecError, match=r"model\.norm\.weight has shape \[3\], the base's tensor \[7\]"):
        AlignmentVector({"model.norm.weight": torch.ones(3)}, BASE)
    with pytest.raises(AlignvecError, match=r"delta w is torch\.int64"):
        AlignmentVector({"w": torch.ones(2).long()})
    with pytest.raises(AlignvecError, match="format 'int3' is not known"):
        AlignmentVector({}, format="int3")
    with pytest.raises(AlignvecError, match="divided by 0: "):
        AlignmentVector({}) / 0
    with pytest.raises(TypeError):
        AlignmentVector({}) + 1  # type: ignore[operator]


def test_vectors_of_different_bases_do_not_add_up() -> None:
    other = identify({name: torch.full(shape, 2.0) for name, shape in SHAPES.items()})
    with pytest.raises(AlignvecError, match=r"different bases.*model\.layers\.0\.w: other values"):
        AlignmentVector(deltas(0), BASE) + AlignmentVector(deltas(1), other)
    with pytest.raises(AlignvecError, match=r"delta w has shape \[2\] in one vector and \[3\]"):
        AlignmentVector({"w": torch.ones(2)}).dot(AlignmentVector({"w": torch.ones(3)}))
    assert (AlignmentVector(deltas(0), BASE) + AlignmentVector(deltas(1))).base is None


def edit(change: Change) -> Callable[[Path], object]:
    return lambda folder: change_description(folder, change)


BROKEN = {
    "holds no alignment_vector.json": lambda f: (f / "alignment_vector.json").unlink(),
    "holds neither": lambda f: (f / "alignment_vector.safetensors").unlink(),
    "is truncated": lambda f: (f / "alignment_vector.safetensors").write_bytes(b"123"),
    "cannot be read as JSON": lambda f: (f / "alignment_vector.json").write_text("{"),
    "schema 3": edit(lambda d: d.update(schema=3)),
    "'format' is missing": edit(lambda d: d.pop("format")),
    "format 'zip' is not known": edit(lambda d: d.update(format="zip")),
    "which the dense delta ghost needs, is missing": edit(
        lambda d: d["tensors"].update(ghost={"shape": [2], "format": "dense", "options": {}})
    ),
    "hold model.norm.weight, which no delta has": edit(lambda d: d["tensors"].pop("model.norm.weight")),
    "identity is malformed": edit(lambda d: d.update(base=[])),
    "belongs to no tensor": edit(lambda d: d["base"]["tensors"].pop("model.norm.weight")),
    "is torch.int8": lambda f: save_file(
        {n: d.to(torch.int8) for n, d in deltas(0).items()}, f / "alignment_vector.safetensors"
    ),
}


@pytest.mark.parametrize(("message", "damage"), BROKEN.items(), ids=list(BROKEN))
def test_broken_folders_are_refused(tmp_path: Path, message: str, damage: Callable[[Path], object]) -> None:
    AlignmentVector(deltas(0), BASE).save(tmp_path / "v")
    damage(tmp_path / "v")
    with pytest.raises(AlignvecError) as caught:
        alignvec.load(tmp_path / "v")
    assert message in str(caught.value)


@pytest.mark.parametrize("number", [10**400, -(10**5000), math.inf, math.nan], ids=["large", "larger", "inf", "nan"])
def test_factors_and_divisors_are_finite(number: float) -> None:
    vector = AlignmentVector({"w": torch.ones(2)})
    with pytest.raises(AlignvecError, match=r"cannot be multiplied by .*: choose a finite factor"):
        vector * number
    with pytest.raises(AlignvecError, match="cannot be divided by"):
        vector / number
    with pytest.raises(AlignvecError, match="cannot be divided by 1e-320"):
        vector / 1e-320
