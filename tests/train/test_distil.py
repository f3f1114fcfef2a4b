"""Scale distillation: gradients of scales, and a divergence that goes down on texts that were not trained on."""

import importlib
import json

import pytest
import torch

import alignvec
from alignvec import AlignmentVector, formats
from alignvec.errors import AlignvecError
from alignvec.evaluate import Question
from alignvec.fingerprint import identify
from alignvec.formats import Encoded
from tests.models import random_vector, tiny

module = importlib.import_module("alignvec.train.distil")


class Words:
    """A tokenizer of numbers."""

    eos_token_id, chat_template = 2, None

    def __call__(self, text: str | list[str], **kwargs) -> dict:
        if isinstance(text, list):
            return {"input_ids": [self(each)["input_ids"] for each in text]}
        return {"input_ids": [int(word) for word in text.split()]}


def _texts(count: int, seed: int) -> list[str]:
    ids = torch.randint(3, 101, (count, 12), generator=torch.Generator().manual_seed(seed))
    return [" ".join(map(str, row)) for row in ids.tolist()]


def _low_bit(dense: AlignmentVector, format: str, factor: float) -> AlignmentVector:
    """The vector in a format, all scales wrong by a factor."""
    deltas = {}
    for name in dense:
        made = formats.encode(format, dense[name], name=name)
        scaled = {"scales": made.parts["scales"] * factor} if "scales" in made.parts else {}
        deltas[name] = Encoded(made.name, made.shape, made.options, {**made.parts, **scaled})
    return AlignmentVector(deltas, dense.base, format=format)


@torch.no_grad()
def _divergence(model, dense: AlignmentVector, low_bit: AlignmentVector, texts: list[str]) -> float:
    ids = torch.tensor([Words()(text)["input_ids"] for text in texts])
    alignment = alignvec.attach(model, {"dense": dense, "low": low_bit})
    logits = []
    for mix in ({"dense": 1.0}, {"low": 1.0}):
        with alignment.using(mix):
            logits.append(model(input_ids=ids).logits.flatten(0, 1))
    alignment.detach()
    return float(module.divergence(*logits))


@pytest.mark.parametrize("format", ["sign", "sign:group=32", "int8:group=32", "int4:group=32"])
def test_gradients_of_scales(format: str) -> None:
    torch.manual_seed(0)
    encoded = formats.encode(format, torch.randn(3, 40))
    scales = encoded.parts["scales"].float().requires_grad_()
    seen = torch.randn(3, 40)
    (module._Scaled.apply(scales, encoded) * seen).sum().backward()
    step = torch.zeros_like(encoded.parts["scales"], dtype=torch.float32)
    for index in range(step.numel()):  # the delta is linear in its scales
        step.zero_().view(-1)[index] = 1.0
        unit = formats.decode(module._with_scales(encoded, step))
        assert float(scales.grad.view(-1)[index]) == pytest.approx(float((unit * seen).sum()), abs=1e-4)


@pytest.mark.parametrize("format", ["sign", "int4:group=32"])
def test_distilled_scales_diverge_less_on_other_texts(format: str) -> None:
    model = tiny("Mistral", tie_word_embeddings=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dense = random_vector(model, 1)
    wrong = _low_bit(dense, format, 1.7)
    made = module.distil(model, dense, wrong, Words(), _texts(24, 1), steps=40, batch_size=8, learning_rate=0.05)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (made.format, made.tensors, made.base) == (wrong.format, wrong.tensors, wrong.base)
    for name in made:
        assert all(
            torch.equal(part, wrong.encoded(name).parts[key])
            for key, part in made.encoded(name).parts.items()
            if key != "scales"
        )
    held_out = _texts(8, 2)
    assert _divergence(model, dense, made, held_out) < 0.6 * _divergence(model, dense, wrong, held_out)


def test_what_cannot_be_distilled_is_refused(tmp_path) -> None:
    model = tiny("Mistral")
    dense = random_vector(model, 1)
    sign = _low_bit(dense, "sign", 1.0)
    with pytest.raises(AlignvecError, match="no scales to train"):
        module.distil(model, dense, dense, Words(), _texts(2, 1))
    with pytest.raises(AlignvecError, match="no calibration texts"):
        module.distil(model, dense, sign, Words(), ["7"])
    with pytest.raises(AlignvecError, match="a different base"):
        module.distil(model, dense, AlignmentVector(sign._deltas, identify(tiny("Qwen3"))), Words(), _texts(2, 1))
    with pytest.raises(AlignvecError, match="steps=0"):
        module.distil(model, dense, sign, Words(), _texts(2, 1), steps=0)
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "1 2"}\n{"text": 3}\n')
    with pytest.raises(AlignvecError, match="line 2"):
        module.load_calibration(file)


def test_calibration_files_hold_texts_or_questions(tmp_path) -> None:
    file = tmp_path / "calibration.jsonl"
    file.write_text('{"text": "1 2"}\n\n{"text": "3 4"}\n')
    assert module.load_calibration(file) == ["1 2", "3 4"]
    question = {"domain": "d", "query": "5 6", "responses": {"low": "7", "high": "8 9"}}
    file.write_text(json.dumps(question))
    (loaded,) = module.load_calibration(file)
    assert isinstance(loaded, Question)
    assert module._encoded(Words(), [loaded], 9) == [[5, 6, 7, 2], [5, 6, 8, 9, 2]]
