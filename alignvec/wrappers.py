"""Names without what wrappers add to them: torch.compile, DDP, FSDP, activation checkpointing, PEFT."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable

from torch import nn

LEADING = ("module.", "base_model.model.", "_orig_mod.", "_fsdp_wrapped_module.")  # DDP and others, PEFT, compile, FSDP
INSIDE = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer", "original_module"}
ADAPTER = re.compile(r"(^|\.)(lora_\w+|lokr_\w+|hada_\w+|ia3_\w+|vera_\w+|modules_to_save|trainable_tokens_\w+)(\.|$)")


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Every name -> the name that the unwrapped model has for it.

    What stands before all names is removed, and what wrappers put between modules. Names stay as they are where two
    would become one.
    """
    listed = list(names)
    stripped = listed
    while prefix := next((p for p in LEADING if stripped and all(n.startswith(p) for n in stripped)), None):
        stripped = [name[len(prefix) :] for name in stripped]
    stripped = [".".join(part for part in name.split(".") if part not in INSIDE) for name in stripped]
    if len(set(stripped)) < len(listed) or "" in stripped:
        stripped = listed
    return dict(zip(listed, stripped, strict=True))


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of torch.compile, data parallelism, a PEFT model or its tuner; any other as it is.

    PEFT's layers, which take the place of modules inside of the model, stay.
    """
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        elif inner is None and "peft" in sys.modules:
            inner = _inside_peft(model)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _inside_peft(model: nn.Module) -> nn.Module | None:
    from peft import PeftMixedModel, PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    if isinstance(model, PeftModel):
        found: nn.Module = model.get_base_model()
        return found
    if isinstance(model, PeftMixedModel):
        return model.base_model
    return model.model if isinstance(model, BaseTuner) else None


def inner_model(model: nn.Module) -> tuple[str, nn.Module]:
    """The transformers model inside whatever wraps it, and its path; `model` itself where there is none, or several."""
    from transformers import PreTrainedModel

    found: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not any(
            not outer or path.startswith(f"{outer}.") for outer, _ in found
        ):
            found.append((path, module))
            if not path:
                break
    return found[0] if len(found) == 1 else ("", model)


def live_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Names in a live model -> those in the transformers model that it is or holds; others are left out."""
    path, _ = inner_model(model)
    prefix = f"{path}." if path else ""
    inside = {name: name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    plain = plain_names(inside.values())
    return {name: plain[short] for name, short in inside.items()}


def is_persistent(model: nn.Module, name: str) -> bool:
    """Whether checkpoints of the model hold its buffer of this name."""
    path, _, leaf = name.rpartition(".")
    return leaf not in model.get_submodule(path)._non_persistent_buffers_set


def is_adapter(name: str) -> bool:
    """Whether a name belongs to a PEFT adapter, not to the model that it adapts."""
    return ADAPTER.search(name) is not None
