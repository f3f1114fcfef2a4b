"""Generated answers and their levels: many mixes in a batch answer as each would alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import alignvec
from alignvec.errors import AlignvecError
from alignvec.evaluate import Question, Scores
from alignvec.evaluate.generation import Generated, generate_answers, generation_rates, judge_generated
from alignvec.recipes import model_path
from alignvec.recipes.evaluate import answers

MIXES = [{}, {"medical": 1.0}, {"medical": -1.0}]
QUESTIONS = [
    Question("medical", "What is metformin used for?", {"short": "a", "long": "b"}),
    Question("legal", "I am a tenant and my landlord wants me to leave. What is a lease?", {"short": "a", "long": "b"}),
    Question("medical", "Is aspirin safe?", {"short": "a", "long": "b"}),
]


class Lengths:
    """Judges by length; has nothing to say about one text."""

    levels = ("short", "long")

    def __init__(self, unsaid: str = "") -> None:
        self.unsaid, self.asked = unsaid, []

    def judge(self, queries: Sequence[str], texts: Sequence[str]) -> list[str | None]:
        self.asked.append((queries, texts))
        return [None if text == self.unsaid else "long" if len(text) > 40 else "short" for text in texts]


@pytest.fixture(scope="module")
def alignment():
    model = AutoModelForCausalLM.from_pretrained(model_path("base"), dtype=torch.float32).eval()
    vector = alignvec.extract(model_path("base"), model_path("medical"))
    return alignvec.attach(model, {"medical": vector}, max_rows=2)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path("base"))


def test_a_batch_of_mixes_answers_as_each_alone(alignment, tokenizer) -> None:
    alignment.set(medical=0.25)
    shares: list[float] = []
    together = generate_answers(alignment, tokenizer, QUESTIONS, MIXES, 12, progress=shares.append)
    assert alignment.coefficients == {"medical": 0.25}
    assert shares == sorted(shares)
    assert shares[-1] == 1
    for mix, texts in zip(MIXES, together, strict=True):
        with alignment.using(mix):
            alone = answers(alignment.model, tokenizer, [question.query for question in QUESTIONS], max_new_tokens=12)
        assert texts == [text.strip() for text in alone]
    assert together[0] != together[1]


def test_rates_are_the_judges_verdicts_by_domain(alignment, tokenizer) -> None:
    judge = Lengths()
    generated = judge_generated(judge, alignment, tokenizer, QUESTIONS, MIXES, 12)
    assert generated.domains == ("medical", "legal", "medical")
    assert judge.asked[0][0] == [question.query for question in QUESTIONS] * 3
    lengths = [["long" if len(text) > 40 else "short" for text in row] for row in generated.texts]
    assert generated.verdicts == lengths
    rates = generation_rates(judge, alignment, tokenizer, QUESTIONS, MIXES, 12)
    assert rates.shape == (3, 2, 2)
    assert rates[1, 0, 1] == (lengths[1][0] == "long") / 2 + (lengths[1][2] == "long") / 2
    silent = judge_generated(Lengths(generated.texts[0][1]), alignment, tokenizer, QUESTIONS, [{}], 12)
    assert silent.unjudged == 1
    assert silent.rates().sum(-1).tolist() == [[1, 0]]


def test_agreement_goes_by_the_names_of_levels() -> None:
    total = torch.tensor([[[0.0, -1.0], [-1.0, 0.0], [0.0, -1.0]]])  # long, short, long
    domains = ("medical", "legal", "medical")
    scores = Scores(("long", "short"), domains, total, total)
    generated = Generated(("short", "long"), domains, [[""] * 3], [["long", "short", None]])
    assert generated.agreement(scores).tolist() == [[0.5, 1.0]]
    with pytest.raises(AlignvecError, match="other questions"):
        generated.agreement(Scores(("long", "short"), ("legal",) * 3, total, total))
    with pytest.raises(AlignvecError, match="2 mixes"):
        generated.agreement(Scores(("long", "short"), domains, total.repeat(2, 1, 1), total.repeat(2, 1, 1)))


def test_bad_input_is_refused(alignment, tokenizer) -> None:
    for questions, mixes in ((QUESTIONS, []), ([], MIXES)):
        with pytest.raises(AlignvecError, match="nothing to generate"):
            generate_answers(alignment, tokenizer, questions, mixes)
    with pytest.raises(AlignvecError, match="no vectors"):
        generate_answers(AutoModelForCausalLM.from_config(alignment.model.config), tokenizer, QUESTIONS, MIXES)
    with pytest.raises(AlignvecError, match="max_new_tokens"):
        generate_answers(alignment, tokenizer, QUESTIONS, MIXES, 0)
    with pytest.raises(AlignvecError, match="legal"):
        generate_answers(alignment, tokenizer, QUESTIONS, [{"legal": 1.0}])
