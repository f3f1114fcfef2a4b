"""What the adapters in a model do to each parameter: low-rank and dense terms, and values put in its place."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from alignvec.errors import AlignvecError
from alignvec.formats import Encoded, decode
from alignvec.peft import wrappers
from alignvec.peft.base import MERGE_INSTEAD, Base, kind_of
from alignvec.peft.experts import parameter_delta

# Variants of PEFT's whose layers add scale * B A to the weight all the same.
PLAIN_VARIANTS = ("MiCALinearVariant", "MiCAEmbeddingVariant", "VeloraLinearVariant")


@dataclass
class Edits:
    """By live parameter names. Factors are pairs (A [r, in], B [out, r]), the scale folded into B."""

    factors: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=lambda: defaultdict(list))
    dense: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    whole: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=lambda: defaultdict(list))

    def deltas(self, base: Base, label: str) -> Iterator[tuple[str, Tensor | Encoded]]:
        """The sum of a parameter's edits, where it is not zero: low-rank if all of them are."""
        for name in dict.fromkeys([*self.factors, *self.dense, *self.whole, *self.rows]):
            _require_shape(self, name, base, label)
            added = [*self.dense.get(name, []), *self._replaced(name, base, label)]
            low_rank = _concatenated(self.factors[name]) if self.factors.get(name) else None
            if low_rank is not None and not _is_finite(low_rank):
                raise AlignvecError(
                    f"adapter {label} edits {name} by values beyond the range of float32: train it anew"
                )
            if not added:
                if low_rank is not None:
                    yield name, low_rank
                continue
            if low_rank is not None:
                added.append(decode(low_rank))
            delta = added[0] if len(added) == 1 else sum((each.float() for each in added[1:]), added[0].float())
            if delta.any():
                yield name, delta

    def _replaced(self, name: str, base: Base, label: str) -> Iterator[Tensor]:
        """Differences of what is put in the place of the base's values."""
        if (value := self.whole.get(name)) is not None:
            original = base.value(name)
            delta = value.float() - original.float()
            if name in self.factors and delta.any():
                raise AlignvecError(f"{name} differs in adapter {label} and {base.label}: give the adapter's own base")
            if delta.any():
                yield narrowed(delta, original.dtype)
        if rows := self.rows.get(name):
            original = base.value(name).float()
            delta = torch.zeros_like(original)
            for indices, values in rows:
                if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < len(original):
                    raise AlignvecError(f"adapter {label} trains a token that {name} has no row for: {indices.max()}")
                delta[indices] = values.float() - original[indices]
            yield delta


def read_edits(model: nn.Module, base: Base, label: str, *, stored: bool = False) -> Edits:
    """What the active adapters of a model do, whose modules PEFT has wrapped.

    stored: the model was made for an adapter's files; a module that they have nothing for is not edited.

    Raises:
        AlignvecError: adapters that are merged or disabled, layers that add no product of two matrices, tensors that
            are missing, a scale that is no number.
    """
    edits = Edits()
    for path, module in wrappers.modules(model, replaced=False):
        for adapter in active(path, module):
            if (copy := wrappers.trained_copy(module)) is not None:
                _add_copy(edits, path, copy, label, base)
            elif wrappers.is_layer(module):
                _add_layer(edits, path, module, adapter, base, label if stored else None)
    return edits


def active(path: str, module: Any) -> list[str]:
    """The adapters that one of PEFT's wrappers applies, in its order; none for a module that is no wrapper.

    Raises AlignvecError for adapters that are merged or disabled.
    """
    if not (wrappers.is_layer(module) or wrappers.is_copied(module)):
        return []
    held = [
        name for name in module.active_adapters if any(name in getattr(module, k) for k in module.adapter_layer_names)
    ]
    if module.merged_adapters:
        raise AlignvecError(
            f"adapter {', '.join(module.merged_adapters)} is merged into {path}: call unmerge() of that module, or the "
            "PeftModel's unmerge_adapter(), first"
        )
    if held and module.disable_adapters:
        raise AlignvecError(
            f"the adapters of {path} are disabled: call enable_adapters(True) of that module, or the PeftModel's "
            "enable_adapter_layers(), first"
        )
    return held


def _add_layer(edits: Edits, path: str, layer: Any, adapter: str, base: Base, stored: str | None) -> None:
    """Adds what one adapter does to the module that one of PEFT's layers wraps.

    stored: what an adapter's folder is called, where the layer was made for it.
    """
    from peft.tuners.lora import LoraLayer, ParamWrapper
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    label = stored or adapter
    if isinstance(layer, TrainableTokensLayer):
        indices = torch.as_tensor(layer.token_indices[adapter], dtype=torch.int64)
        edits.rows[f"{path}.weight"].append(
            (indices, _tensor(layer.trainable_tokens_delta[adapter], f"{path}.trainable_tokens_delta", label))
        )
        return
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    if not isinstance(layer, LoraLayer) or (variant is not None and type(variant).__name__ not in PLAIN_VARIANTS):
        kind = type(layer if variant is None else variant).__name__
        raise AlignvecError(f"adapter {label} is a {kind} on {path}, not a plain LoRA: {MERGE_INSTEAD}")
    embedding = adapter in layer.lora_embedding_A
    matrices = (layer.lora_embedding_A, layer.lora_embedding_B) if embedding else (layer.lora_A, layer.lora_B)
    pair: list[Any] = [held[adapter] if embedding else held[adapter].weight for held in matrices]
    if stored is not None and all(factor.is_meta for factor in pair):
        return
    if stored is not None and any(factor.is_meta for factor in pair):
        raise AlignvecError(f"adapter {label} has no two matrices A [r, in] and B [out, r] for {path}")
    a, b = (_tensor(factor, f"{path}.lora_{key}", label) for key, factor in zip("AB", pair, strict=True))
    for key, factor in (("A", a), ("B", b)):
        if not factor.isfinite().all():
            raise AlignvecError(f"adapter {label} has NaN or infinity in {path}.lora_{key}: train it anew")
    scale = float(layer.scaling[adapter])
    if not math.isfinite(scale):
        raise AlignvecError(f"adapter {label} has the scale {scale} on {path}: it has to be a finite number")
    if isinstance(layer, ParamWrapper):
        name = f"{path}.{layer.parameter_name}"
        if layer.get_param().dim() == 3:
            edits.dense[name].append(parameter_delta(layer, a, b, scale, name))
        elif scale and a.any() and b.any():
            edits.factors[name].append((a, scaled(b, scale)))
        return
    kind = base.kind(path)
    if kind_of(layer.get_base_layer()) != kind:
        raise AlignvecError(
            f"{path} is a {type(layer.get_base_layer()).__name__} where adapter {label} is, and of another kind in "
            f"{base.label}: give the adapter's own base"
        )
    if scale and a.any() and b.any():
        b = scaled(b, scale)
        edits.factors[f"{path}.weight"].append((a, b) if kind == "linear" else (b.T, a.T))  # (B A)^T = A^T B^T
    bias: Any = None if embedding else layer.lora_B[adapter].bias
    if bias is not None:
        offset = _tensor(bias, f"{path}.lora_B.bias", label)
        if f"{path}.bias" not in base.names:
            raise AlignvecError(f"adapter {label} adds a bias to {path}, which has none in {base.label}")
        if scale and offset.any():
            edits.dense[f"{path}.bias"].append(scaled(offset, scale))


def _add_copy(edits: Edits, path: str, copy: nn.Module, label: str, base: Base) -> None:
    """Adds the values of a module that `modules_to_save` trained whole."""
    for inner, module in copy.named_modules():
        place = ".".join(filter(None, (path, inner)))
        if wrappers.wrapped(module) is not None:
            raise AlignvecError(
                f"adapter {label} edits {place} inside of a module that is saved whole: {MERGE_INSTEAD}"
            )
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                edits.whole[f"{place}.{leaf}"] = _tensor(parameter, f"{place}.{leaf}", label)
        for leaf, buffer in module._buffers.items():
            name = f"{place}.{leaf}"
            if buffer is None or leaf in module._non_persistent_buffers_set:
                continue
            original = base.buffer(name)
            if original is None or buffer.is_meta or not torch.equal(buffer.cpu(), original.cpu()):
                raise AlignvecError(f"adapter {label} trains {name}, a buffer, which no alignment vector holds")


def _tensor(value: Tensor, where: str, adapter: str) -> Tensor:
    if value.is_meta:
        raise AlignvecError(f"adapter {adapter} lacks {where}, or has not loaded it: give the whole adapter")
    if not value.is_floating_point():
        raise AlignvecError(f"adapter {adapter} has {where} in {value.dtype}: it has to be floating point")
    return value.detach().cpu()


def _require_shape(edits: Edits, name: str, base: Base, label: str) -> None:
    shape = base.shape(name)
    shapes: list[tuple[int, ...]] = [(b.shape[0], a.shape[1]) for a, b in edits.factors.get(name, [])]
    shapes += [tuple(delta.shape) for delta in edits.dense.get(name, [])]
    if wrong := next((held for held in shapes if held != shape), None):
        raise AlignvecError(
            f"adapter {label} edits {name} as {list(wrong)}, in {base.label} it is {list(shape)}: give the adapter's "
            "own base"
        )
    if (whole := edits.whole.get(name)) is not None and tuple(whole.shape) != shape:
        raise AlignvecError(
            f"{name} is {list(whole.shape)} in adapter {label} and {list(shape)} in {base.label}: resize the base's "
            "vocabulary alike and save it"
        )


def _concatenated(factors: list[tuple[Tensor, Tensor]]) -> Encoded:
    """The sum of products as one product: A's rows and B's columns side by side. bfloat16 if all factors are."""
    dtype = torch.bfloat16 if all(f.dtype == torch.bfloat16 for pair in factors for f in pair) else torch.float32
    a = torch.cat([a.to(dtype) for a, _ in factors], 0)
    b = torch.cat([b.to(dtype) for _, b in factors], 1)
    options: dict[str, int | float | str] = {"rank": a.shape[0], "dtype": str(dtype).removeprefix("torch.")}
    return Encoded("low-rank", (b.shape[0], a.shape[1]), options, {"A": a.contiguous(), "B": b.contiguous()})


def _is_finite(product: Encoded) -> bool:
    """Whether all values of A B are finite in float32; they are computed only where a bound leaves that open."""
    a, b = (product.parts[key].abs().amax().double() for key in "AB")
    if a * b * product.parts["A"].shape[0] < torch.finfo(torch.float32).max / 2:
        return True
    return bool(decode(product).isfinite().all())


def scaled(values: Tensor, scale: float) -> Tensor:
    """values * scale, in their own dtype where that is exact, else in float32."""
    product = values.float() * scale
    power_of_two = math.frexp(scale)[0] in (0.5, -0.5)
    return narrowed(product, values.dtype) if power_of_two else product


def narrowed(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 values in `dtype` if that holds them, else as they are."""
    narrow = values.to(dtype)
    return narrow if torch.equal(narrow.float(), values) else values
