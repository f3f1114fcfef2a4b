"""A mix on disk: the right values, rounded once, in the base's layout; loadable; and never half there."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

import alignvec
from alignvec import AlignmentVector, extract, merge
from alignvec.checkpoint import Checkpoint
from alignvec.errors import AlignvecError
from alignvec.rounding import RealisedCoefficients, mix_, stochastic
from tests.storage.checkpoints import aligned, weights, write_checkpoint

Vectors = dict[str, AlignmentVector]
HEAD = "lm_head.weight"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def vectors(pair: tuple[Path, Path], tmp_path: Path) -> Vectors:
    """One vector in memory and one on disk, of the pair's base."""
    other = write_checkpoint(tmp_path / "other", aligned(weights(), seed=2))
    return {"medical": extract(*pair), "legal": extract(pair[0], other, dtype="float32", output=tmp_path / "legal")}


def expected(vectors: Vectors, mix: dict[str, float], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The mix in float32, rounded once."""
    result = {}
    for name, tensor in weights().items():
        edits = [c * vectors[v][name].float() for v, c in mix.items() if name in vectors[v]]
        total = tensor.float() + sum(edits) if edits else tensor
        result[name] = total.to((dtype or tensor.dtype) if tensor.is_floating_point() else tensor.dtype)
    return result


def test_the_mix_in_the_base_layout(
    pair: tuple[Path, Path], vectors: Vectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["alignvec.merge"], "CHUNK", 100)
    mix = {"medical": 0.7, "legal": -0.35}
    report = merge(pair[0], vectors, mix, tmp_path / "m")
    merged, base = Checkpoint.open(tmp_path / "m"), Checkpoint.open(pair[0])
    assert {n: i.file.name for n, i in merged.tensors.items() if i.file} == {
        n: i.file.name for n, i in base.tensors.items() if i.file
    }
    for name, tensor in expected(vectors, mix).items():
        assert torch.equal(merged.tensor(name), tensor), name
    assert names(tmp_path / "m") == sorted([*names(pair[0]), "merge_report.json"])
    assert merged.config == base.config
    assert report.requested == mix
    assert report.changed == sum(int((merged.tensor(n) != t).sum()) for n, t in weights().items())
    assert json.loads((tmp_path / "m" / "merge_report.json").read_text())["realised"] == report.realised


def test_coefficient_one_gives_the_aligned_checkpoint(pair: tuple[Path, Path], tmp_path: Path) -> None:
    vector = extract(*pair, dtype="float32")
    report = merge(pair[0], {"a": vector}, {"a": 1}, tmp_path / "m")
    merged = Checkpoint.open(tmp_path / "m")
    assert all(torch.equal(merged.tensor(name), tensor) for name, tensor in aligned(weights()).items())
    assert report.realised["a"] == pytest.approx(1, abs=1e-6)


def test_dtype_and_shards_can_be_chosen(pair: tuple[Path, Path], vectors: Vectors, tmp_path: Path) -> None:
    mix = {"medical": 0.3, "legal": 1.2}
    paths = {"medical": vectors["medical"], "legal": tmp_path / "legal"}
    report = merge(pair[0], paths, mix, tmp_path / "m", dtype="float32", max_shard_size="2KB")
    merged = Checkpoint.open(tmp_path / "m")
    assert len(merged.files) > 3
    assert merged.config["dtype"] == "float32"
    for name, tensor in expected(vectors, mix, torch.float32).items():
        torch.testing.assert_close(merged.tensor(name), tensor, rtol=1e-6, atol=1e-9)
    assert report.realised == pytest.approx(mix, abs=1e-5)


def test_stochastic_rounding_realises_what_was_asked_for(tmp_path: Path) -> None:
    base = {"w": (torch.randn(200_000, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()}
    folder = write_checkpoint(tmp_path / "b", base)
    vector = AlignmentVector({"w": torch.randn(200_000) * 2e-5})
    nearest = merge(folder, {"v": vector}, {"v": 0.3}, tmp_path / "n")
    runs = [
        merge(folder, {"v": vector}, {"v": 0.3}, tmp_path / f"s{seed}", rounding="stochastic", seed=seed)
        for seed in range(3)
    ]
    again = merge(folder, {"v": vector}, {"v": 0.3}, tmp_path / "again", rounding="stochastic", seed=0)
    assert abs(nearest.realised["v"] - 0.3) > 0.1
    assert all(abs(report.realised["v"] - 0.3) < 0.03 for report in runs)
    assert len({report.realised["v"] for report in runs}) == 3
    assert again.realised == runs[0].realised
    tensors = [Checkpoint.open(tmp_path / name).tensor("w") for name in ("s0", "again")]
    assert torch.equal(*tensors)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([torch.bfloat16, torch.float16]),
    st.one_of(st.floats(-60000, 60000, width=32), st.floats(-(2**-20), 2**-20, width=32), st.just(0.0)),
)
def test_stochastic_rounding_is_unbiased(dtype: torch.dtype, value: float) -> None:
    values = torch.full((4000,), value)
    draws = stochastic(values, dtype, torch.Generator().manual_seed(0)).double()
    exact, low, high = float(values[0]), float(draws.min()), float(draws.max())
    assert set(draws.tolist()) <= {low, high}
    if low == high:  # exact, or so close that no draw went to the other side
        assert low == float(values[0].to(dtype))
        step = abs(exact) * 2**-7 + 2**-24
        assert abs(low - exact) <= 0.01 * step
    else:
        assert low < exact < high
        assert abs(float(draws.mean()) - exact) < 5 * (high - low) / 2 / 4000**0.5


def test_mix_in_place_and_on_any_layout() -> None:
    base, one, two = torch.randn(70, 50), torch.randn(70, 50).bfloat16(), torch.randn(70, 50)
    wanted = (base + (0.5 * one.float() - two)).half()
    assert torch.equal(mix_(torch.empty(70, 50).half(), base, [one, two], [0.5, -1]), wanted)
    turned = base.t().contiguous().t().clone(memory_format=torch.preserve_format)
    assert torch.equal(mix_(turned, turned, [one, two], [0.5, -1]).half(), wanted)
    scalar = torch.tensor(1.0)
    assert float(mix_(scalar, scalar, [torch.tensor(2.0)], [0.25])) == 1.5
    assert torch.equal(mix_(torch.empty(2, 3), torch.ones(2, 3), [], []), torch.ones(2, 3))


def test_realised_coefficients_of_exact_zero_and_collinear_vectors() -> None:
    base, one, two = torch.randn(3, 500, 50, dtype=torch.float64)
    realised = RealisedCoefficients(4)
    deltas = {0: one, 1: two, 2: torch.zeros_like(one), 3: 2 * one}
    realised.update(base, base + 0.25 * one - two + 0.5 * deltas[3], deltas)
    assert realised.solve([0.25, -1, 0.7, 0.5]) == pytest.approx([0.25, -1, 0.7, 0.5], abs=1e-9)
    free = realised.solve()
    assert free[1] == pytest.approx(-1, abs=1e-9)
    assert free[0] + 2 * free[3] == pytest.approx(1.25, abs=1e-9)
    assert free[2] == pytest.approx(0, abs=1e-9)


def test_a_stored_tied_head_follows_its_embedding(tmp_path: Path) -> None:
    def tie(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | {HEAD: tensors["model.embed_tokens.weight"].clone()}

    base = write_checkpoint(tmp_path / "b", tie(weights()), 3)
    vector = extract(base, write_checkpoint(tmp_path / "a", tie(aligned(weights()))), dtype="float32")
    merge(base, {"v": vector}, {"v": 1.0}, tmp_path / "m")
    merged = Checkpoint.open(tmp_path / "m")
    assert torch.equal(merged.tensor(HEAD), aligned(weights())["model.embed_tokens.weight"])


Refused = Callable[[Path, Vectors, Path], object]
REFUSED: dict[str, Refused] = {
    "no vector is named 'law'": lambda b, v, o: merge(b, v, {"medical": 1, "legal": 1, "law": 1}, o),
    "vector 'legal' has no coefficient": lambda b, v, o: merge(b, v, {"medical": 1}, o),
    "coefficient of 'legal' is nan": lambda b, v, o: merge(b, v, {"medical": 1, "legal": float("nan")}, o),
    "coefficient of 'legal' is inf": lambda b, v, o: merge(b, v, {"medical": 1, "legal": float("inf")}, o),
    "there is no vector": lambda b, v, o: merge(b, {}, {}, o),
    "rounding 'up' is not known": lambda b, v, o: merge(b, {"x": v["legal"]}, {"x": 1}, o, rounding="up"),
    "dtype int8": lambda b, v, o: merge(b, {"x": v["legal"]}, {"x": 1}, o, dtype="int8"),
    "'x' does not fit base: 1 of its 1 tensors have no place there (ghost)": lambda b, v, o: merge(
        b, {"x": AlignmentVector({"ghost": torch.ones(2)})}, {"x": 1}, o
    ),
    "model.norm.weight is [3], the base has shape [24]": lambda b, v, o: merge(
        b, {"x": AlignmentVector({"model.norm.weight": torch.ones(3)})}, {"x": 1}, o
    ),
    "is too large for float16: choose smaller": lambda b, v, o: merge(
        b, {"x": v["legal"]}, {"x": 1e38}, o, dtype="float16"
    ),
    "7 of 10 tensors have other values (lm_head.weight, ": lambda b, v, o: merge(
        b.parent / "aligned", {"x": v["legal"]}, {"x": 1}, o
    ),
    "not an empty folder": lambda b, v, o: merge(b, {"x": v["legal"]}, {"x": 1}, b.parent / "aligned"),
    "holds the input": lambda b, v, o: merge(b, {"x": v["legal"]}, {"x": 1}, b, overwrite=True),
    "is no alignment vector": lambda b, v, o: merge(b, {"x": b}, {"x": 1}, o),
}


@pytest.mark.parametrize(("message", "call"), REFUSED.items(), ids=list(REFUSED))
def test_refused(pair: tuple[Path, Path], vectors: Vectors, tmp_path: Path, message: str, call: Refused) -> None:
    before = names(tmp_path)
    with pytest.raises(AlignvecError) as caught:
        call(pair[0], vectors, tmp_path / "m")
    assert message in str(caught.value)
    assert names(tmp_path) == before


def test_transfer_to_another_stage(pair: tuple[Path, Path], vectors: Vectors, tmp_path: Path) -> None:
    merge(pair[1], {"x": vectors["legal"]}, {"x": 1}, tmp_path / "m", transfer=True)
    delta = vectors["legal"][HEAD]
    assert torch.equal(
        Checkpoint.open(tmp_path / "m").tensor(HEAD), (aligned(weights())[HEAD].float() + delta).bfloat16()
    )


def test_an_interrupt_leaves_nothing(
    pair: tuple[Path, Path], vectors: Vectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["alignvec.merge"], "mix_", interrupted)
    before = names(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        merge(pair[0], vectors, {"medical": 1, "legal": 1}, tmp_path / "m")
    assert names(tmp_path) == before


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_transformers_loads_the_result(tmp_path: Path, tied: bool) -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=67,
        tie_word_embeddings=tied,
    )
    base = MistralForCausalLM(config).bfloat16()
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    after = MistralForCausalLM(config).bfloat16()
    after.load_state_dict(
        {n: (p.float() + 1e-2 * torch.randn(p.shape)).bfloat16() for n, p in base.state_dict().items()}
    )
    after.tie_weights()
    after.save_pretrained(tmp_path / "aligned")
    vector = extract(tmp_path / "base", tmp_path / "aligned", output=tmp_path / "v")
    live = extract(base, after)
    assert set(live) == set(vector)
    assert vector.base is not None
    assert vector.base.differences(alignvec.fingerprint.identify(base)) == []
    merge(tmp_path / "base", {"v": tmp_path / "v"}, {"v": 0.6}, tmp_path / "m")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto")
    parameters = dict(loaded.named_parameters())
    assert parameters.keys() == before.keys()
    for name, parameter in parameters.items():
        edit = 0.6 * vector[name].float() if name in vector else 0.0  # a norm of ones may not have moved
        assert torch.equal(parameter, (before[name].float() + edit).bfloat16()), name
