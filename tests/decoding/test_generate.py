"""What goes with generating: streams, stop strings, sampling, and the way through `model.generate`."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from transformers import AutoTokenizer, StoppingCriteriaList, StopStringCriteria, TextIteratorStreamer

import alignvec
from alignvec import AlignvecError, Sampling
from alignvec.recipes.models import model_path
from tests.models import random_vector, tiny

NEW = 12
QUESTIONS = ["What is the legal test for vicarious liability?", "Tell me of bonds"]


@pytest.fixture(scope="module")
def alignment() -> alignvec.Alignment:
    base = model_path("base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return alignvec.attach(model, {name: alignvec.extract(base, model_path(name)) for name in ("medical", "legal")})


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_path("base"), padding_side="left")


@pytest.fixture
def batch(tokenizer: transformers.PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    encoded = tokenizer(QUESTIONS, return_tensors="pt", padding=True)
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


MIXES = [{"legal": 1.0}, {"medical": -0.5}]


def test_the_shipped_models_answer_as_by_generate(alignment: alignvec.Alignment, batch: dict) -> None:
    decoder = alignment.decoder(max_batch=2, max_length=128)
    assert decoder.fused, decoder.reason
    alignment.set_rows(MIXES)
    expected = alignment.model.generate(**batch, max_new_tokens=60, do_sample=False)
    assert torch.equal(decoder.generate(**batch, max_new_tokens=60), expected)
    assert (expected[:, -1] == alignment.model.generation_config.pad_token_id).any(), "none of them ends early"


def test_a_streamer_gets_every_token(alignment: alignvec.Alignment, tokenizer, batch: dict) -> None:
    ids = batch["input_ids"][:1]
    alignment.set(legal=1.0)
    decoder = alignment.decoder(max_length=128)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = decoder.generate(ids, max_new_tokens=40, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    with pytest.raises(AlignvecError, match="takes one sequence"):
        alignment.decoder(max_batch=2, max_length=128).generate(**batch, streamer=streamer)


def test_stop_strings_end_an_answer(alignment: alignvec.Alignment, tokenizer, batch: dict) -> None:
    alignment.set_rows(MIXES)
    decoder = alignment.decoder(max_batch=2, max_length=128)
    options = {"stop_strings": ["test for", "bond"], "tokenizer": tokenizer}
    expected = alignment.model.generate(**batch, max_new_tokens=60, do_sample=False, **options)
    got = decoder.generate(**batch, max_new_tokens=60, **options)
    assert torch.equal(got, expected)
    assert got.shape[1] < batch["input_ids"].shape[1] + 60
    with pytest.raises(AlignvecError, match="needs the tokenizer"):
        decoder.generate(**batch, stop_strings="the")
    assert decoder.free == 2


def test_custom_generate_plugs_into_generate(alignment: alignvec.Alignment, tokenizer, batch: dict) -> None:
    model = alignment.model
    decoder = alignment.decoder(max_batch=4, max_length=128)
    alignment.set_rows(MIXES)
    cases: list[dict] = [
        {},
        {"repetition_penalty": 1.3},
        {"stopping_criteria": StoppingCriteriaList([StopStringCriteria(tokenizer, ["test for", "bond"])])},
        {"eos_token_id": int(tokenizer("a the")["input_ids"][-1])},
        {"max_time": 1e3},
    ]
    for options in cases:
        options |= {"max_new_tokens": 30, "do_sample": False}
        expected = model.generate(**batch, **options)
        assert torch.equal(model.generate(**batch, **options, custom_generate=decoder), expected), options
    alignment.set()
    options = {"max_new_tokens": 30, "do_sample": False}
    assert torch.equal(model.generate(**batch, **options, custom_generate=decoder, mixes=MIXES), expected)
    alignment.set(legal=1.0)
    result = model.generate(**batch, **options, custom_generate=decoder, return_dict_in_generate=True)
    assert torch.equal(result.sequences, model.generate(**batch, **options))
    one = {name: value[:1] for name, value in batch.items()}
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    output = model.generate(
        **one, **options, streamer=streamer, custom_generate=functools.partial(decoder, streamer=streamer)
    )
    assert "".join(streamer) == tokenizer.decode(output[0, one["input_ids"].shape[1] :])


def test_custom_generate_samples(alignment: alignvec.Alignment, batch: dict) -> None:
    model = alignment.model
    decoder = alignment.decoder(max_batch=4, max_length=128)
    alignment.set(legal=1.0)
    options = {"do_sample": True, "temperature": 1.5, "top_k": 30, "top_p": 0.9, "max_new_tokens": 20}
    one = {name: value[:1] for name, value in batch.items()}

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model.generate(**one, **options, num_return_sequences=4, custom_generate=decoder)

    answers = run(0)
    assert torch.equal(answers, run(0))
    assert not torch.equal(answers, run(1)[:, : answers.shape[1]])
    assert len({tuple(row) for row in answers.tolist()}) == 4, "sequences of one prompt draw the same"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGram"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
        ({"mixes": [{"other": 1.0}]}, "no vector named 'other'"),
    ],
)
def test_options_that_it_has_not_are_refused(
    alignment: alignvec.Alignment, batch: dict, options: dict, message: str
) -> None:
    decoder = alignment.decoder(max_batch=2, max_length=128)
    with pytest.raises(AlignvecError, match=message):
        alignment.model.generate(**batch, max_new_tokens=4, do_sample=False, custom_generate=decoder, **options)
    assert decoder.free == 2


def test_a_decoder_serves_its_own_model(alignment: alignvec.Alignment, batch: dict) -> None:
    other = transformers.AutoModelForCausalLM.from_pretrained(model_path("base"), dtype=torch.float32)
    with pytest.raises(AlignvecError, match="made for another model"):
        other.generate(**batch, max_new_tokens=4, custom_generate=alignment.decoder(max_batch=2, max_length=64))


def test_a_row_samples_the_same_whatever_is_beside_it() -> None:
    model = tiny()
    alignment = alignvec.attach(model, {"a": random_vector(model, 1)})
    decoder = alignment.decoder(max_batch=4, max_length=40)
    torch.manual_seed(0)
    ids = torch.randint(3, 101, (3, 6))
    sampling = Sampling(temperature=1.0, top_p=0.95, seed=11)

    def texts(rows: list[tuple[torch.Tensor, Sampling]]) -> list[list[int]]:
        joined = [decoder.join(prompt, {"a": 0.5}, sampling=own, max_new_tokens=NEW) for prompt, own in rows]
        while decoder.going:
            decoder.step()
        result = [decoder.text(row) for row in joined]
        for row in joined:
            decoder.leave(row)
        return result

    (alone,) = texts([(ids[0], sampling)])
    penalised = Sampling(temperature=0.7, repetition_penalty=1.5, seed=3)
    beside = texts([(ids[1], Sampling()), (ids[0], sampling), (ids[2], penalised)])
    assert beside[1] == alone
    assert beside[0] == texts([(ids[1], Sampling())])[0]
    assert beside[2] == texts([(ids[2], penalised)])[0]
    assert texts([(ids[0], Sampling(temperature=1.0, top_p=0.95, seed=12))])[0] != alone


def test_sampling_changes_within_a_sequence() -> None:
    model = tiny()
    alignment = alignvec.attach(model, {"a": random_vector(model, 1)})
    decoder = alignment.decoder(max_length=40)
    ids = torch.arange(5, 11)
    row = decoder.join(ids, {}, sampling=Sampling(temperature=5.0, seed=1), max_new_tokens=NEW)
    for _ in range(4):
        decoder.step()
    decoder.set_sampling(row, Sampling())
    begun = decoder.text(row)
    while decoder.going:
        decoder.step()
    expected = model.generate(torch.tensor([begun]), max_new_tokens=NEW - 4, do_sample=False)[0].tolist()
    assert decoder.text(row)[: len(expected)] == expected
