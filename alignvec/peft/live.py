"""The adapters of a live model, as they are active in its layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from alignvec.errors import AlignvecError
from alignvec.peft import wrappers
from alignvec.peft.base import Base
from alignvec.peft.config import require_plain
from alignvec.peft.edits import active
from alignvec.wrappers import unwrapped


class LiveAdapters:
    """A model with adapters in it: `model` is it without what is put around it, `label` the active adapters' names.

    Raises AlignvecError for a model without adapters, without active ones, with disabled or merged ones, and for
    adapters that are no sum of low-rank deltas and whole weights.
    """

    def __init__(self, model: Any) -> None:
        self.model: nn.Module = unwrapped(model)
        self.configs: dict[str, Any] = getattr(self.model, "peft_config", None) or getattr(model, "peft_config", {})
        if not isinstance(self.configs, dict) or not self.configs:
            raise AlignvecError(
                f"{type(model).__name__} is no PeftModel and no model with adapters: give one, or an adapter's folder"
            )
        names = dict.fromkeys(
            name for path, module in wrappers.modules(self.model, replaced=False) for name in active(path, module)
        )
        for name in names or self.configs:
            if name in self.configs:
                require_plain(self.configs[name].to_dict(), name)
        if not names:
            raise AlignvecError(f"{type(model).__name__} has no active adapter: call set_adapter() first")
        self.label = ", ".join(names)

    def base(self) -> Base:
        """The model that the adapters are on. AlignvecError where they changed it in place."""
        for name, config in self.configs.items():
            if getattr(config, "bias", "none") != "none":
                raise AlignvecError(
                    f"adapter {name} trained the base's biases in place: give the base as it was before"
                )
        return Base.open(self.model)

    def biases(self) -> dict[str, Tensor]:
        """The base's own biases, by live names, that an adapter trained in place, active or not."""
        asked = {getattr(config, "bias", "none") for config in self.configs.values()}
        own = dict(wrappers.modules(self.model))
        layers = {path for path, module in wrappers.modules(self.model) if wrappers.is_layer(module)}
        trained = own if "all" in asked else layers if "lora_only" in asked else ()
        held = {path: own[path]._parameters.get("bias") for path in trained}
        return {f"{path}.bias": bias.detach().cpu() for path, bias in held.items() if bias is not None}
