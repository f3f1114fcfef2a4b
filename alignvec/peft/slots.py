"""Where a stored adapter's tensors belong in a model that PEFT has put its layers into."""

from __future__ import annotations

from typing import Any

from torch import nn

from alignvec.peft import wrappers

NAME = "default"  # of the adapter in the model


def slots(model: nn.Module) -> dict[str, tuple[Any, str]]:
    """Where each tensor of a stored adapter belongs, by its name: a dictionary of tensors and the key in it."""
    from peft.tuners.lora import LoraLayer

    found: dict[str, tuple[Any, str]] = {}

    def add(prefix: str, module: nn.Module) -> None:
        for path, inner in module.named_modules(prefix=prefix):
            for held in (inner._parameters, inner._buffers):
                found.update({f"{path}.{leaf}": (held, leaf) for leaf, value in held.items() if value is not None})

    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            for group in ("lora_A", "lora_B"):
                if NAME in getattr(module, group):
                    add(f"{path}.{group}", getattr(module, group)[NAME])
            for group in ("lora_embedding_A", "lora_embedding_B"):
                if NAME in getattr(module, group):
                    found[f"{path}.{group}"] = (getattr(module, group)._parameters, NAME)
        elif wrappers.is_copied(module):
            add(path, module.modules_to_save[NAME])
        elif hasattr(module, "token_adapter"):
            held = module.token_adapter.trainable_tokens_delta
            found[f"{path}.token_adapter.trainable_tokens_delta"] = (held._parameters, NAME)
    return found


def left_out(model: nn.Module) -> str | None:
    """The path of a layer of LoRA that the adapter has no tensors for, if there is one."""
    from peft.tuners.lora import LoraLayer

    for path, module in wrappers.modules(model):
        if isinstance(module, LoraLayer):
            held = [*module.lora_A.parameters(), *module.lora_embedding_A.parameters()]
            if any(value.is_meta for value in held):
                return path
    return None


def own_parameters(model: nn.Module) -> dict[str, str]:
    """Names of the base's own parameters with PEFT's wrappers in them, to their live names."""
    plain = {id(module): path for path, module in wrappers.modules(model)}
    return {
        f"{path}.{leaf}": f"{plain[id(module)]}.{leaf}"
        for path, module in model.named_modules()
        for leaf, value in module._parameters.items()
        if value is not None and id(module) in plain
    }
