"""Models with PEFT's wrappers in them, seen as they are without: paths of modules, and copies without values."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from alignvec.errors import AlignvecError

# What a copy does not take over: calls that accelerate and others put on the module, and PEFT's own notes.
LEFT_OUT = ("forward", "_hf_hook", "_old_forward", "peft_config", "_hf_peft_config_loaded")


def modules(model: nn.Module, *, replaced: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """Every module and its path without PEFT's wrappers; a wrapper comes before what it wraps, with the same path.

    What PEFT added (LoRA's matrices, copies of `modules_to_save`) is left out.

    replaced: give modules that a trained copy replaces as well.
    """
    return _modules(model, "", replaced)


def _modules(module: nn.Module, path: str, replaced: bool) -> Iterator[tuple[str, nn.Module]]:
    yield path, module
    inner = wrapped(module)
    if inner is not None:
        if replaced or trained_copy(module) is None:
            yield from _modules(inner, path, replaced)
        return
    for name, child in module._modules.items():
        if child is not None:
            yield from _modules(child, f"{path}.{name}" if path else name, replaced)


def wrapped(module: nn.Module) -> nn.Module | None:
    """What a wrapper of PEFT's wraps, which may be a wrapper as well; None for any other module."""
    if "peft" not in sys.modules:
        return None
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(module, BaseTunerLayer):
        return getattr(module, "base_layer", None)
    if not isinstance(module, AuxiliaryTrainingWrapper):
        return None
    inner: nn.Module = module.token_adapter if hasattr(module, "token_adapter") else module.original_module
    return inner


def is_layer(module: nn.Module) -> bool:
    """Whether PEFT's layer of an adapter wraps another module here."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def is_copied(module: nn.Module) -> bool:
    """Whether the module is one of `modules_to_save`."""
    from peft.utils import ModulesToSaveWrapper

    return isinstance(module, ModulesToSaveWrapper)


def trained_copy(module: Any) -> nn.Module | None:
    """The copy that runs in place of a module of `modules_to_save`; None where none does."""
    if not is_copied(module) or module.disable_adapters:
        return None
    active = module.active_adapters
    if not active or any(name not in module.modules_to_save for name in active):
        return None
    copy: nn.Module = module.modules_to_save[active[0]]
    return copy


def merged(model: nn.Module) -> str | None:
    """The path of a module that an adapter is merged into, if there is one."""
    return next((path for path, module in modules(model) if getattr(module, "merged_adapters", None)), None)


def without_values(model: nn.Module) -> nn.Module:
    """The model without PEFT's wrappers, of the same classes and attributes, tensors on the meta device, ties kept.

    Modules are new, so that PEFT can change them; hooks are not taken over.
    """
    modules: dict[int, nn.Module] = {}
    tensors: dict[int, torch.Tensor] = {}

    def meta(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in tensors:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            tensors[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
        return tensors[id(tensor)]

    def copied(module: nn.Module) -> nn.Module:
        while (inner := wrapped(module)) is not None:
            module = inner
        if id(module) in modules:
            return modules[id(module)]
        copy = modules[id(module)] = type(module).__new__(type(module))
        nn.Module.__init__(copy)
        kept = {key: v for key, v in vars(module).items() if key not in vars(copy) and key not in LEFT_OUT}
        vars(copy).update(kept)
        copy._parameters.update({key: meta(value) for key, value in module._parameters.items()})  # type: ignore[misc]
        copy._buffers.update({key: meta(value) for key, value in module._buffers.items()})
        copy._modules.update({key: child and copied(child) for key, child in module._modules.items()})
        return copy

    return copied(model)


def grow(root: nn.Module, layers: dict[str, nn.Module], label: str) -> None:
    """Puts layers into a model by their paths, with empty modules above them where there are none."""
    for path, layer in layers.items():
        parent = root
        *above, leaf = path.split(".")
        try:
            for name in above:
                if parent._modules.get(name) is None:
                    parent.add_module(name, nn.Module())
                parent = parent.get_submodule(name)
            if leaf in parent._modules:
                del parent._modules[leaf]
            parent.add_module(leaf, layer)
        except KeyError as error:
            raise AlignvecError(f"adapter {label} edits {path}, which names no module ({error})") from None
