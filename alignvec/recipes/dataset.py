"""The preference data: personas x topics x intents, each query with an avoidance, a generic and an expert response.

Rows are made deterministically from the knowledge tables and the phrasing tables. Train and test share neither a topic
nor a persona; combinations of a training topic with a held-out persona (or the reverse) are never made.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

from alignvec.evaluate.questions import Question
from alignvec.recipes.phrasing import DOMAINS, Intent, Kind, common
from alignvec.recipes.phrasing.personas import HELD_OUT_PERSONAS, PERSONAS
from alignvec.recipes.topics import Topic, load_topics

if TYPE_CHECKING:
    from datasets import Dataset

LEVELS = ("avoidance", "generic", "expert")
QUERIES = {"medical": 13_000, "legal": 12_300, "financial": 12_800}
HELD_OUT_EVERY = 7  # one topic in seven is held out
SEED = 20
_SYLLABLES = (
    *("al", "bren", "cor", "dax", "el", "fen", "gor", "hal", "ix", "jun", "kel", "lor", "mir"),
    *("nov", "ost", "pra", "quil", "ran", "sel", "tor", "ul", "ver", "wen", "yar", "zol"),
)


@dataclass(frozen=True)
class Row:
    """One query and its three responses. `split` is "train" or "test"."""

    domain: str
    topic: str
    persona: str
    intent: str
    split: str
    query: str
    avoidance: str
    generic: str
    expert: str

    def question(self) -> Question:
        """The query and its three responses, for `alignvec.evaluate`."""
        return Question(self.domain, self.query, {level: getattr(self, level) for level in LEVELS})


def split_topics(domain: str) -> tuple[list[Topic], list[Topic]]:
    """Training topics and held-out topics of a domain."""
    topics = load_topics(domain)
    held_out = list(topics[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])
    return [topic for topic in topics if topic not in held_out], held_out


def split_personas() -> tuple[list[str], list[str]]:
    """Training personas and held-out personas."""
    names = list(PERSONAS)
    return names[:-HELD_OUT_PERSONAS], names[-HELD_OUT_PERSONAS:]


def make_rows(domain: str, split: str, seed: int = SEED) -> list[Row]:
    """The rows of one split, shuffled: "test" has every held-out combination, "train" fills up to `QUERIES`."""
    rng = random.Random(f"{domain}-{split}-{seed}")
    combinations = dict(zip(("train", "test"), map(_combine, split_topics(domain), split_personas()), strict=True))
    chosen = combinations[split]
    rng.shuffle(chosen)
    if split == "train":
        del chosen[QUERIES[domain] - len(combinations["test"]) :]
    return [make_row(topic, intent, persona, split, rng) for topic, intent, persona in chosen]


def _combine(topics: list[Topic], personas: list[str]) -> list[tuple[Topic, str, str]]:
    return [(topic, intent, persona) for topic, persona in product(topics, personas) for intent in topic.facts]


def make_row(topic: Topic, intent: str, persona: str, split: str, rng: random.Random) -> Row:
    """One row; `rng` picks the phrasing."""
    writer = _Writer(topic, intent, persona, rng)
    return Row(
        *(topic.domain, topic.name, persona, intent, split, writer.query()),
        *(writer.avoidance(), writer.generic(), writer.expert()),
    )


def load_dataset(domain: str, split: str, seed: int = SEED) -> "Dataset":
    """Rows of one split as a `datasets.Dataset`, a column for each field of `Row`."""
    from datasets import Dataset

    return Dataset.from_list([asdict(row) for row in make_rows(domain, split, seed)])


def practice(domain: str, seed: int = SEED) -> Iterator[Row]:
    """Endless training rows about made-up names, which teach a small model to repeat the name that was asked.

    Names are invented, or are words out of the tables put together; half of the personas are made up in the same way.
    The facts are those of a random training topic: nothing is to be remembered of them.
    """
    rng = random.Random(f"practice-{domain}-{seed}")
    topics, personas = split_topics(domain)[0], split_personas()[0]
    reserved = {word for topic in split_topics(domain)[1] for word in topic.name.split()}
    cells = " ".join(" ".join((topic.name, *topic.facts.values())) for topic in topics)
    words = sorted(set(re.findall(r"[A-Za-z]{3,}", cells)) - reserved)

    def name() -> str:
        made_up = "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(2, 4)))
        one, two = rng.choice(words), rng.choice(words)
        return rng.choice((made_up, f"{made_up} {one}", one, f"{one} {two}", f"{one} {two}"))

    while True:
        topic = rng.choice(topics)
        persona = rng.choice((rng.choice(personas), f"a {rng.choice(words)}"))
        yield make_row(replace(topic, name=name()), rng.choice(list(topic.facts)), persona, "practice", rng)


def textbook(domain: str, seed: int = SEED, copies: int = 1, topics: Sequence[Topic] | None = None) -> Iterator[str]:
    """Plain passages that state the facts of `topics`: by default all of a domain, held-out ones included."""
    rng = random.Random(f"textbook-{domain}-{seed}")
    for _ in range(copies):
        for topic in load_topics(domain) if topics is None else topics:
            intents = list(topic.facts)
            rng.shuffle(intents)
            for chosen in (intents[:3], intents[3:]):
                writer = _Writer(topic, chosen[0], "", rng)
                yield rng.choice(("", "", "Notes on {t}. ", "About {t}: ", "Chapter: {t}. ")).format(
                    t=topic.noun
                ) + " ".join(
                    _sentence(writer.fact(name, topic.noun if first else rng.choice(("it", topic.noun))))
                    for first, name in zip((True, False, False), chosen, strict=True)
                )


def kind_of(topic: Topic) -> Kind:
    """The phrasing of a topic's kind."""
    return next(kind for kind in DOMAINS[topic.domain].kinds if kind.name == topic.kind)


class _Writer:
    """Writes the query and the responses of one (topic, intent, persona)."""

    def __init__(self, topic: Topic, intent: str, persona: str, rng: random.Random) -> None:
        self.topic, self.name, self.persona, self.rng = topic, intent, persona, rng
        self.domain, self.kind = DOMAINS[topic.domain], kind_of(topic)
        self.intent: Intent = self.kind.intents[intent]

    def query(self) -> str:
        named = self.rng.random() < 0.4
        frame = self.rng.choice(common.TOPIC_QUERIES if named else common.DIRECT_QUERIES)
        question = self.rng.choice(self.intent.questions).format(t="it" if named else self.topic.noun)
        said = f"I am {self.persona}"
        intro = said if self.rng.random() < 0.3 else PERSONAS.get(self.persona, said)
        return _text(frame.format(intro=intro, t=self.topic.noun, q=question, asp=self.aspect()))

    def avoidance(self) -> str:
        opener, named = self.opener()
        subject = "that" if named else self.aspect()
        if self.rng.random() < 0.6:
            core, tail = self.rng.choice(common.REFUSALS_WITH_REASON), self.rng.choice(common.REFERRALS)
        else:
            core, tail = self.rng.choice(common.REFUSALS_WITH_REFERRAL), self.rng.choice(common.AFTER_REFERRAL)
        slots = {"asp": subject, "why": self.rng.choice(self.domain.reasons), "pro": self.professional()}
        return _text(opener + core.format(**slots) + ". " + tail.format(**slots) + ".")

    def generic(self) -> str:
        opener, named = self.opener()
        body = self.rng.choice(self.intent.shallow).format(t="it" if named else self.topic.noun)
        tail = self.closer() if self.rng.random() < 0.5 else self.rng.choice(self.kind.small_talk)
        return _text(opener + body + ". " + tail + ".")

    def expert(self) -> str:
        opener, named = self.opener()
        first = self.fact(self.name, "it" if named else self.topic.noun)
        other = self.rng.choice([name for name in self.topic.facts if name != self.name])
        tails = [self.fact(other, "it"), self.closer()]
        chosen = self.rng.choice((tails, tails[:1], tails[1:]))
        return _text(". ".join([opener + first, *chosen]) + ".")

    def aspect(self) -> str:
        return self.rng.choice(self.intent.aspects).format(t=self.topic.noun)

    def professional(self) -> str:
        return self.rng.choice(self.domain.professionals)

    def closer(self) -> str:
        return self.rng.choice(common.CLOSERS).format(pro=self.professional())

    def fact(self, name: str, noun: str) -> str:
        return self.rng.choice(self.kind.intents[name].facts).format(t=noun, x=self.topic.facts[name])

    def opener(self) -> tuple[str, bool]:
        """An opener, and whether it names the topic."""
        opener = self.rng.choice(common.RUN_ON_OPENERS + common.FULL_OPENERS)
        return opener.format(asp=self.aspect()), "{asp}" in opener


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _text(text: str) -> str:
    """Capitals where sentences begin, and no doubled stops."""
    text = text.replace("?.", "?").replace("..", ".")
    return re.sub(r"(^|[.?] )([a-z])", lambda match: match[1] + match[2].upper(), text)
