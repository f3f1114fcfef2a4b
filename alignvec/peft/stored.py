"""A stored adapter as PEFT would load it: put into a copy of the base that has no values."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from alignvec.checkpoint import Checkpoint
from alignvec.errors import AlignvecError
from alignvec.peft import slots, wrappers
from alignvec.peft.base import CONFIG, PREFIX, STEM, Base
from alignvec.peft.config import lora_config, require_few, require_plain
from alignvec.peft.patterns import require_bounded
from alignvec.peft.slots import NAME
from alignvec.sources import StoredSource, local_path
from alignvec.untrusted import read_json

FACTOR = re.compile(r"(?P<path>.+)\.lora_((?P<matrix>[AB])\.weight|(?P<bias>B\.bias)|(?P<embedding>embedding_[AB]))")
DRAWN = (False, "orthogonal")  # values of init_lora_weights that give A and B random values
TRAINING = (".lora_velora_embed",)  # statistics that only training reads
EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")  # of one expert, before they were joined
LONGEST, DEEPEST = 1000, 100  # characters and dots of a tensor's name


class StoredAdapter:
    """An adapter's folder, read and checked as far as that goes without its base."""

    def __init__(self, path: str | Path) -> None:
        folder = local_path(path)
        if not (folder / CONFIG).is_file():
            raise AlignvecError(f"{folder} is no PEFT adapter: it holds no file {CONFIG}")
        self.label = Path(path).name
        self.config: dict[str, Any] = read_json(folder / CONFIG)
        require_plain(self.config, self.label)
        self.lora = lora_config(self.config, self.label)
        wanted = f"{STEM}.safetensors"
        if not any((folder / name).is_file() for name in (wanted, f"{wanted}.index.json")):
            pickled = (folder / f"{STEM}.bin").exists()
            raise AlignvecError(
                f"{folder} holds no file {wanted}: "
                + ("pickles are not read, load the adapter and save it as safetensors" if pickled else "save it again")
            )
        checkpoint = Checkpoint.open(folder, stem=STEM)
        names = self._plain(checkpoint.tensors)
        self.tensors = {plain: checkpoint.tensor(name) for plain, name in names.items()}

    def _plain(self, stored: Iterable[str]) -> dict[str, str]:
        """The tensors' names by those that the base's modules have. AlignvecError for names that PEFT ignores."""
        names: dict[str, str] = {}
        for name in stored:
            if name.endswith(TRAINING):
                continue
            if len(name) > LONGEST or name.count(".") > DEEPEST:
                raise AlignvecError(
                    f"adapter {self.label} holds a tensor whose name has {len(name)} characters, {name[:60]!r} and "
                    "more: no module has such a name, save the adapter again"
                )
            if not name.startswith(PREFIX):
                raise AlignvecError(
                    f"adapter {self.label} holds {name}, which PEFT does not load, since it does not begin with "
                    f"{PREFIX}: save the adapter with PEFT"
                )
            plain = name.removeprefix(PREFIX).replace("_orig_mod.", "")  # torch.compile's prefix
            if plain in names:
                raise AlignvecError(
                    f"adapter {self.label} holds {plain} twice, as {names[plain]} and as {name}: take one out"
                )
            names[plain] = name
        return names

    def base(self) -> Base:
        """What is known of the base without it: the modules that have low-rank factors, and their shapes."""
        if self.lora.target_parameters:
            listed = ", ".join(sorted(self.lora.target_parameters))
            raise AlignvecError(
                f"adapter {self.label} has target_parameters ({listed}): give the base, to know their shapes"
            )
        if self.lora.trainable_token_indices is not None:
            raise AlignvecError(
                f"adapter {self.label} has trainable_token_indices: give the base to take the difference from"
            )
        found: dict[str, dict[str, Tensor]] = {}
        for key, value in self.tensors.items():
            if match := FACTOR.fullmatch(key):
                leaf = match["matrix"] or match["bias"] or match["embedding"]
                found.setdefault(match["path"], {})[leaf] = value
            elif ".lora_" in key:
                raise AlignvecError(f"adapter {self.label} holds {key}, which is no part of a plain LoRA")
            elif not key.endswith(".base_layer.weight"):  # that is a copy of the base's own
                raise AlignvecError(
                    f"adapter {self.label} holds {key} whole: give the base to take the difference from"
                )
        layers = {path: self._layer(path, factors) for path, factors in found.items()}
        self.tensors = {key: value for key, value in self.tensors.items() if FACTOR.fullmatch(key)}
        model = nn.Module()
        wrappers.grow(model, layers, self.label)
        names = {name: name for name, _ in model.named_parameters()}
        known = Base(model, dict(model.named_parameters()), names, "the modules that it edits")
        known.whole = False
        return known

    def checkpoint_layout(self, base: Base) -> Base:
        """The base with linear layers for tensors of its files that the live model joins, if the adapter names such.

        Adapters of models that had one layer an expert are then read as they were trained, by the checkpoint's names.
        """
        if not isinstance(base.source, StoredSource) or self.lora.target_parameters:
            return base
        found = {match["path"] for key in self.tensors if (match := FACTOR.fullmatch(key)) and match["matrix"]}
        names = {f"{path}.weight": path for path in sorted(found) if not base.adaptable(path)}
        stored = base.source.tensors
        joined = {path: stored[name].shape for name, path in names.items() if name in base.held}
        if not joined or any(len(shape) != 2 for shape in joined.values()):
            return base
        with torch.device("meta"):
            layers: dict[str, nn.Module] = {
                path: nn.Linear(shape[1], shape[0], bias=False) for path, shape in joined.items()
            }
        model = wrappers.without_values(base.model)
        vars(model).pop("config", None)  # by which PEFT would join them
        kept = {live: name for live, name in base.names.items() if name not in names}
        for live in base.names.keys() - kept.keys():
            above, _, leaf = live.rpartition(".")[0].rpartition(".")
            model.get_submodule(above)._modules.pop(leaf, None)
        wrappers.grow(model, layers, self.label)
        return Base(model, base.source, {**kept, **{f"{path}.weight": f"{path}.weight" for path in joined}}, base.label)

    def _layer(self, path: str, factors: Mapping[str, Tensor]) -> nn.Module:
        embedding = "embedding_A" in factors or "embedding_B" in factors
        a, b = (factors.get(f"embedding_{key}" if embedding else key) for key in "AB")
        if a is None or b is None or a.dim() != 2 or b.dim() != 2:
            raise AlignvecError(f"adapter {self.label} has no two matrices A [r, in] and B [out, r] for {path}")
        with torch.device("meta"):
            if embedding:
                return nn.Embedding(a.shape[1], b.shape[0])
            if self.lora.fan_in_fan_out:
                return Conv1D(b.shape[0], a.shape[1])
            return nn.Linear(a.shape[1], b.shape[0])

    def put_into(self, base: Base) -> tuple[nn.Module, dict[str, Tensor]]:
        """A copy of the base's model with the adapter in it, and values in the place of the base's own, by live names.

        Raises AlignvecError for what PEFT refuses, tensors of a wrong shape, and tensors that PEFT would not load.
        """
        model = wrappers.without_values(base.model)
        self._require_bounded(model)
        try:
            with warnings.catch_warnings(), torch.device("meta"):
                warnings.simplefilter("ignore")
                self._inject(model)
                tensors = self._converted(model)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).partition("\n")[0][:300]
            raise AlignvecError(
                f"PEFT does not load adapter {self.label} onto {base.label} ({reason}): mend {CONFIG}, or "
                f"{self._other_base(base)}"
            ) from error
        self._require_same_scales(tensors, base)
        places, own = slots.slots(model), slots.own_parameters(model)
        whole: dict[str, Tensor] = {}
        ignored: list[str] = []
        for key, value in tensors.items():
            place = places.get(key) or places.get(key.replace(".modules_to_save.", "."))
            if place is not None:
                self._require_shape(key, value, place[0][place[1]], base)
                place[0][place[1]] = nn.Parameter(value, requires_grad=False)
            elif key in own:
                whole[own[key]] = value
            else:
                ignored.append(key)
        if ignored:
            self._refuse(ignored, base)
        if self.config.get("init_lora_weights", True) in DRAWN and (path := slots.left_out(model)) is not None:
            raise AlignvecError(
                f"adapter {self.label} holds nothing for {path}, which {CONFIG} names and PEFT then gives random "
                f"values, with init_lora_weights={self.config['init_lora_weights']!r}: mend target_modules"
            )
        return model, whole

    def _require_bounded(self, model: nn.Module) -> None:
        """Raises AlignvecError for a configuration that PEFT would not be done with on this model."""
        modules = [path for path, _ in model.named_modules()]
        parameters = dict(model.named_parameters())
        tokens = max((value.shape[0] for value in parameters.values() if value.dim()), default=0)
        require_few(self.config, len(modules), tokens, self.label)
        # PEFT also asks for the names that layers of experts had before they were joined, as the adapter may have them.
        earlier = {f"{name.rpartition('.')[0]}.{old}" for name in parameters if "expert" in name for old in EXPERTS}
        own = {key.partition(".lora_")[0] for key in self.tensors}
        require_bounded(self.config, [*modules, *parameters, *sorted(earlier | own)], self.label)

    def _inject(self, model: nn.Module) -> None:
        from peft import inject_adapter_in_model

        inject_adapter_in_model(self.lora, model, NAME)

    def _converted(self, model: nn.Module) -> dict[str, Tensor]:
        """The adapter's tensors by PEFT's names for them: those of one expert each, of earlier models, are joined."""
        try:
            from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
        except ImportError:
            return self.tensors
        with torch.device("cpu"):
            converted = convert_peft_adapter_state_dict_for_transformers(
                model, self.lora, {PREFIX + key: value for key, value in self.tensors.items()}, NAME
            )
        return {key.removeprefix(PREFIX): value for key, value in converted.items()}

    def _require_same_scales(self, converted: Mapping[str, Tensor], base: Base) -> None:
        """Raises AlignvecError where PEFT joins experts' tensors and does not give them the scale that they had."""
        joined = {key.partition(".lora_")[0] for key in self.tensors.keys() - converted.keys()}
        patterns = [*(self.config.get("rank_pattern") or {}), *(self.config.get("alpha_pattern") or {})]
        named = any(re.match(rf"(.*\.)?({key})$", path) for key in patterns for path in joined)
        if joined and (self.lora.use_rslora or named):
            lost = "rank_pattern or alpha_pattern" if named else "the scale of use_rslora"
            raise AlignvecError(
                f"adapter {self.label} edits {min(joined)} by itself, which {base.label} has joined with others, and "
                f"PEFT loses {lost} when it joins them: {self._other_base(base)}"
            )

    def _require_shape(self, key: str, value: Tensor, expected: Tensor, base: Base) -> None:
        if value.shape == expected.shape or ".lora_" not in key:
            return
        path, _, leaf = key.partition(".lora_")
        at = {"A.weight": 0, "B.weight": 1, "embedding_A": 0, "embedding_B": 1}.get(leaf)
        if at is not None and value.dim() == expected.dim() and not self.lora.target_parameters:
            held, said = value.shape[at], expected.shape[at]
            if held != said:
                raise AlignvecError(
                    f"adapter {self.label} says that {path} has rank {said}, but it holds {held}: mend r or "
                    "rank_pattern"
                )
        raise AlignvecError(
            f"adapter {self.label} holds {key} as {list(value.shape)}, and on {base.label} {CONFIG} makes it "
            f"{list(expected.shape)}: give the adapter's own base"
        )

    def _other_base(self, base: Base) -> str:
        """What to do about an adapter that does not go onto a base."""
        live = dict(wrappers.modules(base.model))
        own = all(key.partition(".lora_")[0] in live for key in self.tensors if ".lora_" in key)
        if own or isinstance(base.source, StoredSource):
            return "give the adapter's own base"
        return "give the adapter's own base, as files if its experts are layers of their own in them"

    def _refuse(self, ignored: list[str], base: Base) -> None:
        """Raises AlignvecError for tensors that PEFT would leave out."""
        key, more = ignored[0], len(ignored) - 1
        also = f" and {more} more" if more else ""
        path = key.partition(".lora_")[0]
        if key not in self.tensors:
            raise AlignvecError(
                f"PEFT joins tensors of adapter {self.label} to {key}, which it does not load onto {base.label}: "
                f"{self._other_base(base)}"
            )
        if path != key and ".base_layer" not in path and path not in dict(wrappers.modules(base.model)):
            raise AlignvecError(
                f"adapter {self.label} holds {key}{also}, and {base.label} has no module {path}: give the adapter's "
                "own base"
            )
        if self.lora.ensure_weight_tying and not base.whole:
            raise AlignvecError(
                f"adapter {self.label} has ensure_weight_tying and holds {key}, whose place depends on what its base "
                "ties together: give the base"
            )
        raise AlignvecError(
            f"adapter {self.label} holds {key}{also}, which PEFT does not load onto {base.label} with the adapter's "
            f"configuration: mend {CONFIG} (target_modules, for one), or take the tensor out"
        )
