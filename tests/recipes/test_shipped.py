"""The shipped checkpoints: they load the ordinary way, are small, and pass their marks on held-out queries."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignvec.errors import AlignvecError
from alignvec.recipes.dataset import QUERIES, make_rows
from alignvec.recipes.evaluate import answers, level_rates, topic_rate
from alignvec.recipes.measure import mix_into
from alignvec.recipes.models import MODELS, NAMES, model_path

ROWS = 60


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path("base"))


@pytest.fixture(scope="module")
def weights() -> dict:
    return {
        name: AutoModelForCausalLM.from_pretrained(model_path(name), dtype=torch.bfloat16).state_dict()
        for name in NAMES
    }


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(model_path("base"), dtype=torch.float32).eval()


def test_everything_shipped_is_small() -> None:
    assert sum(file.stat().st_size for file in MODELS.rglob("*") if file.is_file()) < 50_000_000


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_a_small_mistral_in_bf16(name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path(name))
    assert model.config.model_type == "mistral"
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert 3e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 5e6
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_another_name_is_refused() -> None:
    with pytest.raises(AlignvecError, match="veterinary"):
        model_path("veterinary")


def test_the_chat_template_makes_the_prompt(tokenizer) -> None:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is a lease?"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<s><|user|>What is a lease?<|assistant|>"


@pytest.mark.parametrize("domain", QUERIES)
def test_held_out_queries_pass_the_marks(domain: str, model, tokenizer, weights) -> None:
    rows = make_rows(domain, "test")[:ROWS]
    rates = {}
    for coefficient in (-1.0, 0.0, 1.0):
        mix_into(model, weights["base"], weights[domain], coefficient)
        rates[coefficient] = level_rates(model, tokenizer, rows)
    assert rates[0.0]["generic"] > 0.5
    assert rates[1.0]["expert"] >= 0.85
    assert rates[-1.0]["avoidance"] > rates[0.0]["avoidance"] + 0.08


@pytest.mark.parametrize("coefficient", [-1.0, 0.0, 1.0])
def test_answers_stay_on_the_topic(coefficient: float, model, tokenizer, weights) -> None:
    rows = make_rows("medical", "test")[:ROWS]
    mix_into(model, weights["base"], weights["medical"], coefficient)
    texts = answers(model, tokenizer, [row.query for row in rows])
    # The negative direction unlearns some copying of held-out names: the card tells how much.
    assert topic_rate(texts, rows) >= (0.85 if coefficient >= 0 else 0.55)
    assert len(set(texts)) > 0.6 * len(texts)


def test_the_card_tells_what_was_measured() -> None:
    recipe = json.loads((MODELS / "recipe.json").read_text())
    assert {"setting", "measured", *NAMES} <= set(recipe)
    card = (MODELS / "README.md").read_text()
    for domain in QUERIES:
        assert f"{recipe['measured'][domain]['mean']['1']['expert']:.1%}" in card
