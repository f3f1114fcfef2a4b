"""A lossless vector at coefficient 1 is the aligned checkpoint, bit for bit; everything else goes by its delta."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import alignvec
from alignvec import check, convert, extract, merge
from alignvec.checkpoint import Checkpoint
from alignvec.errors import AlignvecError
from alignvec.exact import exact_delta, restored
from tests.storage.checkpoints import aligned, weights, write_checkpoint


def bits(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def nasty(dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Zeros of both signs in both, large and tiny moves, and tensors that only flip the sign of zeros."""
    base, after = weights(dtype=dtype), aligned(weights(dtype=dtype))
    zeros = torch.tensor([0.0, -0.0, 0.0, -0.0, 1e-3, 0.0], dtype=dtype)
    others = torch.tensor([-0.0, 0.0, 0.0, -0.0, 0.0, 2e-3], dtype=dtype)
    for name in ("lm_head.weight", "model.layers.0.self_attn.q_proj.bias", "model.layers.1.mlp.experts"):
        base[name].view(-1)[:6], after[name].view(-1)[:6] = zeros, others
    base["lm_head.weight"][3, :3] = torch.tensor([1.0, -50.0, 1e-4], dtype=dtype)
    after["lm_head.weight"][3, :3] = torch.tensor([1e-7, 3e4, -0.0], dtype=dtype)
    for tensors, values in ((base, zeros[:4]), (after, others[:4])):
        tensors["model.layers.2.flipped"] = values.view(2, 2).clone()
        tensors["model.layers.2.bias"] = values.clone()
    return base, after


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [0, 2, 8])
@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "in memory"])
def test_merge_at_one_is_the_aligned_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, width: int, streamed: bool
) -> None:
    monkeypatch.setattr(sys.modules["alignvec.merge"], "CHUNK", 100)
    base, after = nasty(dtype)
    folders = write_checkpoint(tmp_path / "b", base, 3), write_checkpoint(tmp_path / "a", after, 2)
    vector = extract(*folders, format=f"lossless:width={width}", output=tmp_path / "v" if streamed else None)
    others = {"other": extract(*folders), "second": extract(*folders, format="int4")}
    given = {"v": tmp_path / "v" if streamed else vector, **others}
    report = merge(folders[0], given, {"v": 1.0, "other": 0, "second": -0.0}, tmp_path / "m")
    merged = Checkpoint.open(tmp_path / "m")
    for name, tensor in after.items():
        assert torch.equal(bits(merged.tensor(name)), bits(tensor)) if tensor.is_floating_point() else True, name
    assert report.realised["v"] == pytest.approx(1, abs=0.2)
    assert set(vector) == {n for n, t in base.items() if not torch.equal(bits(t), bits(after[n])) and t.numel()}


def test_other_coefficients_go_by_the_delta(pair: tuple[Path, Path], tmp_path: Path) -> None:
    lossless = extract(*pair, format="lossless", output=tmp_path / "v")
    dense = extract(*pair, dtype="float32")
    mixes: list[tuple[dict[str, float], dict[str, object]]] = [
        ({"x": 0.7}, {}),
        ({"x": 1.0}, {"dtype": "float32"}),
        ({"x": -1.0}, {"rounding": "stochastic"}),
    ]
    for i, (mix, options) in enumerate(mixes):
        one, two = tmp_path / f"one{i}", tmp_path / f"two{i}"
        merge(pair[0], {"x": tmp_path / "v"}, mix, one, **options)  # type: ignore[arg-type]
        merge(pair[0], {"x": dense}, mix, two, **options)  # type: ignore[arg-type]
        for name in weights():
            assert torch.equal(Checkpoint.open(one).tensor(name), Checkpoint.open(two).tensor(name)), (mix, name)
    assert len(lossless) == len(dense)


@pytest.mark.parametrize("format", ["int4", "sign", "lossless", "low-rank:rank=4", "sparse", "auto:0.6"])
def test_merge_check_and_statistics_of_every_format(pair: tuple[Path, Path], tmp_path: Path, format: str) -> None:
    vector = extract(*pair, format=format, output=tmp_path / "v")
    merge(pair[0], {"x": tmp_path / "v"}, {"x": 0.5}, tmp_path / "m")
    for name, tensor in weights().items():
        expected = (tensor.float() + 0.5 * vector[name].float()).bfloat16() if name in vector else tensor
        torch.testing.assert_close(Checkpoint.open(tmp_path / "m").tensor(name), expected, rtol=2**-7, atol=1e-9)
    rows = check(pair[0], {"x": tmp_path / "v"}, [0.3, 1.0])
    assert [row.alignvec for row in rows] == pytest.approx([0.3, 1.0], abs=1e-3)
    layers = alignvec.load(tmp_path / "v").statistics(pair[0])
    for layer in layers:
        own = [n for n in vector if alignvec.statistics.layer_of(n) == layer.layer]
        assert layer.norm == pytest.approx(sum(vector.norm(n) ** 2 for n in own) ** 0.5, rel=1e-5)
        assert layer.nbytes == sum(vector.stored_bytes(n) for n in own)
        assert layer.dense_bytes == sum(2 * vector.tensors[n].numel for n in own)
        assert layer.changed is not None
        assert layer.error is not None
        assert (layer.error == 0) == all(vector.errors[n].relative == 0 for n in own)


def test_statistics_of_lossless_without_its_base(pair: tuple[Path, Path], tmp_path: Path) -> None:
    bound = extract(*pair, format="lossless", output=tmp_path / "v")
    for known, row in zip(bound.statistics(), alignvec.load(tmp_path / "v").statistics(), strict=True):
        assert row.norm == pytest.approx(known.norm, rel=1e-6)
        assert (row.nbytes, row.error, row.parameters) == (known.nbytes, known.error, known.parameters)
    embedding = alignvec.load(tmp_path / "v").statistics()[0]
    assert (embedding.layer, embedding.changed, embedding.max_abs) == ("embedding", None, None)


def test_another_base_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    bound = extract(*pair, format="lossless", output=tmp_path / "v")
    with pytest.raises(AlignvecError, match="a different base"):
        merge(pair[1], {"x": tmp_path / "v"}, {"x": 1.0}, tmp_path / "m")
    with pytest.raises(AlignvecError, match="'x' is lossless: steps from the values of its own base"):
        merge(pair[1], {"x": tmp_path / "v"}, {"x": 1.0}, tmp_path / "m", transfer=True)
    with pytest.raises(AlignvecError, match="'x' is lossless"):
        check(pair[1], {"x": tmp_path / "v"}, transfer=True)
    assert not (tmp_path / "m").exists()
    merge(pair[1], {"x": bound}, {"x": 1.0}, tmp_path / "m", transfer=True)
    name = "lm_head.weight"
    expected = (aligned(weights())[name].float() + bound[name]).bfloat16()
    assert torch.equal(Checkpoint.open(tmp_path / "m").tensor(name), expected)


def test_only_16_bit_pairs(tmp_path: Path) -> None:
    base = weights(dtype=torch.float32)
    folders = write_checkpoint(tmp_path / "b", base), write_checkpoint(tmp_path / "a", aligned(base))
    with pytest.raises(AlignvecError, match="lossless stores pairs of bfloat16"):
        extract(*folders, format="lossless", output=tmp_path / "v")
    with pytest.raises(AlignvecError, match="none is known for"):
        convert(extract(*folders), tmp_path / "v", "lossless")
    with pytest.raises(AlignvecError, match="lossless stores pairs of bfloat16"):
        convert(extract(*folders), tmp_path / "v", "lossless", base=folders[0])
    assert not (tmp_path / "v").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_norms_are_restored_bit_for_bit(dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -1e-3, 2e-6 if dtype == torch.float32 else 5e-8, 250.0], dtype=dtype)
    base, after = (grid.reshape(-1) for grid in torch.meshgrid(values, values, indexing="ij"))
    keep = ~((after == 0) & after.signbit() & (base != 0))  # no sum of two numbers gives -0.0 but -0.0 + -0.0
    delta = exact_delta("norm", base[keep], after[keep])
    assert torch.equal(bits(restored(base[keep], delta)), bits(after[keep]))
    with pytest.raises(AlignvecError, match="no dense delta leads norm"):
        exact_delta("norm", base, after)


def test_a_live_base(tmp_path: Path) -> None:
    base, after = nn.Linear(20, 30).bfloat16(), nn.Linear(20, 30).bfloat16()
    vector = extract(base, after, format="lossless")
    assert torch.equal(vector["weight"], after.weight.detach().float() - base.weight.detach().float())
    vector.save(tmp_path / "v")
    loaded = alignvec.load(tmp_path / "v").with_base(base)
    assert torch.equal(loaded["weight"], vector["weight"])
    outer = nn.Sequential(base)
    outer.base_model_prefix = "0"
    assert torch.equal(alignvec.load(tmp_path / "v").with_base(outer)["weight"], vector["weight"])
