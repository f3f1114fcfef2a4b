"""The shapes that phrasing tables are written in. `{t}` is the topic, `{x}` a table cell, `{pro}` a professional."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Intent:
    """How one thing is asked about a topic and how it is answered.

    Every template reads well with the topic or with "it" in place of `{t}`.

    aspects: singular noun phrases that name what is asked ("the usual dose of {t}").
    questions: direct questions, lower case, without the question mark.
    shallow: lay answers that hold for the whole kind of topic.
    facts: statements of the table's cell `{x}`.
    """

    aspects: tuple[str, ...]
    questions: tuple[str, ...]
    shallow: tuple[str, ...]
    facts: tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """One knowledge table: its file, its intents (named as the table's columns) and its lay small talk."""

    name: str
    table: str
    intents: dict[str, Intent]
    small_talk: tuple[str, ...]


@dataclass(frozen=True)
class Domain:
    """A domain: who to send people to, why an answer would be unwise, and the kinds of topic it holds."""

    name: str
    professionals: tuple[str, ...]
    reasons: tuple[str, ...]
    kinds: tuple[Kind, ...]
