"""Every format: round trips on odd shapes, errors against theory or brute force, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from alignvec import formats
from alignvec.errors import AlignvecError
from alignvec.formats import Encoded, bits, integer, sparse
from alignvec.formats.spec import matrix

SHAPES = [(7, 33), (1, 1), (1, 300), (300, 1), (3, 5, 70), (2, 3, 4, 9), (64, 256)]
LOSSY = [
    "int8",
    "int8:group=32",
    "int4",
    "int4:group=64",
    "sign",
    "sign:group=32",
    "low-rank:rank=3",
    "low-rank:rank=2,dtype=float32",
    "sparse:density=0.3",
    "sparse:method=dare,density=0.5",
    "sparse:method=ties,threshold=0.5",
]


def pair(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """base, aligned and their exact difference."""
    base = (torch.randn(shape) * 0.02).to(dtype)
    aligned = (base.float() + torch.randn(shape) * 1e-4).to(dtype)
    return base, aligned, aligned.float() - base.float()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spec", ["dense", "lossless", "lossless:width=2", *LOSSY])
def test_parts_fit_their_layout_and_rows_decode_alone(spec: str, shape: tuple[int, ...]) -> None:
    base, _, delta = pair(shape)
    delta = delta if spec in ("dense", "lossless", "lossless:width=2") else torch.randn(shape)
    kept = delta.clone()
    encoded = formats.encode(spec, delta, base, "weight")
    formats.check(encoded)
    assert torch.equal(delta, kept)
    assert encoded.nbytes == sum(part.nbytes for part in encoded.parts.values())
    assert formats.parse(str(encoded.spec)) == encoded.spec
    whole = formats.decode(encoded, base)
    rows, cols = matrix(shape)
    assert whole.shape == torch.Size(shape)
    assert whole.dtype == torch.float32
    for part in (slice(0, 1), slice(rows // 2, rows), slice(1, 1)):
        alone = formats.decode(encoded, base.view(rows, cols)[part], part)
        # A product of matrices may be summed in another order for other shapes.
        close = 1e-6 if encoded.name == "low-rank" else 0
        torch.testing.assert_close(alone, whole.view(rows, cols)[part], rtol=close, atol=close)
    error = float((whole.double() - delta.double()).square().sum())
    assert formats.squared_error(encoded, delta, base) == pytest.approx(error, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("spec", LOSSY)
def test_a_delta_of_any_dtype_is_encoded_as_its_float32_values(spec: str, dtype: torch.dtype) -> None:
    delta = torch.randn(9, 70).to(dtype)
    expected = formats.decode(formats.encode(spec, delta.float()))
    torch.testing.assert_close(formats.decode(formats.encode(spec, delta)), expected, rtol=4e-3, atol=0)


@pytest.mark.parametrize("spec", ["lossless", *LOSSY])
def test_vectors_and_empty_tensors_are_stored_dense(spec: str) -> None:
    for delta in (torch.randn(48).bfloat16(), torch.tensor(1.5), torch.empty(0, 7), torch.empty(3, 0)):
        encoded = formats.encode(spec, delta)
        formats.check(encoded)
        assert encoded.name == "dense"
        assert torch.equal(formats.decode(encoded), delta)
        assert formats.decode(encoded).dtype == delta.dtype


@pytest.mark.parametrize("width", range(1, 9))
@pytest.mark.parametrize("cols", [1, 3, 8, 33])
def test_fields_are_packed_little_end_first(width: int, cols: int) -> None:
    fields = torch.randint(0, 1 << width, (5, cols), dtype=torch.uint8)
    packed = bits.pack(fields, width)
    assert packed.shape == (5, math.ceil(cols * width / 8))
    for row in range(5):
        number = sum(int(field) << (i * width) for i, field in enumerate(fields[row]))
        assert bytes(packed[row].tolist()) == number.to_bytes(packed.shape[1], "little")
    assert torch.equal(bits.unpack(packed, width, cols), fields)


def test_bits_are_counted_at_any_number_of_bytes() -> None:
    for packed in (torch.arange(256, dtype=torch.uint8), torch.full((3, 7), 255, dtype=torch.uint8), torch.empty(0, 3)):
        assert bits.count(packed.to(torch.uint8)) == sum(value.bit_count() for value in packed.int().flatten().tolist())


# Error of each format


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(
    # A fine search finds luckier grids for 8 bits, which is worth little: the error is 0.6 % of the delta anyway.
    ("name", "limit", "ratio"),
    [("int4", 7, 1.03), ("int8", 127, 1.4)],
    ids=["int4", "int8"],
)
def test_integer_scale_is_stationary_and_near_the_best_of_a_fine_search(
    name: str, limit: int, ratio: float, group: int
) -> None:
    delta = torch.randn(24, 512) * 10 ** torch.linspace(-9, 2, 24)[:, None]
    encoded = formats.encode(f"{name}:group={group}", delta)
    x = delta.view(24, -1, group).double()
    decoded = formats.decode(encoded).view_as(x).double()
    error = (decoded - x).square().sum(-1)
    scales = encoded.parts["scales"]
    for neighbour in (1, -1):  # the next bf16 numbers
        factor = (scales.view(torch.int16) + neighbour).view(torch.bfloat16).double() / scales.double()
        worse = (decoded * factor[..., None] - x).square().sum(-1) / error
        assert worse.mean() > 1
        assert worse.min() > 0.95  # the search stops after a few rounds
    best = torch.full_like(error, torch.inf)
    for part in torch.linspace(0.5, 1.1, 301):
        scale = x.abs().amax(-1, keepdim=True) / limit * part
        searched = (x / scale).round().clamp(-limit, limit) * scale
        best = torch.minimum(best, (searched - x).square().sum(-1))
    assert (error / best).mean() < ratio


def test_integer_codes_use_the_symmetric_range_and_are_rounded_against_the_stored_scale() -> None:
    delta = torch.randn(16, 200)
    for name, limit in integer.LIMITS.items():
        encoded = formats.encode(name, delta)
        scales = encoded.parts["scales"].float().repeat_interleave(128, 1)[:, :200]
        expected = (delta / scales).round().clamp(-limit, limit) * scales
        assert torch.equal(formats.decode(encoded), expected)
    assert integer.quantise(torch.randn(64, 128), 128, "int4")[1].abs().max() == 7


@pytest.mark.parametrize("spec", ["int8", "int4", "sign", "sign:group=32"])
@pytest.mark.parametrize("size", [1e38, 1e-37, 0.0])
def test_scales_survive_the_ends_of_float32(spec: str, size: float) -> None:
    delta = (torch.rand(4, 70) + 0.5) * size
    decoded = formats.decode(formats.encode(spec, delta))
    assert torch.isfinite(decoded).all()
    assert (decoded - delta).double().norm() <= 0.35 * delta.double().norm()


def test_sign_keeps_every_sign_and_its_scale_minimises_the_error() -> None:
    delta = torch.randn(6, 100)
    for spec, groups in (("sign", [slice(0, 100)]), ("sign:group=64", [slice(0, 64), slice(64, 100)])):
        decoded = formats.decode(formats.encode(spec, delta))
        assert torch.equal(decoded < 0, delta < 0)
        for group in groups:
            part, got = delta[:, group].double(), decoded[:, group].double()
            torch.testing.assert_close(got.abs(), part.abs().mean(1, keepdim=True).expand_as(got), rtol=4e-3, atol=0)
            for factor in (0.98, 1.02):
                assert ((got * factor - part).square().sum(1) > (got - part).square().sum(1)).all()


def test_sign_of_a_normal_distribution_has_the_error_of_theory() -> None:
    delta = torch.randn(256, 1024)
    relative = math.sqrt(formats.squared_error(formats.encode("sign", delta), delta)) / float(delta.norm())
    assert relative == pytest.approx(math.sqrt(1 - 2 / math.pi), rel=0.01)


@pytest.mark.parametrize("shape", [(40, 90), (600, 700)], ids=["full", "iterated"])
def test_low_rank_error_is_that_of_the_discarded_singular_values(shape: tuple[int, int]) -> None:
    delta = torch.randn(shape)
    discarded = torch.linalg.svdvals(delta.double())[5:].square().sum()
    for dtype, slack in (("float32", 2e-3), ("bfloat16", 4e-3)):
        encoded = formats.encode(f"low-rank:rank=5,dtype={dtype}", delta)
        assert formats.squared_error(encoded, delta) == pytest.approx(float(discarded), rel=slack)
        a, b = encoded.parts["A"].float(), encoded.parts["B"].float()
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=1e-2, atol=0)


def test_low_rank_gives_a_low_rank_delta_back_and_is_the_same_each_time() -> None:
    delta = torch.randn(600, 4) @ torch.randn(4, 530) * 1e-4
    state = torch.get_rng_state()
    first, second = (formats.encode("low-rank:rank=8,dtype=float32", delta) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.parts["A"], second.parts["A"])
    torch.testing.assert_close(formats.decode(first), delta, rtol=1e-4, atol=1e-8)


def test_low_rank_is_clipped_to_the_matrix() -> None:
    delta = torch.randn(5, 9)
    encoded = formats.encode("low-rank:rank=64,dtype=float32", delta)
    assert encoded.options["rank"] == 5
    torch.testing.assert_close(formats.decode(encoded), delta)


@pytest.mark.parametrize("density", [0.01, 0.37, 1.0])
def test_topk_keeps_exactly_the_largest(density: float) -> None:
    delta = torch.randn(31, 45).bfloat16()  # with many equal magnitudes
    encoded = formats.encode(f"sparse:density={density}", delta)
    count = max(1, round(density * delta.numel()))
    kept = formats.decode(encoded)
    assert encoded.parts["values"].dtype == torch.bfloat16
    assert len(encoded.parts["values"]) == count
    largest = delta.float().abs().flatten().sort(descending=True).values[:count]
    assert torch.equal(kept.abs().flatten().sort(descending=True).values[:count], largest)
    assert torch.equal(kept[kept != 0], delta.float()[kept != 0])


def test_sparse_never_stores_a_zero() -> None:
    delta = torch.zeros(4, 50)
    delta[1, 3] = -2
    for spec in ("sparse:density=0.5", "sparse:density=1,method=dare", "sparse:method=ties,threshold=1e-45"):
        encoded = formats.encode(spec, delta)
        assert encoded.parts["values"].tolist() == [-2.0]
        assert torch.equal(formats.decode(encoded), delta)


def test_dare_is_unbiased_and_reproducible_by_name_and_seed() -> None:
    delta = torch.randn(200, 300)
    spec = "sparse:method=dare,density=0.2"
    kept = formats.decode(formats.encode(spec, delta, name="a"))
    assert torch.equal(kept, formats.decode(formats.encode(spec, delta, name="a")))
    assert not torch.equal(kept, formats.decode(formats.encode(spec, delta, name="b")))
    assert not torch.equal(kept, formats.decode(formats.encode(f"{spec},seed=1", delta, name="a")))
    mask = kept != 0
    assert float(mask.float().mean()) == pytest.approx(0.2, abs=0.01)
    assert torch.equal(kept[mask], delta[mask] / 0.2)
    assert float((kept * delta).sum() / delta.square().sum()) == pytest.approx(1, abs=0.06)


def test_dare_out_of_range_is_refused() -> None:
    with pytest.raises(AlignvecError, match=r"w divided by the density"):
        formats.encode("sparse:method=dare,density=0.5", torch.full((4, 4), 6e4, dtype=torch.float16), name="w")


@pytest.mark.parametrize("density", [0.001, 0.25, 1.0])
def test_the_threshold_is_the_kth_magnitude_of_all_tensors(density: float) -> None:
    deltas = [torch.randn(7, 33), torch.randn(50) * 10, torch.randn(2, 3, 4) * 1e-20]
    flat = torch.cat([delta.flatten() for delta in deltas]).abs().sort(descending=True).values
    kth = float(flat[max(1, round(density * len(flat))) - 1])
    assert sparse.threshold(lambda: [delta.clone for delta in deltas], density) == kth


def test_the_threshold_of_a_vector_of_zeros_keeps_none() -> None:
    least = sparse.threshold(lambda: [lambda: torch.zeros(3, 4)], 0.5)
    assert least == 2.0**-149
    assert not len(formats.encode(f"sparse:method=ties,threshold={least}", torch.zeros(3, 4)).parts["values"])


def test_ties_without_its_threshold_is_refused() -> None:
    with pytest.raises(AlignvecError, match="threshold"):
        formats.encode("sparse:method=ties", torch.randn(3, 4))


# What is refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int5", "choose one of"),
        ("", "choose one of"),
        ("dense:dtype=float32", "has no option 'dtype', it takes none"),
        ("int4:size=32", "has no option 'size', it takes group"),
        ("int4:group=16", "group must be one of 32, 64, 128"),
        ("int8:group=many", "group must be an integer, not 'many'"),
        ("int8:group", "group must be an integer, not ''"),
        ("sign:group=48", "multiple of 32"),
        ("sign:group=-32", "multiple of 32"),
        ("lossless:width=1", "width=1"),
        ("lossless:width=9", "width=9"),
        ("lossless:dtype=float32", "dtype=float32"),
        ("low-rank:rank=0", "rank=0"),
        ("low-rank:dtype=float16", "dtype=float16"),
        ("sparse:density=0", "density=0"),
        ("sparse:density=nan", "density"),
        ("sparse:density=1.01", "density"),
        ("sparse:method=random", "topk, dare, ties"),
        ("sparse:seed=-1", "seed=-1"),
        ("sparse:threshold=inf", "threshold=inf"),
        ("auto:0.25", "choose one of"),
    ],
)
def test_parse_refuses(text: str, message: str) -> None:
    with pytest.raises(AlignvecError, match=message):
        formats.parse(text)


def test_parse_fills_in_and_specs_are_values() -> None:
    assert str(formats.parse("int4")) == "int4:group=128"
    assert str(formats.parse(" sign ")) == "sign"
    assert formats.parse("low-rank:rank=16,dtype=float32").options == {"rank": 16, "dtype": "float32"}
    assert formats.parse(formats.Spec("int8", {})) == formats.parse("int8:group=128")
    assert len({formats.parse("int8"), formats.parse("int8:group=128"), formats.parse("int4")}) == 2
    with pytest.raises(AlignvecError, match="group cannot be '64'"):
        formats.parse(formats.Spec("int8", {"group": "64"}))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("spec", ["dense", *LOSSY])
def test_encode_refuses_what_is_not_finite(spec: str, bad: float) -> None:
    delta = torch.randn(3, 40)
    delta[2, 39] = bad
    with pytest.raises(AlignvecError, match=r"layer\.w holds NaN or infinity"):
        formats.encode(spec, delta, name="layer.w")


def test_encode_refuses_integers_and_a_base_of_another_shape() -> None:
    with pytest.raises(AlignvecError, match="only floating-point"):
        formats.encode("int8", torch.ones(3, 4, dtype=torch.int32))
    with pytest.raises(AlignvecError, match="its base"):
        formats.encode("lossless", torch.randn(3, 4), torch.randn(4, 3).bfloat16())


def _part(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Encoded], Encoded]:
    return lambda e: dataclasses.replace(e, parts={**e.parts, name: change(e.parts[name].clone())})


def _options(**changes: object) -> Callable[[Encoded], Encoded]:
    return lambda e: dataclasses.replace(e, options={**e.options, **changes})


def _filled(part: Tensor, value: float) -> Tensor:
    return part.index_fill(-1, torch.tensor([part.shape[-1] - 1]), value)


HOSTILE: list[tuple[str, Callable[[Encoded], Encoded], str]] = [
    ("dense", _part("", lambda p: p[1:]), "has shape"),
    ("dense", _part("", lambda p: _filled(p, math.nan)), "holds NaN"),
    ("dense", _part("", lambda p: p.int()), "cannot be torch.int32"),
    ("int8", _part("codes", lambda p: p.view(torch.uint8)), "cannot be torch.uint8"),
    ("int8", _part("scales", lambda p: _filled(p, math.inf)), "holds NaN or infinity"),
    ("int8", _part("scales", lambda p: p.float()), "cannot be torch.float32"),
    ("int8", _options(group=32), "has shape"),
    ("int8", _options(group=32.0), "group cannot be 32.0"),
    ("int8", _options(group=True), "group cannot be True"),
    ("int8", _options(more=1), "no option 'more'"),
    ("int8", lambda e: dataclasses.replace(e, options={}), "needs the options group"),
    ("int8", lambda e: dataclasses.replace(e, name="int9"), "not known"),
    ("int8", lambda e: dataclasses.replace(e, shape=(3, 77, 1)), "has shape"),
    ("int8", lambda e: dataclasses.replace(e, shape=(-3, -77)), "shape cannot be"),
    ("int8", lambda e: dataclasses.replace(e, shape=(231,)), "stored dense"),
    ("int4", lambda e: dataclasses.replace(e, parts={"codes": e.parts["codes"]}), "has the parts"),
    ("int4", _part("codes", lambda p: p[:, 1:]), "has shape"),
    ("sign", _part("signs", lambda p: p.view(-1)), "has shape"),
    ("sign", _part("scales", lambda p: _filled(p, math.nan)), "holds NaN"),
    ("low-rank", _part("A", lambda p: _filled(p, math.nan)), "holds NaN"),
    ("low-rank", _part("B", lambda p: p.float()), "cannot be"),
    ("low-rank", _options(rank=2), "has shape"),
    ("low-rank", _options(rank=10**12), "has shape"),
    ("sparse", _part("values", lambda p: p[1:]), "counts"),
    ("sparse", _part("bitmap", lambda p: _filled(p, 255)), "counts"),
    ("sparse", _part("values", lambda p: p.double()), "cannot be torch.float64"),
    ("lossless", _part("side_start", lambda p: p.flip(0)), "ascending positions"),
    ("lossless", _part("side_start", lambda p: p + 1), "ascending positions"),
    ("lossless", _part("side_start", lambda p: _filled(p, 2**31 - 1)), "ascending positions"),
    ("lossless", _part("side_start", lambda p: p.index_fill(0, torch.tensor([1]), -1)), "ascending positions"),
    ("lossless", _part("side_start", lambda p: p[1:]), "has shape"),
    ("lossless", _part("side_start", lambda p: p.long()), "cannot be torch.int64"),
    ("lossless", _part("side_columns", lambda p: p.int().flip(0).to(torch.uint16)), "ascending columns"),
    ("lossless", _part("side_columns", lambda p: _filled(p.int(), 77).to(torch.uint16)), "ascending columns"),
    ("lossless", _part("side_columns", lambda p: _filled(p.int(), 65535).to(torch.uint16)), "ascending columns"),
    ("lossless", _part("side_columns", lambda p: p.int()), "cannot be torch.int32"),
    ("lossless", _part("side_columns", lambda p: p[1:]), "large steps and holds"),
    ("lossless", _part("side_bits", lambda p: _filled(p, 0x7F80)), "holds NaN or infinity"),
    ("lossless", _part("steps", lambda p: torch.zeros_like(p)), "a large step and a small one"),
    ("lossless", _options(width=0), "has a width"),
    ("lossless", _options(dtype=""), "has a width and a dtype"),
    ("lossless", _options(width=4), "has shape"),
]


@pytest.mark.parametrize(
    ("spec", "change", "message"), HOSTILE, ids=[f"{s}-{i}" for i, (s, _, _) in enumerate(HOSTILE)]
)
def test_check_refuses(spec: str, change: Callable[[Encoded], Encoded], message: str) -> None:
    base, _, delta = pair((3, 77))
    encoded = formats.encode("lossless:width=2" if spec == "lossless" else spec, delta, base)
    formats.check(encoded)
    with pytest.raises(AlignvecError, match=message):
        formats.check(change(encoded))


def test_check_refuses_values_beyond_the_last_column() -> None:
    encoded = formats.encode("sparse:density=1", torch.ones(1, 3))
    moved = {**encoded.parts, "bitmap": torch.tensor([[0b1011]], dtype=torch.uint8)}
    with pytest.raises(AlignvecError, match="beyond the last column"):
        formats.check(dataclasses.replace(encoded, parts=moved))
