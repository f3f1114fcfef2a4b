"""Names that a model lacks are mapped exactly or refused by name, under transfer=True, too."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaModel

import alignvec
from alignvec import AlignmentVector, AlignvecError
from tests.attach.transferred import added, llava, new, tuned

IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def vector() -> AlignmentVector:
    """Of a two-layer Llama, from live models."""
    base = new("Llama")
    return alignvec.extract(base, tuned(base))


def part(vector: AlignmentVector, *fragments: str) -> AlignmentVector:
    """The deltas whose names hold one of the fragments."""
    return AlignmentVector({n: d for n, d in vector.items() if any(f in n for f in fragments)}, vector.base)


def refused(model: nn.Module, vector: AlignmentVector, message: str, transfer: bool) -> str:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = list(model.modules())
    with pytest.raises(AlignvecError, match=message) as caught:
        alignvec.attach(model, {"v": vector}, transfer=transfer)
    assert list(model.modules()) == modules
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return str(caught.value)


@pytest.mark.parametrize("transfer", [False, True])
@pytest.mark.parametrize("family", ["GPTNeoX", "Phi", "GPT2", "Mixtral"])
def test_a_vector_of_another_family_names_what_does_not_fit(
    vector: AlignmentVector, family: str, transfer: bool
) -> None:
    first = {"Phi": "model.layers.0.self_attn.o_proj", "Mixtral": "model.layers.0.mlp.gate_proj"}
    message = refused(new(family), vector, "does not have: ", transfer)
    assert first.get(family, "model.embed_tokens.weight") in message
    assert "transfer" not in message


@pytest.mark.parametrize("transfer", [False, True])
def test_a_model_with_fewer_layers(vector: AlignmentVector, transfer: bool) -> None:
    message = refused(new("Llama", num_hidden_layers=1), vector, "does not have: model.layers.1", transfer)
    assert "transfer" not in message


@pytest.mark.parametrize("transfer", [False, True])
def test_a_backbone_does_not_lose_the_delta_of_the_head(vector: AlignmentVector, transfer: bool) -> None:
    backbone = new("Llama").model
    refused(backbone, vector, "LlamaModel does not have: lm_head.weight", transfer)
    alignvec.attach(backbone, {"v": part(vector, "layers", "embed", "norm")})


@pytest.mark.parametrize("transfer", [False, True])
def test_another_vocabulary_is_no_matter_of_values(vector: AlignmentVector, transfer: bool) -> None:
    model = new("Llama", vocab_size=97)
    message = refused(model, vector, r"shape \[96, 32\] for model.embed_tokens.weight, the model has \[97", transfer)
    assert "transfer" not in message
    layers = part(vector, "layers")
    assert "transfer=True" in refused(model, layers, "21 of 21 tensors differ|different base", False)
    base = dict(model.named_parameters())
    moved = added(model, layers, transfer=True)
    assert all(torch.equal(moved[n], base[n].double() + (layers[n].double() if n in layers else 0)) for n in base)


def test_transfer_is_offered_where_values_alone_differ(vector: AlignmentVector) -> None:
    model = tuned(new("Llama"), 9)
    assert "transfer=True" in refused(model, vector, "a different base: 21 of 21 tensors differ", False)
    alignvec.attach(model, {"v": vector}, transfer=True)


def test_a_text_vector_edits_the_language_model_of_a_vision_language_model_alone(vector: AlignmentVector) -> None:
    model = llava()
    before = dict(model.named_parameters())
    moved = added(model, vector, transfer=True)
    text = {f"model.language_model.{n.removeprefix('model.')}" if n.startswith("model.") else n: n for n in vector}
    for name, value in before.items():
        expected = value.double() + (vector[text[name]].double() if name in text else 0)
        assert torch.equal(moved[name], expected), name
    refused(model, vector, "different base: 16 of 21 .*model.layers.0.self_attn.q_proj.weight", False)


def test_a_text_vector_that_does_not_fit_the_language_model_is_refused() -> None:
    for options in ({"hidden_size": 16}, {"num_hidden_layers": 3}, {"attention_bias": True}):
        base = new("Llama", **options)
        refused(llava(), alignvec.extract(base, tuned(base)), "LlavaForConditionalGeneration does not have", True)
    base = llava()
    vector = alignvec.extract(base, tuned(base))
    message = refused(new("Llama"), vector, "does not have: ", True)
    assert "model.vision_tower" in message


def test_a_vector_with_a_name_of_no_model(vector: AlignmentVector) -> None:
    strange = AlignmentVector({**dict(vector.items()), "mtp.fc.weight": torch.ones(3)}, None)
    for transfer in (False, True):
        refused(new("Llama"), strange, "does not have: mtp.fc.weight; .*vector.select", transfer)


def test_one_of_two_tied_weights_alone_is_refused(vector: AlignmentVector) -> None:
    """An untied base's delta of the head would move the embedding of a model that ties them."""
    tied = new("Llama", tie_word_embeddings=True)
    refused(tied, part(vector, "lm_head"), "edits lm_head.weight and not model.embed_tokens.weight", True)
    refused(tied, part(vector, "embed_tokens"), "edits model.embed_tokens.weight and not lm_head.weight", True)
    refused(tied, vector, "two different deltas for model.embed_tokens.weight", True)


def test_a_backbone_of_the_right_names_gets_every_delta(vector: AlignmentVector) -> None:
    base = LlamaModel(new("Llama").config).eval()
    aligned = tuned(base)
    whole = new("Llama")
    whole.model.load_state_dict(base.state_dict())
    moved = added(whole, alignvec.extract(base, aligned), transfer=True)
    for name, value in aligned.named_parameters():
        torch.testing.assert_close(moved[f"model.{name}"], value.double(), rtol=0, atol=1e-6)
    assert torch.equal(moved["lm_head.weight"], whole.lm_head.weight.double())
