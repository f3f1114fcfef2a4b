"""Which adapters are sums of low-rank deltas and whole weights, and what their configuration means to PEFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
# What acts in training only, or says where an adapter comes from.
HARMLESS = (
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "init_lora_weights", "megatron_core", "loftq_config", "eva_config"),
    *("corda_config", "lora_ga_config", "velora_config", "qalora_group_size", "runtime_config"),
)
FLAGS = ("use_rslora", "fan_in_fan_out", "lora_bias", "ensure_weight_tying")
# Options that list names: whether one text is taken in place of a list.
LISTS = {
    "target_modules": True,
    "exclude_modules": True,
    "layers_pattern": True,
    "modules_to_save": False,
    "target_parameters": False,
}
FEW = 500  # entries in a list are no trouble in any model
LARGEST = 2**31  # of a rank, an alpha, a layer's or a token's number


def require_plain(config: Mapping[str, Any], label: str) -> None:
    """Raises AlignvecError for an adapter that is no sum of low-rank deltas and whole weights, naming the option."""
    kind = _shown(getattr(config.get("peft_type"), "value", config.get("peft_type")))
    if kind != "LORA":
        raise AlignvecError(
            f"adapter {label} is of type {kind}, and only LORA is read: if it changes weights, {MERGE_INSTEAD}"
        )
    for option, why in UNSUPPORTED.items():
        if (value := config.get(option)) or isinstance(value, dict):  # an empty mapping is one of defaults
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
            f"adapter {label} has init_lora_weights={_shown(start, repr)}, which changes the base's weights: {remedy}"
        )


def lora_config(config: Mapping[str, Any], label: str) -> LoraConfig:
    """An adapter's stored configuration as PEFT's, without what initialises, trains or imports anything.

    Raises AlignvecError for ranks that are no positive numbers, alphas that are zero or not finite, values of a wrong
    type, options that only a later version of PEFT has a meaning for, and what PEFT itself refuses.
    """
    from peft import LoraConfig

    _require_types(config, label)
    known = LoraConfig.__dataclass_fields__
    default = LoraConfig()
    for name in known.keys() - {*READ, *UNSUPPORTED, *HARMLESS}:
        if config.get(name) not in (None, False, getattr(default, name)):
            raise AlignvecError(f"adapter {label} uses {name}, which is not known here: {MERGE_INSTEAD}")
    options = {name: config[name] for name in READ if config.get(name) is not None and name in known}
    try:
        return LoraConfig(**options, init_lora_weights=False, inference_mode=True)
    except Exception as error:
        raise AlignvecError(f"adapter {label} has a configuration that PEFT refuses: {error}") from error


def require_few(config: Mapping[str, Any], modules: int, tokens: int, label: str) -> None:
    """Raises AlignvecError for lists that are out of proportion: PEFT compares every entry with every module.

    modules, tokens: how many the model has.
    """
    for name in (*LISTS, "rank_pattern", "alpha_pattern", "layers_to_transform"):
        count = len(held) if isinstance(held := config.get(name), (list, dict)) else 0
        if count > max(modules, FEW):
            raise AlignvecError(
                f"adapter {label} has {count} entries in {name}, and the base has {modules} modules: leave out those "
                "that name none"
            )
    for places in _token_lists(config):
        if len(places) > tokens:
            raise AlignvecError(
                f"adapter {label} has {len(places)} entries in trainable_token_indices, and the base has {tokens} "
                "tokens: give the adapter's own base"
            )


def _require_types(config: Mapping[str, Any], label: str) -> None:
    from peft import TaskType

    def refuse(name: str, wanted: str) -> AlignvecError:
        return AlignvecError(f"adapter {label} has {name}={_shown(config[name], repr)}: it has to be {wanted}")

    for name in ("r", "lora_alpha"):
        if name in config:
            _require_number(config[name], name, label, signed=name == "lora_alpha")
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(name, {})
        if not isinstance(patterns, dict):
            raise refuse(name, "a mapping of expressions to numbers")
        for key, value in patterns.items():
            _require_number(value, f"{name}[{_shown(key, repr)}]", label, signed=name == "alpha_pattern")
    for name in FLAGS:
        if not isinstance(config.get(name), (bool, type(None))):
            raise refuse(name, "true or false")
    if config.get("task_type") not in (None, *TaskType):
        raise refuse("task_type", "one that PEFT knows")
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise refuse("bias", "none, all or lora_only")
    for name, one in LISTS.items():
        held = config.get(name)
        listed = isinstance(held, list) and all(isinstance(each, str) for each in held)
        if held is not None and not listed and not (one and isinstance(held, str)):
            raise refuse(name, "a list of names or an expression" if one else "a list of names")
    layers = config.get("layers_to_transform")
    if layers is not None and not (_numbers(layers) if isinstance(layers, list) else _numbers([layers])):
        raise refuse("layers_to_transform", "a layer's number or a list of such")
    tokens = config.get("trainable_token_indices")
    lists = list(_token_lists(config))
    if tokens is not None and not (lists and all(_numbers(places) for places in lists)):
        raise refuse("trainable_token_indices", "a list of tokens' numbers, or a mapping of modules to such lists")
    if any(len(set(places)) < len(places) for places in lists):
        raise refuse("trainable_token_indices", "without a number twice")


def _token_lists(config: Mapping[str, Any]) -> list[Any]:
    tokens = config.get("trainable_token_indices")
    return [] if tokens is None else list(tokens.values()) if isinstance(tokens, dict) else [tokens]


def _numbers(values: object) -> bool:
    return isinstance(values, list) and all(type(each) is int and 0 <= each < LARGEST for each in values)


def _require_number(value: object, name: str, label: str, *, signed: bool) -> None:
    """A rank is a positive integer; an alpha may be negative, which subtracts what the adapter learnt."""
    kinds = (int, float) if signed else (int,)
    size = abs(value) if signed and type(value) in kinds else value  # type: ignore[arg-type]
    if type(size) not in kinds or not 0 < size < LARGEST:  # type: ignore[operator]
        shown = "too large" if type(size) is int and size >= LARGEST else _shown(value)
        wanted = f"other than 0 and within {LARGEST}" if signed else f"a whole number, positive and below {LARGEST}"
        raise AlignvecError(f"adapter {label} has {name} {shown}: it has to be {wanted}")


def _shown(value: object, how: Callable[[object], str] = str) -> str:
    """A value of any kind and size as a few words."""
    try:
        text = how(value)
    except (RecursionError, ValueError):  # too deep, or a number of too many digits
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= 60 else f"{text[:60]}..."
