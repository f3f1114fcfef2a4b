"""A vector of checkpoint files on the live model: what transformers loads of the aligned checkpoint is the truth."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import alignvec
from alignvec import AlignmentVector, AlignvecError
from alignvec.formats import decode
from alignvec.names import live_deltas, parameter_names
from alignvec.verify import verify_base
from tests.attach.transferred import FAMILIES, added, llava, new, tuned


def qwen2_vl() -> nn.Module:
    torch.manual_seed(3)
    text = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    vision = dict(depth=1, embed_dim=32, hidden_size=32, num_heads=4, patch_size=14)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = transformers.Qwen2VLConfig(
        text_config={**text, "num_key_value_heads": 2, "rope_parameters": rope}, vision_config=vision
    )
    return transformers.Qwen2VLForConditionalGeneration(config).eval()


MODELS = {name: (lambda name=name, options=options: new(name, **options)) for name, options in FAMILIES.items()}
MODELS |= {"Llava": llava, "Qwen2VL": qwen2_vl}


def pair(model: nn.Module, folder: Path) -> tuple[nn.Module, nn.Module, Path, Path]:
    """The model and its tuned copy, saved and loaded again."""
    paths = folder / "base", folder / "aligned"
    for each, path in zip((model, tuned(model)), paths, strict=True):
        each.save_pretrained(path)
    live, aligned = (type(model).from_pretrained(path) for path in paths)
    return live, aligned, *paths


@pytest.mark.parametrize("family", list(MODELS))
def test_vectors_of_files_move_the_live_model_to_the_aligned_one(family: str, tmp_path: Path) -> None:
    live, aligned, base_files, aligned_files = pair(MODELS[family](), tmp_path)
    vector = alignvec.extract(base_files, aligned_files, dtype="float32")
    verify_base(live, {"v": vector})
    moved = added(live, vector)
    for name, value in aligned.named_parameters():
        torch.testing.assert_close(moved[name], value.double(), rtol=0, atol=1e-6)


def test_one_expert_of_many_gives_the_others_no_delta(tmp_path: Path) -> None:
    live, aligned, *files = pair(new("Qwen3Moe", **FAMILIES["Qwen3Moe"]), tmp_path)
    whole = alignvec.extract(*files, dtype="float32")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    one = AlignmentVector({name: whole[name]}, whole.base)
    deltas = live_deltas(live, parameter_names(live), "v", one)
    live_name = "model.layers.1.mlp.experts.gate_up_proj"
    assert set(deltas) == {live_name}
    expected = torch.zeros_like(live.get_parameter(live_name))
    difference = aligned.get_parameter(live_name) - live.get_parameter(live_name)
    expected[2, 16:] = difference[2, 16:].detach()  # gate first, then up
    torch.testing.assert_close(decode(deltas[live_name]()), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("transfer", [False, True])
def test_experts_that_are_not_all_there_are_refused(tmp_path: Path, transfer: bool) -> None:
    live, _, *files = pair(new("Mixtral", num_local_experts=4), tmp_path)
    whole = alignvec.extract(*files)
    some = {n: d for n, d in whole.items() if ".experts.3." not in n}
    with pytest.raises(AlignvecError, match=r"experts.0.w1.weight.* do not make up model.layers.0.mlp.experts"):
        alignvec.attach(live, {"v": AlignmentVector(some, None)}, transfer=transfer)
    fewer = new("Mixtral", num_local_experts=2)
    with pytest.raises(AlignvecError, match=r"do not make up|does not have|has shape"):
        alignvec.attach(fewer, {"v": whole}, transfer=True)


def test_a_lossless_vector_of_files_needs_its_own_base_under_transfer(tmp_path: Path) -> None:
    live, aligned, *files = pair(new("Mixtral", num_local_experts=4).bfloat16(), tmp_path)
    alignvec.extract(*files, format="lossless", output=tmp_path / "v")
    vector = alignvec.load(tmp_path / "v")
    moved = added(live, vector)
    for name, value in aligned.named_parameters():
        assert torch.equal(moved[name].to(torch.bfloat16), value), name
    other = tuned(live, 7)
    deltas = live_deltas(other, parameter_names(other), "v", vector, True)
    with pytest.raises(AlignvecError, match=r"with_base"):
        deltas["model.layers.0.mlp.experts.down_proj"]()
    bound = vector.with_base(files[0])
    shift = added(other, bound, transfer=True)
    for name, value in aligned.named_parameters():
        expected = other.get_parameter(name).double() + value.double() - live.get_parameter(name).double()
        torch.testing.assert_close(shift[name], expected, rtol=0, atol=1e-6)
