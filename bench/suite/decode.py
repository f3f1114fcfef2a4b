"""Decode: seconds of one step of a batch at a context, vectors on the fly against every way to run merged weights.

"decoder" is alignvec's own loop; "merged" in it, the same loop on plain weights, is the fair opponent. Merged weights
serve one mix: a batch of several takes a copy of the model for each ("merged copies"), or a re-merge a switch.
"base only" has three int4 vectors attached, and every coefficient 0. Of "zipf" mixes the m-th has rows by 1 / m.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch

import alignvec
from alignvec import Decoder
from bench import opponents, record
from bench.record import Row
from bench.suite import breakeven, loops, models
from bench.suite.breakeven import ONE_PASS
from bench.suite.case import Case, Setting
from bench.suite.decoders import Mix, decoder, joined, prompt, room, steps, timed, twin
from bench.suite.remerge import Remerge
from bench.timing import Call, samples

FORMATS = ("dense", "lossless", "int4", "sign", "low-rank:rank=64")
ABLATED = ("int4", "sign")
BASE, MERGED, COPIES = "base only", "merged", "merged copies"
CONCATENATED, PEFT = "dense, concatenated K", "PEFT, low-rank:rank=64"
K = 3
DECODER, UNFUSED, UNGRAPHED = "decoder", "decoder, transformers' layers", "decoder, no CUDA graphs"
EAGER, COMPILED = "transformers", "transformers, static cache, compiled"
OPTIONS: dict[str, dict[str, Any]] = {DECODER: {}, UNFUSED: {"fuse": False}, UNGRAPHED: {"graphs": False}}


@dataclass(frozen=True)
class Scale:
    """Tokens that a row has before it decodes, sequences of a batch, numbers of vectors, and who has which mix."""

    context: int
    batches: tuple[int, ...]
    vectors: tuple[int, ...]
    kinds: tuple[str, ...] = ("uniform", "zipf", "distinct")

    @property
    def pairs(self) -> list[tuple[int, str]]:
        """Batches with the popularity of their mixes; a single row has one mix, which is its own."""
        return [(batch, kind) for batch in self.batches for kind in (self.kinds if batch > 1 else self.kinds[:1])]


SCALES = {
    "mistral-7b": Scale(1024, (1, 4, 16, 64), (1, 3, 8)),
    "small": Scale(128, (1, 4), (K,), ("uniform", "distinct")),
    "tiny": Scale(24, (1, 4), (K,)),
}

# On an H200, mistral-7b, at a context of 1,024 tokens, every row with a mix of its own: by format and batch.
SECONDS = {("sign", 1): 5.2e-3, ("int4", 1): 7.0e-3, (MERGED, 1): 4.4e-3}
RATIOS = {("sign", 1): 1.25, ("int4", 1): 1.7, ("sign", 16): 1.3, ("int4", 16): 1.3}


def popularity(kind: str, rows: int) -> list[int]:
    """Which mix each row has, the most popular first: one for all, one for each, or by the weights 1, 1/2, 1/3, ..."""
    if kind != "zipf":
        return [row if kind == "distinct" else 0 for row in range(rows)]
    weights = [1 / (mix + 1) for mix in range(rows)]
    ends = [sum(weights[: mix + 1]) / sum(weights) for mix in range(rows)]
    return [next(mix for mix, end in enumerate(ends) if (row + 0.5) / rows < end) for row in range(rows)]


def over_merged(name: str) -> str:
    return f"{name}, over merged"


def cases(setting: Setting) -> list[Case]:
    scale = SCALES[setting.model]
    best = setting.model == "mistral-7b" and setting.kind == "cuda" and "H200" in record.device_name(setting.device)
    made: list[Case] = []

    def add(name: str, k: int, batch: int, mixes: str = "uniform", loop: str = DECODER, missing: str = "") -> None:
        said = {"k": k, "batch": batch, "mixes": mixes, "loop": loop, "context": scale.context}
        judged = best and loop == DECODER and k in (0, K) and (batch == 1 or mixes == "distinct")
        missing = missing or _missing(setting, loop)
        target = SECONDS.get((name, batch)) if judged else None
        made.append(Case("decode", name, said, target=target, missing=missing))
        if loop == DECODER and name in (*FORMATS, BASE):
            target = RATIOS.get((name, batch)) if judged else None
            made.append(Case("decode", over_merged(name), said, "x", target=target))

    for batch in scale.batches:
        for loop in (DECODER, UNFUSED, UNGRAPHED, EAGER, COMPILED):
            add(MERGED, 0, batch, loop=loop)
    for batch, kind in scale.pairs:
        if kind != "uniform":
            add(COPIES, 0, batch, kind)
    for name in (BASE, *FORMATS):
        for k in scale.vectors if name != BASE else (K,):
            for batch, kind in scale.pairs:
                add(name, k, batch, kind)
                if name in ABLATED and k == K and (batch == 1 or kind == "distinct"):
                    add(name, k, batch, kind, UNFUSED)
                    add(name, k, batch, kind, UNGRAPHED)
    for batch, kind in scale.pairs:
        if kind == "uniform":
            add(CONCATENATED, K, batch, loop=UNFUSED)
            add(PEFT, K, batch, loop=UNFUSED)
            add(PEFT, K, batch, loop=EAGER)
        if kind == "distinct":
            add(PEFT, 1, batch, kind, EAGER)
            add(PEFT, K, batch, kind, EAGER, "PEFT gives a row of a mixed batch one adapter, not several")
    for name in (*(f"{ONE_PASS}, {text}" for text in FORMATS), opponents.CHAIN):
        slow = "low-rank" in name and setting.kind == "cpu"
        made.append(Case("decode", name, {"k": K}, missing="it takes seconds on a CPU" if slow else ""))
    return [*made, *breakeven.cases(setting, FORMATS, K)]


def _missing(setting: Setting, loop: str) -> str:
    if setting.kind == "cuda":
        return ""
    reasons = {UNGRAPHED: "a CPU has no CUDA graphs", COMPILED: "compiling takes longer than this section may on a CPU"}
    return reasons.get(loop, "")


def measure(setting: Setting, cases: Sequence[Case]) -> Iterator[Row]:
    """Merged weights in every loop, each format beside them, and the other ways; then where one overtakes another."""
    bench = _Bench(setting, cases)
    blocks: list[tuple[Callable[..., Iterator[Row]], Any]] = [(bench.merged, batch) for batch in bench.scale.batches]
    blocks += [(bench.format, key) for key in dict.fromkeys((c.name, c.parameters["k"]) for c in bench.ours)]
    blocks += [(bench.copies, pair) for pair in bench.scale.pairs]
    blocks += [(bench.concatenated, None), (bench.peft, None)]
    rows: list[Row] = []
    for block, argument in blocks:
        for row in bench.fitting(block, argument):
            rows.append(row)
            yield row
    yield from breakeven.rows(cases, rows, bench.figures, COPIES)


class _Bench:
    """One model with and without vectors, and what is timed on it."""

    def __init__(self, setting: Setting, cases: Sequence[Case]) -> None:
        self.setting, self.cases, self.scale = setting, list(cases), SCALES[setting.model]
        self.ours = [case for case in cases if case.name in (*FORMATS, BASE)]
        self.model: Any = models.build(setting)
        self.merged_decoder = self._decoder(twin(self.model))
        self.ids = prompt(setting, self.model, self.scale.context)
        self.figures: dict[str, breakeven.Figures] = {}

    def fitting(self, block: Callable[..., Iterator[Row]], argument: Any) -> Iterator[Row]:
        """The rows of a block; of one for which the device has no memory, those that it came to."""
        given: list[Case] = []
        self.wanted: list[Case] = []  # the block's own cases, which it sets before it measures
        try:
            for row in block(argument):
                given += [c for c in self.wanted if (c.name, c.parameters) == (row["name"], row["parameters"])]
                yield row
            return
        except torch.OutOfMemoryError:
            pass
        if (alignment := getattr(self.model, "alignment", None)) is not None:
            alignment.detach()
        gc.collect()
        torch.cuda.empty_cache()
        yield from (c.skipped("it does not fit in the device's memory") for c in self.wanted if c not in given)

    def merged(self, batch: int) -> Iterator[Row]:
        """One mix in the weights, in each loop."""
        own = self._want(lambda case: case.name == MERGED and case.parameters["batch"] == batch)
        calls: dict[str, Call] = {}
        with ExitStack() as stack:
            for loop in own:
                if loop in OPTIONS:
                    made = self.merged_decoder if loop == DECODER else self._decoder(twin(self.model), **OPTIONS[loop])
                    calls[loop] = stack.enter_context(self._joined(made, [None] * batch))
                else:
                    length = self.scale.context + room(self.setting) if loop == COMPILED else None
                    calls[loop] = loops.Loop(twin(self.model), self.ids, batch, steps(self.setting), length)
            taken = timed(self.setting, calls)
        yield from (own[loop].row(taken[loop]) for loop in calls)

    def format(self, key: tuple[str, int]) -> Iterator[Row]:
        """`k` vectors of a format, for each batch and popularity of mixes, beside the merged weights."""
        name, k = key
        self._want(lambda case: case.name in (name, over_merged(name)) and case.parameters["k"] == k)
        everyone = self.wanted
        remerge = [c for c in self.cases if k == K and c.name in _remerges(name)]
        self.wanted = [*everyone, *remerge]
        text = "int4" if name == BASE else name
        alignment = alignvec.attach(self.model, models.vectors(self.model, text, k), max_rows=max(self.scale.batches))
        used = dict.fromkeys(case.parameters["loop"] for case in everyone)
        decoders = {loop: self._decoder(self.model, **OPTIONS[loop]) for loop in used}
        for batch, kind in self.scale.pairs:
            several = models.mixes(batch, k) if name != BASE else [{} for _ in range(batch)]
            mixes = [several[mix] for mix in popularity(kind, batch)]
            own = [c for c in everyone if (c.parameters["batch"], c.parameters["mixes"]) == (batch, kind)]
            own_loops = dict.fromkeys(case.parameters["loop"] for case in own)
            with ExitStack() as stack:
                calls = {loop: stack.enter_context(self._joined(decoders[loop], mixes)) for loop in own_loops}
                calls[MERGED] = stack.enter_context(self._joined(self.merged_decoder, [None] * batch))
                taken = timed(self.setting, calls)
            for case in own:
                seconds = taken[case.parameters["loop"]]
                yield case.row([median(seconds) / median(taken[MERGED])] if case.unit == "x" else seconds)
        decoders.clear()
        calls.clear()  # which hold decoders, too
        if name in FORMATS and k == K:
            self.figures[name] = breakeven.figures(alignment, max(self.scale.batches))
            yield from self._remerge(remerge, alignment, name)
        alignment.detach()

    def copies(self, pair: tuple[int, str]) -> Iterator[Row]:
        """A merged copy for each mix of a batch, one after another with the rows that are its."""
        batch, kind = pair
        own = list(
            self._want(lambda c: c.name == COPIES and (c.parameters["batch"], c.parameters["mixes"]) == pair).values()
        )
        shares = Counter(popularity(kind, batch))
        needed = len(shares) * models.parameter_bytes(self.model)
        if (
            own
            and self.setting.kind == "cuda"
            and needed > torch.cuda.get_device_properties(self.setting.device).total_memory
        ):
            yield own[0].skipped(f"{len(shares)} copies of the model take {1e-9 * needed:.0f} GB")
            return
        for case in own:
            with ExitStack() as stack:
                calls = []
                for rows in shares.values():
                    made = decoder(self.setting, models.build(self.setting), rows, self.scale.context)
                    calls.append(stack.enter_context(self._joined(made, [None] * rows)))
                yield case.row(timed(self.setting, {COPIES: partial(_in_turn, calls)})[COPIES])

    def concatenated(self, _: None) -> Iterator[Row]:
        """Dense vectors beside the base in one product for each layer, swapped in as plain modules."""
        own = list(self._want(lambda case: case.name == CONCATENATED).values())
        if not own:
            return
        factors = torch.full((K,), 0.5, device=self.setting.device)
        made = self._decoder(loops.concatenate(twin(self.model), factors), **OPTIONS[UNFUSED])
        for case in self.wanted:
            with self._joined(made, [None] * case.parameters["batch"]) as call:
                yield case.row(timed(self.setting, {CONCATENATED: call})[CONCATENATED])

    def peft(self, _: None) -> Iterator[Row]:
        """LoRA adapters: all of them active for all rows, or for each row one, named in the call."""
        self._want(lambda case: case.name == PEFT)
        if not self.wanted:
            return
        batch = max(case.parameters["batch"] for case in self.wanted)
        adapted = loops.peft(twin(self.model), max(batch, K))
        for case in self.wanted:
            batch, mixed = case.parameters["batch"], case.parameters["mixes"] == "distinct"
            names = [f"v{number + 1}" for number in range(batch if mixed else K)]
            adapted.base_model.set_adapter(names[:1] if mixed else names)
            with ExitStack() as stack:
                call: Call
                if case.parameters["loop"] == EAGER:
                    options = {"adapter_names": names} if mixed else {}
                    call = loops.Loop(adapted, self.ids, batch, steps(self.setting), **options)
                else:
                    made = self._decoder(adapted.base_model.model, **OPTIONS[UNFUSED])
                    call = stack.enter_context(self._joined(made, [None] * batch))
                yield case.row(timed(self.setting, {PEFT: call})[PEFT])

    def _remerge(self, own: Sequence[Case], alignment: alignvec.Alignment, name: str) -> Iterator[Row]:
        merge = Remerge(alignment, models.mixes(1, K)[0])
        calls: dict[str, Call] = {f"{ONE_PASS}, {name}": merge.one_pass}
        if name == "dense":
            calls[opponents.CHAIN] = merge.by_torch()[opponents.CHAIN]
        taken = samples(
            {n: [call] for n, call in calls.items()}, self.setting.device, self.setting.repeats, graphs=False
        )
        yield from (case.row(taken[case.name]) for case in own)

    def _want(self, chosen: Callable[[Case], bool]) -> dict[str, Case]:
        """Let the block's cases be those, and give them by loop."""
        self.wanted = [case for case in self.cases if chosen(case)]
        return {case.parameters["loop"]: case for case in self.wanted}

    def _decoder(self, model: Any, **options: Any) -> Decoder:
        return decoder(self.setting, model, max(self.scale.batches), self.scale.context, **options)

    def _joined(self, made: Decoder, mixes: Sequence[Mix | None]) -> Any:
        return joined(made, self.ids, mixes, steps(self.setting))


def _remerges(name: str) -> tuple[str, ...]:
    return (f"{ONE_PASS}, {name}", *([opponents.CHAIN] if name == "dense" else []))


def _in_turn(calls: Sequence[Call]) -> None:
    for call in calls:
        call()
