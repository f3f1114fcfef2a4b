"""The cost model: what it says of an H200 has to be what was measured and calculated there."""

from __future__ import annotations

import dataclasses
import functools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alignvec import planner
from alignvec.kernels import configs
from alignvec.planner import Plan, Problem, break_even, choice, cpu, plan
from alignvec.planner.cost import corrected, materialise, model
from alignvec.planner.explain import operand

H200 = planner.find("H200")
# Every read at full bandwidth and no time to launch: what the facts' floors are calculated from.
FLOOR = dataclasses.replace(H200, name="floor", vendor_bandwidth=1.0, launch=1e-15)
SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))  # a layer of Mistral-7B, which has 32
TOKENS = [2**i for i in range(13)]


@pytest.fixture(autouse=True)
def _own_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    """The tables that come with alignvec, whatever this machine's user has tuned."""
    monkeypatch.delenv("ALIGNVEC_TUNED", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    planner.forget()
    yield
    planner.forget()


def problem(
    format: str = "int4", k: int = 3, tokens: int = 1, shape: tuple[int, int] = (4096, 14336), **options: Any
) -> Problem:
    return Problem(tokens, *shape, (operand(format, shape),) * k, **{"device": H200, **options})


def network(format: str, k: int, execution: str = "split", **options: Any) -> float:
    """Milliseconds of all linear layers."""
    return 32e3 * sum(model(problem(format, k, shape=shape, **options), execution).seconds for shape in SHAPES)


@pytest.mark.parametrize("mixes", [1, None])
@pytest.mark.parametrize("execution", ["split", "combine"])
@pytest.mark.parametrize("format", ["dense", "lossless", "int8", "int4", "sign", "low-rank:rank=64", "sparse"])
def test_more_of_anything_never_costs_less(format: str, execution: str, mixes: int | None) -> None:
    def seconds(**options: Any) -> float:
        return model(problem(format, **{"mixes": mixes, **options}), execution).seconds

    over_tokens = [seconds(tokens=tokens) for tokens in TOKENS if mixes == 1 or tokens > 256]
    assert over_tokens == sorted(over_tokens)
    over_vectors = [seconds(k=k, tokens=64) for k in range(1, 17)]
    assert over_vectors == sorted(over_vectors)
    over_shapes = [seconds(shape=(out, 4096)) for out in (1024, 4096, 6144, 28672)]
    assert over_shapes == sorted(over_shapes)


@pytest.mark.parametrize(
    ("format", "k", "milliseconds"),
    [("dense", 0, 3.2), ("dense", 3, 12.9), ("int4", 3, 5.7), ("sign", 3, 3.8), ("sign", 8, 4.8)],
)
def test_floors_of_a_decode_step(format: str, k: int, milliseconds: float) -> None:
    device = dataclasses.replace(FLOOR, vector_32=1e18)
    assert network(format, k, device=device) == pytest.approx(milliseconds, rel=0.03)


@pytest.mark.parametrize(
    ("tokens", "milliseconds"), [(1, 3.83), (16, 3.89), (64, 4.09), (256, 5.78), (1024, 20.1), (4096, 87.3)]
)
def test_the_vendors_product_with_merged_weights(tokens: int, milliseconds: float) -> None:
    layers = [materialise(problem("dense", 1, tokens, shape, precision="merged")) for shape in SHAPES]
    assert 32e3 * sum(layer[1] for layer in layers if layer) == pytest.approx(milliseconds, rel=0.12)


def test_a_fused_merge_of_three_dense_vectors() -> None:
    passes = [materialise(problem("dense", 3, shape=shape, precision="merged")) for shape in SHAPES]
    assert 32e3 * sum(once[0] for once in passes if once) == pytest.approx(16.1, rel=0.03)


@pytest.mark.parametrize(
    ("format", "k", "tokens"),
    [("dense", 1, 3), ("dense", 3, 1.67), ("int4", 1, 9), ("sign", 1, 33), ("low-rank:rank=64", 1, 86)],
    ids=str,
)
def test_decoded_tokens_after_which_a_merge_has_paid_for_itself(format: str, k: int, tokens: float) -> None:
    """The facts' figures: one uniform mix, everything at read bandwidth, k and v projections on their own."""
    shapes = [(1024, 4096), (1024, 4096), (4096, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
    once = saved = 0.0
    for shape in shapes:
        p = problem(format, k, shape=shape, device=dataclasses.replace(FLOOR, vector_32=1e18), precision="merged")
        costs = materialise(p)
        assert costs is not None
        once += costs[0]
        saved += model(p, "split").seconds - costs[1]
    assert once / saved == pytest.approx(tokens, rel=0.08)


def test_break_even_counts_calls() -> None:
    p = problem("dense", device=FLOOR, precision="merged")
    calls = break_even(p)
    assert 1 < calls < 3
    for reuse in (1, 2, 10):
        better = plan(dataclasses.replace(p, reuse=reuse)).execution == "materialise"
        assert better == (reuse > calls)
    assert break_even(problem("sign")) == math.inf  # with one-bit vectors the vendor's product is the slower one


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("format", ["dense", "lossless", "int8", "int4", "sign", "low-rank", "sparse"])
def test_decode_of_mixed_rows_splits(format: str, k: int) -> None:
    for tokens in (1, 4, 16, 64, 256):
        for mixes in (tokens, None):
            assert plan(problem(format, k, tokens, mixes=mixes)).execution == "split"


@pytest.mark.parametrize("format", ["dense", "int4", "sign"])
def test_prefill(format: str) -> None:
    one = problem(format, tokens=2048)
    assert plan(one).execution == "materialise"
    assert plan(dataclasses.replace(one, mixes=None)).execution == "combine"
    assert plan(dataclasses.replace(one, mixes=16)).execution == "combine"  # 128 tokens of each: a tile's own
    assert plan(dataclasses.replace(one, mixes=640)).execution == "split"
    merged = dataclasses.replace(one, precision="merged")
    assert plan(merged).seconds["materialise"] < plan(one).seconds["materialise"]
    assert plan(merged).seconds["combine"] < plan(one).seconds["combine"]


def test_a_merge_is_not_had_by_splitting() -> None:
    for tokens in (1, 64, 2048):
        for mixes in (1, None):
            chosen = plan(problem("int4", tokens=tokens, mixes=mixes, precision="merged"))
            assert chosen.execution != "split"
            assert chosen.seconds["split"] == math.inf
    assert plan(problem("int4", tokens=16, mixes=16, precision="merged")).execution == "split"  # exact anyway


def test_all_tokens_of_a_bucket_have_one_plan() -> None:
    assert [configs.bucket(tokens) for tokens in (1, 2, 3, 4, 5, 16, 17, 2048, 2049)] == [
        1,
        2,
        4,
        4,
        8,
        16,
        32,
        2048,
        4096,
    ]
    for mixes in (1, None):
        assert plan(problem(tokens=33, mixes=mixes)) is plan(problem(tokens=64, mixes=mixes))


@pytest.mark.parametrize("execution", ["split", "combine", "materialise"])
def test_a_forced_execution_is_taken_and_said(execution: str) -> None:
    for tokens, mixes in ((1, 1), (16, 16), (2048, 1)):
        chosen: Plan = plan(problem(tokens=tokens, mixes=mixes), execution)
        assert chosen.execution == execution
        assert "as asked for" in chosen.reason
    assert "needs one mix for all" in plan(problem(tokens=16, mixes=16), "materialise").reason


def test_a_cpu_combines_many_tokens_of_a_mix() -> None:
    """As `kernels.eager` and csrc/cpu decide."""
    device = planner.find("cpu")
    shape = (688, 256)
    for k in (1, 3):
        made = [plan(problem("dense", k, tokens, shape, device=device, dtype="float32")) for tokens in (1, 4, 64, 256)]
        assert [p.execution for p in made] == ["split", "split", "combine", "combine"]
        assert made[0].seconds["materialise"] == math.inf


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("k", [2, 3, 8])
@pytest.mark.parametrize("mixes", [1, 4])
def test_the_plan_for_csrc_cpu_is_what_it_does(k: int, mixes: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where products decide: it forms mixes from `combine_tokens` tokens of each on."""
    monkeypatch.setattr(cpu, "resolve_backend", lambda device_type: "cpp")
    device = dataclasses.replace(cpu.device(2), read_bandwidth=1e15)
    first = cpu.combine_tokens([("dense", 0)] * k, dtype == "bfloat16")
    for tokens, execution in ((mixes * first // 2, "split"), (2 * mixes * first, "combine")):
        own = problem("dense", k, tokens, (688, 256), device=device, dtype=dtype, mixes=mixes)
        assert plan(own).execution == execution


def test_a_table_corrects_the_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Measured times stand at the tokens measured; between them the factor is interpolated, and it ends nowhere."""
    from alignvec import tune

    p = problem("int4", tokens=16)
    names = ("split", "exact", configs.signature(tuple(spec for spec, _ in p.vectors)), "bfloat16")

    def entry(tokens: int, factor: float, shape: tuple[int, int] = (4096, 14336)) -> configs.Entry:
        own = problem("int4", tokens=tokens, shape=shape)
        return configs.Entry(*names, tokens, *shape, own.vector_bytes, factor * model(own, "split").seconds)

    entries = (entry(4, 2.0), entry(64, 8.0), entry(16, 100.0, (4096, 4096)))
    path = tmp_path / "tuned.json"
    tune.write(configs.Table(H200, ("NVIDIA H200",), entries, {}), path)
    monkeypatch.setenv("ALIGNVEC_TUNED", str(path))
    planner.forget()

    def factor(tokens: int, **options: Any) -> float:
        own = problem(**{"format": "int4", "tokens": tokens, **options})
        return corrected(own, "split").seconds / model(own, "split").seconds

    assert [round(factor(tokens), 6) for tokens in (1, 4, 16, 64, 4096)] == [2, 2, 4, 8, 8]
    assert factor(16, shape=(4096, 4096)) == pytest.approx(100)
    assert factor(16, shape=(28672, 4096)) == pytest.approx(100)  # no entry of its shape: the mean of the others
    assert factor(16, format="int8") == factor(16, k=2) == 1
    slow = plan(problem("int4", tokens=64, mixes=1))
    assert slow.execution == "combine"
    assert "8.00 times" in str(plan(problem("int4", tokens=64), "split"))


@pytest.mark.parametrize(
    ("shape", "chosen"),
    [
        ((16, 1), "split"),  # decode: every sequence may have its own mix
        ((300, 1), "split"),
        ((1, 1), "split"),
        ((1, 2048), "materialise"),  # one sequence has one mix
        ((16, 128), "combine"),  # 128 tokens of a sequence fill a tile of combine
        ((256, 8), "split"),  # a tile would be computed for each of 16 sequences
    ],
)
def test_a_call_has_no_more_mixes_than_sequences(shape: tuple[int, int], chosen: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(choice, "find", functools.cache(lambda _: H200))
    weight: Any = SimpleNamespace(is_cuda=True, shape=(4096, 4096), dtype=torch.bfloat16, device="fake")
    parts = [torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")] * 3
    x = torch.empty(*shape, 4096, device="meta")
    choice._choose.cache_clear()
    assert choice.choose("auto", x, weight, ["dense:0:0:1073741824"] * 3, parts, "exact") == chosen
    assert choice.choose("split", x, weight, [], [], "exact") == "split"
    choice._choose.cache_clear()
