"""Vectors stored in every format, attached as they are: what the model computes is what the decoded deltas say."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import alignvec
from alignvec import AlignmentVector, AlignvecError, formats
from alignvec.fingerprint import identify
from tests.attach.test_architectures import relative
from tests.compilers import BACKENDS
from tests.models import random_vector, tiny

FORMATS = (
    "int8:group=32",
    "int4:group=32",
    "sign",
    "sign:group=32",
    "lossless:width=4",
    "sparse:density=0.3",
    "low-rank:rank=6",
)
MIXES = [{"a": 1.0, "b": -0.4}, {"a": -0.7}, {"b": 1.3, "a": 0.1}]
ARCHITECTURES = ("Mistral", "Llama", "Gemma2", "Qwen2", "GPT2", "Mixtral")
IDS = torch.randint(3, 101, (3, 6), generator=torch.Generator().manual_seed(3))


def model_of(architecture: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Weights are bfloat16 numbers whatever the dtype, so that lossless has steps to store."""
    own = {"num_experts_per_tok": 4, "experts_implementation": "eager"} if architecture == "Mixtral" else {}
    return tiny(architecture, torch.bfloat16, **own).to(dtype)


def encoded(model: nn.Module, seed: int, *names: str, base: bool = True) -> AlignmentVector:
    """A random vector whose tensors have the formats `names` in turn."""
    parameters = dict(model.named_parameters())
    deltas: dict[str, formats.Encoded] = {}
    for i, (name, delta) in enumerate(random_vector(model, seed).items()):
        weight = parameters[name].detach().bfloat16()
        aligned = (weight.float() + delta.float()).bfloat16()
        exact = aligned.float() - weight.float()
        deltas[name] = formats.encode(names[i % len(names)], exact, weight, name, aligned=aligned)
    return AlignmentVector(deltas, identify(model) if base else None)


def merged(model: nn.Module, vectors: dict[str, AlignmentVector], mix: dict[str, float]) -> nn.Module:
    """The model with the decoded deltas added in float64."""
    result = copy.deepcopy(model).double()
    parameters, bases = dict(result.named_parameters()), dict(model.named_parameters())
    with torch.no_grad():
        for label, coefficient in mix.items():
            for name in vectors[label].names:
                decoded = formats.decode(vectors[label].encoded(name), bases[name].detach().bfloat16())
                parameters[name] += coefficient * decoded.double()
    return result


@torch.no_grad()
def check(model: nn.Module, vectors: dict[str, AlignmentVector], bound: float) -> alignvec.Alignment:
    """Logits with mixed rows and with uniform mixes, against a merge in float64."""
    truth = torch.cat([merged(model, vectors, mix)(IDS[row][None]).logits for row, mix in enumerate(MIXES)])
    alignment = alignvec.attach(model, vectors)
    alignment.set_rows(MIXES)
    assert relative(model(IDS).logits, truth) < bound, "mixed rows"
    for row, mix in enumerate(MIXES):
        alignment.set(mix)
        assert relative(model(IDS[row][None]).logits[0], truth[row]) < bound, f"uniform mix {row}"
    return alignment


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_formats_mixed_in_every_way(architecture: str) -> None:
    """Tensor by tensor, and vector beside vector in a layer; float32 weights, so that every product shows."""
    model = model_of(architecture)
    check(model, {"a": encoded(model, 1, *FORMATS), "b": encoded(model, 2, *FORMATS[3:], "dense")}, 5e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_in_bfloat16(name: str) -> None:
    model = model_of("Mistral", torch.bfloat16)
    vectors = {"a": encoded(model, 1, name), "b": encoded(model, 2, name)}
    base = relative(model(IDS).logits, copy.deepcopy(model).double()(IDS).logits)
    alignment = check(model, vectors, 1.5 * base)
    operands = model.lm_head.edit.deltas["weight"].operands
    kinds = {"int8": "codes", "int4": "codes", "sign": "codes"}
    assert {operand.kind for operand in operands} == {kinds.get(name.split(":")[0], name.split(":")[0])}
    parts = {id(p): p for m in model.modules() if hasattr(m, "edit") for d in m.edit.deltas.values() for p in d.parts}
    assert 0 < alignment.nbytes <= sum(part.nbytes for part in parts.values())


@torch.no_grad()
def test_generation_copies_moves_and_detaching(tmp_path: Path) -> None:
    model = model_of("Llama", torch.bfloat16)
    vectors = {"a": encoded(model, 1, *FORMATS), "b": encoded(model, 2, *FORMATS[2:], "dense")}
    before = model(IDS).logits
    state = {name: value.clone() for name, value in model.state_dict().items()}
    alignment = alignvec.attach(model, vectors)
    alignment.set_rows(MIXES)
    how = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6}
    together = model.generate(IDS, **how)
    twin = copy.deepcopy(model)
    twin.alignment.set(a=-1.0)
    assert torch.equal(model.generate(IDS, **how), together)
    for row, mix in enumerate(MIXES):
        twin.alignment.set(mix)
        assert torch.equal(twin.generate(IDS[row][None], **how)[0], together[row]), f"row {row}"
    model.save_pretrained(tmp_path)
    saved = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in state.items())
    alignment.detach()
    assert torch.equal(model(IDS).logits, before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@torch.no_grad()
def test_lossless_becomes_dense_when_the_weights_change_dtype(dtype: torch.dtype) -> None:
    """Steps are of bfloat16 bits: after a move to another dtype there are none."""
    model = model_of("Mistral", torch.bfloat16)
    vectors = {"a": encoded(model, 1, "lossless")}
    truth = merged(model, vectors, {"a": 0.8})(IDS).logits
    alignment = alignvec.attach(model, vectors)
    alignment.set(a=0.8)
    model.to(dtype)
    assert {operand.kind for operand in model.lm_head.edit.deltas["weight"].operands} == {"dense"}
    assert relative(model(IDS).logits, truth) < (5e-6 if dtype == torch.float32 else 5e-3)


@torch.no_grad()
def test_lossless_at_coefficient_one_materialises_the_aligned_checkpoint() -> None:
    base = model_of("Qwen2", torch.bfloat16)
    aligned = copy.deepcopy(base)
    for parameter in aligned.parameters():
        parameter.mul_(1 + 0.01 * torch.randn_like(parameter))
    vector = alignvec.extract(base, aligned, format="lossless")
    alignment = alignvec.attach(base, {"a": vector})
    alignment.materialise(a=1.0)
    expected = aligned.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in base.state_dict().items())


@torch.no_grad()
def test_lossless_transferred_to_another_base() -> None:
    """Its steps are those from its own base, which has to be given, and are then values like any others."""
    base = model_of("Mistral", torch.bfloat16)
    vector = encoded(base, 1, "lossless")
    decoded = vector.with_base(copy.deepcopy(base))
    other = copy.deepcopy(base)
    other.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(AlignvecError, match="a different base"):
        alignvec.attach(other, {"a": vector})
    with pytest.raises(AlignvecError, match="base"):
        alignvec.attach(other, {"a": vector}, transfer=True)
    truth = copy.deepcopy(other).double()
    for name, parameter in truth.named_parameters():
        parameter += 0.7 * decoded[name].double()
    noise = relative(other(IDS).logits, copy.deepcopy(other).double()(IDS).logits)
    alignvec.attach(other, {"a": decoded}, transfer=True).set(a=0.7)
    assert relative(other(IDS).logits, truth(IDS).logits) < 1.5 * noise


@torch.no_grad()
def test_saved_formats_attach_by_path(tmp_path: Path) -> None:
    base = model_of("Mixtral", torch.bfloat16)
    aligned = copy.deepcopy(base)
    for parameter in aligned.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    base.save_pretrained(tmp_path / "base")
    aligned.save_pretrained(tmp_path / "aligned")
    expected = aligned(IDS).logits.float()
    for name in ("lossless", "int8:group=32"):
        alignvec.extract(tmp_path / "base", tmp_path / "aligned", format=name).save(tmp_path / name)
        alignment = alignvec.attach(base, {"a": tmp_path / name})
        alignment.set(a=1.0)
        torch.testing.assert_close(base(IDS).logits.float(), expected, rtol=0.1, atol=0.1)
        alignment.detach()


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_fullgraph_with_mixed_formats(backend: str) -> None:
    model = model_of("Mistral")
    vectors = {"a": encoded(model, 1, *FORMATS), "b": encoded(model, 2, *FORMATS[3:], "dense")}
    alignment = alignvec.attach(model, vectors)
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    with torch.no_grad():
        compiled(IDS, use_cache=False)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for ids in (IDS, IDS.repeat(2, 1)[:, :4].contiguous()):
                alignment.set_rows(MIXES)
                got = compiled(ids, use_cache=False).logits
                torch.testing.assert_close(got, model(ids).logits, rtol=1e-4, atol=1e-4)
                alignment.set(a=-0.5)
                got = compiled(ids, use_cache=False).logits
                torch.testing.assert_close(got, model(ids).logits, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_gradients_pass_through_every_format() -> None:
    model = model_of("Mistral")
    vectors = {"a": encoded(model, 1, *FORMATS), "b": encoded(model, 2, *FORMATS[3:], "dense")}
    reference = merged(model, vectors, MIXES[0]).float()
    alignvec.attach(model, vectors).set(MIXES[0])
    for net in (model, reference):
        net(IDS).logits.square().mean().backward()
    expected = {name: p.grad for name, p in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=2e-3, atol=2e-4, msg=name)


def test_moves_take_every_part() -> None:
    model = model_of("Llama", torch.bfloat16)
    vector = encoded(model, 2, *FORMATS)
    only = AlignmentVector({n: vector.encoded(n) for n in vector.names if "up_proj.weight" in n}, None)
    alignvec.attach(model, {"a": encoded(model, 1, *FORMATS), "b": only})
    for module in model.modules():
        for deltas in getattr(getattr(module, "edit", None), "deltas", {}).values():
            specs, strides = deltas.specs, [part.stride() for part in deltas.parts]
            deltas.to(torch.device("meta"))
            assert deltas.specs == specs
            assert [part.stride() for part in deltas.parts] == strides
            assert all(part.is_meta for part in deltas.parts)
            assert deltas.stack is None or deltas.stack.is_meta
