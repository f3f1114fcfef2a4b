"""Deltas of one of two weights, on a model that ties the two: what only one of them had is not given to both."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import alignvec
from alignvec import AlignmentVector, AlignvecError
from tests.attach.transferred import new, tuned

IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def pair() -> tuple[nn.Module, nn.Module]:
    """A model that ties its head and one with the same values that does not."""
    tied = new("Qwen2", tie_word_embeddings=True)
    untied = new("Qwen2", tie_word_embeddings=False)
    untied.load_state_dict(tied.state_dict())
    return tied, untied


def adapter(model: nn.Module, **options: object) -> nn.Module:
    torch.manual_seed(3)
    made = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, lora_alpha=7, task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return made


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("only", [EMBEDDING, HEAD])
@pytest.mark.parametrize("transfer", [False, True])
def test_an_untied_base_whose_two_weights_were_equal(only: str, transfer: bool) -> None:
    tied, untied = pair()
    aligned = copy.deepcopy(untied)
    with torch.no_grad():
        aligned.get_parameter(only).add_(0.05)
    vector = alignvec.extract(untied, aligned)
    with pytest.raises(AlignvecError, match=rf"edits {only} and not .*, which the model ties together"):
        alignvec.attach(tied, {"v": vector}, transfer=transfer)
    alignvec.attach(untied, {"v": vector}, transfer=transfer).set(v=1.0)
    torch.testing.assert_close(logits(untied), logits(aligned), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_without_its_base_on_one_of_two_tied_weights(target: str, tmp_path: Path) -> None:
    tied, untied = pair()
    adapter(untied, target_modules=[target, "q_proj"]).save_pretrained(tmp_path / "adapter")
    read = alignvec.from_peft(tmp_path / "adapter")
    read.save(tmp_path / "saved")
    for vector in (read, alignvec.load(tmp_path / "saved"), 0.5 * read, read + read, read.select(f"*{target}*")):
        for transfer in (False, True):
            with pytest.raises(AlignvecError, match=r"which the model ties together: .*from_peft\(adapter, base\)"):
                alignvec.attach(tied, {"v": vector}, transfer=transfer)
    alignvec.attach(tied, {"v": read.select("*q_proj*")}).detach()
    model = copy.deepcopy(untied)
    alignvec.attach(model, {"v": read}).set(v=1.0)
    expected = logits(adapter(untied, target_modules=[target, "q_proj"]))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_that_ties_its_weights_as_the_model_does(tmp_path: Path) -> None:
    tied, _ = pair()
    trained = adapter(tied, target_modules=["embed_tokens"], ensure_weight_tying=True)
    trained.save_pretrained(tmp_path / "adapter")
    for base in (tied, None):
        vector = alignvec.from_peft(trained) if base is None else alignvec.from_peft(tmp_path / "adapter", base)
        model = copy.deepcopy(tied)
        alignvec.attach(model, {"v": vector}).set(v=1.0)
        torch.testing.assert_close(logits(model), logits(trained), rtol=1e-4, atol=1e-4)


def test_a_vector_of_a_tied_base_without_identity_moves_both() -> None:
    tied, _ = pair()
    aligned = tuned(tied)
    vector = AlignmentVector(dict(alignvec.extract(tied, aligned).items()))
    alignvec.attach(tied, {"v": vector}).set(v=1.0)
    torch.testing.assert_close(logits(tied), logits(aligned), rtol=1e-4, atol=1e-4)
