"""Preference pairs: read from JSON lines, or made from questions and the levels preferred."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import count as counting
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignvec.errors import AlignvecError
from alignvec.evaluate.questions import Question, levels_of, numbered_lines

if TYPE_CHECKING:
    from datasets import Dataset

Preference = tuple[str, str]  # (chosen level, rejected level)
Preferences = Sequence[Preference] | Mapping[str, str | Sequence[Preference]]
COLUMNS = ("prompt", "chosen", "rejected")


def load_pairs(path: str | Path) -> Dataset:
    """Read preference pairs, `{"prompt": ..., "chosen": ..., "rejected": ...}` a line.

    The three are texts, or conversations (`[{"role": "user", "content": "..."}]`), which the tokenizer's chat template
    formats; they are TRL's two formats, one of them in all of a file.

    Raises AlignvecError, naming the line, for anything else, and for a pair whose chosen and rejected are the same.
    """
    file = Path(path)
    pairs = [_pair(place, line) for place, line in numbered_lines(file, "preference pairs")]
    if not pairs:
        raise AlignvecError(f"{file} holds no preference pairs: give at least one line")
    if len({is_conversation(pair) for pair in pairs}) > 1:
        raise AlignvecError(f"{file} holds texts and conversations: write all of its pairs in one of the two ways")
    return _dataset(pairs)


def pairs_from_questions(questions: Sequence[Question], preferences: Preferences, count: int | None = None) -> Dataset:
    """Preference pairs, as conversations, from the stored responses of questions.

    Args:
        questions: taken in their order, over and over.
        preferences: (chosen level, rejected level), which a domain's questions take in turn. One sequence for all
            domains, or for each domain its own, or just the level wanted there, which is then preferred to each of the
            others: `{"medical": "expert", "legal": "avoidance"}` is a joint target.
        count: how many pairs; default: each question with each of its preferences.

    Raises:
        AlignvecError: no questions, a domain without preferences, or a level that the questions do not have.
    """
    wanted = _by_domain(questions, preferences)
    pairs = (
        {
            "prompt": [{"role": "user", "content": question.query}],
            "chosen": [{"role": "assistant", "content": question.responses[chosen]}],
            "rejected": [{"role": "assistant", "content": question.responses[rejected]}],
        }
        for question, (chosen, rejected) in _in_turn(questions, wanted, cycle=count is not None)
    )
    return _dataset(list(islice(pairs, count)))


def is_conversation(pair: Mapping[str, Any]) -> bool:
    """Whether a pair is in TRL's conversational format."""
    return isinstance(pair["prompt"], list)


def _in_turn(
    questions: Sequence[Question], wanted: Mapping[str, Sequence[Preference]], *, cycle: bool
) -> Iterator[tuple[Question, Preference]]:
    for turn in counting() if cycle else range(max(len(own) for own in wanted.values())):
        seen: Counter[str] = Counter()
        for question in questions:
            own = wanted[question.domain]
            if cycle or turn < len(own):
                yield question, own[(seen[question.domain] + turn) % len(own)]
            seen[question.domain] += 1


def _by_domain(questions: Sequence[Question], preferences: Preferences) -> dict[str, Sequence[Preference]]:
    levels = levels_of(questions)
    wanted: dict[str, Sequence[Preference]] = {}
    for domain in dict.fromkeys(question.domain for question in questions):
        own = preferences.get(domain) if isinstance(preferences, Mapping) else preferences
        if not own:
            raise AlignvecError(f"domain {domain} has no preferences: say which level it prefers, or leave it out")
        pairs = [(own, level) for level in levels if level != own] if isinstance(own, str) else list(own)
        for level in [level for pair in pairs for level in pair]:
            if level not in levels:
                raise AlignvecError(f"domain {domain} has no level {level!r}: choose from {', '.join(levels)}")
        if same := next((one for one, other in pairs if one == other), None):
            raise AlignvecError(f"domain {domain} prefers {same} to itself: name two levels")
        wanted[domain] = pairs
    return wanted


def _pair(place: str, line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
        pair = {column: entry[column] for column in COLUMNS}
    except (ValueError, KeyError, TypeError):
        raise AlignvecError(f"{place}: expected an object with prompt, chosen and rejected") from None
    if not (all(map(_is_text, pair.values())) or all(map(_is_messages, pair.values()))):
        raise AlignvecError(
            f"{place}: prompt, chosen and rejected must be texts, or lists of messages with role and content"
        )
    if pair["chosen"] == pair["rejected"]:
        raise AlignvecError(f"{place}: chosen and rejected are the same")
    return pair


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_messages(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and _is_text(m.get("role")) and _is_text(m.get("content")) for m in value)
    )


def _dataset(pairs: list[dict[str, Any]]) -> Dataset:
    from alignvec.train.packages import require

    require("datasets")
    from datasets import Dataset

    return Dataset.from_list(pairs)
