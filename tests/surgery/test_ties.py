"""TIES against formulas written by hand in float64, and against PEFT's, with pieces far smaller than the tensors."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor

import alignvec
from alignvec import AlignmentVector, AlignvecError, formats, surgery
from alignvec.formats import threshold
from alignvec.surgery import pieces, sparse

SHAPES = {"a.weight": (10, 20), "b.weight": (4, 5, 10), "norm": (30,), "one": (1,)}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, size in (
        (pieces, "STEP", 64),
        (pieces, "PART", 24),
        (sparse, "STEP", 48),
        (threshold, "STEP", 7),
    ):
        monkeypatch.setattr(module, name, size)


def vector(seed: int, dtype: torch.dtype = torch.float32, skip: str = "") -> AlignmentVector:
    generator = torch.Generator().manual_seed(seed)
    scales = {"a.weight": 1.0, "b.weight": 0.2, "norm": 3.0, "one": 1.0}
    drawn = {n: (torch.randn(s, generator=generator) * scales[n]).to(dtype) for n, s in SHAPES.items()}
    return AlignmentVector({name: value for name, value in drawn.items() if name != skip})


def three() -> dict[str, AlignmentVector]:
    return {"x": vector(0), "y": vector(1, torch.bfloat16, skip="norm"), "z": vector(2, torch.float16)}


def flat(given: AlignmentVector) -> Tensor:
    """All parameters, float64, those that the vector lacks as zeros."""
    parts = [given[n].flatten() if n in given else torch.zeros(SHAPES[n]).flatten() for n in SHAPES]
    return torch.cat([part.double() for part in parts])


def spans(trim: str) -> list[slice]:
    ends = [0, *torch.tensor([torch.Size(shape).numel() for shape in SHAPES.values()]).cumsum(0).tolist()]
    return [slice(0, ends[-1])] if trim == "vector" else [slice(*pair) for pair in pairwise(ends)]


def by_hand(given: dict[str, AlignmentVector], density: float, trim: str, disjoint: str) -> list[Tensor]:
    """What stays of each vector, float64, by sorting."""
    trimmed = []
    for v in given.values():
        values, present = flat(v), torch.cat([torch.full((torch.Size(s).numel(),), n in v) for n, s in SHAPES.items()])
        kept = torch.zeros_like(values)
        for span in spans(trim):
            own = values[span][present[span]].abs().sort(descending=True).values
            if len(own):
                stays = values[span].abs() >= own[max(1, round(density * len(own))) - 1]
                kept[span][stays] = values[span][stays]
        trimmed.append(kept)
    sign = 1.0 - 2.0 * (sum(trimmed) < 0)
    agreeing = [torch.where(t.sign() == sign, t, 0) for t in trimmed]
    count = sum((a != 0).double() for a in agreeing).clamp(min=1)
    return [a / count if disjoint == "mean" else a for a in agreeing]


@pytest.mark.parametrize("trim", ["vector", "tensor"])
@pytest.mark.parametrize("disjoint", ["mean", "sum"])
@pytest.mark.parametrize("density", [0.001, 0.2, 0.7, 1.0])
def test_ties_by_hand(trim: str, disjoint: str, density: float) -> None:
    parts = by_hand(three(), density, trim, disjoint)
    one = surgery.ties(three(), density, disjoint=disjoint, trim=trim)
    torch.testing.assert_close(flat(one), sum(parts), rtol=1e-6, atol=1e-7)
    apart = surgery.ties_parts(three(), density, disjoint=disjoint, trim=trim)
    for made, expected in zip(apart.values(), parts, strict=True):
        torch.testing.assert_close(flat(made), expected, rtol=1e-6, atol=0)
    for made in (one, *apart.values()):
        assert made.source["trim"] == trim
        assert not any(((values == 0) & values.signbit()).any() for _, values in made.items())
        for name, error in made.errors.items():
            assert (error.relative, error.norm) == (0, pytest.approx(float(made[name].double().norm())))


def test_a_share_of_each_tensor_is_pefts_and_mergekits() -> None:
    """Both prune tensor by tensor and keep int(density * count); here that is a whole number."""
    given = {str(seed): vector(seed) for seed in range(4)}
    made = surgery.ties(given, 0.3, trim="tensor")
    for name in ("a.weight", "b.weight", "norm"):
        deltas = [v[name] for v in given.values()]
        torch.testing.assert_close(made[name], merge_utils.ties(deltas, torch.ones(4), 0.3))
        kept = []
        for delta in deltas:  # mergekit's: a mask of the places that argsort puts first, float64 here
            order = delta.abs().flatten().argsort(descending=True)[: int(0.3 * delta.numel())]
            mask = torch.zeros(delta.numel(), dtype=torch.float64).index_fill_(0, order, 1).view_as(delta)
            kept.append(delta.double() * mask)
        stacked = torch.stack(kept)
        agrees = stacked.sign() == torch.where(stacked.sum(0) >= 0, 1, -1)
        expected = (stacked * agrees).sum(0) / agrees.sum(0).clamp(min=1)
        torch.testing.assert_close(made[name].double(), expected, rtol=1e-6, atol=1e-7)


def test_trims_differ_where_scales_do() -> None:
    given = {"x": vector(0), "y": vector(1)}
    shares = {t: surgery.ties_parts(given, 0.2, trim=t)["x"] for t in ("vector", "tensor")}
    counts = {t: {n: int(v[n].count_nonzero()) if n in v else 0 for n in SHAPES} for t, v in shares.items()}
    assert counts["vector"]["b.weight"] == 0
    assert 20 <= counts["tensor"]["b.weight"] <= 40
    assert counts["vector"]["norm"] > counts["tensor"]["norm"]


def test_all_that_are_as_large_as_the_last_stay() -> None:
    tied = AlignmentVector({"w": torch.tensor([3.0, -2, 2, 1, 2, -1, 0.5, 0, 0, 0])})
    for trim in ("vector", "tensor"):
        assert surgery.ties({"v": tied}, 0.2, trim=trim)["w"].tolist() == [3, -2, 2, 0, 2, 0, 0, 0, 0, 0]


def test_float64_keeps_what_float32_rounds_to_the_limit() -> None:
    below = 1.0 - 2.0**-40
    wide = AlignmentVector({"w": torch.tensor([below, 0.5, -1.0, 1e-300], dtype=torch.float64)})
    made = surgery.ties({"v": wide}, 0.5)["w"]
    assert made.dtype == torch.float64
    assert made.tolist() == [below, 0, -1.0, 0]


def test_a_folder_holds_what_memory_does(tmp_path: Path) -> None:
    for number, storage in enumerate(({}, {"dtype": "bfloat16"}, {"format": "int8"}, {"max_shard_size": 300})):
        for trim in ("vector", "tensor"):
            folder = tmp_path / f"{number}{trim}"
            kept = surgery.ties_parts(three(), 0.3, trim=trim, **storage)  # type: ignore[arg-type]
            surgery.ties_parts(three(), 0.3, trim=trim, output=folder, **storage)  # type: ignore[arg-type]
            for name, made in kept.items():
                loaded = alignvec.load(folder / name)
                assert list(loaded) == list(made)
                assert loaded.source == made.source
                assert loaded.errors == made.errors
                assert loaded.format == made.format
                for parameter in made:
                    assert torch.equal(loaded[parameter], made[parameter])
    rounded, exact = alignvec.load(tmp_path / "1vector" / "x"), alignvec.load(tmp_path / "0vector" / "x")
    for name, error in rounded.errors.items():
        lost = (rounded[name].double() - exact[name].double()).norm() / exact[name].double().norm()
        assert error.relative == pytest.approx(float(lost))
        coded = alignvec.load(tmp_path / "2vector" / "x")
        assert torch.equal(coded[name], formats.decode(formats.encode("int8", exact[name])))


def test_encoded_vectors_give_what_their_values_give(tmp_path: Path) -> None:
    given = {"x": vector(0), "y": vector(1)}
    for format in ("int8", "sparse:density=0.5", "low-rank:rank=2", "sign"):
        coded = {name: alignvec.convert(v, tmp_path / format / name, format) for name, v in given.items()}
        decoded = {name: AlignmentVector(dict(v.items())) for name, v in coded.items() if v is not None}
        for trim in ("vector", "tensor"):
            one, two = (surgery.ties(v, 0.4, trim=trim) for v in (coded, decoded))
            assert all(torch.equal(one[name], two[name]) for name in two)


def test_inputs_are_not_written_to() -> None:
    given = three()
    before = {name: {n: t.clone() for n, t in v.items()} for name, v in given.items()}
    surgery.ties(given, 1.0)
    surgery.ties_parts(given, 1.0, disjoint="mean")
    surgery.remove_shared_mean(given)
    assert all(torch.equal(t, before[name][n]) for name, v in given.items() for n, t in v.items())


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    large = {"v": AlignmentVector({"fine": torch.ones(3), "large": torch.full((200,), 1e6)})}
    with pytest.raises(AlignvecError, match=r"delta large .*float16: choose a wider dtype"):
        surgery.ties(large, 0.5, output=tmp_path / "x", dtype="float16")
    for operation in (surgery.ties, surgery.ties_parts):
        with pytest.raises(AlignvecError, match='trim must be "vector" or "tensor"'):
            operation(three(), trim="layer", output=tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_what_is_zero_is_left_out(tmp_path: Path) -> None:
    zeros = {"v": AlignmentVector({"w": torch.randn(9, 9), "still": torch.zeros(300), "empty": torch.zeros(0, 4)})}
    for output in (None, tmp_path / "x"):
        assert list(surgery.ties(zeros, 0.5, output=output)) == ["w"]
