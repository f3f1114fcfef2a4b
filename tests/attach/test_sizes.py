"""A model of other sizes is a different base, even where it holds every value that the vector's base has."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import alignvec
from alignvec import AlignmentVector, AlignvecError
from tests.attach.transferred import llava, new, tuned


def deeper(base: nn.Module) -> nn.Module:
    model = new("Llama", num_hidden_layers=3)
    model.load_state_dict(base.state_dict(), strict=False)
    return model


def other_heads(base: nn.Module) -> nn.Module:
    model = new("Llama", num_attention_heads=8, num_key_value_heads=4, head_dim=4)
    model.load_state_dict(base.state_dict())
    return model


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (deeper, "its num_hidden_layers is 2, the model's 3; load"),
        (other_heads, "its num_attention_heads is 4, the model's 8; load"),
    ],
)
def test_equal_values_of_another_architecture(model, said: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    base = new("Llama")
    vector = alignvec.extract(base, tuned(base))
    other = model(base)
    with pytest.raises(AlignvecError, match=f"different base: {said} that base, or attach with transfer=True"):
        alignvec.attach(other, {"v": vector})
    alignvec.attach(other, {"v": vector}, transfer=True).detach()
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(AlignvecError, match=r"different base than other .*: \d in the vector's base, \d in other"):
        alignvec.merge(tmp_path / "other", {"v": vector}, {"v": 1.0}, tmp_path / "merged")


def test_a_text_model_inside_of_another_has_its_own_sizes() -> None:
    whole = llava()
    text = new("Llama")
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.lm_head.load_state_dict(whole.lm_head.state_dict())
    aligned = tuned(text)
    alignvec.attach(whole, {"v": alignvec.extract(text, aligned)}).set(v=1.0)
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(whole(ids).logits, aligned(ids).logits, rtol=1e-4, atol=1e-4)
    shallow = copy.deepcopy(text.config)
    shallow.num_hidden_layers = 1
    one = AutoModelForCausalLM.from_config(shallow)
    one.load_state_dict(text.state_dict(), strict=False)
    with pytest.raises(AlignvecError, match="its num_hidden_layers is 1, the model's 2"):
        alignvec.attach(llava_of(text), {"v": alignvec.extract(one, tuned(one))})


def llava_of(text: nn.Module) -> nn.Module:
    model = llava()
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    return model


def test_a_quantised_model_is_not_blamed_for_tables_that_none_loads(tmp_path: Path) -> None:
    base = new("Llama")
    folders = tmp_path / "base", tmp_path / "aligned"
    for model, folder in zip((base, tuned(base)), folders, strict=True):
        model.save_pretrained(folder)
        file = folder / "model.safetensors"
        save_file(load_file(file) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4)}, file)
    vector = alignvec.extract(*folders, exclude="*inv_freq*")
    assert vector.base is not None
    assert any("inv_freq" in name for name in vector.base.tensors)
    norm = AlignmentVector({"model.norm.weight": vector["model.norm.weight"]}, vector.base)
    live = AutoModelForCausalLM.from_pretrained(folders[0])
    live.config.quantization_config = {"quant_method": "gptq"}
    alignvec.attach(live, {"v": norm}).detach()
