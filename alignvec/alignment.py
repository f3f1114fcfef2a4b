"""Alignment: the vectors that live on a model, and the coefficients that dial them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from alignvec.coefficients import Coefficients
from alignvec.edit import Edit
from alignvec.errors import AlignvecError
from alignvec.materialised import Buffers, Edited, Materialised
from alignvec.pickling import NotPickled
from alignvec.rowcheck import RowCheck
from alignvec.standing import Reading
from alignvec.stephooks import StepHooks
from alignvec.steps import Values
from alignvec.swaps import Swap, Swaps

if TYPE_CHECKING:
    from alignvec.decoding import Decoder

Mix = Mapping[str, float]


class Alignment(NotPickled):
    """The vectors attached to `model` by `alignvec.attach`, and their live coefficients.

    A model begins with every coefficient 0: it answers as the base. `set` and `set_rows` take effect with the next
    step: the next call of the model, of a model inside of it, or of an edited module by itself. A step under way keeps
    the mix it began with, whichever thread writes. Keys and values already in a cache stay as they were written.
    """

    def __init__(
        self, model: nn.Module, coefficients: Coefficients, swaps: Sequence[Swap], backend: str = "auto"
    ) -> None:
        self.model = model
        self._backend = backend
        self._coefficients = coefficients
        self._swaps = Swaps(model, swaps)
        # Modules that cannot have rows of different coefficients, or why none can; None before that was tried.
        self._unplaced: list[Edit] | AlignvecError | None = None
        self._materialised: Materialised | None = None
        self._buffers: Buffers = {}
        self._attached = False
        self._changes = 0
        self._attach()

    def __repr__(self) -> str:
        state = "materialised" if self._materialised is not None else "attached" if self._attached else "detached"
        return f"Alignment({type(self.model).__name__}, {self.coefficients}, {state})"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the attached vectors, in the order of the table's columns."""
        return self._coefficients.names

    @property
    def max_rows(self) -> int:
        """Most rows of coefficients that one batch can carry."""
        return self._coefficients.max_rows

    @property
    def coefficients(self) -> dict[str, float] | list[dict[str, float]]:
        """What the next step will use: one mix by name, or after `set_rows` a list with one mix per row."""
        materialised = self._materialised
        rows = self._coefficients.mixes if materialised is None else [materialised.mix]
        mixes = [dict(zip(self.names, mix, strict=True)) for mix in rows]
        return mixes[0] if len(mixes) == 1 else mixes

    @property
    def table(self) -> Coefficients:
        """The coefficients that steps read, as long as no mix is materialised."""
        return self._coefficients

    @property
    def weights(self) -> tuple[float, ...]:
        """The mix that the live weights hold; empty while they are the base's."""
        materialised = self._materialised
        return () if materialised is None else materialised.mix

    @contextlib.contextmanager
    def held(self) -> Iterator[Reading]:
        """What the model computes with, read once, and staying so for the length of a with block: other threads'
        `materialise`, `restore` and `detach` wait, and `set` and `set_rows` are for later."""
        with self._coefficients.held():
            mixes = None if self._materialised is not None else tuple(self._coefficients.mixes)
            yield Reading(self.weights, mixes)

    @property
    def changes(self) -> int:
        """How often the live weights moved to other memory, or modules were swapped."""
        return self._changes

    def set(self, mix: Mix | None = None, /, **coefficients: float) -> None:
        """Give every row of every batch this mix; vectors left out get 0.

        Args:
            mix: coefficients by name, for names that are no Python identifiers.
            coefficients: the same, as keywords.

        Raises:
            AlignvecError: unknown name or a coefficient that is not finite; nothing is changed then.
        """
        self._check_live()
        self._write([self._mix(mix, coefficients)])

    def set_rows(self, mixes: Sequence[Mix]) -> None:
        """Give each row of the batch its own mix; vectors left out of a mix get 0.

        With R mixes a batch of B sequences must be a multiple of R, and sequence b takes mix `b * R // B`: beams and
        `num_return_sequences` follow the prompt that they belong to.

        The first time that rows differ, the model is tried on a few tokens: two rows together against each alone.

        Raises:
            AlignvecError: no mixes, more than the table's `max_rows`, an unknown name, a coefficient that is not
                finite, or rows that differ where the model cannot have that; nothing is changed then. A batch that is
                no multiple of R, and inputs of which it is not known whose rows they are, are refused when they come.
        """
        self._check_live()
        if isinstance(mixes, Mapping):
            raise AlignvecError("set_rows takes a list with one mix for each row; set() takes one mix for all")
        self._write([self._coefficients.mix(mix) for mix in mixes])

    @contextlib.contextmanager
    def using(self, mix: Mix | None = None, /, **coefficients: float) -> Iterator[Alignment]:
        """`set` for the length of a with block; what was live before comes back, also after an exception."""
        before = self._coefficients.mixes
        self.set(mix, **coefficients)
        try:
            yield self
        finally:
            if self._attached:
                self._coefficients.write(before)

    @contextlib.contextmanager
    def step(self, batch: int | None = None) -> Iterator[Alignment]:
        """One step for the length of a with block, whatever is called or read in it: for code that reads parameters
        outside of the model's forward (`F.linear(hidden, model.lm_head.weight)` in a chunked loss), which otherwise
        sees the base. Inside of another step it is a part of that one, and changes nothing.

        Args:
            batch: sequences that the calls in it are of; needed where rows have different mixes.

        Raises:
            AlignvecError: detached, a mix is materialised, a batch that the rows do not divide, or inside of a step
                whose rows have different mixes another batch than that one's.
        """
        self._check_live()
        self._coefficients.end_abandoned()
        outer = self._coefficients.step
        if outer is None:
            with self._coefficients.call(batch):
                self._check_live()  # once more: it stays so from here on
                yield self
        else:
            if outer.rows > 1 and batch not in (None, outer.batch):
                raise AlignvecError(
                    f"step(batch={batch}) is inside of a step of {outer.batch} sequences, whose rows have different "
                    "mixes; give that one the batch"
                )
            yield self

    def detach(self) -> None:
        """Put the original modules back: the model is bit for bit what it was before `attach`.

        What was added to the model since then (adapters, hooks, modules) stays. A module that took the place of one of
        ours stays, too, and a warning names it.

        Raises:
            AlignvecError: already detached, or a forward pass is under way.
        """
        with self._coefficients.moving("detach()"):
            if not self._attached:
                raise AlignvecError("this alignment is already detached; attach the vectors again to use it")
            if self._materialised is not None:
                self._restore(self._materialised)
            if lost := self._swaps.put_originals():
                warnings.warn(f"{', '.join(lost)} were replaced after attach and stay as they are", stacklevel=2)
            self._hooks.remove()
            del self.model.alignment
            self._attached = False
            self._coefficients.suspended = True
            self._swaps.clear()  # frees the deltas
            self._buffers.clear()

    @property
    def nbytes(self) -> int:
        """Bytes that the attached operands take on their devices."""
        storages = [part.untyped_storage() for _, _, deltas, _ in self._edited() for part in deltas.parts]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def materialise(
        self, mix: Mix | None = None, /, *, keep: str = "device", measure: bool = True, **coefficients: float
    ) -> dict[str, float]:
        """Write a mix into the live weights, so that the model runs at the speed of a plain one.

        One pass reads the base and the vectors and writes a second buffer, which takes the base's place: the base is
        not touched. Weights are rounded to the model's dtype, as in any merge; the result says what that did to the
        coefficients. A mix that is materialised already is replaced by the new one, in the same buffers. They stay,
        for the next mix, until `detach`. Forward passes of other threads are waited for.

        Args:
            mix, coefficients: as for `set`; without either, the mix that is set.
            keep: where the base waits. "device": beside the mix. "host": in host memory, which leaves the device as
                full as it was.
            measure: False spares the reading of weights that tells the realised coefficients; nothing is returned.

        Returns:
            The realised coefficient of each vector: the projection of the rounded edit on it, over a sample of the
            weights of large models.

        Raises:
            AlignvecError: as `set`; rows have different mixes, weights are offloaded, `keep` is neither of the two, or
                a forward pass is under way.
        """
        if keep not in ("device", "host"):
            raise AlignvecError(f"keep={keep!r} is not one of device, host")
        wanted = self._mix(mix, coefficients) if mix or coefficients else None
        with self._coefficients.moving("materialise()"):
            self._check_attached()
            realised = self._materialise(wanted, keep, measure)
        return dict(zip(self.names, realised, strict=True)) if measure else {}

    def _materialise(self, wanted: Values | None, keep: str, measure: bool) -> list[float]:
        if wanted is None:
            mixes = self._coefficients.mixes
            if len(set(mixes)) > 1:
                raise AlignvecError("materialise needs one mix for all rows; call set() with it first")
            wanted = mixes[0]
        self._swaps.require_in_place()
        edited = list(self._edited())
        for module, name, _, _ in edited:
            if module._parameters[name].device.type == "meta":  # type: ignore[union-attr]
                raise AlignvecError(f"{type(module).__name__}.{name} is offloaded; materialise needs it in memory")
        materialised = self._materialised
        if materialised is None:
            self._changes += 1
            self._materialised = materialised = Materialised(wanted, self._backend, keep, self._buffers)
            self._coefficients.suspended = True
            self._swaps.put_originals()
        self._coefficients.write([wanted])
        try:
            return materialised.write(edited, wanted, measure)
        except BaseException:
            self._restore(materialised)
            raise

    def restore(self) -> None:
        """Undo `materialise`: the weights come back bit for bit and the vectors apply on the fly again. Forward passes
        of other threads are waited for.

        Raises:
            AlignvecError: nothing is materialised, or a forward pass is under way.
        """
        with self._coefficients.moving("restore()"):
            if self._materialised is None:
                raise AlignvecError("nothing is materialised; restore() undoes materialise()")
            self._restore(self._materialised)

    def _restore(self, materialised: Materialised) -> None:
        self._changes += 1
        materialised.undo()
        self._swaps.put_views()
        for swap in self._swaps:
            swap.aligned.edit.settle(swap.aligned)
        self._coefficients.suspended = False
        self._materialised = None

    def decoder(self, **options: Any) -> Decoder:
        """`alignvec.Decoder` of the model: rows that decode side by side, each under its own mix."""
        from alignvec.decoding import Decoder

        self._check_attached()
        return Decoder(self.model, **options)

    def _edited(self) -> Iterator[Edited]:
        """Every edited parameter once: its module, its name there, deltas, and their columns."""
        seen = set()
        for swap in self._swaps:
            edit = swap.aligned.edit
            for name, deltas in edit.deltas.items():
                key = id(swap.original._parameters[name])
                if key not in seen:
                    seen.add(key)
                    yield swap.original, name, deltas, edit.columns

    def _attach(self) -> None:
        self._swaps.put_views()
        self._hooks = StepHooks(self.model, self._coefficients, self._swaps)
        self._coefficients.before_rows = self._try_rows
        self.model.alignment = self  # type: ignore[assignment]
        self._attached = True

    def _try_rows(self, rows: Sequence[Values]) -> None:
        """Find out, once, which modules cannot have different coefficients for the rows; refuse rows that need it."""
        if self._unplaced is None:
            with self._coefficients.held():
                self._check_live()
                self._swaps.require_in_place()
                edits = [swap.aligned.edit for swap in self._swaps]
                try:
                    self._unplaced = RowCheck(self.model, self._coefficients, edits, self._swaps.run_by_row).run()
                except AlignvecError as refusal:
                    self._unplaced = refusal
        if isinstance(self._unplaced, AlignvecError):
            raise self._unplaced
        for edit in self._unplaced:
            if any(len({row[column] for row in rows}) > 1 for column in edit.vectors):
                edit.refuse_rows()

    def _mix(self, mix: Mix | None, coefficients: Mix) -> Values:
        """One mix out of what a call was given; keywords count."""
        if mix is not None and not isinstance(mix, Mapping):
            return self._coefficients.mix(mix)  # which says what is wrong
        return self._coefficients.mix({**(mix or {}), **coefficients})

    def _write(self, mixes: Sequence[Values]) -> None:
        """Stage these rows, unless another thread has materialised a mix, or detached, since that was checked."""
        while not self._coefficients.write(mixes, live=True):
            self._check_live()

    def _check_attached(self) -> None:
        if not self._attached:
            raise AlignvecError("this alignment is detached; attach the vectors again to use it")

    def _check_live(self) -> None:
        self._check_attached()
        if self._materialised is not None:
            raise AlignvecError(
                "a mix is materialised in the weights; call restore() before dialling another one, or materialise() it"
            )
