"""Threads that set, materialise and restore while a decoder decodes: every token, and every prefix kept, is of one mix.

The switch interval is small, so that threads take turns in the middle of everything.
"""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import alignvec
from tests.decoding.truth import Mix, Truth
from tests.models import random_vector, tiny

SECONDS = 1.0
FIRST, SECOND = list(range(3, 23)), list(range(40, 57))
A, B, C = {"a": 1.0}, {"a": -1.0}, {"b": 1.0}
# What a thread may find set: the mixes of the two rows.
PAIRS: list[tuple[Mix, Mix]] = [(A, B), (B, C), (C, A)]
ALIKE: list[tuple[Mix, Mix]] = [(A, A), (B, B), (C, C)]


@pytest.fixture(autouse=True)
def often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def build() -> tuple[alignvec.Alignment, Truth]:
    model = tiny(num_hidden_layers=1)
    vectors = {"a": random_vector(model, 1, 0.3), "b": random_vector(model, 2, 0.3)}
    truth = Truth(model, vectors)
    for mix in (A, B, C):
        truth.model(mix)
    alignment = alignvec.attach(model, vectors)
    alignment.set_rows([A, B])  # which tries the model
    return alignment, truth


def setting(alignment: alignvec.Alignment) -> Iterator[Callable[[], Any]]:
    for first, second in itertools.cycle(PAIRS):
        yield lambda pair=(first, second): alignment.set_rows(pair)


def moving(alignment: alignvec.Alignment) -> Iterator[Callable[[], Any]]:
    for one, two, three in itertools.cycle(itertools.permutations((A, B, C))):
        yield lambda mix=one: alignment.materialise(mix, measure=False)
        yield lambda mix=two: alignment.materialise(mix, measure=False)
        yield alignment.restore
        yield lambda mix=three: alignment.set(mix)


class Writer(threading.Thread):
    """Calls one after another until the with block ends, which fails if one of them failed."""

    def __init__(self, calls: Iterator[Callable[[], Any]]) -> None:
        super().__init__(daemon=True)
        self.calls, self.done, self.failure = calls, 0, None

    def __enter__(self) -> Writer:
        next(self.calls)()
        self.going = True
        self.start()
        return self

    def run(self) -> None:
        try:
            while self.going:
                next(self.calls)()
                self.done += 1
                time.sleep(0)
        except BaseException as error:
            self.failure = error

    def __exit__(self, *_: object) -> None:
        self.going = False
        self.join()
        assert self.failure is None, self.failure
        assert self.done > 5


def require_true(decoder: alignvec.Decoder, truth: Truth) -> None:
    for ((weights, mix), _), kept in decoder.prefixes._kept.items():
        named = dict(zip("ab", weights or mix, strict=True))
        assert truth.error(named, kept.tokens.tolist(), kept.states) < 1e-4, (weights, mix)


@pytest.mark.parametrize("fuse", [None, False], ids=["fused", "own forward"])
@pytest.mark.parametrize(
    ("calls", "allowed"), [(setting, PAIRS), (moving, ALIKE)], ids=["set_rows", "materialise, restore and set"]
)
def test_rows_that_follow(calls: Any, allowed: list[tuple[Mix, Mix]], fuse: bool | None) -> None:
    """Whole texts are written anew with each change of mixes, so a token shows what its step was computed under."""
    alignment, truth = build()
    decoder = alignment.decoder(max_batch=2, max_length=64, prefix_bytes=1 << 22, fuse=fuse)
    seen: list[tuple[list[list[int]], list[int]]] = []
    with Writer(calls(alignment)):
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            texts = [list(FIRST), list(SECOND)]
            rows = decoder.admit(texts, [None, None], [alignvec.Sampling()] * 2, 6, recompute=True)
            while decoder.going:
                tokens = decoder.step()
                seen.append(([list(text) for text in texts], [tokens[row] for row in rows]))
                for text, row in zip(texts, rows, strict=True):
                    text.append(tokens[row])
            for row in rows:
                decoder.leave(row)
    assert len(seen) > 20
    wrong = [
        case
        for case in seen
        if not any(all(map(truth.likely, pair, *case)) for pair in allowed)  # both rows under one write
    ]
    assert not wrong, f"{len(wrong)} of {len(seen)} steps are of no write"
    require_true(decoder, truth)


def test_prefixes_of_prompts() -> None:
    """What joins and leaves at once, under what happens to be set or materialised."""
    alignment, truth = build()
    decoder = alignment.decoder(max_batch=1, max_length=64, prefix_bytes=1 << 24)
    alignment.set(A)
    count = 0
    with Writer(moving(alignment)):
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            decoder.leave(decoder.join([*FIRST, 30 + count % 60, 5 + count % 7]))
            count += 1
    assert count > 20
    assert len(decoder.prefixes._kept) > 10
    require_true(decoder, truth)


def test_forward_passes_beside_a_decoder() -> None:
    """A model's own forward passes in one thread, a decoder in another, weights that move in a third."""
    alignment, truth = build()
    ids, outputs = torch.tensor([FIRST]), []
    alignment.set(A)
    decoder = alignment.decoder(max_batch=1, max_length=64)
    answers = []

    def forwards() -> Iterator[Callable[[], Any]]:
        def forward() -> None:
            with torch.no_grad():
                outputs.append(alignment.model(ids, use_cache=False).logits[0])

        return itertools.repeat(forward)

    with Writer(moving(alignment)), Writer(forwards()):
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            row = decoder.join(FIRST, max_new_tokens=1, recompute=True)
            answers.append(decoder.step()[row])
            decoder.leave(row)
    with torch.no_grad():
        true = [truth.model(mix)(ids, use_cache=False).logits[0] for mix in (A, B, C)]
    for output in outputs:
        assert min(float((output.double() - own).norm() / own.norm()) for own in true) < 1e-4
    assert all(any(truth.likely(mix, FIRST, token) for mix in (A, B, C)) for token in answers)
