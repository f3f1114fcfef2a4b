"""A decode step of the Llama family's layers in few launches: nine a layer, with its vectors or without.

norm and residual, q/k/v, rotary embedding and cache, attention over what the cache holds, o, norm and residual, gate
and up, activation, down. Models are recognised by their modules' names, and then by trying (`trial.py`): what computes
the same as the model's own forward is that layer, whatever it is called.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alignvec.decoding.cache import RowCache
from alignvec.edit import Edit
from alignvec.kernels.operands import dense
from alignvec.modules import Aligned, AlignedLinear, AlignedRootMeanSquare, own_parameter, root_mean_square
from alignvec.ops import prepared

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP = {"gate_proj", "up_proj", "down_proj"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
# What a configuration may ask for and these layers do not do.
_FOREIGN = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "attention_chunk_size",
    "attn_temperature_tuning",
    "no_rope_layers",
)


class UnrecognisedError(Exception):
    """The model is not of the family; the message says what is different."""


@dataclass(frozen=True)
class _Table:
    """Where coefficients are, and how operators are to run: the same for all modules of a model."""

    table: Tensor
    rows: Tensor
    choices: tuple[str, str, str]
    none: Tensor  # no columns

    @classmethod
    def of(cls, edit: Edit | None, device: torch.device) -> _Table:
        none = torch.zeros(0, dtype=torch.int32, device=device)
        if edit is None:
            table = torch.zeros(1, 1, device=device)
            return cls(table, torch.ones(1, dtype=torch.int32, device=device), ("auto", "exact", "auto"), none)
        execution, precision, backend = edit.choices
        choices = ("split" if execution == "materialise" else execution, precision, backend)
        return cls(edit.table, edit.rows, choices, none)


class _Linear:
    """Linear layers that read the same x, in one call: [rows, in_features] -> [rows, sum of out_features]."""

    def __init__(self, members: Sequence[nn.Linear], table: _Table) -> None:
        if len({own_parameter(member, "bias") is None for member in members}) > 1:
            raise UnrecognisedError("of the projections that read one tensor some have a bias and some have none")
        layers = [_operands(member, table) for member in members]
        self._run = prepared.linear_group(layers, table.table, table.rows, *table.choices)
        self.sizes = [own_parameter(member).shape[0] for member in members]

    def __call__(self, x: Tensor) -> Tensor:
        return self._run(x)


def _operands(member: nn.Linear, table: _Table) -> prepared.Layer:
    edit = member.edit if isinstance(member, AlignedLinear) else None
    weight, bias = own_parameter(member), own_parameter(member, "bias")
    if edit is None:
        return weight, bias, [], None, table.none
    deltas = edit.deltas.get("weight")
    if deltas is not None:
        operands = deltas.operands
    else:  # only the bias is edited
        operands = [dense(weight.new_zeros(1, 1).expand(weight.shape))] * len(edit.columns)
    return weight, bias, operands, edit.stack("bias"), edit.columns


class _Norm:
    """`residual += x`, then the norm of it: [rows, features]."""

    def __init__(self, module: Any, table: _Table) -> None:
        form = module.form if isinstance(module, AlignedRootMeanSquare) else root_mean_square(module)
        if isinstance(module, Aligned) and not isinstance(module, AlignedRootMeanSquare):
            form = None
        if form is None:
            raise UnrecognisedError(f"{type(module).__name__} is no root-mean-square norm with one weight")
        edit = module.edit if isinstance(module, Aligned) else None
        stack, columns = (None, table.none) if edit is None else (edit.stack("weight"), edit.columns)
        eps, offset = form
        mix = (own_parameter(module), stack, columns, table.table, table.rows)
        self._run = prepared.add_rms_norm(*mix, eps=eps, offset=offset, backend=table.choices[2])

    def __call__(self, x: Tensor, residual: Tensor) -> Tensor:
        return self._run(x, residual)


class _Layer:
    """One decoder layer for one token of each row."""

    def __init__(
        self, layer: Any, config: Any, table: _Table, position: tuple[Tensor, Tensor], cache: tuple[Tensor, Tensor]
    ) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.input_norm = _Norm(layer.input_layernorm, table)
        self.qkv = _Linear([_linear(attention, name) for name in ("q_proj", "k_proj", "v_proj")], table)
        self.query_norm: Any = getattr(attention, "q_norm", None)
        self.key_norm: Any = getattr(attention, "k_norm", None)
        self.head_dim = int(attention.head_dim)
        window = (
            attention.sliding_window
            if hasattr(attention, "sliding_window")
            else getattr(config, "sliding_window", None)
        )
        backend = table.choices[2]
        self.attention = prepared.attention(
            *position, *cache, scale=float(attention.scaling), window=int(window or 0), backend=backend
        )
        self.out = _Linear([_linear(attention, "o_proj")], table)
        self.norm = _Norm(layer.post_attention_layernorm, table)
        self.gate_up = _Linear([_linear(mlp, name) for name in ("gate_proj", "up_proj")], table)
        self.gate = prepared.gated(own_parameter(mlp.down_proj), _ACTIVATIONS[config.hidden_act], backend)
        self.down = _Linear([_linear(mlp, "down_proj")], table)
        self._parts = [size // self.head_dim for size in self.qkv.sizes]

    def __call__(self, x: Tensor, residual: Tensor, at: Tensor) -> Tensor:
        heads = self.qkv(self.input_norm(x, residual)).view(x.shape[0], -1, self.head_dim)
        q, k, v = heads.split(self._parts, 1)
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        y = self.norm(self.out(self.attention(q, k, v, at)), residual)
        return self.down(self.gate(self.gate_up(y)))


class FusedForward:
    """tokens int64 [rows] -> logits [rows, vocabulary], with keys and values appended to the cache.

    Raises:
        UnrecognisedError: the model's modules are not those of the family.
    """

    def __init__(self, model: Any, cache: RowCache) -> None:
        backbone, config = model.base_model, model.config
        _require(backbone, model)
        edit = next((module.edit for module in model.modules() if isinstance(module, Aligned)), None)
        table = _Table.of(edit, cache.lengths.device)
        self.cache = cache
        self.embedding, self.head = backbone.embed_tokens, model.get_output_embeddings()
        positions = torch.arange(cache.max_length, device=cache.lengths.device)[None]
        like = cache.layers[0][0].new_empty(1, 1, 1)
        cos, sin = backbone.rotary_emb(like, position_ids=positions)  # as the model rounds them
        position = cos[0].contiguous(), sin[0].contiguous()
        self.layers = [
            _Layer(layer, config, table, position, own)
            for layer, own in zip(backbone.layers, cache.layers, strict=True)
        ]
        self.norm = _Norm(backbone.norm, table)

    def __call__(self, tokens: Tensor) -> Tensor:
        at = self.cache.lengths[: tokens.shape[0]]
        x = self.embedding(tokens[:, None])[:, 0]
        residual = torch.zeros_like(x)
        for layer in self.layers:
            x = layer(x, residual, at)
        logits: Tensor = self.head(self.norm(x, residual))
        return logits


def _require(backbone: Any, model: Any) -> None:
    """Raise UnrecognisedError where names, hooks or settings say that this is not the family's plain forward."""
    config = model.config
    for name in ("embed_tokens", "layers", "norm", "rotary_emb"):
        if not hasattr(backbone, name):
            raise UnrecognisedError(f"{type(backbone).__name__} has no {name}")
    for name in _FOREIGN:
        if getattr(config, name, None):
            raise UnrecognisedError(f"the configuration sets {name}")
    if getattr(config, "hidden_act", None) not in _ACTIVATIONS:
        raise UnrecognisedError(
            f"the activation {getattr(config, 'hidden_act', None)} is none of {', '.join(_ACTIVATIONS)}"
        )
    if getattr(backbone.rotary_emb, "rope_type", "default") in ("dynamic", "longrope"):
        raise UnrecognisedError("its rotary frequencies depend on the length of the sequence")
    if "llama_4_scaling_beta" in (getattr(config, "rope_parameters", None) or {}):
        raise UnrecognisedError("its queries grow with their position (llama_4_scaling_beta)")
    for path, module in model.named_modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if not all(map(_ours, hooks)) or hasattr(module, "_hf_hook"):
            raise UnrecognisedError(f"{path or 'the model'} has hooks, which run with its forward only")
    for layer in backbone.layers:
        _require_children(layer, _LAYER, _LAYER)
        _require_children(layer.self_attn, _ATTENTION, _ATTENTION | {"q_norm", "k_norm", "rotary_emb"})
        _require_children(layer.mlp, _MLP, _MLP | {"act_fn"})
        _require_rotation_by_halves(layer.self_attn)


def _require_rotation_by_halves(attention: nn.Module) -> None:
    """Refuse other rotations, on exact numbers: in bfloat16 they may differ by little more than rounding."""
    module = sys.modules[type(attention).__module__]
    rotate = getattr(module, "apply_rotary_pos_emb", None)
    if rotate is None:
        raise UnrecognisedError(f"{type(attention).__name__} has a rotary embedding of its own")
    x, angles = torch.arange(1.0, 9.0, device="cpu"), torch.arange(0.5, 4.0, device="cpu")
    cos, sin = torch.cat([angles.cos()] * 2), torch.cat([angles.sin()] * 2)
    expected = x * cos + torch.cat([-x[4:], x[:4]]) * sin
    try:
        got = rotate(x[None, None, None], x[None, None, None], cos[None, None], sin[None, None])[0]
    except Exception as error:  # another signature, another embedding
        raise UnrecognisedError(f"{type(attention).__name__} has a rotary embedding of its own: {error}") from error
    if not torch.allclose(got.reshape(-1), expected, atol=1e-5):
        raise UnrecognisedError(f"{type(attention).__name__} does not rotate by halves")


def _ours(hook: Any) -> bool:
    """Whether a hook is of this library: what it does before a step, a decoder does itself."""
    return str(getattr(getattr(hook, "func", hook), "__module__", "")).startswith("alignvec.")


def _require_children(owner: nn.Module, needed: set[str], allowed: set[str]) -> None:
    names = set(owner._modules)
    if not needed <= names <= allowed or any(p is not None for p in owner._parameters.values()):
        parts = ", ".join(sorted(names | set(owner._parameters)))
        raise UnrecognisedError(f"{type(owner).__name__} consists of {parts}")


def _linear(owner: nn.Module, name: str) -> nn.Linear:
    module: Any = owner._modules[name]
    plain = isinstance(module, nn.Linear) and type(module).forward in (nn.Linear.forward, AlignedLinear.forward)
    if not plain or own_parameter(module).dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UnrecognisedError(f"{name} is a {type(module).__name__}, no plain linear layer")
    linear: nn.Linear = module
    return linear
