"""What a decoder is measured against: transformers' own loop, PEFT, and one product over all vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CompileConfig, DynamicCache, StaticCache

RANK = 64


class Loop:
    """Greedy decoding by a model's own forward, as `generate` runs it; `steps` tokens of each of `batch` rows a call.

    length: of a static cache, whose steps are compiled as `generate` compiles them; without it the cache grows.
    options: further arguments of the model's forward.
    """

    def __init__(
        self, model: Any, ids: Tensor, batch: int, steps: int, length: int | None = None, **options: Any
    ) -> None:
        self.steps, self.options = steps, options
        self.cache = DynamicCache(config=model.config) if length is None else StaticCache(model.config, length)
        self.forward: Callable[..., Any] = model
        model(ids[:-1].expand(batch, -1), past_key_values=self.cache, use_cache=True, logits_to_keep=1, **options)
        self.token = ids[-1:].expand(batch, 1).clone()
        if length is not None:
            torch._dynamo.reset()  # a second batch size would be compiled for all
            self.forward = model.get_compiled_call(CompileConfig())

    def __call__(self) -> None:
        for _ in range(self.steps):
            output = self.forward(input_ids=self.token, past_key_values=self.cache, use_cache=True, **self.options)
            self.token = output.logits[:, -1:].argmax(-1)


class Concatenated(nn.Module):
    """Base and dense vectors as one product: [x, c_1 x, ..., c_k x] [W, D_1, ..., D_k]^T; c [k] on the device."""

    def __init__(self, linear: nn.Linear, coefficients: Tensor) -> None:
        super().__init__()
        k = len(coefficients)
        self.weight = nn.Parameter(torch.cat([linear.weight.data] * (k + 1), 1), requires_grad=False)  # any values
        self.register_buffer("factors", torch.cat([coefficients.new_ones(1), coefficients]).to(linear.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear((x[..., None, :] * self.factors[:, None]).flatten(-2), self.weight)


def concatenate(model: Any, coefficients: Tensor) -> Any:
    """The model with every linear layer of its backbone replaced by a `Concatenated`."""
    for parent in list(model.base_model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Concatenated(child, coefficients))
    return model


def peft(model: Any, k: int) -> Any:
    """The model with `k` random LoRA adapters "v1" to "v<k>" of rank RANK on all of its linear layers, v1 active."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(model, config, adapter_name="v1", autocast_adapter_dtype=False)
    for number in range(2, k + 1):
        adapted.add_adapter(f"v{number}", config, autocast_adapter_dtype=False)
    dtype = next(parameter.dtype for parameter in model.parameters())
    return adapted.to(dtype).eval()
