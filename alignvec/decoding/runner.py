"""How a decoder runs its model: found out once by trying, and made anew when the weights move."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from transformers import DynamicCache

from alignvec.coefficients import Coefficients
from alignvec.decoding import trial
from alignvec.decoding.forward import ModelForward
from alignvec.decoding.fused import FusedForward, UnrecognisedError
from alignvec.decoding.step import Forward, Graphs, State
from alignvec.errors import AlignvecError


class Runner:
    """Our own layers or the model's forward, and the graphs of its steps.

    reason: why our layers do not run; None where they do. prompted: a cache as the model writes it, for its shapes.

    Raises:
        AlignvecError: a model that is compiled, on several devices, no decoder, or that decodes with a static cache to
            other logits than without; `fuse=True` where our layers do not compute the same; graphs without CUDA.
    """

    def __init__(self, model: Any, coefficients: Coefficients | None, fuse: bool | None, graphs: bool | None) -> None:
        self.model = model
        device = _device(model)
        self.graphs = device.type == "cuda" if graphs is None else graphs
        if self.graphs and device.type != "cuda":
            raise AlignvecError(f"graphs=True needs a CUDA device; the model is on {device}")
        self._programs: dict[Hashable, tuple[Forward, Graphs | None]] = {}
        self.reason: str | None = "fuse=False"
        with torch.inference_mode(False), torch.no_grad():
            self.prompted = self._try(coefficients, fuse)

    def program(self, state: State, changes: int) -> tuple[Forward, Graphs | None]:
        """What steps run for the weights where they are now.

        changes: how often they moved on purpose. Graphs read addresses: other weights take other graphs.

        Raises:
            AlignvecError: the model went to another device or dtype.
        """
        weight, own = self.model.get_input_embeddings().weight, state.cache.layers[0][0]
        key = changes, weight.data_ptr()
        if key not in self._programs:
            if (weight.device, weight.dtype) != (own.device, own.dtype):
                raise AlignvecError(
                    f"the model is {weight.dtype} on {weight.device} and the decoder {own.dtype} on {own.device}; "
                    "make a new one"
                )
            kind = FusedForward if self.reason is None else ModelForward
            self._programs = {key: (kind(self.model, state.cache), Graphs(state) if self.graphs else None)}
        return self._programs[key]

    def _try(self, coefficients: Coefficients | None, fuse: bool | None) -> DynamicCache:
        model, name = self.model, type(self.model).__name__
        try:
            prompted = trial.prompt(model, coefficients)
            if fuse is not False:
                try:
                    self.reason = trial.differs(model, prompted, lambda c: FusedForward(model, c), coefficients)
                except UnrecognisedError as difference:
                    self.reason = str(difference)
                if self.reason is None:
                    return prompted
                if fuse:
                    raise AlignvecError(f"fuse=True, but {name} cannot have our own layers: {self.reason}")
            other = trial.differs(model, prompted, lambda c: ModelForward(model, c), coefficients)
        except AlignvecError:
            raise
        except Exception as error:  # whatever a model's code makes of a cache that is not its own
            raise AlignvecError(f"{name} cannot be decoded with a static cache: {error}; use model.generate") from error
        if other is not None:
            raise AlignvecError(f"{name} cannot be decoded with a static cache: {other}; use model.generate")
        return prompted


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
