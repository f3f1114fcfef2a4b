"""A LoRA adapter in, an alignment vector out."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignvec import formats
from alignvec.checkpoint import Checkpoint, read_json
from alignvec.errors import AlignvecError
from alignvec.formats import Encoded
from alignvec.peft.base import CONFIG, PREFIX, STEM, Base
from alignvec.sources import local_path
from alignvec.vector import AlignmentVector

# What makes an adapter something other than scale * B A added to weights.
UNSUPPORTED = (
    "use_dora",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "use_qalora",
    "layer_replication",
    "target_parameters",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "megatron_config",
)
# Initialisations that leave the base's weights as they are; pissa, olora, corda, loftq and lora_ga change them.
INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
FACTOR = re.compile(r"(?P<path>.+)\.lora_((?P<matrix>[AB])\.weight|(?P<bias>B\.bias)|(?P<embedding>embedding_[AB]))")
VARIANT = re.compile(r"(^|\.)(lora_|token_adapter|trainable_tokens)")


def from_peft(adapter: str | Path | nn.Module, base: str | Path | nn.Module | None = None) -> AlignmentVector:
    """A LoRA adapter as an alignment vector: `base + vector` is what PEFT's `merge_and_unload` gives.

    LoRA of linear layers, Conv1D (GPT-2) and embeddings becomes low-rank, the scale folded into one factor: bfloat16
    where that is exact, else float32. Trained biases and `modules_to_save` become dense deltas.

    Args:
        adapter: the folder of a saved adapter, or a `PeftModel`, whose active adapter is taken.
        base: the model that the adapter belongs to, a checkpoint or a live model; a `PeftModel` brings its own.
            Without, the vector names no base, full weights cannot be read, and layers are linear unless the adapter
            says `fan_in_fan_out`.

    Raises:
        AlignvecError: an adapter of another kind than LoRA, or of a variant that is no sum of a low-rank delta (named),
            tensors that are missing or of a wrong shape, full weights without a base, and edits of one of two weights
            that the base ties together.
    """
    if isinstance(adapter, nn.Module):
        config, state, label, own = _live_adapter(adapter)
        if base is None and config.get("bias", "none") != "none":
            raise AlignvecError(f"adapter {label} trained the base's biases in place: give the base as it was before")
        base = own if base is None else base
    else:
        config, state, label = _stored_adapter(adapter)
    _require_plain(config, label)
    modules = _grouped(state, label)
    known = None if base is None else Base.open(base)
    deltas = dict(_deltas(config, modules, known, label))
    if not deltas:
        raise AlignvecError(f"adapter {label} changes nothing: all of its deltas are zero")
    if known is None:
        return AlignmentVector(deltas, source={"adapter": label})
    return AlignmentVector(
        _tied_once(deltas, known, label), known.identity(), source={"adapter": label, "base": known.label}
    )


def _stored_adapter(adapter: str | Path) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    folder = local_path(adapter)
    if not (folder / CONFIG).is_file():
        raise AlignvecError(f"{folder} is no PEFT adapter: it holds no {CONFIG}")
    checkpoint = Checkpoint.open(folder, stem=STEM)
    state = {name: checkpoint.tensor(name) for name in checkpoint.tensors}
    return read_json(folder / CONFIG), state, Path(adapter).name


def _live_adapter(model: Any) -> tuple[dict[str, Any], dict[str, Tensor], str, nn.Module]:
    if not hasattr(model, "peft_config"):
        raise AlignvecError(f"{type(model).__name__} is no PeftModel: give one, or an adapter's folder")
    from peft import get_peft_model_state_dict

    active = str(model.active_adapter)
    if any(getattr(module, "merged_adapters", None) for module in model.modules()):
        raise AlignvecError(f"adapter {active} is merged into the model: call unmerge_adapter() first")
    state = get_peft_model_state_dict(model, adapter_name=active, save_embedding_layers=False)
    config: dict[str, Any] = model.peft_config[active].to_dict()
    return config, {name: value.detach().cpu() for name, value in state.items()}, active, model.get_base_model()


def _require_plain(config: Mapping[str, Any], label: str) -> None:
    kind = str(getattr(config.get("peft_type"), "value", config.get("peft_type")))
    if kind != "LORA":
        raise AlignvecError(f"adapter {label} is of type {kind}: only LORA adapters are low-rank deltas")
    for option in UNSUPPORTED:
        if config.get(option):
            raise AlignvecError(f"adapter {label} uses {option}, which is no low-rank delta of the weights")
    if (start := config.get("init_lora_weights", True)) not in INITIALISATIONS:
        raise AlignvecError(
            f"adapter {label} has init_lora_weights={start!r}, which changes the base's weights: save it with "
            "path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        )


@dataclass
class _Module:
    """What an adapter holds for one module."""

    factors: dict[str, Tensor] = field(default_factory=dict)  # A, B (or embedding_A, embedding_B) and B.bias
    full: dict[str, Tensor] = field(default_factory=dict)  # parameters to put in the place of the base's
    frozen: dict[str, Tensor] = field(default_factory=dict)  # a copy of the base's own weight

    @property
    def embedding(self) -> bool:
        return "embedding_A" in self.factors or "embedding_B" in self.factors


def _grouped(state: Mapping[str, Tensor], label: str) -> dict[str, _Module]:
    """The adapter's tensors by module path."""
    modules: dict[str, _Module] = defaultdict(_Module)
    for key, value in state.items():
        name = key.removeprefix(PREFIX)
        if match := FACTOR.fullmatch(name):
            modules[match["path"]].factors[match["matrix"] or match["bias"] or match["embedding"]] = value
        elif VARIANT.search(name):
            raise AlignvecError(f"adapter {label} holds {key}, which is no part of a plain LoRA")
        else:
            path, _, leaf = name.replace(".modules_to_save.", ".").rpartition(".")
            module = modules[path.removesuffix(".base_layer")]
            (module.frozen if path.endswith(".base_layer") and leaf == "weight" else module.full)[leaf] = value
    return modules


def _deltas(
    config: Mapping[str, Any], modules: Mapping[str, _Module], base: Base | None, label: str
) -> Iterator[tuple[str, Tensor | Encoded]]:
    """The deltas that are not zero, by live parameter name."""
    for path, module in modules.items():
        if module.factors:
            yield from _lora(config, path, module, base, label)
        for leaf, value in (module.full | module.frozen).items():
            name, copy = f"{path}.{leaf}", leaf in module.frozen
            if base is None:
                if copy:
                    continue
                raise AlignvecError(f"adapter {label} holds {name} whole: give the base to take the difference from")
            original = base.value(name)
            if value.shape != original.shape:
                shapes = f"{list(value.shape)} in adapter {label} and {list(original.shape)} in {base.label}"
                raise AlignvecError(f"{name} is {shapes}: resize the base's vocabulary alike and save it")
            delta = value.float() - original.float()
            if copy and delta.any():
                raise AlignvecError(f"{name} differs in adapter {label} and {base.label}: give the adapter's own base")
            if delta.any():
                yield name, _narrowed(delta, original.dtype)


def _lora(
    config: Mapping[str, Any], path: str, module: _Module, base: Base | None, label: str
) -> Iterator[tuple[str, Tensor | Encoded]]:
    a, b = (module.factors.get(f"embedding_{key}" if module.embedding else key) for key in "AB")
    if a is None or b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise AlignvecError(f"adapter {label} has no two matrices A [r, in] and B [out, r] for {path}")
    scale = _scale(config, path, a.shape[0], label)
    if base is not None:
        transposed = base.kind(path) != "linear"
    else:
        transposed = module.embedding or bool(config.get("fan_in_fan_out"))
    b = _scaled(b, scale)
    if not a.dtype == b.dtype == torch.bfloat16:
        a, b = a.float(), b.float()
    if transposed:  # (B A)^T = A^T B^T
        a, b = b.T, a.T
    parts = {"A": a.contiguous(), "B": b.contiguous()}
    options: dict[str, int | float | str] = {"rank": a.shape[0], "dtype": str(a.dtype).removeprefix("torch.")}
    encoded = Encoded("low-rank", (b.shape[0], a.shape[1]), options, parts)
    if base is not None and (shape := base.shape(f"{path}.weight")) != encoded.shape:
        raise AlignvecError(
            f"adapter {label} edits {path}.weight as {list(encoded.shape)}, in {base.label} it is {list(shape)}: give "
            "the adapter's own base"
        )
    if a.any() and b.any():
        yield f"{path}.weight", encoded
    if (bias := module.factors.get("B.bias")) is not None and bias.any():
        yield f"{path}.bias", _scaled(bias, scale)


def _scale(config: Mapping[str, Any], path: str, held: int, label: str) -> float:
    rank, alpha = (
        _pattern(config.get(patterns) or {}, path, config.get(default), label)
        for patterns, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    )
    if rank != held:
        raise AlignvecError(f"adapter {label} says that {path} has rank {rank:g}, but it holds {held}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(patterns: Mapping[str, Any], path: str, default: Any, label: str) -> float:
    """PEFT's rule: the first expression that matches the module's path, all of it or what follows a dot."""
    try:
        value = next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), default)
    except re.error as error:
        raise AlignvecError(f"adapter {label} has a rank or alpha pattern that is no expression ({error})") from None
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise AlignvecError(f"adapter {label} has rank or alpha {value!r} for {path}: it has to be positive")
    return float(value)


def _scaled(values: Tensor, scale: float) -> Tensor:
    """values * scale, in their own dtype where that is exact, else in float32."""
    product = values.float() * scale
    power_of_two = math.frexp(scale)[0] == 0.5
    return _narrowed(product, values.dtype) if power_of_two else product


def _narrowed(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 values in `dtype` if that holds them, else as they are."""
    narrow = values.to(dtype)
    return narrow if torch.equal(narrow.float(), values) else values


def _tied_once(deltas: Mapping[str, Tensor | Encoded], base: Base, label: str) -> dict[str, Tensor | Encoded]:
    """The deltas under the vector's names; a tied parameter's once, which has to be the same under all its names."""
    once: dict[str, Tensor | Encoded] = {}
    for name, delta in deltas.items():
        base.shape(name)
        for other in base.tied(name):
            if other not in deltas or not torch.allclose(_dense(delta), _dense(deltas[other]), rtol=1e-4, atol=1e-7):
                raise AlignvecError(
                    f"adapter {label} edits {name} apart from {other}, which {base.label} ties to it, where an "
                    "alignment vector edits both: untie the base, or train with ensure_weight_tying"
                )
        once.setdefault(base.names[name], delta)
    return once


def _dense(delta: Tensor | Encoded) -> Tensor:
    return formats.decode(delta) if isinstance(delta, Encoded) else delta.float()
