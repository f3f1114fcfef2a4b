"""An attached model against one merged in float64, for every architecture: forward, cached decode, beams."""

from __future__ import annotations

import pytest
import torch

import alignvec
from tests.models import ARCHITECTURES, merged, random_vector, tiny

MIXES = [{"a": 0.7, "b": -0.4}, {"a": -1.0}, {"b": 1.3, "a": 0.1}]
DTYPES = [torch.float32, torch.bfloat16]


def prompts(rows: int = 3) -> dict[str, torch.Tensor]:
    """Left-padded prompts of different lengths, with the positions that generate gives them."""
    torch.manual_seed(1)
    ids = torch.randint(3, 101, (rows, 9))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        ids[row, :row], mask[row, :row] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def unpadded(batch: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    real = batch["attention_mask"][row].bool()
    return {name: value[row, real][None] for name, value in batch.items()}


def options(architecture: str) -> dict:
    # Every expert serves every token: rounding then cannot flip a routing choice, which no tolerance covers.
    return {"num_experts_per_tok": 4, "experts_implementation": "eager"} if architecture == "Mixtral" else {}


def relative(got: torch.Tensor, truth: torch.Tensor) -> float:
    return ((got.double() - truth).norm() / truth.norm()).item()


@pytest.fixture(params=ARCHITECTURES, scope="module")
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@torch.no_grad()
def test_logits_equal_a_float64_merge(architecture: str, dtype: torch.dtype) -> None:
    model = tiny(architecture, dtype, **options(architecture))
    vectors = {"a": random_vector(model, 1), "b": random_vector(model, 2)}
    batch = prompts()
    real = batch["attention_mask"].bool()
    rows = range(len(MIXES))

    def truth(mixes: list[dict[str, float]]) -> torch.Tensor:
        return torch.cat([merged(model, vectors, mixes[row])(**unpadded(batch, row)).logits[0] for row in rows])

    expected = truth(MIXES)
    bound = 3e-6 if dtype == torch.float32 else 1.3 * relative(model(**batch).logits[real], truth([{}] * 3))
    alignment = alignvec.attach(model, vectors)
    alignment.set_rows(MIXES)
    assert relative(model(**batch).logits[real], expected) < bound, "mixed rows"
    uniform = []
    for row, mix in enumerate(MIXES):
        alignment.set(mix)
        uniform.append(model(**batch).logits[row][real[row]])
    assert relative(torch.cat(uniform), expected) < bound, "uniform mixes"


@torch.no_grad()
def test_positions_shared_by_the_batch_take_every_row_of_coefficients() -> None:
    """GPT-2 looks its positions up once for all sequences; their learned embedding has a mix per sequence."""
    model = tiny("GPT2")
    vectors = {"a": random_vector(model, 1)}
    mixes = [{"a": 1.0}, {"a": -0.5}, {}]
    ids = prompts()["input_ids"]
    expected = torch.cat([merged(model, vectors, mix)(ids[row][None]).logits for row, mix in enumerate(mixes)])
    alignvec.attach(model, vectors).set_rows(mixes)
    assert relative(model(ids).logits, expected) < 3e-6


@torch.no_grad()
def test_cached_decode_and_beams_follow_their_rows(architecture: str) -> None:
    model = tiny(architecture, **options(architecture))
    vectors = {"a": random_vector(model, 1), "b": random_vector(model, 2)}
    references = [merged(model, vectors, mix).float() for mix in MIXES]
    batch = {name: value for name, value in prompts().items() if name != "position_ids"}
    alignment = alignvec.attach(model, vectors)
    alignment.set_rows(MIXES)
    for choice in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        how = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, **choice)
        got = model.generate(**batch, **how).view(3, -1, 15)
        for row, reference in enumerate(references):
            one = {name: value[row : row + 1] for name, value in batch.items()}
            alone = reference.generate(**one, **how)
            assert torch.equal(got[row], alone), f"row {row}, {choice or 'greedy'}"


@torch.no_grad()
def test_detach_is_bit_for_bit(architecture: str) -> None:
    model = tiny(architecture, torch.bfloat16)
    batch = prompts()
    before, modules = model(**batch).logits, dict(model.named_modules())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    alignment = alignvec.attach(model, {"a": random_vector(model, 1)})
    alignment.set(a=1.0)
    assert not torch.equal(model(**batch).logits, before)
    assert {n: v.shape for n, v in model.state_dict().items()} == {n: v.shape for n, v in state.items()}
    alignment.detach()
    assert torch.equal(model(**batch).logits, before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(module is modules[name] for name, module in model.named_modules())
