"""alignvec.plan and alignvec env: sentences that hold the figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import alignvec
from alignvec import AlignvecError, planner
from alignvec.cli.app import app
from alignvec.kernels import operands
from alignvec.planner.explain import operand
from alignvec.timing import random_operand
from tests.models import random_vector, tiny


@pytest.fixture(autouse=True)
def _own_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.delenv("ALIGNVEC_TUNED", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    planner.forget()
    yield
    planner.forget()


def test_one_sentence_with_the_figures() -> None:
    (made,) = alignvec.plan((4096, 14336), tokens=16, rows=16, device="H200", vectors=("int4",) * 3)
    assert str(made) == (
        "4096x14336, 3 vectors int4:group=128, 16 tokens, 16 mixes: split, 50.2 us by bytes "
        "(base 117 MB, vectors 90.8 MB at 4.33 TB/s); "
        "combine 773 us by bytes, as its tiles of 128 tokens have 16 mixes each; "
        "materialise needs one mix for all"
    )
    assert made.seconds["split"] == pytest.approx((117.44e6 + 90.83e6) / 4.33e12 + 2e-6, rel=0.01)


def test_shapes_formats_and_choices() -> None:
    shapes = [(4096, 4096), (28672, 4096), (4096, 4096)]
    made = alignvec.plan(shapes, tokens=2048, device="H200", vectors=("dense", "sign", "low-rank:rank=64"), reuse=8)
    assert [str(p).split(",")[0] for p in made] == ["2 layers of 4096x4096", "28672x4096"]
    assert all(p.execution == "materialise" and "over 8 calls" in p.reason for p in made)
    assert "1 vector dense, 1 vector sign:group=row, 1 vector low-rank, 2048 tokens, 1 mix" in str(made[0])
    (forced,) = alignvec.plan((4096, 4096), tokens=4, device="H200", execution="combine")
    assert forced.execution == "combine"
    (prefill,) = alignvec.plan((4096, 4096), tokens=4096, rows=4096, device="H200")
    assert "products at 414 TFLOP/s" in str(prefill)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tokens": 0}, "tokens must be at least 1, not 0"),
        ({"rows": -1}, "rows must be at least 1"),
        ({"device": "abacus"}, "'abacus' is not known"),
        ({"vectors": ["int5"]}, "format 'int5' is not known"),
        ({"dtype": "int8"}, "dtype='int8' is not one of"),
        ({"execution": "guess"}, "execution='guess' is not one of"),
        ({"precision": "double"}, "precision='double' is not one of"),
        ({"target": [(4096, 0)]}, r"a layer's shape is \(out_features, in_features\), not \(4096, 0\)"),
        ({"target": torch.nn.Linear(2, 2)}, "no vectors are attached to this model"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_what_cannot_be_planned(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(AlignvecError, match=reason):
        alignvec.plan(**{"target": (4096, 4096), "device": "H200", **options})


def test_a_model_with_vectors() -> None:
    model = tiny("Qwen2")
    layers = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    alignment = alignvec.attach(
        model, {name: random_vector(model, i) for i, name in enumerate("abc")}, execution="split"
    )
    alignment.set_rows([{"a": 1.0}, {"b": 1.0}, {"a": 1.0}, {"b": 1.0}])
    made = alignvec.plan(model, tokens=8, device="H200")
    assert sum(p.layers for p in made) == layers
    for p in made:
        assert (p.execution, p.problem.mixes, p.problem.precision) == ("split", 2, "exact")
        assert "3 vectors dense, 8 tokens, 2 mixes: split" in str(p)
        assert p.problem.vector_bytes == 3 * p.problem.weights * p.problem.itemsize
    assert [p.problem.mixes for p in alignvec.plan(alignment, tokens=8, rows=8)] == [8] * len(made)
    assert alignvec.plan(model)[0].problem.device.name == "cpu"
    alignment.detach()
    for target in (model, alignment):
        with pytest.raises(AlignvecError, match="no vectors are attached"):
            alignvec.plan(target)


@pytest.mark.parametrize(
    "text", ["dense", "int8", "int4:group=32", "sign", "sign:group=64", "lossless", "low-rank", "sparse"]
)
def test_the_bytes_of_a_format_are_those_of_its_operand(text: str) -> None:
    weight = torch.randn(256, 1024).to(torch.bfloat16)
    made = random_operand(text, weight, torch.Generator().manual_seed(0))
    spec, nbytes = operand(text, (256, 1024))
    assert made.spec == spec
    assert made.nbytes == pytest.approx(nbytes, rel=0.02)
    assert operands.decode(made, weight).isfinite().all()


def test_env_says_what_is_live_and_why() -> None:
    result = CliRunner().invoke(app, ["env"], env={"COLUMNS": "400"})
    assert result.exit_code == 0
    assert "plan on cpu" in result.output
    assert "3 vectors int4:group=128, 16 tokens, 16 mixes" in result.output
    assert "no kernel adds with atomics" in result.output
    if not torch.cuda.is_available():
        assert "not live: csrc/cuda needs a GPU and torch finds none" in result.output
        assert "plan on H200, not here" in result.output
