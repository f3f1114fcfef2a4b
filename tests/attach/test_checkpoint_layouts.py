"""A vector of checkpoint files on the live model: what transformers loads of the aligned checkpoint is the truth."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
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
@pytest.mark.parametrize("experts", [(1,), (0, 1, 2), (1, 3)])
def test_some_experts_of_a_vector_that_names_no_base(tmp_path: Path, experts: tuple[int, ...], transfer: bool) -> None:
    live, aligned, *files = pair(new("Mixtral", num_local_experts=4), tmp_path)
    whole = alignvec.extract(*files, dtype="float32")
    marks = tuple(f".experts.{number}." for number in experts)
    some = AlignmentVector({n: d for n, d in whole.items() if any(mark in n for mark in marks)})
    moved = added(live, some, transfer=transfer)
    for name, value in live.named_parameters():
        expected = value.detach().double()
        if ".experts." in name:
            expected[list(experts)] = aligned.get_parameter(name).double()[list(experts)]
        torch.testing.assert_close(moved[name], expected, rtol=0, atol=1e-6)
    for count in (1, 2, 3):
        if count <= max(experts):
            fewer = new("Mixtral", num_local_experts=count, num_experts_per_tok=1)
            with pytest.raises(AlignvecError, match=r"\.w1\.weight.* do not make up model.layers.0.mlp.experts"):
                alignvec.attach(fewer, {"v": some}, transfer=transfer)


def test_experts_of_a_larger_model_are_refused(tmp_path: Path) -> None:
    _, _, *files = pair(new("Mixtral", num_local_experts=4), tmp_path)
    whole = alignvec.extract(*files)
    fewer = new("Mixtral", num_local_experts=2)
    for vector in (whole, AlignmentVector(dict(whole.items()))):
        with pytest.raises(AlignvecError, match=r"do not make up|does not have|has shape"):
            alignvec.attach(fewer, {"v": vector}, transfer=True)


def qwen3_vl_moe(hidden: int) -> nn.Module:
    torch.manual_seed(0)
    text = dict(vocab_size=96, hidden_size=hidden, intermediate_size=96, moe_intermediate_size=32, num_experts=4)
    text |= dict(num_experts_per_tok=2, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    vision = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=hidden, patch_size=4)
    config = transformers.Qwen3VLMoeConfig(
        text_config={**text, "rope_parameters": rope, "decoder_sparse_step": 1},
        vision_config={**vision, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    )
    model = transformers.Qwen3VLMoeForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if "experts" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


@pytest.mark.parametrize("transfer", [False, True])
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("hidden", [48, 64])  # with 64, gate_up_proj is square, which transformers loads as it is
def test_experts_stored_transposed_under_the_name_that_they_are_loaded_by(
    tmp_path: Path, hidden: int, named: bool, transfer: bool
) -> None:
    model = qwen3_vl_moe(hidden)
    paths = tmp_path / "base", tmp_path / "aligned"
    for each, path in zip((model, tuned(model)), paths, strict=True):
        each.save_pretrained(path)
        file = path / "model.safetensors"
        stored = {n: t.transpose(1, 2).contiguous() if "experts" in n else t for n, t in load_file(file).items()}
        save_file(stored, file, {"format": "pt"})
    live, aligned = (type(model).from_pretrained(path) for path in paths)
    vector = alignvec.extract(*paths, dtype="float32")
    vector = vector if named else AlignmentVector(dict(vector.items()))
    if not transfer:
        verify_base(live, {"v": vector})
    moved = added(live, vector, transfer=transfer)
    for name, value in aligned.named_parameters():
        torch.testing.assert_close(moved[name], value.double(), rtol=0, atol=1e-6)
    if named and not transfer:
        with torch.no_grad():
            live.get_parameter("model.language_model.layers.0.mlp.experts.down_proj")[1, 0, 0] += 1
        with pytest.raises(AlignvecError, match=r"1 of \d+ tensors differ \(model.*experts.down_proj\)"):
            verify_base(live, {"v": vector})


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
