"""Level rates against a plain computation, and the topic rate."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import MistralForCausalLM

from alignvec.errors import AlignvecError
from alignvec.recipes.dataset import LEVELS, make_rows
from alignvec.recipes.evaluate import answers, level_rates, level_scores, rates_of, topic_rate
from alignvec.recipes.pretrain import make_config, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(seed=3)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(3)
    return MistralForCausalLM(make_config(tokenizer)).eval()


def test_scores_equal_a_plain_computation(model, tokenizer) -> None:
    rows = make_rows("legal", "test")[:3]
    mean, total = level_scores(model, tokenizer, rows, batch_size=4)
    for row, means, totals in zip(rows, mean, total, strict=True):
        for column, level in enumerate(LEVELS):
            user = [{"role": "user", "content": row.query}]
            chat = [*user, {"role": "assistant", "content": getattr(row, level)}]
            ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)["input_ids"]
            begin = len(tokenizer.apply_chat_template(user, add_generation_prompt=True)["input_ids"])
            with torch.no_grad():
                losses = cross_entropy(model(ids).logits[0, begin - 1 : -1], ids[0, begin:], reduction="none")
            torch.testing.assert_close(totals[column], -losses.sum(), rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(means[column], -losses.mean(), rtol=1e-4, atol=1e-4)


def test_scores_do_not_depend_on_the_batch(model, tokenizer) -> None:
    rows = make_rows("medical", "test")[:5]
    for one, other in zip(
        level_scores(model, tokenizer, rows, batch_size=1),
        level_scores(model, tokenizer, rows, batch_size=64),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_rates_count_the_likeliest_level() -> None:
    scores = torch.tensor([[-1.0, -2.0, -3.0], [-3.0, -1.0, -2.0], [-3.0, -2.0, -1.0], [-2.0, -1.0, -3.0]])
    assert rates_of(scores) == {"avoidance": 0.25, "generic": 0.5, "expert": 0.25}


def test_topic_rate_wants_whole_words_in_any_case() -> None:
    rows = [row for row in make_rows("medical", "test") if row.topic == "lithium"][:3]
    assert topic_rate(["Lithium helps.", "take LITHIUM", "lithiums"], rows) == pytest.approx(2 / 3)


def test_bad_input_is_refused(model, tokenizer) -> None:
    with pytest.raises(AlignvecError, match="no rows"):
        level_scores(model, tokenizer, [])
    with pytest.raises(AlignvecError, match="score"):
        level_rates(model, tokenizer, make_rows("legal", "test")[:1], score="median")
    with pytest.raises(AlignvecError, match="one text a row"):
        topic_rate(["one"], [])


def test_answers_come_back_one_a_query(model, tokenizer) -> None:
    assert len(answers(model, tokenizer, ["What is a lease?", "Why?"], max_new_tokens=3)) == 2
