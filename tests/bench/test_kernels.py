"""What `python -m bench.kernels --device cpu` runs is right, adds up and is judged, on a shape of a few tiles."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from alignvec.errors import AlignvecError
from alignvec.kernels import eager
from alignvec.planner.backends import obstacle
from bench import kernels, measure, record
from bench.cases import DECODE_CPU, REMERGE_CPU, cases
from bench.layers import Contents, Shape
from bench.measure import Bench
from bench.opponents import CHAIN
from bench.timing import Times

SHAPE = Shape("qkv", (64, 32, 32), 96)
BYTES = SHAPE.out * SHAPE.inputs * 2
MISSING = obstacle("cpu", "cpp")
BACKENDS = ["torch", pytest.param("cpp", marks=pytest.mark.skipif(MISSING is not None, reason=str(MISSING)))]


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two copies of everything; each case is called once and takes a millisecond longer than the one before."""
    monkeypatch.setattr(measure, "copies", lambda nbytes, device: 2)
    monkeypatch.setattr(measure, "times", _once)


def _once(calls: dict[str, list[Any]], *_: Any) -> dict[str, Times]:
    for own in calls.values():
        own[-1]()
    return {name: Times(1e-3 * (i + 1), 1e-3, 1e-2) for i, name in enumerate(calls)}


def _bench(backend: str) -> Bench:
    return Bench("cpu", [SHAPE, SHAPE], 1e12, 1, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [1, 4, 256])
def test_every_case_of_a_cpu(backend: str, tokens: int) -> None:
    chosen = cases("cpu", tokens)
    totals = [row for row in _bench(backend).linear(chosen) if row["shape"] == "all"]
    assert [(row["case"], row["rows"], row["dtype"]) for row in totals] == [(c.name, c.rows, c.dtype) for c in chosen]
    assert {row["rows"] for row in totals} == ({1, 4} if tokens == 4 else {1})
    merged = {row["dtype"]: row["median_ms"] for row in totals if row["way"] == "merged"}
    assert set(merged) == {"bfloat16", "float32"}
    for row in totals:
        assert row["ratio"] == pytest.approx(row["median_ms"] / merged[row["dtype"]])
        assert (row["error"] is None) == (row["way"] == "merged")
    dense = next(row for row in totals if (row["case"], row["dtype"]) == ("dense", "bfloat16"))
    assert dense["bytes"] - next(row["bytes"] for row in totals) == 2 * 3 * BYTES


def test_targets_are_of_one_token_in_bfloat16() -> None:
    rows = _bench("torch").linear(cases("cpu", 1))
    judged = {row["case"]: row["target"] for row in rows if row["shape"] == "all" and row["target"] is not None}
    assert judged == DECODE_CPU
    assert all(row["dtype"] == "bfloat16" for row in rows if row["target"] is not None)
    assert all(case.target is None for case in cases("cpu", 16))
    of_a_gpu = [case for case in cases("cuda", 1) if case.name in ("merged", "dense")]
    assert of_a_gpu[1].target is not None
    assert all(row["target"] is None for row in _bench("torch").linear(of_a_gpu)), "a CPU is held to a GPU's targets"


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_only_the_rows_that_say_so_run_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[int] = Counter()
    real = eager.linear

    def counted(x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        calls[x.shape[0]] += 1
        return real(x, *arguments, **options)

    monkeypatch.setattr(eager, "linear", counted)
    for tokens in (1, 16):
        _bench("cpp").linear(cases("cpu", tokens))
    plain = sum(case.way == "torch" for case in cases("cpu", 1))
    assert calls == {1: plain * 2 * 2 * len(SHAPE.outs)}, "two shapes, a call to check and one to time"


@pytest.mark.parametrize("backend", BACKENDS)
def test_merging_again(backend: str) -> None:
    rows = _bench(backend).remerge(quick=True)
    totals = {row["case"]: row for row in rows if row["shape"] == "all"}
    assert set(totals) == {"dense", "torch expression", CHAIN}
    assert totals["dense"]["target_speedup"] == REMERGE_CPU
    assert all("target_speedup" not in row and "target_share" not in row for row in rows if row["case"] != "dense")
    assert totals[CHAIN]["speedup"] == 1
    assert totals["dense"]["speedup"] == pytest.approx(totals[CHAIN]["median_ms"] / totals["dense"]["median_ms"])


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_linear(*arguments: Any, **options: Any) -> torch.Tensor:
        y = linear(*arguments, **options)
        y[:, -1] *= 1.5
        return y

    def wrong_materialise(*arguments: Any, out: torch.Tensor, low: None) -> None:
        eager.materialise(*arguments, out=out, low=low)
        out[-1] *= 1.05

    linear = eager.linear
    monkeypatch.setattr(eager, "linear", wrong_linear)
    monkeypatch.setattr(measure, "kernel", lambda *_: wrong_materialise)
    bench = _bench("torch")
    with pytest.raises(AlignvecError, match="is wrong: its relative error"):
        bench.linear(cases("cpu", 1)[:2])
    with pytest.raises(AlignvecError, match="is wrong: its relative error"):
        bench.remerge(quick=True)


def test_contents_are_drawn_once_and_copied() -> None:
    contents = Contents("cpu")
    first, second = contents.weights(SHAPE, torch.float32, 2)
    assert torch.equal(first.matrix, second.matrix)
    assert first.matrix.data_ptr() != second.matrix.data_ptr()
    assert contents.weights(SHAPE, torch.float32, 1)[0].matrix.data_ptr() == first.matrix.data_ptr()
    some, copy = contents.vectors(("sign", "sign", "dense"), SHAPE, torch.float32, 2)
    assert [len(own) for own in some] == [3, 3, 3]
    for own, other in zip(some, copy, strict=True):
        for operand, twin in zip(own, other, strict=True):
            for part, same in zip(operand.parts, twin.parts, strict=True):
                assert torch.equal(part, same)
                assert part.data_ptr() != same.data_ptr()
    assert not torch.equal(some[0][0].parts[0], some[0][1].parts[0]), "two vectors are one"
    more = contents.vectors(("sign",) * 8, SHAPE, torch.float32, 1)[0]
    assert more[1][1].parts[0].data_ptr() == some[1][1].parts[0].data_ptr()
    assert contents.vectors((), SHAPE, torch.float32, 1) == [[[], [], []]]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"target": 1.35, "ratio": 1.35}, ("<= 1.35", "met")),
        ({"target": 1.35, "ratio": 1.36}, ("<= 1.35", "missed")),
        ({"target": None, "target_speedup": 2.0, "speedup": 2.0}, (">= 2", "met")),
        ({"target_speedup": 2.0, "speedup": 1.9}, (">= 2", "missed")),
        ({"target_share": 0.85, "share_of_floor": 0.86}, (">= 85% of floor", "met")),
        ({"target_share": 0.85, "share_of_floor": 0.84}, (">= 85% of floor", "missed")),
        ({"target": None, "ratio": 1.0}, ("", "")),
    ],
)
def test_verdicts(row: dict[str, Any], said: tuple[str, str]) -> None:
    assert kernels._verdict(row) == said


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_command(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "SHAPES", {"cpu": (SHAPE,)})
    monkeypatch.setattr(kernels, "read_bandwidth", lambda device, repeats: 1e10)
    taken = {"median_ms": 0.01, "p20_ms": 0.01, "p80_ms": 0.01}
    monkeypatch.setattr(kernels, "setting", lambda device: {"section": "set", "case": "set", "shape": "all", **taken})
    path = tmp_path / "kernels.json"
    kernels.main("cpu", path, quick=True, tokens="1", backend=backend)
    shown = capsys.readouterr().out
    assert "missed" in shown  # every case after the first takes twice the merged layer's time, or more
    assert f"backend {backend}" in shown
    kept = record.read(path)
    assert kept["backend"] == backend
    assert kept["instruction_set"] == (str(torch.ops.alignvec.cpu_capability()) if backend == "cpp" else None)
    assert kept["device"] == record.device_name("cpu")
    assert kept["threads"] == torch.get_num_threads()
    assert kept["read_gb_per_s"] == 10
    assert {"versions", "commit", "date"} <= set(kept)
    assert Counter(row["section"] for row in kept["rows"] if row["shape"] == "all") == {
        "set": 1, "decode": len(cases("cpu", 1, quick=True)), "re-merge": 3,
    }  # fmt: skip
    plot = pytest.importorskip("bench.plot", exc_type=ImportError)
    plot.main(path)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_backend_that_is_none() -> None:
    with pytest.raises(AlignvecError, match="--backend='fast' is not one of auto"):
        kernels.main("cpu", backend="fast")
