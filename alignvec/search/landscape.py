"""The memory of evaluated mixes: what every search asks for rates, so that no mix is measured twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from alignvec.errors import AlignvecError
from alignvec.numbers import float32_number
from alignvec.search.storage import Header, Storage

Mix = Mapping[str, float]
Measure = Callable[[Sequence[dict[str, float]]], Tensor]
Key = tuple[int, ...]  # coefficients in millionths, in the order of the names

MILLION = 1_000_000


class Landscape:
    """Preference rates over the coefficients of some vectors, as far as they are known.

    `measure` takes mixes (coefficients by name) and gives float64 rates [mixes, domains, levels] in [0, 1]; without it
    the landscape is a recorded one, which knows what it was loaded with and no more.
    """

    def __init__(
        self,
        names: Sequence[str],
        domains: Sequence[str],
        levels: Sequence[str],
        measure: Measure | None = None,
        storage: str | Path | None = None,
        key: str = "",
        *,
        batch: int = 64,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Args:
            names: of the vectors; a mix gives a coefficient by name, and 0 to those that it leaves out.
            domains, levels: what the last two dimensions of rates are.
            measure: the evaluator; None for a recorded landscape.
            storage: a file of JSON lines to which every measured mix is appended, and from which what is there already
                is read: a search that was stopped goes on.
            key: what the rates depend on besides the coefficients (model, vectors, questions), as a text: see
                `alignvec.search.landscape_key`. A storage with another one is refused.
            batch: most mixes in a call of `measure`.
            progress: called with the number of mixes just measured.

        Raises AlignvecError for empty or repeated names, domains or levels, a batch below 1, and a storage that is
        damaged or belongs to another landscape.
        """
        for what, given in (("names", names), ("domains", domains), ("levels", levels)):
            if not given or len(set(given)) != len(given):
                raise AlignvecError(
                    f"a landscape's {what} must be different and at least one, not {', '.join(given)!r}"
                )
        if batch < 1:
            raise AlignvecError(f"a landscape measures at least one mix a call, not batch={batch}")
        self.names, self.domains, self.levels, self.key = tuple(names), tuple(domains), tuple(levels), key
        self.measure, self.batch, self.progress = measure, batch, progress
        self._rates: dict[Key, Tensor] = {}
        self._seconds: dict[Key, float] = {}
        self._storage = None
        if storage is not None:
            self._storage = Storage(Path(storage), Header(self.names, self.domains, self.levels, key))
            for coefficients, rates, seconds in self._storage.records:
                self.record(dict(zip(self.names, coefficients, strict=True)), rates, seconds)

    def __len__(self) -> int:
        """How many mixes are known."""
        return len(self._rates)

    def __repr__(self) -> str:
        kind = "recorded" if self.measure is None else "measured"
        return f"Landscape({', '.join(self.names)}; {len(self)} mixes {kind})"

    @property
    def mixes(self) -> list[dict[str, float]]:
        """The known mixes, in the order in which they came."""
        return [self.mix(key) for key in self._rates]

    @property
    def seconds(self) -> float:
        """What measuring all known mixes took."""
        return sum(self._seconds.values())

    def rates(self, mixes: Sequence[Mix]) -> Tensor:
        """Rates of the mixes, float64 [mixes, domains, levels]; those not known yet are measured, in batches.

        Coefficients count to six decimals. Raises AlignvecError for no mixes, a name that no vector has, a coefficient
        that is not finite, a mix that a recorded landscape lacks, and rates of another shape or outside [0, 1].
        """
        keys = self.keys(mixes)
        missing = [key for key in dict.fromkeys(keys) if key not in self._rates]
        if missing and self.measure is None:
            raise AlignvecError(
                f"this recorded landscape has no rates of {show(self.mix(missing[0]))} "
                f"({len(missing)} of {len(keys)} mixes are missing): give it measure=, or keep to its grid"
            )
        for start in range(0, len(missing), self.batch):
            self._measure(missing[start : start + self.batch])
        return torch.stack([self._rates[key] for key in keys])

    def record(self, mix: Mix, rates: Tensor, seconds: float = 0.0) -> None:
        """Make known what a mix was measured to have: rates [domains, levels]; nothing is written to the storage."""
        [key] = self.keys([mix])
        self._rates[key] = self._checked(rates[None])[0]
        self._seconds[key] = seconds

    def view(self) -> View:
        """A counter for one search: see `View`."""
        return View(self)

    def keys(self, mixes: Sequence[Mix]) -> list[Key]:
        """What mixes are known by: their coefficients in millionths."""
        if not mixes:
            raise AlignvecError("there are no mixes to measure: give at least one")
        for mix in mixes:
            for name, coefficient in mix.items():
                if name not in self.names:
                    raise AlignvecError(f"no vector is named {name!r}: there are {', '.join(self.names)}")
                float32_number(coefficient, "the coefficient of", name)
        return [tuple(round(mix.get(name, 0.0) * MILLION) for name in self.names) for mix in mixes]

    def mix(self, key: Key) -> dict[str, float]:
        """The mix of a key."""
        return {name: millionths / MILLION for name, millionths in zip(self.names, key, strict=True)}

    def cost(self, keys: Iterable[Key]) -> float:
        """Seconds that measuring these mixes took when it was done: a batch's time, split evenly."""
        return sum(self._seconds[key] for key in keys)

    def _measure(self, keys: list[Key]) -> None:
        assert self.measure is not None
        begun = time.perf_counter()
        measured = self._checked(self.measure([self.mix(key) for key in keys]), len(keys))
        seconds = (time.perf_counter() - begun) / len(keys)
        if self._storage is not None:
            self._storage.append([(key, rates.tolist(), seconds) for key, rates in zip(keys, measured, strict=True)])
        for key, rates in zip(keys, measured.unbind(), strict=True):
            self._rates[key], self._seconds[key] = rates, seconds
        if self.progress is not None:
            self.progress(len(keys))

    def _checked(self, rates: Tensor, mixes: int = 1) -> Tensor:
        expected = (mixes, len(self.domains), len(self.levels))
        if tuple(rates.shape) != expected:
            raise AlignvecError(f"rates must be [mixes, domains, levels] = {list(expected)}, not {list(rates.shape)}")
        rates = rates.detach().to("cpu", torch.float64)
        if not bool(((rates >= -1e-9) & (rates <= 1 + 1e-9)).all()):
            raise AlignvecError("rates must be shares between 0 and 1: the evaluator gave others")
        return rates


class View:
    """One search's look at a landscape: it counts every mix that is asked for once, whether it was known before or not.

    So a search on a recorded landscape reports the evaluations and the seconds that it would have needed alone. A view
    of a view counts both in itself and in the one that it looks through: `together = landscape.view()`, handed to
    several searches, counts what all of them needed.
    """

    def __init__(self, landscape: Landscape | View) -> None:
        self.landscape: Landscape = landscape.landscape if isinstance(landscape, View) else landscape
        self.names, self.domains, self.levels = self.landscape.names, self.landscape.domains, self.landscape.levels
        self._parent = landscape
        self._seen: dict[Key, Tensor] = {}
        self.waited = 0.0  # seconds spent in `rates`, which is next to nothing where all was known

    def rates(self, mixes: Sequence[Mix]) -> Tensor:
        """As `Landscape.rates`."""
        begun = time.perf_counter()
        rates = self._parent.rates(mixes)
        self.waited += time.perf_counter() - begun
        self._seen.update(zip(self.landscape.keys(mixes), rates.unbind(), strict=True))
        return rates

    def view(self) -> View:
        """A view that counts here, too."""
        return View(self)

    @property
    def evaluations(self) -> int:
        """How many distinct mixes were asked for."""
        return len(self._seen)

    @property
    def seconds(self) -> float:
        """What measuring them took, then or before."""
        return self.landscape.cost(self._seen)

    def known(self) -> tuple[Tensor, Tensor]:
        """The distinct mixes asked for so far, in order, float64: coefficients [mixes, names], rates [mixes, ...]."""
        return torch.tensor(list(self._seen), dtype=torch.float64) / MILLION, torch.stack(list(self._seen.values()))


def show(mix: Mix) -> str:
    """`medical=0.7, legal=-0.3`."""
    return ", ".join(f"{name}={coefficient:g}" for name, coefficient in mix.items())
