"""The base that an adapter belongs to: what kind its modules are, and its values, by the live model's names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from alignvec.checkpoint import TensorInfo
from alignvec.errors import AlignvecError
from alignvec.fingerprint import BaseIdentity, identify
from alignvec.formats import Encoded, decode
from alignvec.names import parameter_names, resolve
from alignvec.peft import wrappers
from alignvec.peft.outline import outline
from alignvec.sources import LiveSource, StoredSource, local_path, open_source
from alignvec.untrusted import brief
from alignvec.wrappers import unwrapped

STEM, CONFIG, PREFIX = "adapter_model", "adapter_config.json", "base_model.model."
MERGE_INSTEAD = "merge the adapter with PEFT's merge_and_unload and extract the vector from the two models"


class Base:
    """`names` maps every live parameter name, all that a tied one goes by, to the name that a vector has for it.

    `whole` is False where only what an adapter's own tensors say of its base is known.
    """

    whole = True
    held: frozenset[str] = frozenset()  # stored tensors that the live model has by any name, or as parts of others

    def __init__(self, model: nn.Module, source: StoredSource | dict[str, Tensor], names: dict[str, str], label: str):
        self.model, self.source, self.names, self.label = model, source, names, label
        self._modules = dict(wrappers.modules(model))  # of a wrapper and what it wraps, the latter
        self._parameters = {
            f"{path}.{leaf}" if path else leaf: parameter
            for path, module in self._modules.items()
            for leaf, parameter in module._parameters.items()
            if parameter is not None
        }

    @classmethod
    def open(cls, base: str | Path | nn.Module) -> Base:
        """A live model (one with PEFT's layers in it is seen as it was before), or a checkpoint.

        Raises AlignvecError for a live model that an adapter is merged into, and for a checkpoint that transformers
        builds no causal language model from.
        """
        return cls._live(base) if isinstance(base, nn.Module) else cls._stored(base)

    @classmethod
    def _live(cls, model: nn.Module) -> Base:
        model = unwrapped(model)
        label = type(model).__name__
        if (path := wrappers.merged(model)) is not None:
            raise AlignvecError(f"an adapter is merged into {path} of {label}: call unmerge() of that module first")
        found = cls(model, {}, {}, label)
        first: dict[int, str] = {}
        found.names = {name: first.setdefault(id(value), name) for name, value in found._parameters.items()}
        found.source = {name: found._parameters[name].detach() for name in first.values()}
        return found

    @classmethod
    def _stored(cls, path: str | Path) -> Base:
        """Which modules a checkpoint has says the model that transformers would build from its config."""
        source, folder = open_source(path), local_path(path)
        assert not isinstance(source, LiveSource)
        model = outline(source, folder if folder.is_dir() else folder.parent)
        live = parameter_names(model)
        stored: dict[str, str] = {}
        for name in source.tensors:
            found = resolve(model, live, name)
            if found is not None and (found == name or found not in stored):
                stored[found] = name
        others = {name: value for name, value in model.named_parameters() if name not in stored}
        moved = {id(value): name for name, value in others.items()}
        try:
            layout = _checkpoint_layout(model, others)
        except Exception as error:
            raise AlignvecError(
                f"transformers does not say how {source.label} stores {next(iter(others))} ({brief(error, 300)}): "
                "give the loaded model as the base"
            ) from error
        for name, value in layout.items():
            if id(value) in moved and name in source.tensors:
                stored[moved[id(value)]] = name
        described = {stored[name]: value for name, value in model.named_parameters() if name in stored}
        for name, value in {**layout, **described}.items():
            info = source.tensors.get(name)
            if info is not None and info.dtype.is_floating_point and info.shape != tuple(value.shape):
                raise AlignvecError(
                    f"{source.label} holds {name} as {list(info.shape)}, and its config.json makes it "
                    f"{list(value.shape)}: give a base whose files fit together"
                )
        base = cls(model, source, {name: stored.get(first, name) for name, first in live.items()}, source.label)
        base.held = frozenset(source.tensors.keys() & {*layout, *stored.values()})
        return base

    def identity(self) -> BaseIdentity:
        """Reads every tensor once."""
        config = self.source.config if isinstance(self.source, StoredSource) else getattr(self.model, "config", None)
        names = self.source.tensors if isinstance(self.source, StoredSource) else self.source
        once = [name for name in names if self.names.get(name, name) == name]  # a stored copy of a tied tensor is none
        return identify(((name, self._read(name)) for name in once), config)

    def value(self, name: str) -> Tensor:
        """A parameter's value, by its live name. AlignvecError when there is none, or one in another layout."""
        self.shape(name)
        if not self._has(self.names[name]):
            raise AlignvecError(
                f"{self.label} does not store {name} under one name: give the loaded model as the base, not its files"
            )
        return self._read(self.names[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """A parameter's shape. AlignvecError when there is no such parameter, or it is quantised."""
        if name not in self.names:
            raise AlignvecError(f"{self.label} has no parameter {name}: give the base that belongs to the adapter")
        stored = self.names[name]
        in_file = self.source.tensors.get(stored) if isinstance(self.source, StoredSource) else None
        found: Tensor | TensorInfo = in_file or self._parameters[name]
        if not found.dtype.is_floating_point:
            raise AlignvecError(
                f"{name} is {found.dtype} in {self.label}, which is quantised: give the base in floating point"
            )
        return tuple(found.shape)

    def buffer(self, name: str) -> Tensor | None:
        """A buffer's value, by its live name; None where it is not known."""
        path, _, leaf = name.rpartition(".")
        held = self._modules[path]._buffers.get(leaf) if path in self._modules else None
        if isinstance(self.source, StoredSource):
            return self._read(name) if held is not None and name in self.source.tensors else None
        return held

    def _has(self, stored: str) -> bool:
        return stored in (self.source.tensors if isinstance(self.source, StoredSource) else self.source)

    def _read(self, stored: str) -> Tensor:
        if not isinstance(self.source, StoredSource):
            if self.source[stored].is_meta:
                raise AlignvecError(f"{stored} of {self.label} is on the meta device: load the model's weights first")
            return self.source[stored].cpu()
        info = self.source.tensors[stored]
        return self.source.read(stored, 0, info.numel).view(info.shape)

    def adaptable(self, path: str) -> bool:
        """Whether there is a module of a kind that LoRA is read of."""
        return path in self._modules and kind_of(self._modules[path]) is not None

    def kind(self, path: str) -> str:
        """ "linear", "conv1d" or "embedding". AlignvecError for a module of another kind, or none."""
        if path not in self._modules:
            raise AlignvecError(f"{self.label} has no module {path}: give the base that belongs to it")
        kind = kind_of(self._modules[path])
        if kind is None:
            raise AlignvecError(
                f"{path} is a {type(self._modules[path]).__name__}, and LoRA is known of linear layers, Conv1D and "
                f"embeddings: {MERGE_INSTEAD}"
            )
        return kind

    def parameters_of(self, path: str) -> dict[str, Tensor]:
        """A module's own parameters by their last names."""
        own = {name.rpartition(".")[2] for name in self.names if name.rpartition(".")[0] == path}
        return {leaf: self.value(f"{path}.{leaf}") for leaf in sorted(own)}

    def tied(self, name: str) -> list[str]:
        """The other live names of the same parameter."""
        return [other for other, stored in self.names.items() if stored == self.names.get(name) and other != name]

    def live_names(self, stored: Mapping[str, object]) -> dict[str, str]:
        """A vector's names to the live ones. AlignvecError for one that the base does not have."""
        back = {there: live for live, there in reversed(self.names.items())}
        for name in stored:
            if name not in back:
                raise AlignvecError(f"{self.label} has no parameter {name}: give the vector's own base")
        return {name: back[name] for name in stored}

    def as_stored(self, deltas: Mapping[str, Tensor | Encoded]) -> dict[str, Tensor | Encoded]:
        """Deltas by live names to deltas by the vector's names, in the layout that the base is stored in.

        Checkpoints that hold one tensor an expert, where the live model has one for all, are written by transformers'
        own code: it cuts and puts together, so it converts differences as it converts weights.
        """
        there = {self.names[name]: delta for name, delta in deltas.items() if self._has(self.names[name])}
        others = {
            name: decode(delta) if isinstance(delta, Encoded) else delta.float()
            for name, delta in deltas.items()
            if not self._has(self.names[name])
        }
        if not others:
            return there
        # What is stored as one tensor with an edited parameter, and not edited, are zeros.
        zeros = {
            name: torch.zeros(()).expand(value.shape)
            for name, value in self.model.named_parameters()
            if not self._has(self.names[name]) and name not in others
        }
        try:
            layout = _checkpoint_layout(self.model, {**zeros, **others})
        except Exception as error:
            raise AlignvecError(
                f"transformers does not write {next(iter(others))} as {self.label} stores it ({brief(error, 300)}): "
                "give the loaded model as the base"
            ) from error
        for name, delta in layout.items():
            if not delta.any():
                continue
            if not self._has(name):
                raise AlignvecError(f"{self.label} has no tensor {name}: give the base that belongs to the adapter")
            there[name] = delta.contiguous()
        return there


def kind_of(module: nn.Module) -> str | None:
    """ "linear", "conv1d" or "embedding"; None for a module of another kind."""
    from transformers.pytorch_utils import Conv1D

    kinds = ((nn.Linear, "linear"), (Conv1D, "conv1d"), (nn.Embedding, "embedding"))
    return next((kind for cls, kind in kinds if isinstance(module, cls)), None)


def _checkpoint_layout(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by live names to tensors as transformers writes them; what is only renamed is the same object."""
    from transformers.core_model_loading import revert_weight_conversion

    with torch.no_grad():
        return dict(revert_weight_conversion(model, dict(tensors)))  # type: ignore[arg-type]
