"""Scale distillation: the scales of a low-bit vector, trained until the model answers as with the dense one.

As BitDelta (arXiv 2402.10193) distils its scale of each matrix, here with a scale for each row, or group of a row.
"""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from alignvec import formats
from alignvec.description import STEM, Error
from alignvec.encoder import square
from alignvec.errors import AlignvecError
from alignvec.evaluate.questions import Question, load_questions, numbered_lines
from alignvec.fingerprint import summary
from alignvec.formats import Encoded
from alignvec.formats.spec import matrix
from alignvec.loading import load_model
from alignvec.names import parameter_names, resolve
from alignvec.vector import AlignmentVector
from alignvec.verify import verify_base

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SCALED = ("sign", "int8", "int4")


def distil(
    base: str | Path | PreTrainedModel,
    aligned: AlignmentVector | str | Path,
    vector: AlignmentVector | str | Path,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Sequence[str | Question] | str | Path,
    *,
    steps: int = 200,
    batch_size: int = 4,
    learning_rate: float = 5e-2,
    max_length: int = 128,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> AlignmentVector:
    """Train the scales of `vector` so that base + vector predicts what base + `aligned` does; bits and codes stay.

    The loss is the Kullback-Leibler divergence of the next token's distribution, averaged over tokens. The paper has
    the squared error of the logits, which also counts what no distribution shows: an offset that all logits share, and
    the logits of tokens that are never likely.

    Most of the gain is a length: the scale with the least squared error of the weights, mean |d| for sign, realises
    less of the dense vector than its coefficient says (0.67 for the shipped ones), and training makes up for that.

    A step holds the base, the deltas of `aligned` and the weights of both sums, about four times the model; packed bits
    and a number for each scale are all that is kept for the backward pass beside activations.

    Args:
        aligned: the vector to be matched, in a format that loses little, or the aligned checkpoint.
        vector: the low-bit vector: sign, int8 or int4. What it stores otherwise (norms) stays as it is.
        calibration: texts, or questions, whose responses are read at every level, or a file of either: JSON lines with
            "text", or what `load_questions` reads. In the order of a shuffle, over and over.
        steps: of Adam, with a cosine schedule; each reads `batch_size` texts.
        learning_rate: of factors that the scales are multiplied by, which begin at 1.
        max_length: tokens of a text that are read.
        dtype: to compute in; default float32 for a folder, a live model's own. In 16 bits the sums are rounded.
        progress: called with the number of steps done and the loss.

    Raises:
        AlignvecError: a vector without scales, vectors of different bases, no texts, an option out of range.
    """
    for name, value in (("steps", steps), ("batch_size", batch_size), ("learning_rate", learning_rate)):
        if not 0 < value < math.inf:
            raise AlignvecError(f"{name}={value} must be positive")
    if max_length < 2:
        raise AlignvecError(f"max_length={max_length} must be at least 2")
    texts = load_calibration(calibration) if isinstance(calibration, (str, Path)) else list(calibration)
    low_bit = vector if isinstance(vector, AlignmentVector) else AlignmentVector.load(vector)
    if not any(low_bit.format_of(name).name in SCALED for name in low_bit):
        raise AlignvecError(f"a vector in format {low_bit.format} has no scales to train: give sign, int8 or int4")
    model = _frozen(base, dtype, device)
    target = _dense(base, aligned)
    verify_base(model, {"aligned": target, "low-bit": low_bit})
    batches = _batches(_encoded(tokenizer, texts, max_length), batch_size, random.Random(seed))
    teacher, student = _Deltas(model, target), _Deltas(model, low_bit)
    optimizer = torch.optim.Adam(student.factors.values(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, learning_rate / 50)
    for step in range(1, steps + 1):
        ids, mask = (tensor.to(model.device) for tensor in next(batches))
        with torch.no_grad():
            wanted = _logits(model, teacher, ids, mask)
        loss = divergence(wanted, _logits(model, student, ids, mask))
        found = loss.item()
        if not math.isfinite(found):
            raise AlignvecError(f"the divergence is {found} at step {step}: lower learning_rate")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step, found)
    return _distilled(low_bit, target, student, {"steps": steps, "batch_size": batch_size, "texts": len(texts)})


def divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """KL(wanted || found) of logits [tokens, vocabulary], in nats, averaged over tokens."""
    return F.kl_div(found.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean")


def load_calibration(path: str | Path) -> list[str | Question]:
    """Read texts, `{"text": "..."}` a line, or questions. AlignvecError, naming the line, for anything else."""
    lines = numbered_lines(path, "calibration texts")
    if lines and '"query"' in lines[0][1]:
        return list(load_questions(path))
    texts: list[str | Question] = []
    for place, line in lines:
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str) or not text.strip():
            raise AlignvecError(f'{place}: expected {{"text": "..."}}, or a question in every line')
        texts.append(text)
    return texts


class _Scaled(torch.autograd.Function):
    """scales [rows, groups] -> the delta that they and the stored bits make, in the parameter's shape, float32."""

    @staticmethod
    def forward(ctx: Any, scales: Tensor, encoded: Encoded) -> Tensor:
        ctx.encoded = encoded
        return formats.decode(_with_scales(encoded, scales))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        encoded = ctx.encoded
        (rows, cols), scales = matrix(encoded.shape), encoded.parts["scales"]
        units = formats.decode(_with_scales(encoded, torch.ones_like(scales)))
        groups = scales.shape[1]
        group = int(encoded.options["group"]) or cols
        products = (gradients[0] * units).view(rows, cols)
        return F.pad(products, (0, groups * group - cols)).view(rows, groups, group).sum(-1), None


class _Deltas:
    """A vector on the model's device by the model's names: what is constant, and what has scales to train."""

    def __init__(self, model: PreTrainedModel, vector: AlignmentVector) -> None:
        names = parameter_names(model)
        found = {name: resolve(model, names, name) for name in vector}
        if missing := [name for name, live in found.items() if live is None]:
            raise AlignvecError(f"the base has no parameters {summary(missing)} in memory, so they cannot be distilled")
        self.constant: dict[str, Tensor] = {}
        self.encoded: dict[str, Encoded] = {}
        self.factors: dict[str, Tensor] = {}
        for name, live in found.items():
            assert live is not None
            if vector.format_of(name).name in SCALED:
                encoded = vector.encoded(name)
                parts = {part: values.to(model.device) for part, values in encoded.parts.items()}
                self.encoded[live] = Encoded(encoded.name, encoded.shape, encoded.options, parts)
                self.factors[live] = torch.ones_like(parts["scales"], dtype=torch.float32, requires_grad=True)
            else:
                self.constant[live] = vector[name].to(model.device, model.dtype)
        self.live = found

    def scales(self, live: str) -> Tensor:
        return self.encoded[live].parts["scales"].float() * self.factors[live]

    def weights(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """base + delta, by the model's names."""
        parameters = dict(model.named_parameters())
        sums = {live: parameters[live] + delta for live, delta in self.constant.items()}
        for live, encoded in self.encoded.items():
            sums[live] = parameters[live] + _Scaled.apply(self.scales(live), encoded).to(model.dtype)
        return sums


def _logits(model: PreTrainedModel, deltas: _Deltas, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits that follow each token, float32 [tokens, vocabulary]; padding is left out."""
    inputs = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
    output: Any = torch.func.functional_call(model, deltas.weights(model), args=(), kwargs=inputs)
    return output.logits[mask].float()


def _frozen(
    base: str | Path | PreTrainedModel, dtype: str | torch.dtype | None, device: str | torch.device | None
) -> PreTrainedModel:
    """The base without gradients; a live one is copied, since it may be in use."""
    from alignvec.extract import parse_dtype

    chosen = None if dtype is None else parse_dtype(dtype)
    if isinstance(base, (str, Path)):
        model = load_model(base, dtype=chosen or torch.float32)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    elif getattr(base, "alignment", None) is not None:
        raise AlignvecError("vectors are attached to the base; call model.alignment.detach() first")
    else:
        model = copy.deepcopy(base).to(chosen or base.dtype)  # type: ignore[arg-type]
    return model.to(device).eval().requires_grad_(False) if device else model.eval().requires_grad_(False)


def _dense(base: str | Path | PreTrainedModel, aligned: AlignmentVector | str | Path) -> AlignmentVector:
    if not isinstance(aligned, AlignmentVector):
        if not (Path(aligned) / f"{STEM}.json").is_file():
            from alignvec.extract import extract

            return extract(base, aligned, dtype="float32")
        aligned = AlignmentVector.load(aligned)
    return aligned.with_base(base) if aligned.needs_base else aligned


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str | Question], max_length: int) -> list[list[int]]:
    """Tokens of every text, and of every question with each of its responses."""
    from alignvec.evaluate.batches import encode

    sequences: list[list[int]] = []
    for text in texts:
        if isinstance(text, str):
            sequences.append(tokenizer(text)["input_ids"])
        else:
            (question,) = encode(tokenizer, [text], tuple(text.responses), None)
            sequences += [question.prompt + response for response in question.responses]
    sequences = [sequence[:max_length] for sequence in sequences if len(sequence) > 1]
    if not sequences:
        raise AlignvecError("there are no calibration texts of two tokens or more: give some that are like the use")
    return sequences


def _batches(sequences: list[list[int]], size: int, rng: random.Random) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (ids, mask) [texts, length], padded on the right, where causal attention does not see it."""
    queue: list[list[int]] = []
    while True:
        while len(queue) < size:
            queue += rng.sample(sequences, len(sequences))
        chosen, queue = queue[:size], queue[size:]
        length = max(map(len, chosen))
        ids, mask = torch.zeros(size, length, dtype=torch.long), torch.zeros(size, length, dtype=torch.bool)
        for row, sequence in enumerate(chosen):
            ids[row, : len(sequence)] = torch.tensor(sequence)
            mask[row, : len(sequence)] = True
        yield ids, mask


def _distilled(
    vector: AlignmentVector, target: AlignmentVector, student: _Deltas, settings: dict[str, int]
) -> AlignmentVector:
    """The vector with the scales trained, rounded as its format stores them, and the errors that they make."""
    deltas: dict[str, Tensor | Encoded] = {}
    errors = dict(vector.errors)
    for name, live in student.live.items():
        encoded = vector.encoded(name)
        if live in student.encoded:
            assert live is not None
            scales = student.scales(live).detach().cpu().to(encoded.parts["scales"].dtype)
            encoded = _with_scales(encoded, scales)
            if name in target:
                exact = target[name].float()
                errors[name] = Error.of(formats.squared_error(encoded, exact), square(exact), name)
        deltas[name] = encoded
    source = {**vector.source, "distilled": settings}
    return AlignmentVector(deltas, vector.base, format=vector.format, source=source, errors=errors)


def _with_scales(encoded: Encoded, scales: Tensor) -> Encoded:
    return Encoded(encoded.name, encoded.shape, encoded.options, {**encoded.parts, "scales": scales})
