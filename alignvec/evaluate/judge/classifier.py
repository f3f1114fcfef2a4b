"""A classifier of texts by level, trained in seconds on the stored responses of questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from alignvec.errors import AlignvecError
from alignvec.evaluate.questions import Question, levels_of

if TYPE_CHECKING:
    import numpy

SHIPPED = 700  # training rows a domain: more of them do not make it better


class ClassifierJudge:
    """Logistic regression on the TF-IDF of a text's words and pairs of words; queries are not looked at.

    It knows the levels by the words of the responses that it was trained on: it judges texts like those, and is no
    judge of texts in another style. Training is deterministic and takes seconds, so nothing is stored.
    """

    def __init__(self, levels: tuple[str, ...], pipeline: Any) -> None:
        self.levels = levels
        self._pipeline = pipeline

    @classmethod
    def train(cls, questions: Sequence[Question]) -> ClassifierJudge:
        """Train on every response of these questions, which should not be those that are judged later.

        Raises:
            AlignvecError: no questions, different levels, responses without words, or scikit-learn is not installed.
        """
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
            from sklearn.linear_model import LogisticRegression
            from sklearn.pipeline import make_pipeline
        except ImportError:
            raise AlignvecError(
                'the classifier judge needs scikit-learn; install it with pip install "alignvec[judge]"'
            ) from None
        levels = levels_of(questions)
        texts = [question.responses[level] for question in questions for level in levels]
        pipeline = make_pipeline(
            TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10, max_iter=300)
        )
        try:
            pipeline.fit(texts, [column for _ in questions for column in range(len(levels))])
        except ValueError as error:
            raise AlignvecError(f"the classifier judge cannot be trained on these responses: {error}") from None
        return cls(levels, pipeline)

    @classmethod
    def shipped(cls) -> ClassifierJudge:
        """Trained on the training split of the shipped medical, legal and financial questions (`alignvec.recipes`)."""
        from alignvec.recipes.dataset import QUERIES, make_rows

        return cls.train([row.question() for domain in QUERIES for row in make_rows(domain, "train")[:SHIPPED]])

    def judge(self, queries: Sequence[str], texts: Sequence[str]) -> list[str | None]:
        """The most probable level of each text; None for one without a word.

        Raises:
            AlignvecError: not one query a text.
        """
        check_lengths(queries, texts)
        if not texts:
            return []
        chosen = self.probabilities(texts).argmax(1)
        return [self.levels[level] if text.strip() else None for level, text in zip(chosen, texts, strict=True)]

    def probabilities(self, texts: Sequence[str]) -> numpy.ndarray:
        """Of every level, float64 [texts, levels]."""
        return self._pipeline.predict_proba(list(texts))

    def accuracy(self, questions: Sequence[Question]) -> float:
        """Share of these questions' responses whose level it finds."""
        texts = [question.responses[level] for question in questions for level in self.levels]
        expected = [column for _ in questions for column in range(len(self.levels))]
        return float((self.probabilities(texts).argmax(1) == expected).mean())


def check_lengths(queries: Sequence[str], texts: Sequence[str]) -> None:
    """Raises AlignvecError unless there is one query a text."""
    if len(queries) != len(texts):
        raise AlignvecError(f"a judge needs one query a text, got {len(queries)} queries for {len(texts)} texts")
