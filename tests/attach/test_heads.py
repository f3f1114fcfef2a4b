"""A base that ties its head to its embedding, on models that do not: the head follows, or the vector is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import alignvec
from alignvec import AlignmentVector, AlignvecError
from tests.attach.transferred import new, tuned

IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
FAMILIES = {"Qwen2": {}, "GPT2": {}, "GPTNeoX": {}, "Gemma": {}, "OPT": {"word_embed_proj_dim": 32, "ffn_dim": 48}}


def untied(model: nn.Module, family: str) -> nn.Module:
    """The same values, with a head that is a parameter of its own."""
    other = new(family, tie_word_embeddings=False, **FAMILIES[family])
    other.load_state_dict(model.state_dict())
    assert other.get_output_embeddings().weight is not other.get_input_embeddings().weight
    return other


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("transfer", [False, True])
@pytest.mark.parametrize("format", ["dense", "lossless"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_head_of_an_untied_copy_follows_the_embedding(family: str, format: str, transfer: bool) -> None:
    dtype = torch.float32 if format == "dense" else torch.bfloat16
    base = new(family, tie_word_embeddings=True, **FAMILIES[family]).to(dtype)
    aligned = tuned(base)
    vector = alignvec.extract(base, aligned, format=format)
    model = untied(base, family).to(dtype)
    alignvec.attach(model, {"v": vector}, transfer=transfer).materialise(v=1.0)
    truth = dict(aligned.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, truth[name], rtol=0, atol=1e-6)
    model = untied(base.float(), family)
    alignvec.attach(model, {"v": vector}, transfer=transfer).set(v=1.0)
    torch.testing.assert_close(logits(model), logits(aligned.float()), rtol=1e-3, atol=1e-3)


def with_own_head(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_output_embeddings().weight.add_(0.3)
    return other


def test_a_head_of_the_models_own_is_another_base(tmp_path: Path) -> None:
    base = new("Qwen2", tie_word_embeddings=True)
    vector = alignvec.extract(base, tuned(base))
    model = with_own_head(untied(base, "Qwen2"))
    said = r"different base, whose head is its embedding .*lm_head.weight of .* has values of its own"
    for transfer in (False, True):
        with pytest.raises(AlignvecError, match=said):
            alignvec.attach(model, {"v": vector}, transfer=transfer)
    layers = vector.select("*layers*")
    with pytest.raises(AlignvecError, match=said):
        alignvec.attach(model, {"v": layers})
    alignvec.attach(model, {"v": layers}, transfer=True).detach()
    model.save_pretrained(tmp_path / "own")
    with pytest.raises(AlignvecError, match=said):
        alignvec.merge(tmp_path / "own", {"v": vector}, {"v": 1.0}, tmp_path / "merged")


def test_attach_and_merge_agree_on_an_untied_copy(tmp_path: Path) -> None:
    base = new("Qwen2", tie_word_embeddings=True)
    aligned = tuned(base)
    vector = alignvec.extract(base, aligned)
    untied(base, "Qwen2").save_pretrained(tmp_path / "untied")
    alignvec.merge(tmp_path / "untied", {"v": vector}, {"v": 1.0}, tmp_path / "merged")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(aligned), rtol=1e-4, atol=1e-4
    )


def test_a_base_that_was_saved_without_its_head() -> None:
    base = new("Qwen2", tie_word_embeddings=True)
    vector = alignvec.extract(base.model, tuned(base).model)
    model = untied(base, "Qwen2")
    for transfer in (False, True):
        with pytest.raises(AlignvecError, match=r"saved without a head, does not say whether lm_head.weight, which"):
            alignvec.attach(model, {"v": vector}, transfer=transfer)
    alignvec.attach(model, {"v": vector.select("*layers*")}).detach()
    own = with_own_head(model)
    alignvec.attach(own, {"v": vector}).materialise(v=1.0)
    assert torch.equal(own.lm_head.weight, with_own_head(model).lm_head.weight)
    torch.testing.assert_close(own.model.embed_tokens.weight, tuned(base).model.embed_tokens.weight, rtol=0, atol=1e-6)


def test_a_vector_that_names_no_base_moves_what_it_names() -> None:
    base = new("Qwen2", tie_word_embeddings=True)
    model = untied(base, "Qwen2")
    delta = torch.full((96, 32), 0.25)
    alignvec.attach(model, {"v": AlignmentVector({"model.embed_tokens.weight": delta})}).materialise(v=1.0)
    assert torch.equal(model.lm_head.weight, base.lm_head.weight)
