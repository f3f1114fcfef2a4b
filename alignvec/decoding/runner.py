"""How a decoder runs its model: found out once by trying, and made anew when the weights move."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
from transformers import DynamicCache

from alignvec.coefficients import Coefficients
from alignvec.decoding import limits
from alignvec.decoding.cache import RowCache
from alignvec.decoding.forward import ModelForward
from alignvec.decoding.fused import FusedForward
from alignvec.decoding.step import Forward, Graphs, State
from alignvec.decoding.trial import OwnForwardError, Trial
from alignvec.errors import AlignvecError, RowsError

Make = Callable[[Any, RowCache], Forward]
_FLAT: Make = functools.partial(ModelForward, flat=True)


class _UnfitError(AlignvecError):
    """No way of running computes what the model's own forward does. problem: the reason alone."""

    def __init__(self, message: str, problem: str | None) -> None:
        super().__init__(message)
        self.problem = problem or message


class Runner:
    """Our own layers or the model's forward, and the graphs of its steps.

    room: most tokens of a row, `max_length` or fewer; short: why fewer, or None.
    reason: why our layers do not run; None where they do. prompted: a cache as the model writes it, for its shapes.
    alike: why all rows of a step must have one mix; None where they may differ.

    Raises:
        AlignvecError: a model that is compiled, on several devices, no decoder, that keeps more than keys and values,
            or that decodes with a static cache to other logits than without; `fuse=True` where our layers do not
            compute the same; graphs without CUDA or of a model that reads lengths on the host.
    """

    def __init__(
        self,
        model: Any,
        coefficients: Coefficients | None,
        fuse: bool | None,
        graphs: bool | None,
        max_batch: int,
        max_length: int,
    ) -> None:
        self.model, self._fuse, self._rows = model, fuse, min(max_batch, 2)
        device = _device(model)
        self.graphs = device.type == "cuda" if graphs is None else graphs
        if self.graphs and device.type != "cuda":
            raise AlignvecError(f"graphs=True needs a CUDA device; the model is on {device}")
        limits.require_keys_and_values(model)
        if self.graphs and limits.length_dependent(model):
            if graphs:
                raise AlignvecError("graphs=True, but the model's rotary frequencies follow lengths on the host")
            self.graphs = False
        self.room, self.short = max_length, None
        most = limits.most_tokens(model, alone=max_batch == 1 and device.type == "cpu")
        if most is not None and most[0] < max_length:
            self.room, self.short = most
        self._programs: dict[Hashable, tuple[Forward, Graphs | None]] = {}
        self.reason: str | None = "fuse=False"
        self.alike: str | None = None
        self._make: Make = ModelForward
        with torch.inference_mode(False), torch.no_grad():
            self.prompted = self._tried(coefficients)
        self._with_mixes = coefficients is not None

    @property
    def rows_differ(self) -> bool:
        """Whether it was tried, and found, that the rows of a step may have different mixes."""
        return self._with_mixes and self.alike is None

    def program(self, state: State, changes: int, coefficients: Coefficients | None) -> tuple[Forward, Graphs | None]:
        """What steps run for the weights where they are now.

        changes: how often they moved on purpose. Graphs read addresses: other weights take other graphs.
        coefficients: where mixes go to, if they do; the first time that they do the model is tried with them.

        Raises:
            AlignvecError: the model went to another device or dtype, or cannot be decoded with mixes.
        """
        if coefficients is not None and not self._with_mixes:
            with torch.inference_mode(False), torch.no_grad():
                self._tried(coefficients)
            self._with_mixes = True
        weight, own = self.model.get_input_embeddings().weight, state.cache.layers[0][0]
        key = changes, weight.data_ptr()
        if key not in self._programs:
            if (weight.device, weight.dtype) != (own.device, own.dtype):
                raise AlignvecError(
                    f"the model is {weight.dtype} on {weight.device} and the decoder {own.dtype} on {own.device}; "
                    "make a new one"
                )
            self._programs = {key: (self._make(self.model, state.cache), Graphs(state) if self.graphs else None)}
        return self._programs[key]

    def _tried(self, coefficients: Coefficients | None) -> DynamicCache:
        """Rows under mixes of their own, else under one mix, else one row alone."""
        fuse, rows = self._fuse, self._rows
        if rows > 1 and coefficients is not None:
            try:
                return self._try(coefficients, fuse, rows, apart=True)
            except (RowsError, _UnfitError) as refusal:
                alike = refusal.problem
            prompted = self._try(coefficients, fuse, rows)
            self.alike = alike
            return prompted
        return self._try(coefficients, fuse, rows)

    def _try(
        self, coefficients: Coefficients | None, fuse: bool | None, rows: int, *, apart: bool = False
    ) -> DynamicCache:
        """Set how the model is run; a cache as it writes it."""
        name = type(self.model).__name__
        try:
            trial = Trial(self.model, coefficients, rows, apart, self.room)
        except AlignvecError:
            raise
        except Exception as error:  # whatever a model's code makes of a cache that is not its own
            why = str(error) or type(error).__name__
            raise _UnfitError(
                f"{name} cannot be decoded with a static cache: {why}; use model.generate", why
            ) from error
        if fuse is not False:
            self.reason = self._problem(trial, FusedForward)
            if self.reason is None:
                self._make = FusedForward
                return trial.prompted
            if fuse:
                raise AlignvecError(f"fuse=True, but {name} cannot have our own layers: {self.reason}")
        problem = limits.one_position(self.model) if rows > 1 else None
        ways: tuple[Make, ...] = (ModelForward, _FLAT) if problem is None else ()
        for make in ways:
            other = self._problem(trial, make)
            if other is None:
                self._make = make
                return trial.prompted
            problem = problem or other
        if rows > 1 and not apart and self._alone(coefficients):
            raise AlignvecError(
                f"{name} cannot decode rows of different lengths in one step: {problem}; make the decoder with "
                "max_batch=1, or use model.generate"
            )
        advice = "it is in training mode, call model.eval()" if self.model.training else "use model.generate"
        raise _UnfitError(f"{name} cannot be decoded with a static cache: {problem}; {advice}", problem)

    def _problem(self, trial: Trial, make: Make) -> str | None:
        """Why steps that are made like this are not used."""
        try:
            return trial.differs(lambda cache: make(self.model, cache))
        except OwnForwardError:
            raise
        except Exception as error:  # of ours, or whatever a model's code makes of a cache that is not its own
            return str(error) or type(error).__name__

    def _alone(self, coefficients: Coefficients | None) -> bool:
        """Whether one row can be decoded where two cannot."""
        try:
            self._try(coefficients, False, 1)
        except AlignvecError:
            return False
        return True


def _device(model: Any) -> torch.device:
    """The device of a model that can be decoded."""
    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "config"):
        raise AlignvecError(f"{type(model).__name__} is no transformers causal language model")
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise AlignvecError("the model is compiled; give the decoder the model as it was before")
    if model.config.is_encoder_decoder or model.get_output_embeddings() is None:
        raise AlignvecError(f"{type(model).__name__} is no decoder with a language-modelling head")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or next(iter(devices)).type == "meta":
        names = ", ".join(sorted(map(str, devices)))
        raise AlignvecError(f"a decoder needs the whole model on one device; this one is on {names}")
    return devices.pop()
