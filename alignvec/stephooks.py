"""Where steps begin and end: at the attached model, and at every model inside of it that holds edited modules."""

from __future__ import annotations

import functools
import math
import sys
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from alignvec.coefficients import Coefficients
from alignvec.edit import publish_traced
from alignvec.errors import AlignvecError
from alignvec.modules import Aligned
from alignvec.roworder import named_tensors
from alignvec.swaps import Swaps
from alignvec.tracing import traced

_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


@functools.cache
def _settle_with_compile() -> None:
    """torch.compile runs a compiled model's own hooks by themselves: they then run as they are, and are traced where
    they are a part of what is compiled. On first use: torch._dynamo imports triton."""
    from torch._dynamo.eval_frame import skip_code

    for function in (StepHooks._open, StepHooks._close, traced):
        skip_code(function.__code__)
    for name in ("_enter", "_leave"):
        setattr(StepHooks, name, torch.compiler.disable(getattr(StepHooks, name)))


class StepHooks:
    """Forward hooks on a model, its backbone, encoders, decoders and towers.

    Whichever is called outside of a step opens one for the length of its call, and what runs inside sees that. In a
    graph that is compiled the step begins with the operator `alignvec::publish`, at the outermost of those that it
    contains.
    """

    def __init__(self, model: nn.Module, coefficients: Coefficients, swaps: Swaps) -> None:
        from transformers import PreTrainedModel

        _settle_with_compile()
        self.model, self._coefficients, self._swaps = model, coefficients, swaps
        self._handles = []
        for module in model.modules():
            whole = module is model or isinstance(module, PreTrainedModel)
            if whole and any(isinstance(inner, Aligned) for inner in module.modules()):
                self._handles.append(module.register_forward_pre_hook(self._open, with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._close, always_call=True))
                if hasattr(module, "resize_token_embeddings"):
                    module.__dict__["resize_token_embeddings"] = _refuse_resize

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        for module in self.model.modules():
            if module.__dict__.get("resize_token_embeddings") is _refuse_resize:
                del module.__dict__["resize_token_embeddings"]
        self._handles.clear()

    def _open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        coefficients = self._coefficients
        if traced():
            if not self._swaps.standing:  # a mix is materialised
                return
            if coefficients.thread.traced_depth == 0:
                if coefficients.step is None:
                    publish_traced(coefficients)
                coefficients.thread.traced_batch = _batch(args, kwargs)
            coefficients.thread.traced_depth += 1
        else:
            self._enter(module, args, kwargs)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        coefficients = self._coefficients
        step = coefficients.step
        if step is not None and step.abandoned():
            coefficients.end(step)
            step = None
        if step is None:
            step = coefficients.begin(_batch(args, kwargs))
            if self._swaps.standing:  # else a mix is materialised, which stays so for the length of the step
                try:
                    self._swaps.require_in_place()
                except BaseException:
                    coefficients.end(step)
                    raise
            step.opened_by(module, _caller())
            coefficients.enter(step)
            if not step.reads_live and self._swaps.standing:
                for device in coefficients.devices:  # for graphs that were compiled of parts
                    step.on(device)
        elif step.opener is module:
            step.depth += 1

    def _close(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        coefficients = self._coefficients
        if traced():
            if self._swaps.standing:
                coefficients.thread.traced_depth -= 1
                if coefficients.thread.traced_depth == 0:
                    coefficients.thread.traced_batch = None
        else:
            self._leave(module, output)

    def _leave(self, module: nn.Module, output: Any) -> None:
        coefficients = self._coefficients
        step = coefficients.step
        if step is None or step.opener is not module:
            return
        step.depth -= 1
        if step.depth:
            return
        recorded = torch.is_grad_enabled() and self._swaps.standing
        coefficients.end(step)
        if recorded:
            for tensor in named_tensors(output).values():
                if tensor.requires_grad:
                    tensor.register_hook(functools.partial(_backward, coefficients, step))


def _refuse_resize(*_: Any, **__: Any) -> NoReturn:
    raise AlignvecError(
        "vectors are attached, which have the vocabulary that the model has now: call model.alignment.detach(), "
        "resize, and attach vectors of the new vocabulary"
    )


def _caller() -> FrameType | None:
    """The frame of the module's call, which lasts as long as the step."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "_call_impl":
        frame = frame.f_back
    return frame


def _backward(coefficients: Coefficients, step: Any, _: Tensor) -> None:
    coefficients.began_backward(step)


def _batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Sequences of a call, by the first of its inputs: of ids [batch, choices, tokens] one for each choice."""
    named = [kwargs.get(name) for name in _INPUTS]
    values = [*named, *args, *kwargs.values()]
    tensors = [value for value in values if isinstance(value, Tensor) and value.dim()]
    if not tensors:
        return None
    first = tensors[0]
    if not first.is_floating_point():
        return math.prod(first.shape[:-1]) if first.dim() > 1 else first.shape[0]
    return math.prod(first.shape[:-2]) if first.dim() > 3 and first is kwargs.get("inputs_embeds") else first.shape[0]
