"""Blend: one answer from the summed logits of several policies (DeRa, arXiv 2402.02992; MOD, arXiv 2406.18853).

Published implementations take a forward pass a policy and token. Here a policy is a row with a mix of its own, and all
rows of a step share every read of the weights. "one policy" is the step that a single mix takes, "separate passes"
runs the policies one after another on the same vectors, "merged models" on plain weights, one set for each policy:
of the latter two the sum of the logits is not counted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from statistics import median

from torch import Tensor

import alignvec
from alignvec import Decoder
from bench.record import Row
from bench.suite import models
from bench.suite.case import Case, Setting
from bench.suite.decoders import GREEDY, Mix, decoder, joined, prompt, run, steps, timed, twin
from bench.timing import Call

FORMATS = ("int4", "sign", "low-rank:rank=64")
K = 3
POLICIES = (2, 4)
CONTEXTS = {"mistral-7b": 1024, "small": 128, "tiny": 24}
PROMPTS = {"mistral-7b": (1, 4), "small": (1,), "tiny": (1, 2)}
ONE, BLEND, SEPARATE, MODELS = "one policy", "blend", "separate passes", "merged models"
OVER_ONE, OVER_SEPARATE = "blend, over one policy", "blend, over separate passes"


def cases(setting: Setting) -> list[Case]:
    made = []
    for text in FORMATS:
        for prompts in PROMPTS[setting.model]:
            said = {"format": text, "k": K, "prompts": prompts, "context": CONTEXTS[setting.model]}
            made.append(Case("blend", ONE, said))
            for policies in POLICIES:
                several = {**said, "policies": policies}
                made += [Case("blend", name, several) for name in (BLEND, SEPARATE, MODELS)]
                made += [Case("blend", name, several, "x") for name in (OVER_ONE, OVER_SEPARATE)]
    return made


def measure(setting: Setting, cases: Sequence[Case]) -> Iterator[Row]:
    """Steps of each format, one policy and several ways of several side by side."""
    model = models.build(setting)
    plain = twin(model)
    context, most = CONTEXTS[setting.model], max(PROMPTS[setting.model])
    ids = prompt(setting, model, context)
    merged = [decoder(setting, plain, most, context) for _ in range(max(POLICIES))]
    for text in FORMATS:
        alignment = alignvec.attach(model, models.vectors(model, text, K), max_rows=max(POLICIES) * most)
        shared = decoder(setting, model, max(POLICIES) * most, context)
        single, *alone = (decoder(setting, model, most, context) for _ in range(1 + max(POLICIES)))
        for prompts in PROMPTS[setting.model]:
            taken: dict[tuple[str, int | None], list[float]] = {}
            for policies in POLICIES:
                mixes = models.mixes(policies, K)
                with ExitStack() as stack:
                    join = partial(_join, stack, ids, prompts, steps(setting))
                    calls: dict[str, Call] = {
                        ONE: join(single, mixes[0]),
                        BLEND: stack.enter_context(_blended(shared, ids.tolist(), mixes, prompts, steps(setting))),
                        SEPARATE: partial(_all, [join(room, mix) for room, mix in zip(alone, mixes, strict=False)]),
                        MODELS: partial(_all, [join(room, None) for room in merged[:policies]]),
                    }
                    found = timed(setting, calls)
                taken[OVER_ONE, policies] = [median(found[BLEND]) / median(found[ONE])]
                taken[ONE, None] = [*taken.get((ONE, None), ()), *found.pop(ONE)]
                taken |= {(name, policies): seconds for name, seconds in found.items()}
                taken[OVER_SEPARATE, policies] = [median(found[BLEND]) / median(found[SEPARATE])]
            own = [c for c in cases if (c.parameters["format"], c.parameters["prompts"]) == (text, prompts)]
            yield from (case.row(taken[case.name, case.parameters.get("policies")]) for case in own)
        alignment.detach()


def _join(stack: ExitStack, ids: Tensor, prompts: int, steps: int, room: Decoder, mix: Mix | None) -> Call:
    return stack.enter_context(joined(room, ids, [mix] * prompts, steps))


@contextlib.contextmanager
def _blended(room: Decoder, ids: list[int], mixes: Sequence[Mix], prompts: int, steps: int) -> Iterator[Call]:
    """Steps of so many prompts, each answered by the mean of all policies."""
    limit, count = room.max_length + 1 - len(ids), len(mixes)
    rows = []
    for _ in range(prompts):
        rows += room.admit([ids] * count, mixes, [GREEDY] * count, limit, weights=[1 / count] * count)
    try:
        yield partial(run, room, steps)
    finally:
        for row in rows:
            room.leave(row)


def _all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()
