"""What a model's configuration and modules say that no trial of a few tokens can show."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from alignvec.errors import AlignvecError

_OFFSETS = 8  # entries at most that a table of positions has besides the positions, as OPT's two
_KINDS = ("full_attention", "sliding_attention", "chunked_attention")
_NO_ATTENTION = ("moe", "mlp", "dense", "sparse")  # kinds of layers that look at no other token


@dataclass(frozen=True)
class Reach:
    """Which earlier tokens a layer looks at. window: so many, its own included; chunk: those of its chunk; 0: all."""

    window: int = 0
    chunk: int = 0

    def __str__(self) -> str:
        sizes = {"window": self.window, "chunk": self.chunk}
        return ", ".join(f"a {name} of {size}" for name, size in sizes.items() if size) or "all"

    def within(self, tokens: int) -> Reach:
        """The same for rows of at most `tokens`."""
        return Reach(self.window if self.window < tokens else 0, self.chunk if self.chunk < tokens else 0)


def reaches(config: Any) -> dict[str, Reach] | Reach:
    """What the layers of a text configuration look at: by their kind, or one for all where it names no kinds.

    Raises:
        AlignvecError: layers of one kind that reach differently far, or of a kind whose reach is not known.
    """
    types = list(getattr(config, "layer_types", None) or ())
    count = len(types) or int(getattr(config, "num_hidden_layers", 1))
    per_layer = getattr(config, "per_layer_config", None)  # configurations may set a window layer by layer
    found: dict[str, Reach] = {}
    for index in range(count):
        kind = types[index] if types else ""
        if kind in _NO_ATTENTION:
            continue
        if kind and kind not in _KINDS:
            raise AlignvecError(f"a decoder does not know which tokens layers of {kind} look at; use model.generate")
        reach = _reach(config if per_layer is None else per_layer[index], kind)
        if found.setdefault(kind, reach) != reach:
            raise AlignvecError(
                f"layer {index} looks at other tokens ({reach}) than {kind or 'the others'} ({found[kind]}), and a "
                "decoder has one mask for both; use model.generate"
            )
    return found if types else found[""]


def _reach(config: Any, kind: str) -> Reach:
    """Of a layer with this configuration."""
    window = 0 if kind in ("full_attention", "chunked_attention") else getattr(config, "sliding_window", None)
    chunk = 0 if kind in ("full_attention", "sliding_attention") else getattr(config, "attention_chunk_size", None)
    return Reach(int(window or 0), 0 if window else int(chunk or 0))


def require_keys_and_values(model: Any) -> None:
    """Refuse a model whose layers keep more than the keys and values of each token.

    Raises:
        AlignvecError: which names those layers.
    """
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    try:
        layers = list(enumerate(DynamicCache(config=config).layers))
    except Exception:  # a configuration that transformers' cache cannot be made for: the trial says what comes of it
        layers = []
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    others = [(i, layer) for i, layer in layers if type(layer) not in plain and type(layer).__name__ != "DummyLayer"]
    if others:
        types = getattr(config, "layer_types", None) or ()
        kinds = ", ".join(dict.fromkeys(types[i] for i, _ in others if i < len(types))) or "an unknown kind"
        numbers = ", ".join(str(i) for i, _ in others[:4]) + (", ..." if len(others) > 4 else "")
        recurrent = any(hasattr(layer, "recurrent_states") or hasattr(layer, "conv_states") for _, layer in others)
        kept = "recurrent state" if recurrent else "more than keys and values"
        what = f"{kept} in layer{'s' if len(others) > 1 else ''} {numbers} ({kinds})"
    elif getattr(model, "_is_stateful", False):
        what = "recurrent state in its layers"
    else:
        return
    raise AlignvecError(f"{name} keeps {what}, and a decoder has room for keys and values alone; use model.generate")


def length_dependent(model: Any) -> bool:
    """Whether the model's forward looks at the length of its rows on the host, which a captured graph cannot."""
    return any("dynamic" in kind for _, _, kind, _ in _ropes(model))


def most_tokens(model: Any, alone: bool) -> tuple[int, str] | None:
    """How many tokens a row can have, and why no more; None where nothing but memory bounds them.

    alone: the row is alone in its steps, whose lengths the host knows.
    """
    config = model.config.get_text_config(decoder=True)
    ends = []
    for path, module, kind, parameters in _ropes(model):
        end = getattr(module, "original_max_seq_len", None)
        if kind == "longrope":
            end = parameters.get("original_max_position_embeddings", end)
        if end:
            ends.append((int(end), f"beyond them the {kind} frequencies of {path} change for all rows of a step"))
    if getattr(config, "attn_temperature_tuning", False) and not alone:
        end = int(getattr(config, "floor_scale", 0)) - 1
        ends.append((end, "beyond them attn_temperature_tuning scales all rows of a step by one length"))
    table = _position_table(model)
    if table is not None:
        ends.append((int(config.max_position_embeddings), f"{table} has no more positions"))
    return min(ends, default=None)


def one_position(model: Any) -> str | None:
    """Why all rows of a step have one position; None where each has its own."""
    table = _position_table(model)
    if table is None or "position_ids" in inspect.signature(type(model).forward).parameters:
        return None
    return f"its forward takes no position_ids, and counts the positions of {table} from the longest row"


def _ropes(model: Any) -> Iterator[tuple[str, Any, str, Mapping[str, Any]]]:
    """Rotary embeddings whose frequencies follow the length of the sequence: path, module, kind and parameters."""
    for path, module in model.named_modules():
        own = getattr(module, "rope_type", None)
        parameters = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
        by_layer = own if isinstance(own, dict) else {None: own}
        for layer, kind in by_layer.items():
            if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
                yield path, module, kind, parameters if layer is None else parameters.get(layer) or {}


def _position_table(model: Any) -> str | None:
    """The path of a table with one entry a position, as learned positions have; None where the model has none."""
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not isinstance(positions, int):
        return None
    vocabulary = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    for path, module in model.named_modules():
        entries = module.num_embeddings if isinstance(module, nn.Embedding) and id(module) not in vocabulary else 0
        if positions <= entries <= positions + _OFFSETS:
            return str(path)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.dim() == 2 and buffer.is_floating_point() and len(buffer) == positions:
                return f"{path}.{name}"
    return None
