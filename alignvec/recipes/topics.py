"""Topics and their facts, read from the knowledge tables."""

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from alignvec.recipes.phrasing import DOMAINS

KNOWLEDGE = Path(__file__).parent / "knowledge"

_MASS = ("factoring", "paper", "bullion", "stock")  # instruments without an article; "stock warrant" does not end so
_DEFINITE_MEASURES = ("ratio", "multiple", "rate", "cycle", "period", "point", "index", "coefficient", "yield")
_COUNTED = {  # doctrines and conditions that take an article
    *("floating charge", "force majeure clause", "non-compete covenant", "exclusion clause", "Miranda warning"),
    *("class action", "easement", "constructive trust", "implied term", "care order", "trade secret"),
    *("charitable trust", "liquidated damages clause", "prenuptial agreement", "lease", "interim injunction"),
    *("hearsay exception", "default judgment", "restrictive covenant", "mortgage", "freezing injunction"),
    *("express trust", "unfair prejudice petition", "resulting trust", "derivative claim", "confession", "offer"),
    *("criminal attempt", "joint tenancy", "partnership", "summary judgment"),
    *("abdominal aortic aneurysm", "ectopic pregnancy", "pneumothorax", "peptic ulcer", "pulmonary embolism"),
}


@dataclass(frozen=True)
class Topic:
    """One row of a knowledge table: its name as written there, and one fact an intent."""

    domain: str
    kind: str
    name: str
    facts: dict[str, str]

    @property
    def noun(self) -> str:
        """The name as it stands in a sentence, with the article it needs."""
        article = ""
        if self.kind == "instrument" and not self.name.endswith(_MASS):
            article = "a"
        elif (self.kind == "measure" and self.name.endswith(_DEFINITE_MEASURES)) or self.name == "nemo dat rule":
            article = "the"
        elif self.name in _COUNTED:
            article = "a"
        if article == "a" and self.name[0].lower() in "aeiou" and not self.name.startswith("eu"):
            article = "an"
        return f"{article} {self.name}".strip()


@cache
def load_topics(domain: str) -> tuple[Topic, ...]:
    """All topics of a domain, in the order of its tables."""
    topics = []
    for kind in DOMAINS[domain].kinds:
        with open(KNOWLEDGE / kind.table, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                name = row.pop("topic")
                topics.append(Topic(domain, kind.name, name, {intent: row[intent] for intent in kind.intents}))
    return tuple(topics)
