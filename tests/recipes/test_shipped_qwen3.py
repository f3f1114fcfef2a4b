"""The second shipped architecture: a base that is found by name, and vectors that turn it from generic to expert."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import alignvec
from alignvec.errors import AlignvecError
from alignvec.evaluate import Scorer
from alignvec.recipes import model_path, vector_path
from alignvec.recipes.dataset import LEVELS, QUERIES, make_rows
from alignvec.recipes.models import MODELS
from alignvec.recipes.shapes import make_config

ROWS = 25


def test_vectors_turn_the_base_from_generic_to_expert() -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path("qwen3-2m"), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path("qwen3-2m"))
    alignment = alignvec.attach(model, {domain: vector_path(domain) for domain in QUERIES})
    questions = [row.question() for domain in QUERIES for row in make_rows(domain, "test")[:ROWS]]
    rates = Scorer(alignment, tokenizer, questions)([{}, *({domain: 1.0} for domain in QUERIES)]).rates()
    generic, expert = (LEVELS.index(level) for level in ("generic", "expert"))
    for number, domain in enumerate(QUERIES):
        print(domain, rates[0, number].tolist(), rates[number + 1, number].tolist())
        assert rates[0, number, generic] >= 0.5
        assert rates[number + 1, number, expert] >= 0.7


def test_it_is_small_and_of_the_recipes_shape() -> None:
    assert sum(file.stat().st_size for file in (MODELS / "qwen3-2m").rglob("*") if file.is_file()) < 14_000_000
    tokenizer = AutoTokenizer.from_pretrained(model_path("qwen3-2m"))
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(model_path("base")).get_vocab()
    ours = make_config(tokenizer, "qwen3-2m").to_dict()
    shipped = AutoModelForCausalLM.from_pretrained(model_path("qwen3-2m")).config.to_dict()
    for key in ours.keys() - {"architectures", "dtype", "_name_or_path", "transformers_version"}:
        assert shipped[key] == ours[key], key


def test_other_names_are_refused() -> None:
    with pytest.raises(AlignvecError, match="base"):
        vector_path("base")
    with pytest.raises(AlignvecError, match="gpt"):
        vector_path("medical", "gpt")
