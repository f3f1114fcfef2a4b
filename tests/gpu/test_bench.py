"""What `python -m bench.kernels` runs on a GPU is right and adds up, on a shape of a few tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alignvec.errors import AlignvecError
from bench import measure, record
from bench.cases import cases
from bench.layers import Contents, Shape, check, draw_coefficients, run
from bench.measure import Bench
from bench.timing import Times

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = Shape("qkv", (64, 32, 32), 96)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """One sample of each call on a CPU, and few copies: the interpreter is slow, and its times mean nothing."""
    if DEVICE == "cpu":
        monkeypatch.setattr(measure, "copies", lambda nbytes, device: 2)
        monkeypatch.setattr(measure, "times", _once)
    return Bench(DEVICE, [SHAPE], 1e12, 2, "triton")


def _once(calls: dict[str, list[Any]], *_: Any) -> dict[str, Times]:
    for own in calls.values():
        own[-1]()
    return {name: Times(1e-3 * (i + 1), 1e-3, 1e-2) for i, name in enumerate(calls)}


@pytest.mark.parametrize("tokens", [1, 16, 2048])
def test_every_case_of_a_gpu(bench: Bench, tokens: int) -> None:
    """2048 tokens stand for prefill; off a GPU 16 rows of 2 tokens go through its cases."""
    chosen = cases("cuda", tokens)
    if tokens > 16 and DEVICE == "cpu":
        chosen = [case for case in cases("cuda", tokens) if case.name.startswith(("merged", "dense", "low-rank"))]
        chosen = [type(case)(**{**vars(case), "tokens": 32}) for case in chosen]
    rows = bench.linear(chosen)
    totals = [row for row in rows if row["shape"] == "all"]
    assert [row["case"] for row in totals] == [case.name for case in chosen]
    assert totals[0]["case"] == "merged"
    assert totals[0]["ratio"] == 1.0
    for row in totals:
        assert row["ratio"] == pytest.approx(row["median_ms"] / totals[0]["median_ms"])
        assert row["share_of_floor"] == pytest.approx(row["floor_ms"] / row["median_ms"])
    dense, merged = next(row for row in totals if row["case"] == "dense"), totals[0]
    assert dense["bytes"] - merged["bytes"] == bench.layers * 3 * 2 * SHAPE.out * SHAPE.inputs


def test_merging_again(bench: Bench) -> None:
    totals = [row for row in bench.remerge(quick=True) if row["shape"] == "all"]
    assert {"dense", "torch expression", "torch copy, add_"} <= {row["case"] for row in totals}
    assert {row["bytes"] for row in totals} == {bench.layers * 5 * 2 * SHAPE.out * SHAPE.inputs}


def test_a_wrong_result_is_not_timed() -> None:
    contents = Contents(DEVICE)
    (weights,) = contents.weights(SHAPE, torch.bfloat16, 1)
    (vectors,) = contents.vectors(("dense", "low-rank:rank=64"), SHAPE, torch.bfloat16, 1)
    c = draw_coefficients(vectors[0], weights.projections[0], 2)
    x = torch.randn(4, SHAPE.inputs, device=DEVICE).bfloat16()
    results = run(x, weights.projections, vectors, c)
    check(results, x, weights.projections, vectors, c, "the operator")
    c.table[:, 1] *= 1.05
    with pytest.raises(AlignvecError, match="the operator is wrong"):
        check(results, x, weights.projections, vectors, c, "the operator")


def test_results_of_another_device_stay(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path, kept = tmp_path / "kernels.json", {"bench": "kernels", "device": "one", "rows": [{"case": "dense"}]}
    record.write(path, kept)
    assert record.read(path) == kept
    record.write(path, kept | {"rows": []})
    with pytest.raises(AlignvecError, match="holds results of 'one'"):
        record.write(path, kept | {"device": "another"})
    assert record.read(path)["rows"] == []
