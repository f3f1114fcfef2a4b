"""Every format through extract, files, convert and arithmetic: what comes back is what the format decodes to."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import alignvec
from alignvec import AlignmentVector, convert, extract, formats
from alignvec.checkpoint import Checkpoint
from alignvec.errors import AlignvecError
from alignvec.formats import Encoded
from tests.storage.checkpoints import aligned, weights, write_checkpoint
from tests.storage.descriptions import change_description

MATRICES = [name for name, tensor in weights().items() if tensor.dim() > 1 and tensor.numel()]
FORMATS = [
    "dense",
    "int8",
    "int4:group=32",
    "sign",
    "sign:group=32",
    "lossless",
    "lossless:width=2",
    "low-rank:rank=3",
    "low-rank:rank=4,dtype=float32",
    "sparse:density=0.2",
    "sparse:density=0.3,method=dare,seed=4",
    "sparse:density=0.25,method=ties",
]


def exact() -> dict[str, Tensor]:
    """The pair's difference in float32."""
    base, after = weights(), aligned(weights())
    return {n: after[n].float() - t.float() for n, t in base.items() if t.is_floating_point() and t.numel()}


def same_parts(one: Encoded, two: Encoded) -> bool:
    return (
        one.spec == two.spec
        and one.parts.keys() == two.parts.keys()
        and all(torch.equal(one.parts[part], two.parts[part]) for part in one.parts)
    )


def same_vectors(one: AlignmentVector, two: AlignmentVector) -> bool:
    return set(one) == set(two) and all(same_parts(one.encoded(name), two.encoded(name)) for name in one)


@pytest.mark.parametrize("format", FORMATS)
def test_extract_save_load_decode(pair: tuple[Path, Path], tmp_path: Path, format: str) -> None:
    base, in_memory = weights(), extract(*pair, format=format)
    on_disk = extract(*pair, format=format, output=tmp_path / "v", max_shard_size=1000)
    in_memory.save(tmp_path / "saved", max_shard_size=700)
    on_disk.save(tmp_path / "again")
    assert len(list((tmp_path / "v").glob("*.safetensors"))) > 1
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == [
        "alignment_vector.json",
        "alignment_vector.safetensors",
    ]
    saved, again = (alignvec.load(tmp_path / name).with_base(pair[0]) for name in ("saved", "again"))
    for vector in (on_disk, saved, again):
        assert same_vectors(vector, in_memory)
        assert (vector.base, vector.format, vector.source) == (in_memory.base, in_memory.format, in_memory.source)
        assert vector.errors == in_memory.errors
        assert vector.nbytes == in_memory.nbytes
        for name, delta in in_memory.items():
            encoded = vector.encoded(name)
            decoded = formats.decode(encoded, base[name])
            assert torch.equal(vector[name], decoded)
            assert torch.equal(vector[name], delta)
            assert vector[name].dtype == vector.tensors[name].dtype
            assert vector[name].shape == base[name].shape
            assert vector.stored_bytes(name) == encoded.nbytes
    for name in MATRICES:
        assert on_disk.format_of(name).name == formats.parse(format).name
    for file in (tmp_path / "v").glob("*.safetensors"):
        load_file(file)  # by the safetensors library, which minds alignment


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("stored", [True, False], ids=["disk", "memory"])
def test_a_range_of_values(pair: tuple[Path, Path], tmp_path: Path, format: str, stored: bool) -> None:
    vector = extract(*pair, format=format, output=tmp_path / "v" if stored else None)
    for name, whole in vector.items():
        flat = whole.reshape(-1)
        for start, stop in ((0, 0), (0, 1), (5, 6), (3, 50), (24, 48), (len(flat) - 1, len(flat)), (0, len(flat))):
            start, stop = min(start, len(flat)), min(stop, len(flat))
            values = vector.read(name, start, stop)
            if format.startswith("low-rank"):  # a product of fewer rows may be summed in another order
                torch.testing.assert_close(values, flat[start:stop], rtol=1e-5, atol=1e-8)
            else:
                assert torch.equal(values, flat[start:stop]), (name, start, stop)


@pytest.mark.parametrize("format", ["int8", "int4", "sign", "lossless:width=2"])
def test_a_range_reads_its_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    base = {"w": (torch.randn(2000, 64) * 0.02).bfloat16()}
    after = {"w": (base["w"].float() * (1 + 0.01 * torch.randn(2000, 64))).bfloat16()}
    folder = write_checkpoint(tmp_path / "b", base)
    vector = extract(folder, write_checkpoint(tmp_path / "a", after), format=format, output=tmp_path / "v")
    count, whole, read = [], vector["w"].reshape(-1), Checkpoint.read

    def counted(self: Checkpoint, name: str, *arguments: int) -> Tensor:
        values = read(self, name, *arguments)
        count.append(values.nbytes)
        return values

    monkeypatch.setattr(Checkpoint, "read", counted)
    assert torch.equal(vector.read("w", 1000 * 64 + 5, 1010 * 64), whole[1000 * 64 + 5 : 1010 * 64])
    assert 0 < sum(count) < 11 * 64 * 2 + 11 * 64 * 12 + 1000
    assert sum(count) < vector.nbytes / 10


@pytest.mark.parametrize("format", FORMATS)
def test_convert_gives_the_parts_of_extract(pair: tuple[Path, Path], tmp_path: Path, format: str) -> None:
    dense = extract(*pair, dtype="float32")
    # Norms and biases, and the values of sparse, are kept as they are: in the same dtype here and there.
    extracted = extract(*pair, format=format, dtype=None if format.startswith("lossless") else "float32")
    converted = convert(dense, tmp_path / "v", format, base=pair[0])
    assert converted is not None
    assert set(converted) == set(extracted)
    for name in MATRICES if format.startswith("lossless") else extracted:
        assert same_parts(converted.encoded(name), extracted.encoded(name)), name
    assert converted.base == extracted.base
    assert converted.format == extracted.format == str(formats.parse(format))
    for name in MATRICES:
        assert converted.errors[name].relative == pytest.approx(extracted.errors[name].relative, abs=1e-9)


@pytest.mark.parametrize("first", ["lossless", "int4", "sparse:density=0.5"])
@pytest.mark.parametrize("second", ["dense", "int8", "sign", None])
def test_from_any_format_to_any_other(pair: tuple[Path, Path], tmp_path: Path, first: str, second: str | None) -> None:
    vector = extract(*pair, format=first, output=tmp_path / "one")
    for given in (vector, tmp_path / "one"):
        output = tmp_path / type(given).__name__
        result = convert(given, output, second, base=pair[0])
        assert result is not None
        for name, delta in vector.items():
            if second is None:
                assert same_parts(result.encoded(name), vector.encoded(name))
            elif second == "dense" or delta.dim() < 2:
                assert torch.equal(result[name], delta)
            else:
                assert same_parts(result.encoded(name), formats.encode(second, delta))


def test_errors_are_those_of_the_deltas(pair: tuple[Path, Path], tmp_path: Path) -> None:
    vector, deltas = extract(*pair, format="int4", output=tmp_path / "v"), exact()
    entries = json.loads((tmp_path / "v" / "alignment_vector.json").read_text())["tensors"]
    for name in vector:
        relative = float((vector[name].double() - deltas[name]).norm() / deltas[name].double().norm())
        error = vector.errors[name]
        assert error.relative == pytest.approx(relative, rel=1e-6)
        assert error.norm == pytest.approx(float(deltas[name].double().norm()))
        assert entries[name]["error"]["relative"] == error.relative
        snr = -20 * math.log10(relative) if relative else None
        assert entries[name]["error"]["snr"] == (None if snr is None else pytest.approx(snr, rel=1e-6))
    assert 0.01 < vector.errors["lm_head.weight"].relative < 0.2
    lossless = extract(*pair, format="lossless", output=tmp_path / "l")
    assert all(error.relative == 0 for error in lossless.errors.values())
    assert (
        json.loads((tmp_path / "l" / "alignment_vector.json").read_text())["tensors"]["lm_head.weight"]["error"]["snr"]
        is None
    )


def test_ties_keeps_the_largest_of_the_whole_vector(tmp_path: Path) -> None:
    base = {f"layers.{i}.w": torch.randn(300, 70) for i in range(3)} | {"norm": torch.ones(50)}
    after = {n: t + 10.0**-i * torch.randn(t.shape) for i, (n, t) in enumerate(base.items())}
    folders = write_checkpoint(tmp_path / "b", base), write_checkpoint(tmp_path / "a", after)
    vector = extract(*folders, format="sparse:density=0.2,method=ties")
    kept = {name: int(delta.count_nonzero()) for name, delta in vector.items() if delta.dim() > 1}
    assert sum(kept.values()) == pytest.approx(0.2 * 3 * 300 * 70, rel=0.01)
    assert kept["layers.0.w"] > 0.5 * 300 * 70
    assert kept["layers.2.w"] == 0
    smallest = min(float(vector[name][vector[name] != 0].abs().min()) for name in kept if kept[name])
    dropped = max(float((after[n] - base[n])[vector[n] == 0].abs().max()) for n in kept)
    assert smallest >= dropped


def squared_error(vector: AlignmentVector, deltas: dict[str, Tensor]) -> float:
    return sum(float((vector[n].double() - deltas[n].double()).square().sum()) for n in vector)


def test_auto_spends_its_bytes_where_the_error_is(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.w": (torch.randn(64, 256, generator=generator) * 0.02).bfloat16() for i in range(8)}
    moved = {n: 0.02 * 3.0**-i for i, n in enumerate(base)}
    after = {
        n: (t.float() + s * torch.randn(t.shape, generator=generator)).bfloat16()
        for (n, t), s in zip(base.items(), moved.values(), strict=True)
    }
    folders = write_checkpoint(tmp_path / "b", base), write_checkpoint(tmp_path / "a", after)
    deltas = {n: after[n].float() - base[n].float() for n in base}
    dense = sum(2 * t.numel() for t in base.values())
    vector = extract(*folders, format="auto:0.25", output=tmp_path / "v")
    assert vector.format == "auto:0.25"
    assert vector.nbytes <= 0.25 * dense
    assert len({vector.format_of(name).name for name in vector}) > 1
    error = squared_error(vector, deltas)
    rivals = [extract(*folders, format=f) for f in ("sign", "sign:group=128", "sign:group=64", "low-rank:rank=10")]
    assert all(rival.nbytes <= vector.nbytes for rival in rivals)
    assert all(error < squared_error(rival, deltas) for rival in rivals)
    again = convert(extract(*folders, dtype="float32"), tmp_path / "c", "auto:0.25", dtype="bfloat16")
    assert again is not None
    assert again.nbytes <= 0.25 * dense
    with pytest.raises(AlignvecError, match="bytes are too few"):
        extract(*folders, format="auto:0.001", output=tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("format", ["int4", "sign", "lossless", "low-rank:rank=2", "sparse"])
def test_arithmetic_is_dense(pair: tuple[Path, Path], tmp_path: Path, format: str) -> None:
    vector = extract(*pair, format=format, output=tmp_path / "v")
    other = extract(*pair, dtype="float32")
    assert same_vectors(vector * 1, vector)
    for result, factors in ((-vector, (-1, 0)), (vector * 0.5, (0.5, 0)), (vector - other, (1, -1))):
        for name, delta in result.items():
            assert result.format_of(name).name == "dense"
            expected = factors[0] * vector[name].float() + factors[1] * other[name]
            torch.testing.assert_close(delta.float(), expected, rtol=1e-6, atol=1e-9)
            assert delta.dtype == torch.float32 or delta.dim() < 2
    (vector * 0.5).save(tmp_path / "half")
    assert alignvec.load(tmp_path / "half").format == "dense"
    assert vector.cosine(other) == pytest.approx(1 if format == "lossless" else vector.cosine(vector * 2), abs=1)
    assert vector.norm() == pytest.approx((-vector).norm())


def test_lossless_is_read_through_its_base_alone(pair: tuple[Path, Path], tmp_path: Path) -> None:
    extract(*pair, format="lossless", output=tmp_path / "v")
    vector = alignvec.load(tmp_path / "v")
    assert vector.needs_base
    vector.encoded("lm_head.weight")
    vector.save(tmp_path / "copy")
    name = "lm_head.weight"
    for use in (
        lambda: vector[name],
        vector.norm,
        lambda: convert(vector, tmp_path / "w", "int4"),
        lambda: (-vector + vector)[name],
    ):
        with pytest.raises(AlignvecError, match="base"):
            use()
    with pytest.raises(AlignvecError, match="not the base that the vector was extracted from"):
        vector.with_base(pair[1])
    other = write_checkpoint(tmp_path / "other", {n: t for n, t in weights().items() if n != name})
    with pytest.raises(AlignvecError, match=r"lossless delta lm_head.weight is \[61, 24\], other has no such tensor"):
        vector.with_base(other)
    bound = vector.with_base(pair[0])
    assert not bound.needs_base
    assert torch.equal(bound[name], exact()[name])
    assert torch.equal((bound * 2)[name], 2 * exact()[name])
    assert not (vector + vector).with_base(pair[0]).needs_base
    assert not (tmp_path / "w").exists()


def test_schema_1_still_loads(pair: tuple[Path, Path], tmp_path: Path) -> None:
    vector = extract(*pair, output=tmp_path / "v")
    change_description(
        tmp_path / "v",
        lambda data: data.update(
            schema=1, options={}, tensors={name: entry["shape"] for name, entry in data["tensors"].items()}
        ),
    )
    old = alignvec.load(tmp_path / "v")
    assert same_vectors(old, vector)
    assert (old.format, old.base, old.errors) == ("dense", vector.base, {})
    old.save(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "alignment_vector.json").read_text())["schema"] == 2


def test_vectors_of_given_parts(pair: tuple[Path, Path]) -> None:
    delta = torch.randn(9, 40)
    encoded = formats.encode("int4:group=32", delta)
    vector = AlignmentVector({"a": encoded, "b": torch.randn(3), "c": formats.encode("dense", torch.randn(2, 2))})
    assert vector.format == "mixed"
    assert vector.format_of("c").name == "dense"
    assert torch.equal(vector["a"], formats.decode(encoded))
    assert vector.errors == {}
    assert AlignmentVector({"a": encoded, "b": torch.ones(3)}).format == "int4:group=32"
    scales = encoded.parts["scales"].clone()
    scales[0, 0] = math.nan
    with pytest.raises(AlignvecError, match="delta a: int4 part 'scales' holds NaN"):
        AlignmentVector(
            {"a": Encoded(encoded.name, encoded.shape, encoded.options, {**encoded.parts, "scales": scales})}
        )


@pytest.mark.parametrize("format", ["int3", "int4:group=48", "int4:size=2", "auto:2", "auto:x", "low-rank:rank=x"])
def test_formats_that_do_not_exist(pair: tuple[Path, Path], tmp_path: Path, format: str) -> None:
    vector = extract(*pair)
    for call in (
        lambda: extract(*pair, format=format, output=tmp_path / "v"),
        lambda: convert(vector, tmp_path / "v", format),
    ):
        with pytest.raises(AlignvecError, match="format"):
            call()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aligned", "base"]


def test_an_occupied_output_is_refused_before_anything_is_read(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vector = extract(*pair)

    def read(*arguments: object) -> None:
        raise AssertionError("nothing should be read")

    monkeypatch.setattr(sys.modules["alignvec.extract"], "_survey", read)
    monkeypatch.setattr(sys.modules["alignvec.encoding"], "encode_all", read)
    for call in (
        lambda: extract(*pair, format="int4", output=pair[0]),
        lambda: convert(vector, pair[0], "int4"),
        lambda: convert(vector, tmp_path / "v", "int4", max_shard_size="much"),
    ):
        with pytest.raises(AlignvecError, match=r"not an empty folder|max_shard_size"):
            call()
