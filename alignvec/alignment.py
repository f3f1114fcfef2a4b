"""Alignment: the vectors that live on a model, and the coefficients that dial them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from alignvec import ops
from alignvec.coefficients import Coefficients
from alignvec.errors import AlignvecError
from alignvec.materialised import Buffers, Edited, Materialised
from alignvec.modules import Aligned

if TYPE_CHECKING:
    from alignvec.decoding import Decoder

Mix = Mapping[str, float]


@dataclass
class Swap:
    """One module of the model and the view that stands in for it, at every place that holds it."""

    original: nn.Module
    aligned: Aligned
    places: list[tuple[nn.Module, str]] = field(default_factory=list)

    def put(self, module: nn.Module) -> None:
        other = self.original if module is self.aligned else self.aligned
        module.training = other.training
        for parent, name in self.places:
            parent._modules[name] = module


class Alignment:
    """The vectors attached to `model` by `alignvec.attach`, and their live coefficients.

    A model begins with every coefficient 0: it answers as the base. `set` and `set_rows` take effect with the next
    step (forward pass); a step under way keeps the mix it began with, whichever thread writes. Keys and values already
    in a cache stay as they were written.
    """

    def __init__(
        self, model: nn.Module, coefficients: Coefficients, swaps: Sequence[Swap], backend: str = "auto"
    ) -> None:
        self.model = model
        self._backend = backend
        self._coefficients = coefficients
        self._swaps = list(swaps)
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
        mixes = [dict(zip(self.names, mix, strict=True)) for mix in self._coefficients.mixes]
        return mixes[0] if len(mixes) == 1 else mixes

    @property
    def table(self) -> Coefficients | None:
        """The coefficients that steps read; None while a mix is materialised."""
        return self._coefficients if self._materialised is None else None

    @property
    def weights(self) -> tuple[float, ...]:
        """The mix that the live weights hold; empty while they are the base's."""
        return () if self._materialised is None else self._coefficients.mixes[0]

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
        self._coefficients.write([self._coefficients.mix({**(mix or {}), **coefficients})])

    def set_rows(self, mixes: Sequence[Mix]) -> None:
        """Give each row of the batch its own mix; vectors left out of a mix get 0.

        With R mixes a batch of B sequences must be a multiple of R, and sequence b takes mix `b * R // B`: beams and
        `num_return_sequences` follow the prompt that they belong to.

        Raises:
            AlignvecError: no mixes, more than the table's `max_rows`, an unknown name or a coefficient that is not
                finite; nothing is changed then. A batch that is no multiple of R is refused when it arrives.
        """
        self._check_live()
        self._coefficients.write([self._coefficients.mix(mix) for mix in mixes])

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

    def detach(self) -> None:
        """Put the original modules back: the model is bit for bit what it was before `attach`.

        Raises:
            AlignvecError: already detached.
        """
        if not self._attached:
            raise AlignvecError("this alignment is already detached; attach the vectors again to use it")
        if self._materialised is not None:
            self.restore()
        for swap in self._swaps:
            swap.put(swap.original)
        self._swaps.clear()  # frees the deltas
        self._buffers.clear()
        self._hook.remove()
        del self.model.alignment
        self._attached = False

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
        for the next mix, until `detach`.

        Args:
            mix, coefficients: as for `set`; without either, the mix that is set.
            keep: where the base waits. "device": beside the mix. "host": in host memory, which leaves the device as
                full as it was.
            measure: False spares the reading of weights that tells the realised coefficients; nothing is returned.

        Returns:
            The realised coefficient of each vector: the projection of the rounded edit on it, over a sample of the
            weights of large models.

        Raises:
            AlignvecError: as `set`; rows have different mixes, weights are offloaded, or `keep` is neither of the two.
        """
        self._check_attached()
        if keep not in ("device", "host"):
            raise AlignvecError(f"keep={keep!r} is not one of device, host")
        wanted = self._coefficients.mix({**(mix or {}), **coefficients}) if mix or coefficients else None
        if wanted is None and self._coefficients.rows > 1:
            raise AlignvecError("materialise needs one mix for all rows; call set() with it first")
        edited = list(self._edited())
        for module, name, _, _ in edited:
            if module._parameters[name].device.type == "meta":  # type: ignore[union-attr]
                raise AlignvecError(f"{type(module).__name__}.{name} is offloaded; materialise needs it in memory")
        if wanted is not None:
            self._coefficients.write([wanted])
        if self._materialised is None:
            self._changes += 1
            self._materialised = Materialised(self._backend, keep, self._buffers)
            for swap in self._swaps:
                swap.put(swap.original)
        try:
            realised = self._materialised.write(edited, self._coefficients.mixes[0], measure)
        except BaseException:
            self.restore()
            raise
        return dict(zip(self.names, realised, strict=True)) if measure else {}

    def restore(self) -> None:
        """Undo `materialise`: the weights come back bit for bit and the vectors apply on the fly again.

        Raises:
            AlignvecError: nothing is materialised.
        """
        if self._materialised is None:
            raise AlignvecError("nothing is materialised; restore() undoes materialise()")
        self._changes += 1
        self._materialised.undo()
        self._materialised = None
        for swap in self._swaps:
            swap.put(swap.aligned)

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
        for swap in self._swaps:
            swap.put(swap.aligned)
        # The innermost model that sees whole batches: a step may begin there (a backbone called for its hidden states).
        backbone = getattr(self.model, "base_model", self.model)
        self._hook = backbone.register_forward_pre_hook(self._begin_step, with_kwargs=True)
        self.model.alignment = self  # type: ignore[assignment]
        self._attached = True

    def _begin_step(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._materialised is not None:
            return
        inputs = kwargs.get("input_ids", args[0] if args else None)
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        self._coefficients.batch = None if inputs is None else inputs.shape[0]
        if torch.compiler.is_compiling():
            for device in self._coefficients.devices:
                staged, live = self._coefficients.staged(device), self._coefficients.live(device)
                ops.publish(staged.table, staged.rows, live.table, live.rows)
            return
        self._coefficients.publish()
        rows = self._coefficients.live_rows
        if inputs is not None and inputs.shape[0] % rows:
            raise AlignvecError(
                f"a batch of {inputs.shape[0]} does not divide over the {rows} rows of coefficients; "
                "call set_rows with one mix per sequence, or set() for one mix for all"
            )

    def _check_attached(self) -> None:
        if not self._attached:
            raise AlignvecError("this alignment is detached; attach the vectors again to use it")

    def _check_live(self) -> None:
        self._check_attached()
        if self._materialised is not None:
            raise AlignvecError(
                "a mix is materialised in the weights; call restore() before dialling another one, or materialise() it"
            )
