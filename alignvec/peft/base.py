"""The base that an adapter belongs to: what kind its modules are, and its values, by the live model's names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from alignvec.errors import AlignvecError
from alignvec.fingerprint import BaseIdentity, identify
from alignvec.names import parameter_names, resolve
from alignvec.sources import LiveSource, StoredSource, local_path, open_source

STEM, CONFIG, PREFIX = "adapter_model", "adapter_config.json", "base_model.model."
WRAPPERS = re.compile(r"\.(base_layer|original_module)(?=\.)")  # what PEFT puts between a module and its parameters
ADDED = re.compile(r"\.(lora_\w+|modules_to_save)\.")


class Base:
    """`names` maps every live parameter name, all that a tied one goes by, to the name that a vector has for it."""

    def __init__(self, model: nn.Module, source: StoredSource | dict[str, Tensor], names: dict[str, str], label: str):
        self.model, self.source, self.names, self.label = model, source, names, label

    @classmethod
    def open(cls, base: str | Path | nn.Module) -> Base:
        """A live model (one with PEFT's layers in it is seen as it was before), or a checkpoint."""
        return cls._live(base) if isinstance(base, nn.Module) else cls._stored(base)

    @classmethod
    def _live(cls, model: nn.Module) -> Base:
        first = parameter_names(model)
        plain = {name: WRAPPERS.sub("", name) for name in first if not ADDED.search(name)}
        parameters = dict(model.named_parameters())
        values = {plain[name]: parameters[name].detach() for name in plain if first[name] == name}
        return cls(model, values, {here: plain[first[name]] for name, here in plain.items()}, type(model).__name__)

    @classmethod
    def _stored(cls, path: str | Path) -> Base:
        """Which modules a checkpoint has says the model that transformers would build from its config."""
        from transformers import AutoConfig, AutoModelForCausalLM

        source, folder = open_source(path), local_path(path)
        assert not isinstance(source, LiveSource)
        try:
            config = AutoConfig.from_pretrained(folder if folder.is_dir() else folder.parent, local_files_only=True)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
        except (OSError, ValueError, KeyError) as error:
            raise AlignvecError(f"{path} has no config.json of a causal language model ({error})") from None
        model.tie_weights()
        live = parameter_names(model)
        stored: dict[str, str] = {}
        for name in source.tensors:
            found = resolve(model, live, name)
            if found is not None and (found == name or found not in stored):
                stored[found] = name
        return cls(model, source, {name: stored.get(first, name) for name, first in live.items()}, source.label)

    def identity(self) -> BaseIdentity:
        """Reads every tensor once."""
        config = self.source.config if isinstance(self.source, StoredSource) else getattr(self.model, "config", None)
        names = self.source.tensors if isinstance(self.source, StoredSource) else self.source
        return identify(((name, self._read(name)) for name in names), config)

    def value(self, name: str) -> Tensor:
        """A parameter's value, by its live name."""
        self.shape(name)
        return self._read(self.names[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """A parameter's shape. AlignvecError when there is no such parameter."""
        stored = self.names.get(name, "")
        found = self.source.tensors.get(stored) if isinstance(self.source, StoredSource) else self.source.get(stored)
        if found is None:
            raise AlignvecError(f"{self.label} has no parameter {name}: give the base that belongs to the adapter")
        return tuple(found.shape)

    def _read(self, stored: str) -> Tensor:
        if not isinstance(self.source, StoredSource):
            return self.source[stored].cpu()
        info = self.source.tensors[stored]
        return self.source.read(stored, 0, info.numel).view(info.shape)

    def kind(self, path: str) -> str:
        """ "linear", "conv1d" or "embedding". AlignvecError for a module of another kind, or none."""
        from transformers.pytorch_utils import Conv1D

        try:
            module = self.model.get_submodule(path)
        except AttributeError:
            raise AlignvecError(f"{self.label} has no module {path}: give the base that belongs to it") from None
        module = getattr(module, "base_layer", module)
        for cls, kind in ((nn.Linear, "linear"), (Conv1D, "conv1d"), (nn.Embedding, "embedding")):
            if isinstance(module, cls):
                return kind
        raise AlignvecError(f"{path} is a {type(module).__name__}: LoRA is known of linear and embedding layers only")

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
