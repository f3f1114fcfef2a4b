"""What attach takes and what it refuses: names, layouts, bases, offloaded models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MistralModel

import alignvec
from alignvec import AlignmentVector, AlignvecError
from tests.models import merged, random_vector, tiny

IDS = torch.randint(3, 101, (2, 6), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


@pytest.fixture
def model() -> nn.Module:
    return tiny("Mistral")


def changed(vector: AlignmentVector, **deltas: torch.Tensor | None) -> AlignmentVector:
    """The vector, without its base, with some tensors (dots written as __) replaced, added, or (None) left out."""
    new = {name.replace("__", "."): delta for name, delta in deltas.items()}
    kept = {name: delta for name, delta in vector.items() if name not in new}
    return AlignmentVector(kept | {name: d for name, d in new.items() if d is not None}, None)


def refused(model: nn.Module, vectors: dict, message: str, **options: object) -> None:
    before, modules = logits(model), dict(model.named_modules())
    with pytest.raises(AlignvecError, match=message):
        alignvec.attach(model, vectors, **options)
    assert getattr(model, "alignment", None) is None
    assert all(module is modules[name] for name, module in model.named_modules())
    assert torch.equal(logits(model), before)


def test_another_base_is_refused_by_name(model: nn.Module) -> None:
    vector = random_vector(model, 1)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] += 0.5
        model.lm_head.weight.mul_(1.01)
    refused(model, {"a": vector}, r"2 of 21 tensors differ \(model.layers.1.mlp.down_proj.weight, lm_head.weight\)")
    alignvec.attach(model, {"a": vector}, transfer=True).set(a=1.0)


def test_the_base_in_another_dtype_is_the_same_base(model: nn.Module) -> None:
    model = model.bfloat16()
    vector = random_vector(model, 1)
    alignvec.attach(model.float(), {"a": vector})


@pytest.mark.parametrize(
    ("deltas", "message"),
    [
        ({"model__layers__9__mlp__up_proj__weight": torch.ones(72, 48)}, "does not have: model.layers.9.mlp.up_proj"),
        ({"lm_head__weight": torch.ones(103, 48)}, r"shape \[103, 48\] for lm_head.weight, the model has \[101, 48\]"),
    ],
    ids=["extra-tensor", "shape"],
)
def test_deltas_that_do_not_fit(model: nn.Module, deltas: dict, message: str) -> None:
    refused(model, {"good": random_vector(model, 1), "bad": changed(random_vector(model, 2), **deltas)}, message)


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (0, {}, "0 vectors were given"),
        (17, {}, "17 vectors were given"),
        (1, {"precision": "rough"}, "precision='rough' is not one of exact, merged"),
        (1, {"execution": "magic"}, "execution='magic' is not one of"),
        (1, {"backend": "abacus"}, "backend='abacus' is not one of"),
        (1, {"backend": "cuda"}, "backend 'cuda' cannot run on cpu: it is for tensors on a GPU"),
        (1, {"max_rows": 0}, "max_rows=0 must be a positive integer"),
    ],
)
def test_bad_options(model: nn.Module, count: int, options: dict, message: str) -> None:
    vector = random_vector(model, 1)
    refused(model, {f"v{i}": vector for i in range(count)}, message, **options)


def test_a_folder_that_is_no_vector(model: nn.Module, tmp_path: Path) -> None:
    refused(model, {"a": tmp_path / "nowhere"}, "nowhere")


def test_saved_vectors_attach_by_path(model: nn.Module, tmp_path: Path) -> None:
    vector = random_vector(model, 1)
    vector.save(tmp_path / "av")
    alignment = alignvec.attach(model, {"a": tmp_path / "av"})
    alignment.set(a=0.6)
    got = logits(model)
    alignment.detach()
    alignvec.attach(model, {"a": vector}).set(a=0.6)
    assert torch.equal(got, logits(model))


def test_a_vector_of_the_backbone_fits_the_full_model_and_the_reverse(model: nn.Module) -> None:
    vector = random_vector(model, 1)
    backbone = {n.removeprefix("model."): d for n, d in vector.items() if n.startswith("model.")}
    expected = merged(model, {"a": changed(vector, lm_head__weight=None)}, {"a": 1.0})(IDS).logits
    alignvec.attach(model, {"a": AlignmentVector(backbone, None)}).set(a=1.0)
    torch.testing.assert_close(logits(model).double(), expected, rtol=1e-4, atol=1e-4)
    inner = MistralModel(model.config).eval()
    alignvec.attach(inner, {"a": changed(vector, lm_head__weight=None)})
    assert inner.layers[0].mlp.up_proj.edit is not None


def test_vectors_that_edit_different_parameters(model: nn.Module) -> None:
    """Each module stacks only the vectors that edit it; columns find the others' coefficients."""
    one, two = random_vector(model, 1), random_vector(model, 2)
    one = AlignmentVector({n: d for n, d in one.items() if "mlp" in n}, one.base)
    two = AlignmentVector({n: d.bfloat16() for n, d in two.items() if "mlp.up" in n or "norm" in n}, two.base)
    vectors, mix = {"one": one, "two": two}, {"one": -0.5, "two": 0.8}
    expected = merged(model, vectors, mix)(IDS).logits
    alignvec.attach(model, vectors).set(mix)
    assert type(model.lm_head) is nn.Linear
    assert model.model.layers[0].mlp.down_proj.edit.columns.tolist() == [0]
    assert model.model.norm.edit.columns.tolist() == [1]
    torch.testing.assert_close(logits(model).double(), expected, rtol=1e-4, atol=1e-4)


def test_only_a_bias_edited() -> None:
    model = tiny("Qwen2")
    vector = AlignmentVector({n: d for n, d in random_vector(model, 1, 1.0).items() if n.endswith("bias")}, None)
    expected = merged(model, {"a": vector}, {"a": 2.0})(IDS).logits
    alignvec.attach(model, {"a": vector}).set(a=2.0)
    torch.testing.assert_close(logits(model).double(), expected, rtol=1e-4, atol=1e-4)


def test_experts_from_the_checkpoint_layout(tmp_path: Path) -> None:
    """On disk an expert is a tensor, in memory a slice of one: a vector of the files fits the live model."""
    base = tiny("Mixtral", torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "experts" in name or "gate" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
        base.model.layers[1].mlp.experts.down_proj[2] = (
            AutoModelForCausalLM.from_pretrained(tmp_path / "base").model.layers[1].mlp.experts.down_proj[2]
        )
    base.save_pretrained(tmp_path / "aligned")
    vector = alignvec.extract(tmp_path / "base", tmp_path / "aligned")
    assert any(".experts.0.w1" in name for name in vector.names)
    load = {"dtype": torch.float32, "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **load).eval()
    aligned = AutoModelForCausalLM.from_pretrained(tmp_path / "aligned", **load).eval()
    expected = logits(aligned)
    alignment = alignvec.attach(model, {"a": vector})
    alignment.set_rows([{"a": 1.0}, {"a": 1.0}])
    torch.testing.assert_close(logits(model), expected, rtol=0.02, atol=0.02)
    alignment.detach()
    with torch.no_grad():
        model.model.layers[0].mlp.experts.gate_up_proj[1, 0, 0] += 1.0
    refused(model, {"a": vector}, "experts.1.w1")


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_run_under_every_implementation(implementation: str) -> None:
    model = tiny("Mixtral", experts_implementation=implementation)
    vectors, mixes = {"a": random_vector(model, 1)}, [{"a": 1.0}, {"a": -0.5}]
    model.set_experts_implementation("eager")
    expected = torch.cat([merged(model, vectors, mix)(IDS[row][None]).logits for row, mix in enumerate(mixes)])
    model.set_experts_implementation(implementation)
    alignvec.attach(model, vectors).set_rows(mixes)
    torch.testing.assert_close(logits(model).double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_device_map(model: nn.Module, tmp_path: Path, where: str) -> None:
    vector = random_vector(model, 1)
    model.save_pretrained(tmp_path / "base")
    expected = merged(model, {"a": vector}, {"a": 0.7})(IDS).logits
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": where, "model.norm": "cpu"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base",
        device_map={**places, "model.rotary_emb": "cpu", "lm_head": where},
        offload_folder=tmp_path / "offload",
        dtype=torch.float32,
    )
    plain = logits(loaded)
    alignment = alignvec.attach(loaded, {"a": vector})
    alignment.set(a=0.7)
    torch.testing.assert_close(logits(loaded).double(), expected, rtol=1e-4, atol=1e-4)
    alignment.detach()
    assert torch.equal(logits(loaded), plain)


def test_gradient_checkpointing_gives_the_same_gradient(model: nn.Module) -> None:
    alignment = alignvec.attach(model, {"a": random_vector(model, 1)})
    alignment.set(a=0.5)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()  # the name that both transformers 5.17 and later have
        model.train()
        model.zero_grad()
        model(IDS).logits.square().mean().backward()
        gradients.append(model.model.layers[0].mlp.up_proj.weight.grad.clone())
    torch.testing.assert_close(*gradients)
