"""The sampler keeps what transformers' warpers keep, and draws from it by a counter."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import logits_process as warpers

from alignvec.decoding.sampling import Sampler, Sampling, Variant, from_transformers
from alignvec.decoding.uniform import uniform
from alignvec.errors import AlignvecError
from tests.models import tiny

VOCAB = 1009
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SAMPLED = Variant(sampled=True)
PROMPT = torch.tensor([3, 5, 5, 900, VOCAB + 4])


def _sampler(*settings: Sampling, vocab: int = VOCAB, prompt: Tensor = PROMPT) -> Sampler:
    sampler = Sampler(len(settings), vocab, DEVICE)
    for row, sampling in enumerate(settings):
        sampler.put(row, sampling, prompt)
    return sampler


def _logits(rows: int, vocab: int = VOCAB, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, device=DEVICE) * scale


def _warped(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities that transformers would draw from, float64."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(warpers.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature not in (0.0, 1.0):
        processors.append(warpers.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(warpers.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(warpers.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        processors.append(warpers.MinPLogitsWarper(sampling.min_p))
    ids = PROMPT.to(logits.device).expand(len(logits), -1)
    return processors(ids, logits.float()).double().softmax(-1)


SETTINGS = [
    Sampling(1.0),
    Sampling(0.7, top_k=50),
    Sampling(1.3, top_p=0.9),
    Sampling(1.0, top_p=1e-6),
    Sampling(1.0, min_p=0.05),
    Sampling(0.9, min_p=1.0),
    Sampling(1.0, top_k=1),
    Sampling(1.0, top_k=VOCAB + 7),
    Sampling(0.8, top_k=40, top_p=0.8, min_p=0.02, repetition_penalty=1.3),
    Sampling(1.1, top_k=200, top_p=0.95, min_p=0.3),
    Sampling(1.0, repetition_penalty=0.5),
    Sampling(2.5, top_k=3, top_p=0.4),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keeps_what_transformers_keeps(dtype: torch.dtype) -> None:
    # In 16 bits many logits tie, and ties at an edge have to fall alike.
    logits = _logits(len(SETTINGS)).to(dtype)
    sampler = _sampler(*SETTINGS)
    ours = sampler.probabilities(logits, sampler.variant(len(SETTINGS)))
    for row, sampling in enumerate(SETTINGS):
        truth = _warped(logits[row : row + 1], sampling)[0]
        assert torch.equal(ours[row] > 0, truth > 0), sampling
        torch.testing.assert_close(ours[row], truth, rtol=2e-6, atol=1e-9)


def test_low_temperatures_and_large_vocabularies() -> None:
    settings = (Sampling(0.05), Sampling(0.01, top_p=0.9), Sampling(1e-30))
    logits = _logits(len(settings), 151_000)
    ours = _sampler(*settings, vocab=151_000).probabilities(logits, SAMPLED)
    for row in (0, 1):
        torch.testing.assert_close(ours[row], _warped(logits[row : row + 1], settings[row])[0], rtol=1e-5, atol=1e-8)
    tokens = _sampler(*settings, vocab=151_000).sample(
        logits, torch.zeros(3, dtype=torch.int32, device=DEVICE), SAMPLED
    )
    assert tokens[2] == logits[2].argmax(), "a temperature so low that scores overflow is greedy"


def test_a_flat_row_of_many_tokens_does_not_overflow() -> None:
    vocab = 262_144
    sampler = _sampler(Sampling(1.0), vocab=vocab)
    flat = torch.zeros(1, vocab, device=DEVICE)
    ours = sampler.probabilities(flat, SAMPLED)
    assert torch.equal(ours, torch.full_like(ours, 1 / vocab))
    tokens = [int(sampler.sample(flat, torch.tensor([n], device=DEVICE), SAMPLED)) for n in range(8)]
    assert len(set(tokens)) == 8
    assert max(tokens) < vocab


def test_draws_have_the_distribution() -> None:
    vocab, count = 12, 20_000
    logits = torch.tensor([[0.1, 2.0, -1.0, 1.5, 0.3, -3.0, 2.2, 0.0, 1.0, -0.5, 0.7, 1.9]], device=DEVICE)
    for sampling in (Sampling(1.0, seed=3), Sampling(0.8, top_p=0.9, seed=-4), Sampling(1.5, top_k=4, min_p=0.2)):
        sampler = _sampler(*[sampling] * count, vocab=vocab, prompt=PROMPT[:0])
        positions = torch.arange(count, device=DEVICE)
        tokens = sampler.sample(logits.expand(count, -1).contiguous(), positions, SAMPLED)
        expected = _warped(logits, sampling)[0] * count
        drawn = tokens.bincount(minlength=vocab)
        kept = expected > 0
        assert drawn[~kept].sum() == 0
        chi_square = float(((drawn - expected)[kept].square() / expected[kept]).sum())
        freedom = int(kept.sum()) - 1
        assert chi_square < freedom + 5 * (2 * freedom) ** 0.5, sampling


@pytest.mark.parametrize("along", ["positions", "seeds"])
def test_numbers_are_uniform_and_independent(along: str) -> None:
    count = 1 << 16
    counter, other = torch.arange(count), torch.full((count,), 7)
    numbers = uniform(other, counter) if along == "positions" else uniform(counter, other)
    assert 0 <= numbers.min() < numbers.max() < 1
    assert len(numbers.unique()) == count
    bins = 64
    for values in (numbers, (numbers * 2**20) % 1):  # the upper and the middle bits
        counts = (values * bins).long().bincount(minlength=bins).double()
        chi_square = float((counts - count / bins).square().sum() / (count / bins))
        assert abs(chi_square - (bins - 1)) < 5 * (2 * (bins - 1)) ** 0.5
    for lag in (1, 2, 3, 64):
        assert abs(float(torch.corrcoef(torch.stack([numbers[lag:], numbers[:-lag]]))[0, 1])) < 5 / count**0.5


def test_numbers_are_those_of_splitmix64() -> None:
    """From plain integers: the published function, of seeds and positions at the ends of their range."""

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    pairs = [(0, 0), (1, 0), (-1, 5), (2**63 - 1, 1 << 20), (-(2**63), 31)]
    truth = [(mix((mix(s % 2**64) + (p + 1) * 0x9E3779B97F4A7C15) % 2**64) >> 11) / 2**53 for s, p in pairs]
    seeds, positions = torch.tensor(pairs).to(DEVICE).unbind(1)
    assert uniform(seeds, positions).tolist() == truth
    assert uniform(seeds, positions.int()).tolist() == truth


def test_a_token_does_not_depend_on_the_batch() -> None:
    settings = [Sampling(1.0, top_p=0.95, seed=n) for n in range(6)]
    logits, positions = _logits(6), torch.arange(6, device=DEVICE) * 3
    together = _sampler(*settings).sample(logits, positions, SAMPLED)
    for row in range(6):
        alone = _sampler(settings[row]).sample(logits[row : row + 1], positions[row : row + 1], SAMPLED)
        assert alone[0] == together[row]
    order = torch.tensor([4, 2, 0, 5, 1, 3], device=DEVICE)
    mixed = _sampler(*(settings[n] for n in order.tolist())).sample(logits[order], positions[order], SAMPLED)
    assert torch.equal(mixed, together[order])
    seeds = [Sampling(1.0, seed=n) for n in range(200)]
    many = _sampler(*seeds).sample(logits[:1].expand(200, -1), positions[:1].expand(200), SAMPLED)
    assert len(many.unique()) > 10, "seeds do not matter"


def test_greedy_rows_take_the_first_of_the_largest_in_any_variant() -> None:
    logits = _logits(3).bfloat16()
    logits[:, [17, 400, 801]] = logits.max() + 1
    sampler = _sampler(Sampling(), Sampling(1.0, top_k=3), Sampling(repetition_penalty=1.2))
    positions = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    for variant in (Variant(), SAMPLED, Variant(True, True), Variant(False, True)):
        tokens = sampler.sample(logits, positions, variant)
        assert tokens.dtype == torch.int64
        assert tokens[0] == logits[0].argmax() == 17
        assert tokens[2] == 17
        assert tokens[1] in (17, 400, 801)


def test_the_penalty_follows_what_was_seen() -> None:
    sampler = _sampler(Sampling(repetition_penalty=2.0), Sampling(), Sampling(repetition_penalty=2.0))
    variant = sampler.variant(3)
    assert variant == Variant(penalised=True)
    logits = torch.zeros(3, VOCAB, device=DEVICE)
    logits[:, 900], logits[:, 20], logits[:, 30] = 1.0, 0.9, 0.8
    positions = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    assert sampler.sample(logits, positions, variant).tolist() == [20, 900, 20], "900 is in the prompt"
    sampler.observe(torch.tensor([20, 20, 20], device=DEVICE), torch.tensor([True, True, False], device=DEVICE))
    assert sampler.sample(logits, positions, variant).tolist() == [30, 900, 20]
    sampler.put(0, Sampling(repetition_penalty=2.0), torch.tensor([1]))
    assert sampler.sample(logits, positions, variant).tolist() == [900, 900, 20], "a new sequence has seen nothing"
    negative = torch.full((3, VOCAB), -5.0, device=DEVICE)
    negative[:, 1], negative[:, 2] = -1.0, -1.5
    assert sampler.sample(negative, positions, variant).tolist() == [2, 1, 1]


def test_variants_are_of_the_rows_in_use() -> None:
    sampler = Sampler(4, VOCAB, DEVICE)
    assert sampler.variant(4) == Variant()
    sampler.put(2, Sampling(0.5), PROMPT)
    sampler.put(3, Sampling(repetition_penalty=1.5), PROMPT)
    assert [sampler.variant(n) for n in (2, 3, 4)] == [Variant(), SAMPLED, Variant(True, True)]
    sampler.clear(2)
    assert sampler.variant(4) == Variant(penalised=True)
    sampler.clear(3)
    assert sampler.variant(4) == Variant()
    assert Sampler(1, VOCAB, DEVICE).seen is None
    assert sampler.seen is not None


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_poisoned_rows_get_a_token_and_harm_no_other(poison: float) -> None:
    settings = [Sampling(1.0, top_k=5, top_p=0.9, min_p=0.01, repetition_penalty=1.1, seed=n) for n in range(3)]
    logits, positions = _logits(3), torch.arange(3, device=DEVICE)
    sampler = _sampler(*settings)
    variant = sampler.variant(3)
    clean = sampler.sample(logits, positions, variant)
    for some in (slice(None), slice(7, 8)):
        poisoned = logits.clone()
        poisoned[1, some] = poison
        tokens = sampler.sample(poisoned, positions, variant)
        assert 0 <= tokens[1] < VOCAB
        assert torch.equal(tokens[[0, 2]], clean[[0, 2]])
        if poison != -float("inf"):
            assert tokens[1] == poisoned[1].argmax()


def test_later_writes_reach_the_same_buffers() -> None:
    sampler = _sampler(Sampling(1.0, repetition_penalty=1.2))
    before = [value.data_ptr() for value in vars(sampler).values() if isinstance(value, Tensor)]
    with torch.inference_mode():
        sampler.put(0, Sampling(0.5, top_k=3, repetition_penalty=1.1), PROMPT)
    sampler.clear(0)
    assert [value.data_ptr() for value in vars(sampler).values() if isinstance(value, Tensor)] == before
    assert len(before) == 4


def test_nothing_waits_for_the_device() -> None:
    """Fake tensors have no values: reading one on the host, or a shape that depends on one, raises."""
    with FakeTensorMode():
        sampler = Sampler(2, VOCAB, "cpu")
        for row in range(2):
            sampler.put(row, Sampling(0.9, top_k=9, top_p=0.9, min_p=0.1, repetition_penalty=1.2), torch.arange(4))
        tokens = sampler.sample(torch.randn(2, VOCAB), torch.zeros(2, dtype=torch.int32), sampler.variant(2))
        sampler.observe(tokens, torch.ones(2, dtype=torch.bool))
        assert tokens.shape == (2,)


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_a_captured_graph_follows_later_writes() -> None:
    sampler = _sampler(Sampling(1.0), Sampling(1.0))
    logits, positions = _logits(2), torch.zeros(2, dtype=torch.int32, device=DEVICE)
    sampler.sample(logits, positions, SAMPLED)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = sampler.sample(logits, positions, SAMPLED)
    for turn in range(20):
        sampler.put(0, Sampling(1.5, top_k=turn + 1, seed=turn), PROMPT)
        positions.fill_(turn)
        graph.replay()
        assert torch.equal(tokens, sampler.sample(logits, positions, SAMPLED))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_k", 2.0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("nan")),
        ("seed", 1.5),
        ("seed", 1 << 63),
    ],
)
def test_bad_settings_are_refused(option: str, value: Any) -> None:
    with pytest.raises(AlignvecError, match=f"^{option} is .*; it must be "):
        Sampling(**{option: value})


def test_streams() -> None:
    sampling = Sampling(0.7, top_k=5, seed=11)
    streams = [sampling.stream(n) for n in range(100)]
    assert streams[0] == sampling
    assert len({own.seed for own in streams}) == 100
    assert {(own.temperature, own.top_k) for own in streams} == {(0.7, 5)}
    assert sampling.stream(3) == streams[3]
    assert Sampling(seed=2).stream(5) == Sampling(seed=2), "greedy rows need no numbers"


@functools.cache
def _model() -> Any:
    return tiny("Llama", num_hidden_layers=1)


def _translated(**options: Any) -> Sampling:
    """Through `model.generate` itself, as a decoder gets them."""
    got: list[Sampling] = []

    def custom(model: Any, input_ids: Tensor, *, logits_processor: Any, generation_config: Any, **_: Any) -> Tensor:
        got.append(from_transformers(generation_config, logits_processor))
        return input_ids

    ids = torch.tensor([[0, 5, 6], [4, 5, 6]])
    own = {name: options.pop(name) for name in ("logits_processor", "prefix_allowed_tokens_fn") if name in options}
    config = GenerationConfig(max_new_tokens=2, pad_token_id=0, eos_token_id=1, **options)
    _model().generate(ids, attention_mask=(ids > 0).long(), generation_config=config, custom_generate=custom, **own)
    return got[0]


def test_translation_of_what_generate_hands_over() -> None:
    assert _translated(do_sample=False) == Sampling()
    assert _translated(do_sample=False, repetition_penalty=1.3) == Sampling(repetition_penalty=1.3)
    every = dict(temperature=0.7, top_k=40, top_p=0.9, min_p=0.1, repetition_penalty=1.2)
    _model()  # which seeds the generator
    torch.manual_seed(5)
    first, second = _translated(do_sample=True, **every), _translated(do_sample=True, **every)
    torch.manual_seed(5)
    assert _translated(do_sample=True, **every) == first
    assert first == Sampling(**every, seed=first.seed)
    assert second.seed != first.seed
    plain = _translated(do_sample=True, top_k=0, renormalize_logits=True)
    assert plain == Sampling(1.0, seed=plain.seed)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor is not supported"),
        ({"min_length": 4}, "MinLengthLogitsProcessor is not supported"),
        ({"suppress_tokens": [4]}, "SuppressTokensLogitsProcessor is not supported"),
        ({"do_sample": True, "typical_p": 0.9}, "TypicalLogitsWarper is not supported"),
        ({"do_sample": True, "top_h": 0.5}, "TopHLogitsWarper is not supported"),
        ({"prefix_allowed_tokens_fn": lambda *_: [1]}, "PrefixConstrainedLogitsProcessor is not supported"),
    ],
)
def test_processors_that_are_not_understood_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(AlignvecError, match=said):
        _translated(**options)


def test_processors_of_a_user_are_refused_by_name_and_order() -> None:
    class TopKLogitsWarper(warpers.LogitsProcessor):
        """A stranger with a name that is known."""

    config = GenerationConfig(do_sample=True)
    with pytest.raises(AlignvecError, match="TopKLogitsWarper is not supported"):
        from_transformers(config, [TopKLogitsWarper()])
    swapped = [warpers.TopPLogitsWarper(0.9), warpers.TemperatureLogitsWarper(0.7)]
    with pytest.raises(AlignvecError, match="TemperatureLogitsWarper comes after TopPLogitsWarper"):
        from_transformers(config, swapped)
    with pytest.raises(AlignvecError, match="min_tokens_to_keep"):
        from_transformers(config, [warpers.TopPLogitsWarper(0.9, min_tokens_to_keep=2)])
    with pytest.raises(AlignvecError, match="prompt_ignore_length"):
        from_transformers(config, [warpers.RepetitionPenaltyLogitsProcessor(1.1, prompt_ignore_length=3)])
    assert from_transformers(config, None).temperature == 1.0
