"""Which adapters are sums of low-rank deltas and whole weights, and what their configuration means to PEFT."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from alignvec.errors import AlignvecError
from alignvec.peft.base import MERGE_INSTEAD

if TYPE_CHECKING:
    from peft import LoraConfig

# What makes an adapter something other than scale * B A added to weights, and what to do about it.
UNSUPPORTED = {
    "use_dora": f"which scales the rows of the whole weight: {MERGE_INSTEAD}",
    "use_bdlora": f"whose matrices are block-diagonal: {MERGE_INSTEAD}",
    "kasa_config": f"which truncates the base's weights: {MERGE_INSTEAD}",
    "monteclora_config": f"which draws its matrices at random: {MERGE_INSTEAD}",
    "alora_invocation_tokens": "which acts on some tokens only, so no change of the weights is the same",
    "arrow_config": "which chooses adapters for every token, so no change of the weights is the same",
    "use_qalora": "which averages the layer's inputs, so it is not scale * B A added to the weight",
    "layer_replication": "which repeats layers of the base, so its weights are not the base's",
    "megatron_config": "whose layers are Megatron's, not transformers'",
}
# Initialisations that leave the base's weights as they are.
INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
CONVERTIBLE = ("pissa", "olora", "corda", "lora_ga")  # PEFT saves these as plain LoRA if asked to
# What PEFT reads an adapter's shapes, places and scales from.
READ = (
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "target_parameters",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "fan_in_fan_out",
    "bias",
    "lora_bias",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "trainable_token_indices",
    "ensure_weight_tying",
)
LARGEST = 2**31  # of a rank or alpha


def require_plain(config: Mapping[str, Any], label: str) -> None:
    """Raises AlignvecError for an adapter that is no sum of low-rank deltas and whole weights, naming the option."""
    kind = str(getattr(config.get("peft_type"), "value", config.get("peft_type")))
    if kind != "LORA":
        raise AlignvecError(
            f"adapter {label} is of type {kind}, and only LORA is read: if it changes weights, {MERGE_INSTEAD}"
        )
    for option, why in UNSUPPORTED.items():
        if config.get(option):
            raise AlignvecError(f"adapter {label} uses {option}, {why}")
    start = config.get("init_lora_weights", True)
    if not isinstance(start, (bool, str, type(None))) or start not in INITIALISATIONS:
        convertible = isinstance(start, str) and start.lower().startswith(CONVERTIBLE)
        remedy = (
            "save it with path_initial_model_for_weight_conversion, which makes it a plain LoRA"
            if convertible
            else MERGE_INSTEAD
        )
        raise AlignvecError(
            f"adapter {label} has init_lora_weights={start!r}, which changes the base's weights: {remedy}"
        )


def lora_config(config: Mapping[str, Any], label: str) -> LoraConfig:
    """An adapter's stored configuration as PEFT's, without what initialises, trains or imports anything.

    Raises AlignvecError for ranks that are no positive numbers, alphas that are zero or not finite, patterns that are
    no regular expressions, and what PEFT itself refuses.
    """
    from peft import LoraConfig

    for default in ("r", "lora_alpha"):
        if default in config:
            _require_number(config[default], default, label, signed=default == "lora_alpha")
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(name) or {}
        if not isinstance(patterns, dict):
            raise AlignvecError(f"adapter {label} has {name}={patterns!r}: it has to map expressions to numbers")
        for key, value in patterns.items():
            _require_number(value, f"{name}[{key!r}]", label, signed=name == "alpha_pattern")
            try:
                re.compile(key)
            except re.error as error:
                raise AlignvecError(
                    f"adapter {label} has {key!r} in {name}, which is no expression ({error})"
                ) from None
    known = LoraConfig.__dataclass_fields__
    options = {name: config[name] for name in READ if config.get(name) is not None and name in known}
    try:
        return LoraConfig(**options, init_lora_weights=False, inference_mode=True)
    except Exception as error:
        raise AlignvecError(f"adapter {label} has a configuration that PEFT refuses: {error}") from error


def _require_number(value: object, name: str, label: str, *, signed: bool) -> None:
    """A rank is positive; an alpha may be negative, which subtracts what the adapter learnt."""
    size = abs(value) if signed and type(value) in (int, float) else value  # type: ignore[arg-type]
    if type(size) not in (int, float) or not 0 < size < LARGEST:  # type: ignore[operator]
        shown = str(value)[:40] if type(size) is not int or size < LARGEST else "too large"
        wanted = f"other than 0 and within {LARGEST}" if signed else f"positive and below {LARGEST}"
        raise AlignvecError(f"adapter {label} has {name} {shown}: it has to be {wanted}")
