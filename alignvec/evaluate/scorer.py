"""Scorer: stored responses under many mixes, several of them in one forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignvec.alignment import Alignment
from alignvec.errors import AlignvecError
from alignvec.evaluate.batches import Batch, Encoded, Prompt, batches, encode
from alignvec.evaluate.questions import Question, domains_of, levels_of
from alignvec.evaluate.scores import Scores
from alignvec.planner import check_choice

# Tokens in a forward: on a CPU as many as its caches like, on a GPU enough to fill it.
BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
FORMS = ("auto", "rows", "merged")
SLACK = {torch.float32: 1e-3}  # of a mean log-probability between packed and plain sequences; 16 bits: 0.1

Mix = Mapping[str, float]


class Scorer:
    """Questions ready to be scored under any mixes of a model: arXiv 2410.19206's preference accuracy.

    Mixes are rows of a batch: one forward carries several of them, and a large model's weights are read once for all.
    """

    def __init__(
        self,
        model: PreTrainedModel | Alignment,
        tokenizer: PreTrainedTokenizerBase,
        questions: Sequence[Question],
        *,
        form: str = "auto",
        batch_tokens: int | None = None,
        prompt: Prompt | None = None,
    ) -> None:
        """
        Args:
            model: a causal language model, or vectors attached to one.
            tokenizer: the model's; queries become a user's turn of its chat template, where it has one.
            questions: at least one, all with the same levels.
            form: "rows" turns coefficients on the fly, many mixes in a forward; "merged" writes one mix after the
                other into the weights, which is less arithmetic where batches are large, and rounds to the weights'
                dtype. "auto" is "merged" for float32 weights on a CPU, where nothing is lost, else "rows".
            batch_tokens: most tokens in a forward.
            prompt: the text before a question's responses, special tokens included, instead of the chat template.

        Raises:
            AlignvecError: no questions, different levels, a question longer than the model's positions.
        """
        check_choice("form", form, FORMS)
        self.levels, self.questions = levels_of(questions), list(questions)
        self.domains = domains_of(questions)
        self.alignment = model if isinstance(model, Alignment) else None
        self.model = cast(PreTrainedModel, model.model if isinstance(model, Alignment) else model)
        if form == "auto":
            exact = self.model.device.type == "cpu" and self.model.dtype == torch.float32
            form = "merged" if exact else "rows"
        self.form = form
        self.batch_tokens = batch_tokens or BATCH_TOKENS.get(self.model.device.type, BATCH_TOKENS["cuda"])
        self.encoded = encode(tokenizer, questions, self.levels, prompt)
        self._check_lengths()
        self._longest = max(len(each.prompt) + sum(map(len, each.responses)) for each in self.encoded)
        self._lengths = torch.tensor([len(response) for each in self.encoded for response in each.responses])
        self._packed: bool | None = None

    @torch.inference_mode()
    def __call__(self, mixes: Sequence[Mix] = ({},), *, progress: Callable[[float], None] | None = None) -> Scores:
        """Score every response under every mix; what was dialled before is dialled again afterwards.

        ``progress`` is called with the share of the work that is done.

        Raises:
            AlignvecError: no mixes, a mix for a model without vectors, an unknown name or a coefficient that is not
                finite, a mix that is materialised at the time.
        """
        if not mixes:
            raise AlignvecError("there are no mixes to score: give at least one, {} for the base")
        if self.alignment is None and any(mixes):
            raise AlignvecError("this model has no vectors attached: score an alignvec.attach() result to turn mixes")
        total = self._total(list(mixes), progress or (lambda _: None))
        shape = (len(mixes), len(self.questions), len(self.levels))
        domains = tuple(question.domain for question in self.questions)
        return Scores(self.levels, domains, (total / self._lengths).view(shape), total.view(shape))

    def batches(self, mixes: int = 1) -> list[Batch]:
        """The questions in batches that leave room for ``mixes`` rows in each forward."""
        return batches(self.encoded, self.batch_tokens // mixes, self._packs())

    @property
    def responses(self) -> int:
        return len(self._lengths)

    def _total(self, mixes: list[Mix], progress: Callable[[float], None]) -> Tensor:
        if self.alignment is None:
            row = self._score(self.batches(), 1, progress, 0, 1)
            return row.repeat(len(mixes), 1)
        with self.alignment.using({}):
            if self.form == "rows":
                return self._rows(mixes, self.alignment, progress)
            return self._merged(mixes, self.alignment, progress)

    def _rows(self, mixes: list[Mix], alignment: Alignment, progress: Callable[[float], None]) -> Tensor:
        rows = max(1, min(len(mixes), alignment.max_rows, self.batch_tokens // self._longest))
        made = self.batches(rows)
        totals = []
        for start in range(0, len(mixes), rows):
            chosen = mixes[start : start + rows]
            alignment.set_rows(chosen)
            totals.append(self._score(made, len(chosen), progress, start, len(mixes)))
        return torch.cat(totals)

    def _merged(self, mixes: list[Mix], alignment: Alignment, progress: Callable[[float], None]) -> Tensor:
        made = self.batches()
        totals = []
        try:
            for i, mix in enumerate(mixes):
                alignment.materialise({**dict.fromkeys(alignment.names, 0.0), **mix}, measure=False)
                totals.append(self._score(made, 1, progress, i, len(mixes)))
        finally:
            if alignment.weights:
                alignment.restore()
        return torch.cat(totals)

    def _score(self, made: list[Batch], rows: int, progress: Callable[[float], None], begun: int, mixes: int) -> Tensor:
        total = torch.zeros(rows, self.responses)
        for i, batch in enumerate(made, 1):
            total += batch.sums(batch.logits(self.model, rows), self.responses, rows)
            progress((begun + rows * i / len(made)) / mixes)
        return total

    def _packs(self) -> bool:
        """Whether the model, tried on the shortest question, keeps the responses that share a prompt apart."""
        if self._packed is None:
            self._packed = self._try()
        return self._packed

    def _try(self) -> bool:
        # A window counts places, not positions: responses in one sequence would push the prompt out of it.
        window = getattr(self.model.config, "sliding_window", None)
        if window is not None and self._longest > window:
            return False
        shortest = min(self.encoded, key=lambda each: sum(map(len, each.responses)))
        plain = self._mean(shortest, packed=False)
        try:
            packed = self._mean(shortest, packed=True)
        except (TypeError, ValueError, RuntimeError):
            return False
        return bool((plain - packed).abs().max() <= SLACK.get(self.model.dtype, 0.1))

    def _mean(self, question: Encoded, packed: bool) -> Tensor:
        """Mean log-probabilities [1, levels]."""
        total = torch.zeros(1, len(question.responses))
        for batch in batches([question], self.batch_tokens, packed):
            total += batch.sums(batch.logits(self.model), len(question.responses))
        return total / torch.tensor([len(response) for response in question.responses])

    def _check_lengths(self) -> None:
        most = getattr(self.model.config, "max_position_embeddings", None)
        for question, encoded in zip(self.questions, self.encoded, strict=True):
            length = len(encoded.prompt) + max(map(len, encoded.responses))
            if most is not None and length > most:
                raise AlignvecError(f"{question.query!r} and a response take {length} tokens, the model has {most}")
