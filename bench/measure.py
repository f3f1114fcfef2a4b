"""Rows of results: the cases on one shape after another, checked and timed, and their sums over a model's layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from alignvec import planner
from alignvec.errors import AlignvecError
from alignvec.kernels import operands
from alignvec.kernels.eager import take
from alignvec.kernels.operands import Operand
from alignvec.ops.backend import kernel
from bench import opponents
from bench.cases import FORMATS, REMERGE, REMERGE_CPU, Case
from bench.layers import (
    LAYERS,
    Coefficients,
    Contents,
    Shape,
    Weights,
    check,
    draw_coefficients,
    run,
    sample,
    vector_bytes,
)
from bench.timing import Call, Times, copies, times

Row = dict[str, Any]


class Bench:
    """Where and how often is measured, and the bandwidth that all is held against."""

    def __init__(self, device: str, shapes: Sequence[Shape], bandwidth: float, repeats: int, backend: str) -> None:
        self.device, self.shapes, self.bandwidth, self.repeats = device, tuple(shapes), bandwidth, repeats
        self.kind = torch.device(device).type
        self.backend = planner.resolve_backend(self.kind, backend)
        self.layers = LAYERS[self.kind]
        self.contents = Contents(device)

    def linear(self, cases: Sequence[Case], advance: Callable[[], None] = lambda: None) -> list[Row]:
        """A row for each case and shape, and one for the sum over all layers of the model, `shape` "all"."""
        parts: dict[Case, list[Row]] = {case: [] for case in cases}
        for dtype in dict.fromkeys(case.dtype for case in cases):
            own = [case for case in cases if case.dtype == dtype]
            for shape in self.shapes:
                for case, row in zip(own, self._linear(own, shape), strict=True):
                    parts[case].append(row)
                advance()
        rows = [row for each in parts.values() for row in each]
        merged: dict[str, float] = {}
        for case, each in parts.items():
            total = self._total(each, merged.get(case.dtype))
            if case.way == "merged":
                merged[case.dtype] = total["median_ms"]
                total["ratio"] = 1.0
            rows.append(total)
        return rows

    def _linear(self, cases: Sequence[Case], shape: Shape) -> list[Row]:
        dtype: torch.dtype = getattr(torch, cases[0].dtype)
        weights = self.contents.weights(shape, dtype, copies(shape.out * shape.inputs * dtype.itemsize, self.device))
        generator = torch.Generator(self.device).manual_seed(2)
        x = torch.randn(cases[0].tokens, shape.inputs, generator=generator, device=self.device).to(dtype)
        vectors: dict[tuple[str, ...], list[list[list[Operand]]]] = {}
        calls: dict[str, list[Call]] = {}
        figures: list[tuple[int, float | None]] = []
        for number, case in enumerate(cases):
            if case.formats not in vectors:
                vectors[case.formats] = self._vectors(case.formats, shape, weights)
            drawn = vectors[case.formats]
            c = draw_coefficients(drawn[0][0], weights[0].projections[0], case.rows)
            calls[str(number)], error = self._calls(case, x, weights, drawn, c)
            kept = 2 if case.way == "kept" else 1  # a mix in two halves
            read = kept * weights[0].matrix.nbytes
            read += vector_bytes(drawn[0]) if case.way not in ("merged", "kept") else 0
            figures.append((read + x.nbytes + case.tokens * shape.out * x.element_size(), error))
        taken = times(calls, self.device, self.repeats)
        merged = next(taken[str(i)].median for i, case in enumerate(cases) if case.way == "merged")
        rows = []
        for number, (case, (nbytes, error)) in enumerate(zip(cases, figures, strict=True)):
            row = {"section": case.section, "case": case.name, **self._described(case), "shape": shape.name}
            row |= {"out": shape.out, "in": shape.inputs, "error": error}
            rows.append(row | self._figures(taken[str(number)], nbytes) | {"ratio": taken[str(number)].median / merged})
        return rows

    def _described(self, case: Case) -> Row:
        row = asdict(case) | {"k": len(case.formats), "target": case.target if case.kind == self.kind else None}
        return {key: value for key, value in row.items() if key not in ("name", "kind")}

    def _vectors(self, formats: tuple[str, ...], shape: Shape, weights: Sequence[Weights]) -> list[list[list[Operand]]]:
        """Operands for as many of the copies of the base as exceed the caches together with them."""
        base = weights[0].matrix
        (first,) = self.contents.vectors(formats, shape, base.dtype, 1)
        count = min(len(weights), copies(base.nbytes + vector_bytes(first), self.device))
        return self.contents.vectors(formats, shape, base.dtype, count)

    def _calls(
        self, case: Case, x: Tensor, weights: Sequence[Weights], drawn: list[list[list[Operand]]], c: Coefficients
    ) -> tuple[list[Call], float | None]:
        """The calls to time, one a copy, after the first was checked; its error, where it was checked."""
        pairs = list(zip(weights, drawn, strict=False))
        base, own = pairs[0]
        outs = [weight.shape[0] for weight in base.projections]
        merged = case.precision == "merged"
        if case.way == "merged":
            return [partial(opponents.merged, x, w) for w in weights], None
        if case.way == "concatenated":
            return [opponents.concatenated(x, w, v, c) for w, v in pairs], None
        if case.way == "low-rank":
            made: list[Call] = [opponents.low_rank(x, w, v, c) for w, v in pairs]
        elif case.way == "kept":
            halves = [(torch.empty_like(w.matrix), torch.empty_like(w.matrix)) for w, _ in pairs]
            for (w, v), (high, low) in zip(pairs, halves, strict=True):
                for weight, vectors, h, part in zip(w.projections, v, high.split(outs), low.split(outs), strict=True):
                    self._materialise(weight, vectors, c, h, part)
            made = [partial(opponents.kept, x, high, low) for high, low in halves]
        else:
            choices = (case.execution, case.precision, "torch" if case.way == "torch" else self.backend)
            made = [partial(run, x, w.projections, v, c, *choices) for w, v in pairs]
        y: Any = made[0]()
        results = list(y.split(outs, 1)) if isinstance(y, Tensor) else y
        what = f"{case.name} ({case.way}, {case.execution}, {case.precision}, {case.tokens} tokens) on {outs}"
        slack = 1e-2 if case.way == "low-rank" else 2e-4  # plain torch rounds in between
        return made, check(results, x, base.projections, own, c, what, merged, slack)

    def _materialise(
        self, weight: Tensor, vectors: list[Operand], c: Coefficients, out: Tensor, low: Tensor | None
    ) -> None:
        materialise = kernel(weight.device, self.backend, "materialise", "materialise")
        materialise(weight, vectors, c.columns, c.table, c.rows, out=out, low=low)

    def remerge(self, quick: bool = False, advance: Callable[[], None] = lambda: None) -> list[Row]:
        """Writing a mix of every format into all weights, bfloat16, and of dense vectors by other means."""
        formats = {name: own for name, own in FORMATS.items() if own and (name == "dense" or not quick)}
        parts: dict[str, list[Row]] = {}
        for shape in self.shapes:
            for row in self._remerge(shape, formats):
                parts.setdefault(row["case"], []).append(row)
            advance()
        rows = [row for own in parts.values() for row in own]
        totals = {name: self._total(own, None) for name, own in parts.items()}
        for name, total in totals.items():
            total["speedup"] = totals[opponents.CHAIN]["median_ms"] / total["median_ms"]
            if name == "dense":
                total |= {"target_share": REMERGE} if self.kind == "cuda" else {"target_speedup": REMERGE_CPU}
        return [*rows, *totals.values()]

    def _remerge(self, shape: Shape, formats: dict[str, tuple[str, ...]]) -> Iterator[Row]:
        nbytes_of_both = 2 * shape.out * shape.inputs * torch.bfloat16.itemsize
        weights = self.contents.weights(shape, torch.bfloat16, copies(nbytes_of_both, self.device))
        outs = [w.matrix.clone() for w in weights]  # whose pages are there before a call is timed
        calls: dict[str, list[Call]] = {}
        nbytes: dict[str, int] = {}
        for name, own in formats.items():
            drawn = self._vectors(own, shape, weights)
            c = draw_coefficients(drawn[0][0], weights[0].projections[0], 1)
            calls[name] = [self._pass(w, v, c, out) for w, v, out in zip(weights, drawn, outs, strict=False)]
            nbytes[name] = 2 * outs[0].nbytes + vector_bytes(drawn[0])
            calls[name][0]()
            _check_mix(weights[0], drawn[0], c, outs[0], f"materialise of {name} on {shape.name}")
            if name == "dense":
                for w, v, out in zip(weights, drawn, outs, strict=False):
                    for other, call in opponents.remerges(w, v, c, out, self.kind == "cuda").items():
                        calls.setdefault(other, []).append(call)
                        nbytes[other] = nbytes[name]
        taken = times(calls, self.device, self.repeats)
        for name in calls:
            own = formats.get(name, FORMATS["dense"])
            row = {"section": "re-merge", "case": name, "formats": own, "k": len(own)}
            row |= {"dtype": "bfloat16", "way": "operator" if name in formats else "torch"}
            row |= {"shape": shape.name, "out": shape.out, "in": shape.inputs}
            row |= {"speedup": taken[opponents.CHAIN].median / taken[name].median}
            yield row | self._figures(taken[name], nbytes[name])

    def _pass(self, w: Weights, vectors: list[list[Operand]], c: Coefficients, out: Tensor) -> Call:
        parts = out.split([weight.shape[0] for weight in w.projections])

        def call() -> None:
            for weight, own, part in zip(w.projections, vectors, parts, strict=True):
                self._materialise(weight, own, c, part, None)

        return call

    def _figures(self, taken: Times, nbytes: int, layers: int = 1) -> Row:
        floor = nbytes / self.bandwidth
        row: Row = {f"{key}_ms": 1e3 * layers * getattr(taken, key) for key in ("median", "p20", "p80")}
        row["samples"] = taken.samples
        row |= {"bytes": nbytes * layers, "gb_per_s": 1e-9 * nbytes / taken.median}
        return row | {"floor_ms": 1e3 * layers * floor, "share_of_floor": floor / taken.median}

    def _total(self, rows: Sequence[Row], merged_ms: float | None) -> Row:
        """The sum over the shapes, times the model's layers."""
        first = {key: value for key, value in rows[0].items() if key not in ("out", "in", "ratio")}
        sums = {f: 1e-3 * sum(row[f"{f}_ms"] for row in rows) for f in ("median", "p20", "p80")}
        total = first | {"shape": "all", "layers": self.layers}
        if first.get("error") is not None:
            total["error"] = max(row["error"] for row in rows)
        samples = min(row["samples"] for row in rows)
        total |= self._figures(Times(**sums, samples=samples), sum(row["bytes"] for row in rows), self.layers)
        if merged_ms:
            total["ratio"] = total["median_ms"] / merged_ms
        return total


def _check_mix(weights: Weights, vectors: list[list[Operand]], c: Coefficients, out: Tensor, what: str) -> None:
    """AlignvecError where the mix in `out` is not the rounded float64 one, over sampled rows."""
    outs = [weight.shape[0] for weight in weights.projections]
    for weight, own, part in zip(weights.projections, vectors, out.split(outs), strict=True):
        some = sample(weight.shape[0], weight.device)
        base, truth = weight[some], weight[some].double()
        for i, operand in enumerate(own):
            truth += c.table[0, c.columns[i]].double() * operands.decode(take(operand, some), base).double()
        error = float((part[some].double() - truth).norm() / truth.norm())
        bound = 1.1 * float((truth.to(part.dtype).double() - truth).norm() / truth.norm()) + 1e-6
        if not error <= bound:
            raise AlignvecError(f"{what} is wrong: its relative error is {error:.1e}, rounding explains {bound:.1e}")
