"""Decoders beyond windows, chunks and whatever a trial of a few tokens does not reach, in many families.

Truth is what the tuned model and the base generate by themselves.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import alignvec
from alignvec import AlignvecError, Decoder
from tests.decoding.families import FAMILIES, built, tuned

NEW = 12
ROOM = 48

# Run by our own layers; all others by their own forward.
FUSED = {"Llama, llama3 rope", "Llama, yarn rope", "Mistral, window", "Ministral, window", "Qwen 2, window"}
FUSED |= {"Qwen 3, window", "Gemma"}
ONE_MIX = {"GPT-OSS", "Llama 4, chunks", "Gemma 3n", "BERT"}  # where different mixes in a step may be refused
ALONE = {  # rows of different lengths cannot be decoded in one step
    "GPT-Neo, window": "differ from those of the model's own forward by .*max_batch=1",
    "RoFormer": "takes no position_ids.*max_batch=1",
}
ROWS_END = {  # tokens that a row can have, and why
    "Llama, dynamic rope": (16, "dynamic frequencies of model.rotary_emb"),
    "Phi 3, longrope": (16, "longrope frequencies of model.rotary_emb"),
    "Llama 4, temperature": (7, "attn_temperature_tuning"),
}
REFUSED = {
    "DeepSeek V3.2": r"more than keys and values in layers 0, 1 \(indexed_attention\)",
    "Qwen 3 Next": r"recurrent state in layer 0 \(linear_attention\)",
    "Qwen 3.5": r"recurrent state in layer 0 \(linear_attention\)",
    "MiniMax": r"recurrent state in layer 0 \(linear_attention\)",
    "Mamba": r"recurrent state in layers 0, 1 \(linear_attention\)",
    "Jamba": r"recurrent state in layer 0 \(linear_attention\)",
    "Bamba": r"recurrent state in layer 0 \(linear_attention\)",
    "Falcon H1": r"recurrent state in layers 0, 1 \(hybrid\)",
    "LFM 2": r"recurrent state in layer 0 \(conv\)",
    "Recurrent Gemma": r"recurrent state in layer 0 \(linear_attention\)",
    "RWKV": "recurrent state in its layers",
    "OpenAI GPT": "does not write its keys and values to the cache",
    "RoBERTa": "differ from those of the model's own forward by",
}
RIGHT = [name for name in FAMILIES if name not in {*REFUSED, *ROWS_END, *ALONE}]
QUICK = {"Llama 4, chunks", "Mistral, window", "Ministral 3, temperature", "Gemma 3n", "GPT-OSS", "Bloom"}
QUICK |= {"Cohere 2", "DeepSeek V3"}


def prompts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 96, (length,), generator=generator) for length in (20, 9)]


def generated(model: Any, prompt: torch.Tensor, new: int = NEW) -> list[int]:
    ids = model.generate(prompt[None], max_new_tokens=new, do_sample=False, eos_token_id=-1)
    return list(ids[0, len(prompt) :].tolist())


def decoded(decoder: Decoder, own: list[torch.Tensor], mixes: list[Any] | None) -> list[list[int]]:
    width = max(map(len, own))
    ids, mask = torch.zeros(len(own), width, dtype=torch.int64), torch.zeros(len(own), width, dtype=torch.int64)
    for row, prompt in enumerate(own):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    return list(decoder.generate(ids, mask, mixes=mixes, max_new_tokens=NEW, eos_token_id=-1)[:, width:].tolist())


@pytest.mark.parametrize(
    "family", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RIGHT]
)
def test_rows_get_the_tokens_of_their_models(family: str) -> None:
    model = built(family)
    aligned = tuned(model)
    expected = [generated(aligned, prompt) for prompt in prompts()]
    base = generated(model, prompts()[1])
    assert max(len(set(tokens)) for tokens in expected) > 1, "tokens that any attention would give"
    alignment = alignvec.attach(model, {"v": alignvec.extract(model, aligned)})
    decoder = alignment.decoder(max_batch=2, max_length=ROOM)
    assert decoder.fused == (family in FUSED), decoder.reason
    assert decoded(decoder, prompts(), [{"v": 1.0}, {"v": 1.0}]) == expected
    try:
        apart: Any = decoded(decoder, prompts(), [{"v": 1.0}, {}])
    except AlignvecError as refusal:
        apart = str(refusal)
    refused = family in ONE_MIX and "rows of one step have different mixes" in str(apart)
    assert refused or apart == [expected[0], base]
    assert decoder.free == 2


@pytest.mark.parametrize("family", ALONE)
def test_rows_that_share_their_positions_are_decoded_alone(family: str) -> None:
    model = built(family)
    with pytest.raises(AlignvecError, match=ALONE[family]):
        Decoder(model, max_batch=2, max_length=ROOM)
    decoder = Decoder(model, max_length=ROOM)
    for prompt in prompts():
        assert decoded(decoder, [prompt], None) == [generated(model, prompt)]


@pytest.mark.parametrize("family", ROWS_END)
def test_rows_end_where_the_model_would_change_for_all_of_them(family: str) -> None:
    model = built(family)
    room, why = ROWS_END[family]
    decoder = Decoder(model, max_batch=2, max_length=ROOM)
    prompt = prompts()[0][:4]
    ids = decoder.generate(prompt[None], max_new_tokens=room - 3, eos_token_id=-1)
    assert ids[0, 4:].tolist() == generated(model, prompt, room - 3)
    with pytest.raises(AlignvecError, match=f"4 tokens and {room - 2} new ones do not fit the {room} .*{why}"):
        decoder.generate(prompt[None], max_new_tokens=room - 2)


def test_a_temperature_by_length_is_right_where_the_row_is_alone() -> None:
    model = built("Llama 4, temperature")
    decoder = Decoder(model, max_length=ROOM)
    for prompt in prompts():
        assert decoded(decoder, [prompt], None) == [generated(model, prompt)]


@pytest.mark.parametrize("family", REFUSED)
def test_what_a_decoder_cannot_keep_is_refused_by_name(family: str) -> None:
    model = built(family)
    with pytest.raises(AlignvecError, match=REFUSED[family]) as refusal:
        Decoder(model, max_length=ROOM)
    assert type(model).__name__ in str(refusal.value)
    assert str(refusal.value).endswith("use model.generate")


@pytest.mark.parametrize("family", ["GPT-2", "GPT-J", "OPT", "BERT"])
def test_learned_positions_end(family: str) -> None:
    decoder = Decoder(built(family), max_length=2048)
    assert decoder.cache.max_length == 128
    row = decoder.join([5] * 120)
    while decoder.going:
        decoder.step()
    assert len(decoder.text(row)) == 129
    decoder.leave(row)
    with pytest.raises(AlignvecError, match=r"120 tokens and 10 new ones do not fit the 128 .* no more positions"):
        decoder.join([5] * 120, max_new_tokens=10)


@pytest.mark.parametrize("token", [-1, 96, 2.5])
def test_a_token_outside_of_the_vocabulary_stops_no_other_row(token: float) -> None:
    decoder = Decoder(built("Mistral, window"), max_batch=2, max_length=ROOM)
    decoder.join([5, 6])
    with pytest.raises(AlignvecError, match=f"{token} is no token id of this model, whose vocabulary has 96"):
        decoder.join([5, token, 7])
    assert decoder.free == 1
    decoder.step()


@pytest.mark.parametrize("family", ["Ernie 4.5", "Helium"])
def test_another_rotation_is_told_apart_in_half_precision(family: str) -> None:
    decoder = Decoder(built(family, torch.bfloat16), max_length=ROOM)
    assert decoder.reason.endswith("does not rotate by halves")


def test_code_that_masks_what_its_configuration_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial at the last token finds a window of 8 that a prompt of five tokens cannot; one row is right by it."""
    from transformers.masking_utils import create_causal_mask, sliding_window_overlay
    from transformers.models.llama import modeling_llama

    model = built("Llama, yarn rope")
    assert Decoder(model, max_batch=2, max_length=ROOM).fused

    def windowed(*args: Any, **kwargs: Any) -> Any:
        return create_causal_mask(*args, **kwargs, and_mask_function=sliding_window_overlay(8))

    monkeypatch.setattr(modeling_llama, "create_causal_mask", windowed)
    Decoder(model, max_batch=2, max_length=8)
    with pytest.raises(AlignvecError, match=r"differ from those of the model's own forward by .* at 47 tokens"):
        Decoder(model, max_batch=2, max_length=ROOM)
    decoder = Decoder(model, max_length=ROOM)
    assert decoder.reason.endswith("at 47 tokens")
    assert decoded(decoder, prompts()[:1], None) == [generated(model, prompts()[0])]


def test_reasons_are_the_models_own() -> None:
    with pytest.raises(AlignvecError, match=r"MptForCausalLM itself fails at 200 tokens: .*a smaller max_length"):
        Decoder(built("MPT"), max_length=200)
    model = built("Llama, yarn rope").train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with pytest.raises(AlignvecError, match=r"it is in training mode, call model.eval\(\)$"):
        Decoder(model, max_length=ROOM)
    assert Decoder(model.eval(), max_length=ROOM).fused
