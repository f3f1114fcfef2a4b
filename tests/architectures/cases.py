"""The checks of one architecture: results of the plain models, and the same ones of an attached model.

The truth is never the library's: coefficient 1 is the tuned model, 0 the base, and 0.5 a merge formed in float64.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import alignvec
from tests.architectures.inputs import NEW_TOKENS, ids, inputs, prompt
from tests.architectures.outcomes import Check
from tests.architectures.subject import Results, Subject, generated, logits


def uniform_plain(subject: Subject) -> Results:
    models = {"1": subject.tuned, "0.5": subject.half, "0": subject.base}
    return {f"v={name}": logits(model) for name, model in models.items()}


def uniform_attached(subject: Subject) -> Results:
    model, alignment = subject.attach()
    found: Results = {}
    for name in ("1", "0.5", "0"):
        alignment.set(v=float(name))
        found[f"v={name}"] = logits(model)
    return found


def rows_plain(subject: Subject) -> Results:
    base, aligned = logits(subject.base, 4), logits(subject.tuned, 4)
    return {
        "row 0 of 2": _halves(logits(subject.tuned))[0],
        "row 1 of 2": _halves(logits(subject.base))[1],
        "row 0 of 4 sequences": _halves(aligned)[0],
        "row 1 of 4 sequences": _halves(base)[1],
    }


def rows_attached(subject: Subject) -> Results:
    model, alignment = subject.attach()
    alignment.set_rows([{"v": 1.0}, {"v": 0.0}])
    two, four = logits(model), logits(model, 4)
    return {
        **dict(zip(("row 0 of 2", "row 1 of 2"), _halves(two), strict=True)),
        **dict(zip(("row 0 of 4 sequences", "row 1 of 4 sequences"), _halves(four), strict=True)),
    }


def _halves(batch: Tensor) -> tuple[Tensor, Tensor]:
    """What belongs to either of two rows."""
    middle = len(batch) // 2
    return batch[:middle], batch[middle:]


def decode_plain(subject: Subject) -> Results:
    return generated(subject.tuned, "v=1")


def decode_attached(subject: Subject) -> Results:
    model, alignment = subject.attach()
    alignment.set(v=1.0)
    return generated(model, "v=1")


def decode_rows_plain(subject: Subject) -> Results:
    wanted = (("row 0", subject.tuned, 0), ("row 1", subject.base, 1))
    return {k: v for name, model, row in wanted for k, v in generated(model, name, row, alone=True).items()}


def decode_rows_attached(subject: Subject) -> Results:
    model, alignment = subject.attach()
    alignment.set_rows([{"v": 1.0}, {"v": 0.0}])
    return {**generated(model, "row 0", 0), **generated(model, "row 1", 1)}


def decoder_plain(subject: Subject) -> Results:
    wanted = (("v=1", subject.tuned, None), ("row 0", subject.tuned, 0), ("row 1", subject.base, 1))
    results = {k: v for name, model, row in wanted for k, v in generated(model, name, row, images=False).items()}
    return {name: value for name, value in results.items() if name.startswith("tokens")}


def decoder_attached(subject: Subject) -> Results:
    model, alignment = subject.attach()
    decoder = alignment.decoder(max_batch=2, max_length=64)
    given = prompt(model, 2, images=False)["input_ids"]
    options: Any = {"max_new_tokens": NEW_TOKENS, "eos_token_id": -1}
    alignment.set(v=1.0)
    uniform = decoder.generate(given, torch.ones_like(given), **options)
    rows = decoder.generate(given, torch.ones_like(given), mixes=[{"v": 1.0}, {"v": 0.0}], **options)
    return {"tokens v=1": uniform, "tokens row 0": rows[:1], "tokens row 1": rows[1:]}


def materialise_plain(subject: Subject) -> Results:
    truth = {"logits": logits(subject.tuned)}
    with contextlib.suppress(Exception):  # a class that cannot generate has logits to compare
        truth |= generated(subject.tuned, "v=1")
    same = ("restored weights", "restored outputs", "detached weights", "detached outputs", "detached modules")
    return {**truth, **{name: torch.tensor(True) for name in same}}


def materialise_attached(subject: Subject) -> Results:
    model = copy.deepcopy(subject.base)
    modules, plain = dict(model.named_modules()), logits(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    alignment = alignvec.attach(model, {"v": subject.vector})
    alignment.set(v=1.0)
    before = logits(model)
    alignment.materialise(v=1.0)
    found = {"logits": logits(model)}
    with contextlib.suppress(Exception):
        found |= generated(model, "v=1")
    alignment.restore()
    found["restored outputs"] = torch.tensor(torch.equal(before, logits(model)))
    found["restored weights"] = _same(weights, model)
    alignment.detach()
    found["detached outputs"] = torch.tensor(torch.equal(plain, logits(model)))
    found["detached weights"] = _same(weights, model)
    found["detached modules"] = torch.tensor(
        {n: id(m) for n, m in model.named_modules()} == {n: id(m) for n, m in modules.items()}
    )
    return found


def _same(weights: Results, model: PreTrainedModel) -> Tensor:
    state = model.state_dict()
    return torch.tensor(state.keys() == weights.keys() and all(torch.equal(state[n], w) for n, w in weights.items()))


def embedding_plain(subject: Subject) -> Results:
    return {
        "the first call": _embedded(subject.tuned),
        "after set(v=0.5)": _embedded(subject.half),
        "after a step of two sequences": _embedded(subject.base),
    }


def embedding_attached(subject: Subject) -> Results:
    model, alignment = subject.attach()
    alignment.set(v=1.0)
    found = {"the first call": _embedded(model)}
    alignment.set(v=0.5)
    found["after set(v=0.5)"] = _embedded(model)
    logits(model)
    alignment.set(v=0.0)
    return {**found, "after a step of two sequences": _embedded(model)}


def submodules_plain(subject: Subject) -> Results:
    return {
        f"{name}, v={c}": value
        for c, model in ((1, subject.tuned), (0.5, subject.half))
        for name, value in _submodules(model).items()
    }


def submodules_attached(subject: Subject) -> Results:
    model, alignment = subject.attach()
    found: Results = {}
    for coefficient in (1, 0.5):
        alignment.set(v=coefficient)
        found |= {f"{name}, v={coefficient}": value for name, value in _submodules(model).items()}
    return found


@torch.no_grad()
def _embedded(model: PreTrainedModel) -> Tensor:
    return model.get_input_embeddings()(ids(3))


@torch.no_grad()
def _submodules(model: PreTrainedModel) -> Results:
    """The head on hidden states of its own, the backbone, the encoder and the vision tower, each called by itself."""
    found: Results = {}
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):
        found["head"] = head(torch.randn(3, 5, head.in_features, generator=torch.Generator().manual_seed(3)))
    if model.base_model is not model:
        torch.manual_seed(0)
        found["backbone"] = model.base_model(**inputs(model, 2))[0]
    if model.config.is_encoder_decoder:
        found["encoder"] = model.get_encoder()(ids(2))[0]
    given = inputs(model, 2)
    vision: Any = getattr(model.base_model, "get_image_features", None)
    if "pixel_values" in given and vision is not None:
        accepted = inspect.signature(vision).parameters
        features = vision(**{n: v for n, v in given.items() if n in accepted})
        found["images"] = torch.cat([f.reshape(-1, f.shape[-1]) for f in getattr(features, "pooler_output", features)])
    return found


def gradient_plain(subject: Subject) -> Results:
    return _gradients(copy.deepcopy(subject.tuned))


def gradient_attached(subject: Subject) -> Results:
    model, alignment = subject.attach()
    alignment.set(v=1.0)
    return _gradients(model)


def _gradients(model: PreTrainedModel) -> Results:
    torch.manual_seed(0)
    with torch.enable_grad():
        output = model(**inputs(model, 2))
        output.logits.float().pow(2).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


CHECKS: dict[str, Check] = {
    "uniform": (uniform_plain, uniform_attached),
    "rows": (rows_plain, rows_attached),
    "decode": (decode_plain, decode_attached),
    "decode rows": (decode_rows_plain, decode_rows_attached),
    "decoder": (decoder_plain, decoder_attached),
    "materialise": (materialise_plain, materialise_attached),
    "embedding": (embedding_plain, embedding_attached),
    "submodules": (submodules_plain, submodules_attached),
    "gradient": (gradient_plain, gradient_attached),
}
