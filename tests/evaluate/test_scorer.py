"""Scores of stored responses against one plain forward a response, for every architecture and form."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from alignvec import AlignvecError, attach
from alignvec.evaluate import Question, Scorer
from alignvec.evaluate.batches import plan
from tests.models import ARCHITECTURES, merged, random_vector, tiny

LETTERS = "abcdefghijklmnopqrstuvwxyz"
QUESTIONS = [
    Question("one", "abc", {"low": "de", "mid": "fghijk", "high": "l"}),
    Question("two", "mnopqrs", {"high": "cab", "mid": "tu", "low": "vwxyz"}),
    Question("one", "z", {"low": "yxwvu", "mid": "a", "high": "bbbb"}),
]
MIXES = [{"first": 0.5}, {}, {"first": -0.7, "second": 0.9}, {"second": 1.0}]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<s>": 1, "</s>": 2, **{letter: i + 10 for i, letter in enumerate(LETTERS)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def expected(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Log-probabilities [questions, levels], a forward for every response."""
    result = torch.empty(len(QUESTIONS), 3)
    for row, question in enumerate(QUESTIONS):
        prompt = tokenizer(question.query)["input_ids"]
        for column, level in enumerate(("low", "mid", "high")):
            ids = torch.tensor([prompt + tokenizer(question.responses[level])["input_ids"] + [2]])
            with torch.no_grad():
                log_probabilities = model(ids).logits[0].double().log_softmax(-1)
            picked = log_probabilities[:-1].gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
            result[row, column] = picked.sum()
    return result


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_mix_scores_as_its_merged_model(architecture: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny(architecture)
    vectors = {"first": random_vector(model, 1), "second": random_vector(model, 2)}
    totals = [
        expected(merged(model, vectors, {"first": 0.0, "second": 0.0, **mix}).float(), tokenizer) for mix in MIXES
    ]
    alignment = attach(model, vectors)
    alignment.set(first=0.25)
    for form in ("rows", "merged"):
        for tokens in (24, 4096):
            scores = Scorer(alignment, tokenizer, QUESTIONS, form=form, batch_tokens=tokens)(MIXES)
            torch.testing.assert_close(scores.total, torch.stack(totals), rtol=2e-4, atol=2e-3)
    assert alignment.coefficients == {"first": 0.25, "second": 0.0}
    assert not alignment.weights


def test_a_plain_model_and_a_prompt_of_ones_own(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny()
    scores = Scorer(model, tokenizer, QUESTIONS)()
    torch.testing.assert_close(scores.total[0], expected(model, tokenizer), rtol=2e-4, atol=2e-3)
    lengths = torch.tensor([[3, 7, 2], [6, 3, 4], [6, 2, 5]])  # with the end of text
    torch.testing.assert_close(scores.mean[0], scores.total[0] / lengths)
    prompted = Scorer(model, tokenizer, QUESTIONS, prompt=lambda question: "<s>" + question.query)()
    assert not torch.allclose(prompted.total, scores.total, atol=1e-2)


def test_packed_sequences_are_used_where_the_model_keeps_responses_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    for architecture, changes, packs in (("Mistral", {}, True), ("Mistral", {"sliding_window": 8}, False)):
        scorer = Scorer(tiny(architecture, **changes), tokenizer, QUESTIONS)
        assert (scorer.batches()[0].mask is not None) is packs
        torch.testing.assert_close(scorer().total[0], expected(scorer.model, tokenizer), rtol=2e-4, atol=2e-3)


def test_a_model_that_ignores_masks_gets_plain_sequences(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny()
    forward = model.forward
    model.forward = lambda input_ids, use_cache=False, **_: forward(input_ids=input_ids, use_cache=use_cache)
    scorer = Scorer(model, tokenizer, QUESTIONS)
    totals = scorer().total[0]
    assert scorer.batches()[0].mask is None
    model.forward = forward
    torch.testing.assert_close(totals, expected(model, tokenizer), rtol=2e-4, atol=2e-3)


def test_progress_reaches_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny()
    alignment = attach(model, {"first": random_vector(model, 1)})
    for form in ("rows", "merged"):
        shares: list[float] = []
        Scorer(alignment, tokenizer, QUESTIONS, form=form, batch_tokens=40)([{}] * 3, progress=shares.append)
        assert shares == sorted(shares)
        assert shares[-1] == pytest.approx(1)


def test_plan_keeps_to_the_budget_and_loses_nothing() -> None:
    lengths = [5, 1, 9, 3, 3, 30, 2]
    chosen = list(plan(lengths, 12))
    assert sorted(index for group in chosen for index in group) == list(range(len(lengths)))
    assert all(len(group) == 1 or len(group) * max(lengths[i] for i in group) <= 12 for group in chosen)
    assert [5] in chosen  # longer than the budget, alone


def test_refusals(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny(max_position_embeddings=8)
    with pytest.raises(AlignvecError, match="take 10 tokens, the model has 8"):
        Scorer(model, tokenizer, QUESTIONS)
    model = tiny()
    with pytest.raises(AlignvecError, match="form"):
        Scorer(model, tokenizer, QUESTIONS, form="fast")
    with pytest.raises(AlignvecError, match="no vectors attached"):
        Scorer(model, tokenizer, QUESTIONS)([{"first": 1.0}])
    with pytest.raises(AlignvecError, match="no mixes"):
        Scorer(model, tokenizer, QUESTIONS)([])
    alignment = attach(model, {"first": random_vector(model, 1)})
    for form in ("rows", "merged"):
        with pytest.raises(AlignvecError, match="no vector named 'third'"):
            Scorer(alignment, tokenizer, QUESTIONS, form=form)([{}, {"third": 1.0}])
        assert not alignment.weights
