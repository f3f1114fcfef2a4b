"""What the experiments run on: a base, its vectors, and questions to measure and to learn from."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import alignvec
from alignvec import Alignment, AlignmentVector, AlignvecError
from alignvec.evaluate import Question, Scorer, Scores, load_questions
from alignvec.loading import load_model, load_tokenizer
from alignvec.recipes.models import model_path, vector_path

SHIPPED = ("mistral-4m", "qwen3-2m")
COEFFICIENTS = tuple(i / 10 for i in range(-10, 11))  # the paper's 21

Mix = Mapping[str, float]
Progress = Callable[[float], None]


@dataclass
class Setting:
    """``base``: a folder or hub id. ``vectors``: one a domain, by the domain's name. ``test`` and ``train``: questions.

    ``safety``: the vector to a safety-tuned descendant of the same base, and questions with levels refuse and comply.
    ``scale``: multiplies every number of questions.
    """

    name: str
    base: str
    vectors: dict[str, AlignmentVector]
    test: list[Question]
    train: list[Question]
    safety: tuple[AlignmentVector, list[Question]] | None = None
    device: str = "cpu"
    dtype: str = "float32"
    scale: float = 1.0
    results: Path = Path("results")
    track: Callable[[str], Progress] = field(default=lambda _: lambda _: None)

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self.vectors)

    @property
    def levels(self) -> tuple[str, ...]:
        """From the least to the most forthcoming."""
        return tuple(self.test[0].responses)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.base)

    def few(self, count: int, domains: Sequence[str] | None = None, train: bool = False) -> list[Question]:
        """The first ``count`` test (or training) questions of every domain, scaled."""
        count = max(1, round(count * self.scale))
        source = self.train if train else self.test
        return [
            question
            for domain in domains or self.domains
            for question in [each for each in source if each.domain == domain][:count]
        ]

    def model(self, dtype: str | None = None) -> Any:
        """The base, anew."""
        found = getattr(torch, dtype or self.dtype)
        return load_model(self.base, dtype=found).to(self.device).eval()

    def attach(
        self, vectors: Mapping[str, AlignmentVector] | None = None, dtype: str | None = None, model: Any = None
    ) -> Alignment:
        """Vectors (by default the domains') on the base anew, or on ``model``, a descendant of it."""
        chosen = dict(self.vectors if vectors is None else vectors)
        return alignvec.attach(model or self.model(dtype), chosen, transfer=model is not None)

    def score(
        self, alignment: Any, questions: Sequence[Question], mixes: Sequence[Mix], what: str, **options: Any
    ) -> Scores:
        """Scores of questions under mixes, with a progress bar that says ``what``."""
        return Scorer(alignment, self.tokenizer, questions, **options)(mixes, progress=self.track(what))


def open_setting(name: str, *, device: str = "cpu", scale: float = 1.0) -> Setting:
    """A shipped setting by its name, or one from a TOML file.

    The file has ``base``, ``questions`` and a table ``vectors`` (domain = folder); ``train`` (questions, for steering,
    prompting and joint training), ``dtype``, ``safety.vector`` and ``safety.questions`` are optional. Paths are taken
    from the file's folder.

    Raises AlignvecError for an unknown name, a file that cannot be read, or questions of a domain without a vector.
    """
    if name in SHIPPED:
        return _shipped(name, device, scale)
    file = Path(name)
    if file.suffix != ".toml":
        raise AlignvecError(f"--setting {name!r} is neither a TOML file nor one of {', '.join(SHIPPED)}")
    try:
        entries = tomllib.loads(file.read_text(encoding="utf-8"))
        base, questions, folders = str(entries["base"]), entries["questions"], dict(entries["vectors"])
        safety = entries.get("safety")
        told = (
            (alignvec.load(file.parent / safety["vector"]), load_questions(file.parent / safety["questions"]))
            if (safety)
            else None
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AlignvecError(f"{file} is no setting with base, questions and vectors: {error}") from None
    if (file.parent / base).is_dir():
        base = str(file.parent / base)
    test = load_questions(file.parent / questions)
    train = load_questions(file.parent / entries["train"]) if "train" in entries else []
    vectors = {domain: alignvec.load(file.parent / folder) for domain, folder in folders.items()}
    if missing := {question.domain for question in test + train} - set(vectors):
        raise AlignvecError(f"{file} has questions of {', '.join(sorted(missing))}, but no vector of that name")
    return Setting(file.stem, base, vectors, test, train, told, device, entries.get("dtype", "bfloat16"), scale)


def _shipped(name: str, device: str, scale: float) -> Setting:
    from alignvec.recipes.dataset import QUERIES, make_rows
    from alignvec.recipes.safety import safety_questions

    test = [row.question() for domain in QUERIES for row in make_rows(domain, "test")[:400]]
    train = [row.question() for domain in QUERIES for row in make_rows(domain, "train")[:2000]]
    safety = None
    if name == "mistral-4m":
        base = str(model_path("base"))
        vectors = {domain: alignvec.extract(base, model_path(domain)) for domain in QUERIES}
        safety = alignvec.load(vector_path("safety")), safety_questions("test")
    else:
        base = str(model_path(name))
        vectors = {domain: alignvec.load(vector_path(domain, name)).with_base(base) for domain in QUERIES}
    return Setting(name, base, vectors, test, train, safety, device, "float32", scale)
