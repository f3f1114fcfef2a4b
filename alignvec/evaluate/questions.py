"""Questions with one stored response a level: what preference rates are measured on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from alignvec.errors import AlignvecError
from alignvec.folders import replaced


@dataclass(frozen=True)
class Question:
    """A query of a domain, and a response to it at each level (`{"avoidance": ..., "generic": ..., "expert": ...}`)."""

    domain: str
    query: str
    responses: dict[str, str]


def load_questions(path: str | Path) -> list[Question]:
    """Read questions from JSON lines: `{"domain": "medical", "query": "...", "responses": {"avoidance": "...", ...}}`.

    Raises AlignvecError for a missing or empty file, a line that is no such object, an empty text, or questions with
    different levels; the message names the line.
    """
    questions = [_question(place, line) for place, line in numbered_lines(path, "questions")]
    levels_of(questions)
    return questions


def save_questions(path: str | Path, questions: Sequence[Question]) -> None:
    """Write questions as JSON lines; the file appears whole or not at all."""
    with replaced(Path(path)) as file:
        file.write_text("".join(json.dumps(asdict(q), ensure_ascii=False) + "\n" for q in questions), encoding="utf-8")


def numbered_lines(path: str | Path, what: str) -> list[tuple[str, str]]:
    """The lines of a text file that are not blank, each with its place, "FILE, line N", for messages.

    Raises AlignvecError for a file that cannot be read as ``what``.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AlignvecError(f"{Path(path)} cannot be read as {what}: {error}") from None
    return [(f"{Path(path)}, line {i}", line) for i, line in enumerate(lines, 1) if line.strip()]


def first_of_each(questions: Iterable[Question], count: int | None) -> list[Question]:
    """The first ``count`` questions of each domain, in their order; None: all of them."""
    seen: Counter[str] = Counter()
    chosen = []
    for question in questions:
        seen[question.domain] += 1
        if count is None or seen[question.domain] <= count:
            chosen.append(question)
    return chosen


def members_of(domains: Sequence[str]) -> list[Tensor]:
    """Indices of each domain's questions, from the domain of every question; domains in order of appearance."""
    return [torch.tensor([i for i, domain in enumerate(domains) if domain == name]) for name in dict.fromkeys(domains)]


def levels_of(questions: Sequence[Question]) -> tuple[str, ...]:
    """The levels of all questions, in the first one's order.

    Raises AlignvecError for no questions, fewer than two levels, or a question with other levels.
    """
    if not questions:
        raise AlignvecError("there are no questions: give at least one")
    levels = tuple(questions[0].responses)
    if len(levels) < 2:
        raise AlignvecError(f"{questions[0].query!r} has {len(levels)} responses: a question needs two levels at least")
    for question in questions:
        if set(question.responses) != set(levels):
            found = ", ".join(question.responses)
            expected = ", ".join(levels)
            raise AlignvecError(f"{question.query!r} has levels {found}, the first question has {expected}")
    return levels


def domains_of(questions: Iterable[Question]) -> tuple[str, ...]:
    """The domains that occur, in order of appearance."""
    return tuple(dict.fromkeys(question.domain for question in questions))


def _question(place: str, line: str) -> Question:
    try:
        entry = json.loads(line)
        domain, query, responses = entry["domain"], entry["query"], entry["responses"]
        texts = [domain, query, *responses, *responses.values()]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise AlignvecError(f"{place}: expected an object with domain, query and responses by level") from None
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise AlignvecError(f"{place}: domain, query, levels and responses must be texts that are not empty")
    return Question(domain, query, dict(responses))
