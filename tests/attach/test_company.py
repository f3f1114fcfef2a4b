"""What others put on an attached model, before and after, is theirs: it works, and it stays."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import alignvec
from alignvec import AlignvecError
from tests.tuned import IDS, built, error, tuned, with_vector

peft = pytest.importorskip("peft")


def lora(model: nn.Module, *targets: str) -> Any:
    torch.manual_seed(2)
    config = peft.LoraConfig(target_modules=list(targets), init_lora_weights=False, r=2)
    return peft.get_peft_model(model, config).eval()


@torch.no_grad()
def test_a_lora_that_came_later_survives() -> None:
    model = built("LlamaConfig")
    base, aligned, alignment = with_vector(model)
    wrapped = lora(model, "q_proj", "up_proj")
    truth_base, truth = lora(base, "q_proj", "up_proj"), lora(aligned, "q_proj", "up_proj")
    alignment.set(v=1)
    assert error(wrapped(IDS).logits, truth(IDS).logits) < 1e-5
    alignment.materialise(v=1)
    assert error(wrapped(IDS).logits, truth(IDS).logits) < 1e-5
    alignment.restore()
    alignment.set(v=0)
    assert error(wrapped(IDS).logits, truth_base(IDS).logits) < 1e-5
    alignment.detach()
    assert error(wrapped(IDS).logits, truth_base(IDS).logits) == 0
    assert sum("lora" in name for name, _ in wrapped.named_parameters()) == 8


@pytest.mark.parametrize("targets", [("q_proj",), ("q_proj", "down_proj", "embed_tokens")])
@torch.no_grad()
def test_a_lora_that_was_there_first(targets: tuple[str, ...]) -> None:
    base = built("LlamaConfig")
    vector = alignvec.extract(base, tuned(base))
    truth = lora(tuned(base), *targets)
    wrapped = lora(copy.deepcopy(base), *targets)
    alignment = alignvec.attach(wrapped, {"v": vector})
    alignment.set(v=1)
    assert error(wrapped(IDS).logits, truth(IDS).logits) < 1e-5
    alignment.set_rows([{"v": 1}, {"v": 0}])
    assert error(wrapped(IDS).logits[0], truth(IDS).logits[0]) < 1e-5
    alignment.detach()
    assert error(wrapped(IDS).logits, lora(base, *targets)(IDS).logits) == 0


@torch.no_grad()
def test_a_compiled_model_is_the_model() -> None:
    model = built("LlamaConfig")
    aligned = tuned(model)
    vector = alignvec.extract(model, aligned)
    compiled = torch.compile(model, backend="aot_eager")
    alignment = alignvec.attach(compiled, {"v": vector})
    for coefficient, truth in ((1, aligned), (0, copy.deepcopy(model))):
        alignment.set(v=coefficient)
        assert error(compiled(IDS, use_cache=False).logits, aligned(IDS).logits) < 1e-5 or truth is not aligned
    alignment.set(v=1)
    assert error(compiled(IDS, use_cache=False).logits, aligned(IDS).logits) < 1e-5
    assert compiled.alignment is alignment
    torch._dynamo.reset()


def test_data_parallel_is_refused() -> None:
    model = built("LlamaConfig")
    vector = alignvec.extract(model, tuned(model))
    with pytest.raises(AlignvecError, match="DistributedDataParallel"):
        alignvec.attach(nn.DataParallel(model), {"v": vector})


@torch.no_grad()
def test_a_view_that_somebody_holds_gives_what_the_model_holds() -> None:
    model = built("LlamaConfig")
    base, aligned, alignment = with_vector(model)
    held = model.get_input_embeddings()
    for coefficient, truth in ((1, aligned), (0, base)):
        alignment.set(v=coefficient)
        assert error(held(IDS), truth.get_input_embeddings()(IDS)) < 1e-6
    alignment.materialise(v=1)
    assert error(held(IDS), aligned.get_input_embeddings()(IDS)) < 1e-6
    alignment.restore()
    alignment.set(v=1)
    alignment.detach()
    assert error(held(IDS), base.get_input_embeddings()(IDS)) < 1e-6


@pytest.mark.parametrize("what", ["embeddings", "head"])
@torch.no_grad()
def test_the_vocabulary_is_resized_before_or_after_not_meanwhile(what: str) -> None:
    model = built("LlamaConfig")
    base, _, alignment = with_vector(model)
    with pytest.raises(AlignvecError, match="detach"):
        model.resize_token_embeddings(99)
    if what == "head":
        model.lm_head = nn.Linear(32, 99, bias=False)
        with pytest.raises(AlignvecError, match="lm_head, which vectors edit, was replaced after attach"):
            model(IDS)
        with pytest.raises(AlignvecError, match="lm_head"):
            alignment.materialise(v=1)
        with pytest.warns(UserWarning, match="lm_head were replaced"):
            alignment.detach()
        assert model.lm_head.weight.shape == (99, 32)
    else:
        weight = model.get_input_embeddings().weight
        weight.data = torch.cat([weight.data, weight.data[:3]])
        with pytest.raises(AlignvecError, match=r"model\.embed_tokens has 99 embeddings by now and its vectors 96"):
            model(IDS)
        weight.data = weight.data[:96]
        alignment.detach()
        assert error(model(IDS).logits, base(IDS).logits) == 0
        model.resize_token_embeddings(99)
        assert model.lm_head.weight.shape == model.get_input_embeddings().weight.shape == (99, 32)


@torch.no_grad()
def test_offloading_that_came_later_stays() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = built("LlamaConfig")
    base, aligned, alignment = with_vector(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    alignment.set(v=1)
    assert error(model(IDS).logits, aligned(IDS).logits) < 1e-5
    alignment.detach()
    assert error(model(IDS).logits, base(IDS).logits) < 1e-6


@torch.no_grad()
def test_state_that_a_forward_keeps_moves_with_its_module() -> None:
    class Counting(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.scale, self.inner, self.calls = nn.Parameter(torch.ones(32)), inner, 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.inner(x) * self.scale

    model = built("LlamaConfig")
    model.model.layers[0].mlp = Counting(model.model.layers[0].mlp)
    _, aligned, alignment = with_vector(model)
    alignment.set(v=1)
    model(IDS)
    alignment.materialise(v=1)
    assert error(model(IDS).logits, aligned(IDS).logits) < 1e-5
    alignment.restore()
    model(IDS)
    alignment.detach()
    assert model.model.layers[0].mlp.calls == 3


def test_a_parametrization_is_refused_by_name() -> None:
    model = built("LlamaConfig")
    vector = alignvec.extract(model, tuned(model))
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    with pytest.raises(AlignvecError, match=r"model\.layers\.0\.mlp\.up_proj"):
        alignvec.attach(model, {"v": vector})


@torch.no_grad()
def test_training_a_materialised_mix_is_not_lost_without_a_word() -> None:
    model = built("LlamaConfig")
    _, _, alignment = with_vector(model)
    alignment.materialise(v=1)
    alignment.restore()
    alignment.materialise(v=1)
    model.lm_head.weight.add_(1)
    with pytest.warns(UserWarning, match="changed while they held a mix"):
        alignment.restore()


def test_a_model_inside_of_an_attached_one_is_refused() -> None:
    model = built("LlamaConfig")
    vector = alignvec.extract(model, tuned(model))
    inner = alignvec.extract(model.model, tuned(model.model))
    alignment = alignvec.attach(model, {"v": vector})
    with pytest.raises(AlignvecError, match=r"already attached to embed_tokens"):
        alignvec.attach(model.model, {"v": inner})
    alignment.detach()
    alignvec.attach(model.model, {"v": inner})
    with pytest.raises(AlignvecError, match=r"already attached to model\.embed_tokens"):
        alignvec.attach(model, {"v": vector})
