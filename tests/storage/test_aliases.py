"""What a caller hands over, live models, deltas, encoded parts and adapters, has the same bits after every operation.

Reading gives the model's or the vector's own memory where it can, so each operation here could write to it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import alignvec
from alignvec import AlignmentVector, formats, surgery
from alignvec.fingerprint import identify
from alignvec.formats import Encoded
from tests.models import random_vector, tiny
from tests.storage.adapters import ATTENTION, adapted

FORMATS = [
    *("dense", "int8", "int4:group=32", "sign", "sign:group=32", "low-rank:rank=2", "sparse:density=0.3"),
    *("sparse:density=0.3,method=dare", "sparse:density=0.3,method=ties", "auto:0.5"),
]
PAIRS = ["lossless", "lossless:width=3"]  # formats of 16-bit checkpoints alone


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


@contextlib.contextmanager
def untouched(*held: nn.Module | AlignmentVector | Mapping[str, Tensor]) -> Iterator[None]:
    """Every tensor of these has the same bits at the end, and, of a model, the same memory."""
    tensors = {(i, name): tensor for i, each in enumerate(held) for name, tensor in _tensors(each).items()}
    before = {key: (bits(tensor).clone(), tensor.data_ptr()) for key, tensor in tensors.items()}
    yield
    after = {(i, name): tensor for i, each in enumerate(held) for name, tensor in _tensors(each).items()}
    for key, (own, place) in before.items():
        assert torch.equal(bits(tensors[key]), own), key
        assert torch.equal(bits(after[key]), own), key
        assert after[key].data_ptr() == place, key


def _tensors(held: nn.Module | AlignmentVector | Mapping[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(held, nn.Module):
        return {**dict(held.named_parameters()), **dict(held.named_buffers())}
    if isinstance(held, AlignmentVector):
        return {f"{name}/{part}": t for name in held for part, t in held.encoded(name).parts.items()}
    return dict(held)


def moved(model: nn.Module, size: float = 1e-3) -> nn.Module:
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter += (torch.randn(parameter.shape, generator=generator) * size).to(parameter)
    return twin


@pytest.mark.parametrize("format", [*FORMATS, *PAIRS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_extract_leaves_both_models(tmp_path: Path, dtype: torch.dtype, format: str) -> None:
    if format in PAIRS and dtype == torch.float32:
        pytest.skip("lossless is of 16-bit checkpoints")
    base = tiny(dtype=dtype, num_hidden_layers=1)
    aligned = moved(base)
    base.save_pretrained(tmp_path / "base")
    with untouched(base, aligned):
        held = alignvec.extract(base, aligned, format=format)
        sides = {"live": (base, aligned), "stored": (tmp_path / "base", aligned)}
        for label, (left, right) in sides.items():
            out = tmp_path / label
            written = alignvec.extract(left, right, format=format, output=out, max_shard_size="2KB")
            assert len(list(out.glob("*.safetensors"))) > 1
            for name in held:
                assert torch.equal(written[name], held[name]), name
    exact = {name: p.double() - dict(base.named_parameters())[name].double() for name, p in aligned.named_parameters()}
    if format in ("dense", *PAIRS):
        rounded = torch.float32 if format in PAIRS else dtype
        assert all(torch.equal(held[name].to(dtype), exact[name].to(rounded).to(dtype)) for name in held)


def test_a_live_base_is_left_by_a_stored_aligned_model(tmp_path: Path) -> None:
    base = tiny(dtype=torch.bfloat16, num_hidden_layers=1)
    moved(base).save_pretrained(tmp_path / "aligned")
    for format in [*FORMATS, *PAIRS]:
        with untouched(base):
            alignvec.extract(base, tmp_path / "aligned", format=format)


def deltas_of(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {name: (torch.randn(p.shape, generator=generator) * 0.01).to(dtype) for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_operations_leave_the_deltas_of_the_caller(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny(num_hidden_layers=1)
    one, two = deltas_of(model, dtype), {name: -d for name, d in deltas_of(model, dtype).items()}
    first, second = (AlignmentVector(deltas, identify(model)) for deltas in (one, two))
    both = {"one": first, "two": second}
    with untouched(one, two, model):
        for total in (first + second, first - second, first * 1.0, 2 * first, first / 3, -first):
            assert all(total[name].isfinite().all() for name in total)
        first.norm(), first.dot(second), first.cosine(second)
        first.statistics(model)
        surgery.cosines(both)
        first.save(tmp_path / "saved")
        for number, format in enumerate(FORMATS):
            alignvec.convert(first, tmp_path / f"converted {number}", format)
        surgery.dare(first, density=0.5, seed=0)
        surgery.ties(both)
        surgery.ties_parts(both)
        surgery.truncate(first, 2)
        surgery.tsv(both)
        surgery.isotropic(both)
        surgery.remove_shared_mean(both)
        alignvec.attach(model, {"v": first}).detach()


def encoded_vectors(base: nn.Module, aligned: nn.Module) -> dict[str, AlignmentVector]:
    formats_ = [*FORMATS, *(PAIRS if next(base.parameters()).dtype == torch.bfloat16 else [])]
    return {f"v{i}": alignvec.extract(base, aligned, format=format) for i, format in enumerate(formats_)}


@pytest.mark.parametrize("backend", ["torch", None], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attached_models_leave_base_and_vectors(dtype: torch.dtype, backend: str | None) -> None:
    model = tiny(dtype=dtype, num_hidden_layers=1)
    vectors = encoded_vectors(model, moved(model)) | {"own": random_vector(model, 3)}
    ids = torch.arange(6)[None]
    mixes = [{"v0": 1.0}, dict.fromkeys(vectors, 0.1), {"v3": -2.0, "own": 0.5}, {}]
    with untouched(model, *vectors.values()), torch.no_grad():
        before = model(ids).logits
        attached = alignvec.attach(model, vectors, **({} if backend is None else {"backend": backend}))
        with untouched(*vectors.values()):
            for mix in mixes:
                attached.set(mix)
                changed = model(ids).logits
                attached.materialise(mix)
                model(ids)
                attached.restore()
                assert torch.equal(model(ids).logits, changed)
        attached.detach()
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_and_converting_leave_the_base_and_the_vectors(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny(dtype=dtype, num_hidden_layers=1)
    model.save_pretrained(tmp_path / "base")
    vectors = encoded_vectors(model, moved(model))
    with untouched(model, *vectors.values()):
        for label, vector in vectors.items():
            alignvec.merge(tmp_path / "base", {label: vector}, {label: 0.5}, tmp_path / f"merged {label}")
            vector.save(tmp_path / f"saved {label}")
            alignvec.convert(vector, tmp_path / f"int8 {label}", "int8", base=model)
            vector.with_base(model)
            vector.statistics(model)
            if vector.needs_base or dtype == torch.bfloat16:
                alignvec.convert(vector.with_base(model), tmp_path / f"dense {label}", "dense")


def test_formats_leave_what_they_encode_and_decode() -> None:
    base = torch.randn(40, 96).bfloat16()
    aligned = (base.float() + torch.randn(40, 96) * 1e-3).bfloat16()
    for dtype in (torch.float32, torch.float64):
        delta = aligned.to(dtype) - base.to(dtype)
        with untouched({"delta": delta, "base": base, "aligned": aligned}):
            for format in [*FORMATS[:-2], *PAIRS]:
                encoded = formats.encode(format, delta, base, "w", aligned=aligned)
                with untouched(dict(encoded.parts)):
                    formats.check(encoded)
                    decoded = formats.decode(encoded, base)
                    formats.squared_error(encoded, delta, base)
                    formats.joined([encoded], (40, 96)) if encoded.name not in ("low-rank", "sparse") else None
                    if encoded.name != "dense":
                        decoded.zero_()


def test_adapters_keep_their_factors(tmp_path: Path) -> None:
    model = tiny(num_hidden_layers=1)
    wrapped = adapted(model, target_modules=ATTENTION)
    with untouched(wrapped, model):
        vector = alignvec.from_peft(wrapped)
        assert {vector.encoded(name).name for name in vector} == {"low-rank"}
        for format in ("dense", "int8", "sign", "low-rank:rank=2"):
            alignvec.convert(vector, tmp_path / format, format)
        alignvec.to_peft(vector, tmp_path / "adapter", model)
        attached = alignvec.attach(model, {"v": vector})
        attached.set(v=0.7)
        with torch.no_grad():
            model(torch.arange(4)[None])
        attached.materialise({"v": 0.3})
        attached.restore()
        attached.detach()
        (vector * 2).norm()


def test_a_vector_read_from_live_adapters_stays_when_they_are_trained_on() -> None:
    model = tiny(num_hidden_layers=1)
    wrapped = adapted(model, target_modules=ATTENTION, modules_to_save=["lm_head"])
    vector = alignvec.from_peft(wrapped)
    with untouched(vector), torch.no_grad():
        for parameter in wrapped.parameters():
            parameter *= 2


def test_a_vector_extracted_from_live_models_stays_when_they_are_trained_on() -> None:
    for format in [*FORMATS, *PAIRS]:
        base = tiny(dtype=torch.bfloat16, num_hidden_layers=1)
        aligned = moved(base)
        vector = alignvec.extract(base, aligned, format=format)
        with untouched(vector), torch.no_grad():
            for parameter in [*base.parameters(), *aligned.parameters()]:
                parameter *= 2


def test_encoded_parts_are_what_was_handed_over() -> None:
    """A vector made of encoded deltas neither changes nor replaces them."""
    parts = {"codes": torch.randint(-127, 128, (4, 64), dtype=torch.int8), "scales": torch.rand(4, 1).bfloat16()}
    with untouched(parts):
        vector = AlignmentVector({"w": Encoded("int8", (4, 64), {"group": 64}, parts)})
        vector["w"].mul_(3)
        (vector * 2)["w"].mul_(3)
