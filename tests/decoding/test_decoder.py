"""A decoder against `model.generate`: the same greedy tokens, for every architecture, batch and mix."""

from __future__ import annotations

import pytest
import torch

import alignvec
from alignvec import AlignvecError, Decoder
from tests.models import ARCHITECTURES, random_vector, tiny

MIXES = [{"a": 0.7, "b": -0.4}, {"a": -1.0}, {"b": 1.3, "a": 0.1}]
NEW = 12
# Recognised by their modules; all others run by their own forward.
FUSED = {"Mistral", "Llama", "Qwen2", "Qwen3"}


def prompts(rows: int = 3, length: int = 9) -> dict[str, torch.Tensor]:
    """Prompts of different lengths, padded on the left."""
    torch.manual_seed(1)
    ids = torch.randint(3, 101, (rows, length))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        ids[row, : 2 * row], mask[row, : 2 * row] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generated(model: torch.nn.Module, batch: dict[str, torch.Tensor], **options: object) -> torch.Tensor:
    return model.generate(**batch, max_new_tokens=NEW, do_sample=False, **options)


def attached(architecture: str = "Mistral", **changes: object) -> alignvec.Alignment:
    options = {"experts_implementation": "eager"} if architecture == "Mixtral" else {}
    model = tiny(architecture, **options, **changes)
    return alignvec.attach(model, {"a": random_vector(model, 1), "b": random_vector(model, 2)})


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "own forward"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_tokens_are_those_of_generate(architecture: str, fuse: bool) -> None:
    if fuse and architecture not in FUSED:
        pytest.skip("not of the family")
    alignment = attached(architecture)
    alignment.set_rows(MIXES)
    batch = prompts()
    expected = generated(alignment.model, batch)
    assert len({tuple(row) for row in expected[:, -NEW:].tolist()}) == 3
    decoder = alignment.decoder(max_batch=4, max_length=32, fuse=fuse)
    assert torch.equal(decoder.generate(**batch, max_new_tokens=NEW), expected), "rows as set_rows gives them"
    alignment.set()
    assert torch.equal(decoder.generate(**batch, mixes=MIXES, max_new_tokens=NEW), expected), "mixes of their own"
    assert torch.equal(decoder.generate(**batch, max_new_tokens=NEW), generated(alignment.model, batch)), "the base"
    assert alignment.coefficients == {"a": 0.0, "b": 0.0}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_familys_models_are_recognised_and_no_other(architecture: str) -> None:
    decoder = attached(architecture).decoder(max_length=8)
    assert decoder.fused == (architecture in FUSED)
    assert bool(decoder.reason) != decoder.fused
    if not decoder.fused:
        with pytest.raises(AlignvecError, match="fuse=True, but"):
            decoder.model.alignment.decoder(max_length=8, fuse=True)


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "own forward"])
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("Mistral", {"sliding_window": 6}),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
        ("Gemma2", {"sliding_window": 6}),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    ],
    ids=["Mistral", "Qwen2", "Gemma2", "Llama"],
)
def test_windows_and_scaled_positions(architecture: str, changes: dict[str, object], fuse: bool) -> None:
    if fuse and architecture not in FUSED:
        pytest.skip("not of the family")
    alignment = attached(architecture, **changes)
    alignment.set_rows(MIXES)
    batch = prompts(length=15)
    decoder = alignment.decoder(max_batch=3, max_length=40, fuse=fuse)
    assert torch.equal(decoder.generate(**batch, max_new_tokens=NEW), generated(alignment.model, batch))


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "own forward"])
def test_a_plain_model_and_a_materialised_one(fuse: bool) -> None:
    model = tiny()
    batch = prompts()
    plain = Decoder(model, max_batch=3, max_length=32, fuse=fuse)
    assert torch.equal(plain.generate(**batch, max_new_tokens=NEW), generated(model, batch))
    with pytest.raises(AlignvecError, match="has no vectors"):
        plain.generate(**batch, mixes=MIXES)
    alignment = alignvec.attach(model, {"a": random_vector(model, 1)})
    with pytest.raises(AlignvecError, match="attached or detached since"):
        plain.generate(**batch)
    decoder = alignment.decoder(max_batch=3, max_length=32, fuse=fuse)
    for mix in ({"a": 0.8}, {"a": -0.9}):
        alignment.materialise(mix)
        assert torch.equal(decoder.generate(**batch, max_new_tokens=NEW), generated(model, batch)), mix
    with pytest.raises(AlignvecError, match="while a mix is materialised"):
        decoder.generate(**batch, mixes=[{"a": 1.0}] * 3)
    alignment.restore()
    alignment.set(a=0.8)
    assert torch.equal(decoder.generate(**batch, max_new_tokens=NEW), generated(model, batch))
    alignment.detach()
    with pytest.raises(AlignvecError, match="attached or detached since"):
        decoder.generate(**batch)


def test_one_token_prompts_and_the_last_place() -> None:
    alignment = attached()
    alignment.set(a=1.0)
    ids = torch.tensor([[5]])
    decoder = alignment.decoder(max_length=NEW)
    assert torch.equal(decoder.generate(ids, max_new_tokens=NEW), generated(alignment.model, {"input_ids": ids}))
    with pytest.raises(AlignvecError, match="do not fit max_length=12"):
        decoder.generate(ids, max_new_tokens=NEW + 1)


def test_answers_end_with_an_end_token_and_are_filled_up() -> None:
    alignment = attached()
    alignment.set_rows(MIXES)
    batch = prompts()
    free = generated(alignment.model, batch, eos_token_id=-1)[:, -NEW:]
    end = int(free[0, 3])
    expected = generated(alignment.model, batch, eos_token_id=end, pad_token_id=0)
    decoder = alignment.decoder(max_batch=3, max_length=32)
    got = decoder.generate(**batch, max_new_tokens=NEW, eos_token_id=end, pad_token_id=0)
    assert torch.equal(got, expected)
    assert decoder.free == 3
    assert torch.equal(decoder.generate(**batch, max_new_tokens=NEW, eos_token_id=-1)[:, -NEW:], free)


def test_half_precision_models_decode() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = tiny(dtype=dtype)
        alignment = alignvec.attach(model, {"a": random_vector(model, 1)})
        alignment.set(a=0.5)
        decoder = alignment.decoder(max_batch=3, max_length=32)
        assert decoder.fused, decoder.reason
        answers = decoder.generate(**prompts(), max_new_tokens=NEW)
        # Roundings differ, so tokens may: each has to be among the likeliest of what the model makes of the text.
        logits = model(answers[:1]).logits[0, -NEW - 1 : -1].float()
        chosen = logits.gather(1, answers[0, -NEW:, None]).squeeze(1)
        assert (chosen >= logits.max(-1).values - 0.1 * logits.std()).all()


def test_what_cannot_be_decoded_is_refused() -> None:
    model = tiny()
    alignment = alignvec.attach(model, {"a": random_vector(model, 1)}, max_rows=2)
    batch = prompts()
    with pytest.raises(AlignvecError, match="max_rows=3 or more"):
        alignment.decoder(max_batch=3)
    decoder = alignment.decoder(max_batch=2, max_length=32)
    with pytest.raises(AlignvecError, match="larger max_batch"):
        decoder.generate(**batch)
    ids, mask = batch["input_ids"][:2], batch["attention_mask"][:2]
    with pytest.raises(AlignvecError, match="padding_side='left'"):
        decoder.generate(ids, mask.flip(1))
    with pytest.raises(AlignvecError, match="no vector named 'c'"):
        decoder.generate(ids, mask, mixes=[{"c": 1.0}, {}])
    with pytest.raises(AlignvecError, match="mixes has 1 entries"):
        decoder.generate(ids, mask, mixes=[{}])
    with pytest.raises(AlignvecError, match="has no tokens"):
        decoder.generate(ids, torch.zeros_like(mask))
    with pytest.raises(AlignvecError, match="must be an integer of at least"):
        alignment.decoder(max_batch=0)
    with pytest.raises(AlignvecError, match="needs a CUDA device"):
        alignment.decoder(graphs=True)
    assert decoder.free == 2
    model.double()
    with pytest.raises(AlignvecError, match="make a new one"):
        decoder.generate(ids[:1])
