"""Baselines on the shipped models and very few questions: where they have to agree with what they are baselines of."""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import alignvec
from alignvec import Alignment, AlignvecError
from alignvec.evaluate import Question
from alignvec.evaluate.scorer import Scorer
from alignvec.recipes import model_path
from alignvec.recipes.dataset import LEVELS, make_row, split_personas, split_topics
from bench.paper.baselines import mixing, prompting, steering


def questions(domain: str, count: int, held_out: bool) -> list[Question]:
    """Straight from the tables: making all rows of a split takes seconds."""
    topics, personas = split_topics(domain)[held_out], split_personas()[held_out]
    rows = [
        make_row(topic, next(iter(topic.facts)), personas[i % len(personas)], "", random.Random(i))
        for i, topic in enumerate(topics[:count])
    ]
    return [Question(domain, row.query, {level: getattr(row, level) for level in LEVELS}) for row in rows]


@pytest.fixture(scope="module")
def shipped() -> Iterator[SimpleNamespace]:
    """Base with two vectors attached, and few questions of two domains; training ones for what has to be learnt."""
    plain, model = (AutoModelForCausalLM.from_pretrained(model_path("base"), dtype=torch.float32) for _ in range(2))
    vectors = {d: alignvec.extract(model_path("base"), model_path(d), dtype="float32") for d in ("medical", "legal")}
    alignment = alignvec.attach(model.eval(), vectors)
    yield SimpleNamespace(
        model=plain.eval(),
        alignment=alignment,
        tokenizer=AutoTokenizer.from_pretrained(model_path("base")),
        asked=[q for domain in vectors for q in questions(domain, 2, True)],
        known=[q for domain in vectors for q in questions(domain, 3, False)],
    )
    alignment.detach()


def scorer(s: SimpleNamespace, model: Alignment | None = None) -> Scorer:
    return Scorer(model or s.model, s.tokenizer, s.asked)


def test_mixing_ends_in_the_models_it_mixes(shipped: SimpleNamespace) -> None:
    ends = [{}, {"medical": 1.0}, {"legal": 1.0}]
    found = mixing.mixed(scorer(shipped, shipped.alignment), [*ends, {"medical": 0.5, "legal": -0.25}])
    expected = scorer(shipped, shipped.alignment)(ends)
    torch.testing.assert_close(found.total[:3], expected.total, rtol=1e-4, atol=1e-3)
    assert (found.total[1] - found.total[0]).abs().max() > 1
    assert shipped.alignment.coefficients == {"medical": 0.0, "legal": 0.0}
    made = mixing.rates(
        shipped.alignment, shipped.tokenizer, shipped.asked[:1], [{"medical": c / 10} for c in range(21)]
    )
    assert torch.tensor(made["rates"]).shape == (21, 1, 3)
    assert made["forwards_per_setting"] == pytest.approx(3 / 21)
    with pytest.raises(AlignvecError, match="financial"):
        mixing.policy_weights(("medical",), [{"financial": 1.0}])


def test_mixing_is_the_product_of_powers(shipped: SimpleNamespace) -> None:
    """One question, token by token, from the models' own distributions."""
    question, mix = shipped.asked[0], {"medical": 1.5, "legal": -0.5}
    prompt = shipped.tokenizer.apply_chat_template(
        [{"role": "user", "content": question.query}], add_generation_prompt=True, tokenize=False
    )
    before = shipped.tokenizer(prompt)["input_ids"]
    after = [*shipped.tokenizer(question.responses["expert"])["input_ids"], shipped.tokenizer.eos_token_id]
    ids, logs = torch.tensor([before + after]), []
    for policy in ({}, {"medical": 1.0}, {"legal": 1.0}):
        with torch.no_grad(), shipped.alignment.using(policy):
            logs.append(shipped.alignment.model(ids).logits[0, len(before) - 1 : -1].double().log_softmax(-1))
    product = (logs[0].exp() ** 0.0) * (logs[1].exp() ** 1.5) * (logs[2].exp() ** -0.5)  # 1 - 1.5 + 0.5 of the base
    chosen = (product / product.sum(-1, keepdim=True)).log()[torch.arange(len(after)), after]
    only = Scorer(shipped.alignment, shipped.tokenizer, [question])
    found = mixing.mixed(only, [mix]).total[0, 0, LEVELS.index("expert")]
    assert float(found) == pytest.approx(float(chosen.sum()), abs=1e-2)


def test_steering_turns_the_rows_apart(shipped: SimpleNamespace) -> None:
    found = steering.directions(shipped.model, shipped.tokenizer, shipped.known)
    layers = shipped.model.config.num_hidden_layers
    assert {name: tuple(d.shape) for name, d in found.items()} == dict.fromkeys(
        ("medical", "legal"), (layers, shipped.model.config.hidden_size)
    )
    one, plain = scorer(shipped), scorer(shipped)().total
    settings = [{}, {"medical": 0.0}, {"medical": 1.0}, {"medical": -0.5, "legal": 2.0}]
    together = steering.steered(one, found, 2, settings, rows=4).total
    torch.testing.assert_close(together[:1], plain, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(together[1:2], plain, rtol=1e-5, atol=1e-3)
    assert (together[2] - together[0]).abs().max() > 1
    apart = torch.cat([steering.steered(one, found, 2, [setting]).total for setting in settings])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(scorer(shipped)().total, plain)  # no hook is left
    layer = steering.choose_layer(shipped.model, shipped.tokenizer, shipped.known[:1], {"medical": found["medical"]})
    assert 0 <= layer < layers
    with pytest.raises(AlignvecError, match="financial"):
        steering.steered(one, found, 0, [{"financial": 1.0}])


def test_directions_are_differences_of_means(shipped: SimpleNamespace) -> None:
    question = shipped.known[0]
    (found,) = steering.directions(shipped.model, shipped.tokenizer, [question]).values()
    means = []
    for level in ("expert", "avoidance"):
        text = shipped.tokenizer.apply_chat_template(
            [{"role": "user", "content": question.query}], add_generation_prompt=True, tokenize=False
        )
        before = shipped.tokenizer(text)["input_ids"]
        ids = torch.tensor([before + shipped.tokenizer(question.responses[level])["input_ids"]])
        with torch.no_grad():
            states = shipped.model(ids, output_hidden_states=True).hidden_states
        # The end of text is predicted at the response's last token.
        means.append(torch.stack([state[0, len(before) - 1 :].mean(0) for state in states[1:-1]]))
    torch.testing.assert_close(found[:-1], means[0] - means[1], rtol=1e-3, atol=1e-4)


def test_prompting_counts_its_tokens(shipped: SimpleNamespace) -> None:
    settings = [{}, {"medical": "expert"}, {"medical": "expert", "legal": "avoidance"}]
    made = prompting.rates(shipped.model, shipped.tokenizer, shipped.asked, settings)
    said = prompting.INSTRUCTIONS["expert"].format(domain="medical") + "\n\n"
    tokens = len(shipped.tokenizer(said)["input_ids"])
    assert made["extra_tokens"][0] == [0, 0]
    assert made["extra_tokens"][1] == pytest.approx([tokens, tokens], abs=1.5)
    assert made["extra_tokens"][2][0] > made["extra_tokens"][1][0]
    assert torch.tensor(made["rates"]).sum(-1).allclose(torch.ones(3, 2))
    assert made["rates"][0] == scorer(shipped)().rates()[0].tolist()


def test_examples_are_turns_at_the_level_wanted(shipped: SimpleNamespace) -> None:
    write = prompting.writer(shipped.tokenizer, shipped.known, 1, None)
    text = write(shipped.asked[0], {"medical": "generic"})
    example = shipped.known[0]
    assert text == (
        f"<s><|user|>{example.query}<|assistant|>{example.responses['generic']}</s>"
        f"<|user|>{shipped.asked[0].query}<|assistant|>"
    )
    both = prompting.writer(shipped.tokenizer, shipped.known, 1)(shipped.asked[0], {"medical": "generic"})
    assert both.startswith(
        f"<s><|user|>{prompting.INSTRUCTIONS['generic'].format(domain='medical')}\n\n{example.query}"
    )
    assert write(shipped.asked[-1], {"medical": "generic"}) == write(shipped.asked[-1], {})
    with pytest.raises(AlignvecError, match="examples"):
        prompting.writer(shipped.tokenizer, shipped.known, 9)(shipped.asked[0], {"medical": "expert"})
