"""Level rates against a plain computation, and the topic rate."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import MistralForCausalLM

from alignvec.errors import AlignvecError
from alignvec.recipes.dataset import LEVELS, make_rows
from alignvec.recipes.evaluate import answers, level_rates, topic_rate
from alignvec.recipes.pretrain import make_config, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(seed=3)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(3)
    return MistralForCausalLM(make_config(tokenizer)).eval()


def test_rates_count_the_likeliest_response(model, tokenizer) -> None:
    rows = make_rows("legal", "test")[:3]
    likeliest = []
    for row in rows:
        means = []
        for level in LEVELS:
            user = [{"role": "user", "content": row.query}]
            chat = [*user, {"role": "assistant", "content": getattr(row, level)}]
            ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)["input_ids"]
            begin = len(tokenizer.apply_chat_template(user, add_generation_prompt=True)["input_ids"])
            with torch.no_grad():
                means.append(-cross_entropy(model(ids).logits[0, begin - 1 : -1], ids[0, begin:]).item())
        likeliest.append(LEVELS[means.index(max(means))])
    expected = {level: pytest.approx(likeliest.count(level) / 3) for level in LEVELS}
    assert level_rates(model, tokenizer, rows) == expected


def test_topic_rate_wants_whole_words_in_any_case() -> None:
    rows = [row for row in make_rows("medical", "test") if row.topic == "lithium"][:3]
    assert topic_rate(["Lithium helps.", "take LITHIUM", "lithiums"], rows) == pytest.approx(2 / 3)


def test_bad_input_is_refused(model, tokenizer) -> None:
    with pytest.raises(AlignvecError, match="no questions"):
        level_rates(model, tokenizer, [])
    with pytest.raises(AlignvecError, match='"mean" or "sum"'):
        level_rates(model, tokenizer, make_rows("legal", "test")[:1], by="median")
    with pytest.raises(AlignvecError, match="one text a row"):
        topic_rate(["one"], [])


def test_answers_come_back_one_a_query(model, tokenizer) -> None:
    assert len(answers(model, tokenizer, ["What is a lease?", "Why?"], max_new_tokens=3)) == 2
