"""Sibling projections in one launch: the same results as one by one, whatever happens between the calls."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import alignvec
from alignvec import AlignmentVector, fused, ops
from tests.attach.test_every_format import FORMATS, encoded, model_of
from tests.models import random_vector, tiny

IDS = torch.randint(3, 101, (2, 5), generator=torch.Generator().manual_seed(3))
MIXES = [{"a": 1.0, "b": -0.5}, {"b": 0.3}]


@pytest.fixture
def model() -> nn.Module:
    return tiny("Mistral")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each launch of several computed."""
    counts: list[int] = []
    run = ops.linear_group

    def counted(x: torch.Tensor, weights: list[torch.Tensor], *rest: object) -> torch.Tensor:
        counts.append(len(weights))
        return run(x, weights, *rest)

    monkeypatch.setattr(ops, "linear_group", counted)
    return counts


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Layers give the same bits, in memory with other strides: what reads them may add in another order."""
    return ((got - expected).norm() / expected.norm()).item() < 2e-6


def two(model: nn.Module) -> dict[str, AlignmentVector]:
    return {"a": random_vector(model, 1), "b": random_vector(model, 2)}


def attached(model: nn.Module, vectors: dict[str, AlignmentVector] | None = None) -> alignvec.Alignment:
    alignment = alignvec.attach(model, vectors or two(model), fuse=True)
    alignment.set_rows(MIXES)
    return alignment


@pytest.mark.parametrize("architecture", ["Mistral", "Llama", "Qwen2", "Gemma2", "Qwen3"])
def test_on_and_off_are_equal(architecture: str, launches: list[int]) -> None:
    model = model_of(architecture)
    vectors = {"a": encoded(model, 1, *FORMATS), "b": encoded(model, 2, *FORMATS[3:], "dense")}
    results = []
    for fuse in (True, False):
        alignment = alignvec.attach(model, vectors, fuse=fuse)
        alignment.set_rows(MIXES)
        mixed = logits(model)
        alignment.set(a=0.4)
        tokens = model.generate(IDS, max_new_tokens=4, do_sample=False)
        results.append((mixed, logits(model), tokens))
        alignment.detach()
        assert launches[:4] == [3, 2, 3, 2]
    fused_on, fused_off = results
    assert close(fused_on[0], fused_off[0])
    assert close(fused_on[1], fused_off[1])
    assert torch.equal(fused_on[2], fused_off[2])


def test_only_edited_siblings_are_fused(model: nn.Module, launches: list[int]) -> None:
    vector = random_vector(model, 1)
    vector = AlignmentVector({n: d for n, d in vector.items() if "k_proj" not in n and "up_proj" not in n}, vector.base)
    alignvec.attach(model, {"a": vector}, fuse=True)
    logits(model)
    assert launches == [2, 2]


def test_off_where_there_is_nothing_to_gain(model: nn.Module, launches: list[int]) -> None:
    alignvec.attach(model, {"a": random_vector(model, 1)})
    logits(model)
    assert launches == []


def test_gradients_and_inference_mode_go_one_by_one(model: nn.Module, launches: list[int]) -> None:
    attached(model)
    expected = logits(model)
    launches.clear()
    torch.testing.assert_close(model(IDS).logits, expected)
    with torch.inference_mode():
        torch.testing.assert_close(model(IDS).logits, expected)
    assert launches == []


def test_hooks_see_and_change_what_they_always_did(model: nn.Module) -> None:

    def write(_: nn.Module, args: tuple[torch.Tensor]) -> None:
        args[0].mul_(1.25)

    plain = copy.deepcopy(model)
    seen: dict[str, list[torch.Tensor]] = {"fused": [], "plain": []}
    for label, net, fuse in (("fused", model, True), ("plain", plain, False)):
        attention = net.model.layers[0].self_attn
        attention.k_proj.register_forward_hook(lambda _, args, y, label=label: seen[label].append(y.clone()))
        attention.k_proj.register_forward_pre_hook(lambda _, args: (args[0] * 1.5,))
        net.model.layers[1].self_attn.v_proj.register_forward_pre_hook(write)
        net.model.layers[1].mlp.up_proj.register_forward_hook(lambda _, args, y: y * 2)
        alignvec.attach(net, two(net), fuse=fuse).set_rows(MIXES)
    for _ in range(3):
        assert close(logits(model), logits(plain))
    assert all(close(one, other) for one, other in zip(seen["fused"], seen["plain"], strict=True))


@torch.no_grad()
def test_only_the_same_unchanged_tensor_takes_a_waiting_result(model: nn.Module) -> None:
    alignment = attached(model)
    attention = model.model.layers[0].self_attn
    alone = attention.k_proj.edit
    x = torch.randn(2, 3, 48)

    def truth(x: torch.Tensor) -> torch.Tensor:
        return alone.linear(x, attention.k_proj.weight, None)

    for change in ("none", "other", "written", "step", "twice"):
        attention.k_proj.edit.fused._misses = 0
        attention.q_proj(x)
        y = x
        if change == "other":
            y = x.clone()
        elif change == "written":
            x.add_(1.0)
        elif change == "step":
            alignment.set(a=-2.0)
            model(IDS[:1])
        elif change == "twice":
            attention.k_proj(x)
        assert torch.equal(attention.k_proj(y), truth(y)), change


@torch.no_grad()
def test_an_exception_in_between_leaves_nothing_behind(model: nn.Module) -> None:
    attached(model)
    expected = logits(model)
    failing = model.model.layers[0].self_attn.k_proj.register_forward_pre_hook(lambda *_: 1 / 0)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            logits(model)
    failing.remove()
    for _ in range(2):
        assert torch.equal(logits(model), expected)


@torch.no_grad()
def test_siblings_with_inputs_of_their_own_are_let_go(launches: list[int]) -> None:
    """As in cross attention: q from the decoder, k and v from the encoder."""
    model = tiny("Mistral")
    attached(model)
    attention = model.model.layers[0].self_attn
    for _ in range(5):
        x, y = torch.randn(2, 3, 48), torch.randn(2, 4, 48)
        attention.q_proj(x)
        attention.k_proj(y)
        attention.v_proj(y.clone())
    assert len(launches) <= fused.MISSES


@torch.no_grad()
def test_threads_do_not_take_each_others_results(model: nn.Module) -> None:
    attached(model)
    expected = logits(model)
    failures = []

    def run() -> None:
        with torch.no_grad():
            failures.extend(i for i in range(10) if not torch.equal(model(IDS).logits, expected))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@torch.no_grad()
def test_copies_and_detached_models(model: nn.Module, launches: list[int]) -> None:
    alignment = attached(model)
    expected = logits(model)
    twin = copy.deepcopy(model)
    members = twin.model.layers[0].self_attn.q_proj.edit.fused.members
    assert members == tuple(getattr(twin.model.layers[0].self_attn, name) for name in ("q_proj", "k_proj", "v_proj"))
    twin.alignment.set(a=5.0)
    assert not torch.equal(logits(twin), expected)
    assert torch.equal(logits(model), expected)
    group = weakref.ref(model.model.layers[0].self_attn.q_proj.edit.fused)
    alignment.materialise(a=1.0)
    launches.clear()
    logits(model)
    assert launches == []
    alignment.detach()
    del alignment, twin, members
    gc.collect()
    assert group() is None


@torch.no_grad()
def test_results_do_not_outlive_their_step(model: nn.Module) -> None:
    attached(model)
    logits(model)
    for module in model.modules():
        if getattr(getattr(module, "edit", None), "fused", None) is not None:
            assert module.edit.fused._local.pending is None


@torch.no_grad()
def test_offloaded_siblings(model: nn.Module, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "base")
    vectors = two(model)
    attached(model, vectors)
    expected = logits(model)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base",
        device_map={**places, "model.layers.0": "cpu", "model.layers.1": "disk"},
        offload_folder=tmp_path / "offload",
        dtype=torch.float32,
    )
    attached(loaded, vectors)
    torch.testing.assert_close(logits(loaded), expected)


@torch.no_grad()
def test_peft_around_fused_layers(model: nn.Module) -> None:
    peft = pytest.importorskip("peft")
    attached(model)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, lora_alpha=4, init_lora_weights=False)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, config).eval()
    with_fused = wrapped(IDS).logits
    for module in model.modules():
        if hasattr(module, "edit"):
            module.edit.fused = None
    assert close(wrapped(IDS).logits, with_fused)


def test_compiled_layers_go_one_by_one(model: nn.Module, launches: list[int]) -> None:
    attached(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS, use_cache=False).logits, logits(model))
    torch._dynamo.reset()


def test_the_operator_and_its_gradients() -> None:
    """linear_group against linear, layer by layer, biases and weights included."""
    model = model_of("Llama")
    vectors = {"a": encoded(model, 1, *FORMATS), "b": encoded(model, 2, *FORMATS[3:], "dense")}
    alignvec.attach(model, vectors, fuse=True).set_rows(MIXES)
    logits(model)
    layers = model.model.layers[0].self_attn.q_proj.edit.fused
    x = torch.randn(2, 3, 48, requires_grad=True)
    with model.alignment._coefficients.call(2) as step:
        together = list(layers._compute(x, step).values())
    alone = [member.edit.linear(x, member.weight, member.bias) for member in layers.members]
    inputs = [x, *(member.weight for member in layers.members), *(member.bias for member in layers.members)]
    gradients = [
        torch.autograd.grad(sum((i + 1) * y.square().sum() for i, y in enumerate(ys)), inputs)
        for ys in (together, alone)
    ]
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
