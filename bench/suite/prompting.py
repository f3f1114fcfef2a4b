"""Prompting: the same control by an instruction in the prompt, against vectors (no instruction) and merged weights.

Measured are the parts of a request: seconds to its first token by the tokens that have to be read, and seconds of a
step by the context. Requests follow from them: in each of `turns` turns a user sends TURN tokens and gets `answer`
tokens, under an instruction of `instruction` tokens for each of `preferences`, or a vector for each. The instruction
lengthens every context. A server that keeps nothing reads the whole conversation in each turn; one that keeps keys and
values ("cached") only what is new, and the instruction never: what that reads attends to is left out. One request is
measured as a whole, beside what follows from its parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from typing import Any

from torch import Tensor

import alignvec
from alignvec import Decoder
from bench.record import Row
from bench.suite import models
from bench.suite.case import Case, Setting
from bench.suite.decoders import decoder, joined, prompt, run, steps, timed, twin
from bench.timing import Call, samples

TURN = 64  # tokens that a user sends in a turn
PLAIN = "plain weights"  # what prompting and merged weights run on
FIRST, STEP, CHECK = "first token", "step", "request, measured"
INSTRUCTION, MERGED = "prompting", "merged"
REQUEST, RATIO, HALF = "request", "over prompting", "longest answer at half the cost of prompting"
KEPT, READ = "keys and values", "tokens read"
REQUESTS = 3  # samples of a request
CLAIM = 0.5  # of the cost of prompting, as the paper says


@dataclass(frozen=True)
class Scale:
    """Requests by all of these, formats of the vectors, and the tokens at which the parts are measured."""

    instructions: tuple[int, ...]
    preferences: tuple[int, ...]
    answers: tuple[int, ...]
    turns: tuple[int, ...]
    formats: tuple[str, ...]
    lengths: tuple[int, ...]

    @property
    def ways(self) -> list[tuple[str, int]]:
        """Plain weights, and each format with a vector for each preference."""
        return [(PLAIN, 0), *product(self.formats, self.preferences)]


SCALES = {
    "mistral-7b": Scale((64, 256, 1024), (1, 3), (32, 256), (1, 4), ("int4", "sign"), (64, 256, 1024, 4096)),
    "small": Scale((64, 256), (1, 3), (8, 64), (1, 4), ("int4",), (64, 256)),
    "tiny": Scale((64,), (1, 2), (8,), (1, 2), ("int4",), (16, 200)),
}


@dataclass(frozen=True)
class Request:
    """A conversation; `cached`: keys and values of what was read before are kept, the instruction's for ever."""

    instruction: int
    preferences: int
    answer: int
    turns: int
    cached: bool

    def read(self, instructed: bool) -> list[int]:
        """Tokens that each turn reads before its first token."""
        if self.cached:
            return [TURN] * self.turns
        return [self.context(instructed, turn) for turn in range(self.turns)]

    def context(self, instructed: bool, turn: int) -> int:
        """Tokens before the answer of a turn."""
        return self.instruction * self.preferences * instructed + turn * (TURN + self.answer) + TURN


def cases(setting: Setting) -> list[Case]:
    scale = SCALES[setting.model]
    made = []

    def add(name: str, unit: str = "s", better: str = "lower", **said: Any) -> None:
        made.append(Case("prompting", name, said, unit, better))

    for way, k in scale.ways:
        for tokens in scale.lengths:
            add(FIRST, way=way, k=k, tokens=tokens)
            add(STEP, way=way, k=k, tokens=tokens)
    for way in (INSTRUCTION, MERGED, scale.formats[0]):
        add(CHECK, way=way, **vars(_checked(scale)))
    sizes = (scale.instructions, scale.preferences, scale.answers, scale.turns, (False, True))
    for request in (Request(*values) for values in product(*sizes)):
        add(REQUEST, way=INSTRUCTION, **vars(request))
        for way in (INSTRUCTION, MERGED):  # vectors read and keep what merged weights do
            add(READ, "tokens", way=way, **vars(request))
            add(KEPT, "B", way=way, **vars(request))
        for way in (MERGED, *scale.formats):
            add(RATIO, "x", way=way, **vars(request))
    for way, instruction, preferences, turns, cached in product(
        (MERGED, *scale.formats), scale.instructions, scale.preferences, scale.turns, (False, True)
    ):
        said = {"instruction": instruction, "preferences": preferences, "turns": turns, "cached": cached}
        add(HALF, "tokens", "higher", way=way, **said)
    return made


def measure(setting: Setting, cases: Sequence[Case]) -> Iterator[Row]:
    """The parts of each way, a whole request, and what follows."""
    scale = SCALES[setting.model]
    model: Any = models.build(setting)
    plain = twin(model)
    parts: dict[tuple[str, int], Parts] = {}
    token_bytes = 0
    for way, k in scale.ways:
        used, mix = (model, models.mixes(1, k)[0]) if k else (plain, None)
        if k:
            alignment = alignvec.attach(model, models.vectors(model, way, k))
        room = decoder(setting, used, 1, max(scale.lengths))
        token_bytes = room.nbytes // room.max_length
        own = [c for c in cases if (c.parameters["way"], c.parameters.get("k")) == (way, k)]
        rows = list(_parts(setting, own, room, mix))
        yield from rows
        parts[way, k] = Parts.of(rows)
        if k < 2:
            checked = [case for case in cases if case.name == CHECK and case.parameters["way"] in _names(way)]
            yield from _checks(setting, checked, used, mix)
        if k:
            alignment.detach()
    yield from (_follows(case, parts, token_bytes) for case in cases if case.name in (REQUEST, READ, KEPT, RATIO, HALF))


def _names(way: str) -> tuple[str, ...]:
    """The ways of control that run on these weights."""
    return (INSTRUCTION, MERGED) if way == PLAIN else (way,)


def _parts(setting: Setting, own: Sequence[Case], room: Decoder, mix: Any) -> Iterator[Row]:
    """First tokens and steps of one sequence; nothing of a prompt is kept from one call to the next."""
    for case in (case for case in own if case.name == STEP):
        ids = prompt(setting, room.model, case.parameters["tokens"])
        with joined(room, ids, [mix], steps(setting)) as call:
            yield case.row(timed(setting, {STEP: call})[STEP])
    room.forget()
    room.prefixes.capacity = 0
    firsts = [case for case in own if case.name == FIRST]
    calls = {str(c.parameters["tokens"]): partial(_answer, room, _ids(setting, room, c), mix, 1) for c in firsts}
    taken = samples({name: [call] for name, call in calls.items()}, setting.device, setting.repeats, graphs=False)
    yield from (case.row(taken[str(case.parameters["tokens"])]) for case in firsts)


def _ids(setting: Setting, room: Decoder, case: Case) -> list[int]:
    return prompt(setting, room.model, case.parameters["tokens"]).tolist()


def _answer(room: Decoder, ids: Sequence[int], mix: Any, tokens: int) -> list[int]:
    """The prompt, and so many tokens after it."""
    row = room.join(ids, mix, max_new_tokens=tokens)
    run(room, tokens)
    text = room.text(row)
    room.leave(row)
    return text


def _checked(scale: Scale) -> Request:
    """The request that is measured as a whole."""
    return Request(scale.instructions[0], scale.preferences[0], scale.answers[0], scale.turns[0], cached=False)


def _checks(setting: Setting, own: Sequence[Case], model: Any, mix: Any) -> Iterator[Row]:
    request = _checked(SCALES[setting.model])
    most = request.context(True, request.turns - 1) + request.answer
    calls: dict[str, Call] = {}
    for case in own:
        room = Decoder(model, max_length=most)
        start = request.instruction if case.parameters["way"] == INSTRUCTION else 0
        turns = prompt(setting, model, request.turns * TURN).view(request.turns, TURN)
        calls[case.parameters["way"]] = partial(
            _conversation, room, prompt(setting, model, start).tolist(), turns, mix, request.answer
        )
    taken = samples({way: [call] for way, call in calls.items()}, setting.device, REQUESTS, graphs=False)
    yield from (case.row(taken[case.parameters["way"]]) for case in own)


def _conversation(room: Decoder, text: list[int], turns: Tensor, mix: Any, answer: int) -> None:
    for turn in turns.tolist():
        text = _answer(room, [*text, *turn], mix, answer)


@dataclass(frozen=True)
class Parts:
    """Measured medians of one way by tokens, between which lines are drawn, and beyond which they go on."""

    first: Mapping[int, float]
    step: Mapping[int, float]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Parts:
        first, step = ({r["parameters"]["tokens"]: r["median"] for r in rows if r["name"] == n} for n in (FIRST, STEP))
        return cls(first, step)

    def seconds(self, request: Request, instructed: bool) -> float:
        """Of each turn, the first token, and a step for each other at the answer's middle."""
        total = 0.0
        for turn, read in enumerate(request.read(instructed)):
            middle = request.context(instructed, turn) + request.answer / 2
            total += line(self.first, read) + (request.answer - 1) * line(self.step, middle)
        return total


def line(points: Mapping[int, float], at: float) -> float:
    """The value at a place of the line through the points."""
    segments = list(pairwise(sorted(points.items())))
    (low, before), (high, after) = next((s for s in segments if at <= s[1][0]), segments[-1])
    return before + (after - before) * (at - low) / (high - low)


def _follows(case: Case, parts: Mapping[tuple[str, int], Parts], token_bytes: int) -> Row:
    said = dict(case.parameters)
    way = said.pop("way")
    plain = parts[PLAIN, 0]
    own = plain if way in _names(PLAIN) else parts[way, said["preferences"]]
    if case.name == HALF:
        return case.row([longest(own, plain, said)])
    request, instructed = Request(**said), way == INSTRUCTION
    seconds = own.seconds(request, instructed)
    values = {
        REQUEST: seconds,
        READ: sum(request.read(instructed)),
        KEPT: token_bytes * (request.context(instructed, request.turns - 1) + request.answer),
        RATIO: seconds / plain.seconds(request, True),
    }
    return case.row([values[case.name]])


def longest(own: Parts, plain: Parts, said: Mapping[str, Any]) -> int:
    """The longest answer, of 1, 2, 4 ... 1024 tokens, with which a way costs CLAIM of prompting or less; 0: none."""
    answers = [1 << n for n in range(11)]
    requests = {answer: Request(answer=answer, **said) for answer in answers}
    held = [n for n, r in requests.items() if own.seconds(r, False) <= CLAIM * plain.seconds(r, True)]
    return max(held, default=0)
