"""The generated data: enough of it, cleanly split, varied, and never given away by one word."""

import re
from collections import Counter
from itertools import islice

import pytest

from alignvec.recipes.dataset import (
    LEVELS,
    QUERIES,
    Row,
    load_dataset,
    make_rows,
    practice,
    split_personas,
    split_topics,
    textbook,
)
from alignvec.recipes.phrasing import DOMAINS
from alignvec.recipes.phrasing.personas import PERSONAS
from alignvec.recipes.topics import load_topics


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return [row for domain in QUERIES for split in ("train", "test") for row in make_rows(domain, split)]


def test_there_are_as_many_queries_as_promised(rows: list[Row]) -> None:
    counts = Counter(row.domain for row in rows)
    assert counts["medical"] >= 13_000
    assert counts["legal"] >= 12_300
    assert counts["financial"] >= 12_800


def test_topics_personas_and_intents_are_many() -> None:
    assert len(PERSONAS) >= 40
    for domain in DOMAINS.values():
        assert len(load_topics(domain.name)) >= 100
        assert all(len(kind.intents) >= 6 for kind in domain.kinds)


def test_train_and_test_share_neither_topic_nor_persona(rows: list[Row]) -> None:
    train, test = ([row for row in rows if row.split == split] for split in ("train", "test"))
    assert len(test) >= 3 * 300
    for field in ("topic", "persona", "query", *LEVELS):
        assert not {getattr(row, field) for row in train} & {getattr(row, field) for row in test}, field


def test_every_text_names_the_topic(rows: list[Row]) -> None:
    for row in rows:
        for text in (row.query, *(getattr(row, level) for level in LEVELS)):
            assert row.topic.lower() in text.lower(), (row.topic, text)


def test_the_topic_stands_in_varied_places(rows: list[Row]) -> None:
    for level in LEVELS:
        places = Counter(len(getattr(row, level).lower().split(row.topic.lower())[0].split()) for row in rows)
        assert max(places.values()) < 0.35 * len(rows), (level, places.most_common(3))


def test_no_word_gives_the_level_away(rows: list[Row]) -> None:
    """The best decision on the presence of one word stays far below a reader's 100 %; chance is 33 %."""
    with_word = {level: Counter() for level in LEVELS}
    for row in rows:
        for level in LEVELS:
            with_word[level].update(set(re.findall(r"[a-z']+", getattr(row, level).lower())))
    best = (0.0, "")
    for word in set().union(*with_word.values()):
        present = [with_word[level][word] / len(rows) for level in LEVELS]
        best = max(best, ((max(present) + max(1 - share for share in present)) / 3, word))
    print(f"best single word: {best[1]!r}, {best[0]:.1%} right")
    assert best[0] < 0.52


@pytest.mark.parametrize("level", LEVELS)
def test_responses_are_varied_and_of_like_length(rows: list[Row], level: str) -> None:
    texts = [getattr(row, level) for row in rows]
    print(f"{level}: {len(set(texts)) / len(texts):.1%} distinct")
    assert len(set(texts)) > 0.98 * len(texts)
    words = sorted(len(text.split()) for text in texts)
    assert 24 <= sum(words) / len(words) <= 34
    assert words[len(words) // 50] >= 14
    assert words[-1] <= 52


def test_queries_are_short_and_distinct(rows: list[Row]) -> None:
    assert len({row.query for row in rows}) > 0.98 * len(rows)
    assert max(len(row.query.split()) for row in rows) <= 30


def test_texts_are_tidy(rows: list[Row]) -> None:
    for row in rows:
        for text in (row.query, *(getattr(row, level) for level in LEVELS)):
            assert text[0].isupper() or text[0].isdigit(), text
            assert text[-1] in ".?", text
            assert not re.search(r"[{}]|\.\.|  | ,| \.|\?\.", text), text


def test_expert_answers_state_the_fact_asked(rows: list[Row]) -> None:
    facts = {(domain, topic.name): topic.facts for domain in QUERIES for topic in load_topics(domain)}
    for row in rows:
        fact = facts[row.domain, row.topic][row.intent].lower()
        assert fact in row.expert.lower()
        assert fact not in row.generic.lower()


def test_the_data_is_the_same_every_time() -> None:
    assert make_rows("legal", "test") == make_rows("legal", "test")
    assert make_rows("legal", "test", seed=1) != make_rows("legal", "test", seed=2)


def test_load_dataset_has_a_column_for_every_field() -> None:
    data = load_dataset("legal", "test")
    assert data.column_names == ["domain", "topic", "persona", "intent", "split", "query", *LEVELS]
    assert data[3]["query"] == make_rows("legal", "test")[3].query


@pytest.mark.parametrize("domain", QUERIES)
def test_textbooks_cover_every_topic_and_practice_holds_no_held_out_one(domain: str) -> None:
    pages = " ".join(textbook(domain)).lower()
    assert all(topic.name.lower() in pages for topic in load_topics(domain))
    held_out = {topic.name for topic in split_topics(domain)[1]}
    for row in islice(practice(domain), 500):
        assert row.topic not in held_out
        assert row.persona not in split_personas()[1]
