"""Tensors that checkpoints hold and models do not load: computed tables, masks, prediction heads for training."""

from __future__ import annotations

import functools
import re
from typing import Any

# Rotary tables, masks and positions, which earlier versions of models saved and which are computed now.
COMPUTED = re.compile(
    r"(^|\.)((original_)?inv_freq|position_ids|masked_bias|(attn|attention)\.(bias|causal_mask|attn_mask))$"
)
MASKED = re.compile(r"(^|\.)(attn|attention)\.bias$")  # GPT-2's mask [1, 1, n, n]; elsewhere it may be a bias


class Unloaded:
    """Says of a checkpoint's tensor whether the model of its config is known not to load it."""

    def __init__(self, config: Any, model: Any = None) -> None:
        """`config`: that of a checkpoint (a dict), a transformers config, or None. `model`: a live model or its class,
        where there is one; else it is found by the config."""
        self._config, self._model = config, model

    @functools.cached_property
    def _patterns(self) -> list[re.Pattern[str]]:
        model = _model_class(self._config) if self._model is None else self._model
        patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        return [re.compile(pattern) for pattern in patterns]

    def __call__(self, name: str, shape: tuple[int, ...]) -> bool:
        if MASKED.search(name):
            return len(shape) == 4 and shape[:2] == (1, 1)
        return COMPUTED.search(name) is not None or any(pattern.search(name) for pattern in self._patterns)


def quantisation(config: Any) -> str:
    """How a model of this config (a dict, or transformers' own) is quantised ("gptq"), "" if it is not."""
    options = config.get("quantization_config") if isinstance(config, dict) else None
    options = options or getattr(config, "quantization_config", None)
    method = options.get("quant_method") if isinstance(options, dict) else getattr(options, "quant_method", None)
    return str(getattr(method, "value", method) or "")


def _model_class(config: Any) -> type | None:
    """The causal language model's class that transformers loads for the config; None where it knows none."""
    values = config if isinstance(config, dict) else getattr(config, "__dict__", {})
    names, kind = values.get("architectures"), values.get("model_type") or getattr(config, "model_type", None)
    known = [name for name in names if isinstance(name, str)] if isinstance(names, list | tuple) else []
    if not known and not kind:
        return None
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    for name in [*known, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(kind), "")]:
        try:
            found = getattr(transformers, name, None)
        except (ImportError, RuntimeError):  # a class whose own requirements are not installed
            continue
        if isinstance(found, type):
            return found
    return None
