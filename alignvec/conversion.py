"""From the tensors of a checkpoint to the parameters of a live model, by transformers' own rules of loading.

Transformers renames, stacks, splits and permutes tensors while it loads (one tensor for each expert on disk, three
dimensions in memory). The rules are linear, so they convert differences as they convert weights. Here they are planned
by names and shapes, on the meta device, and a parameter gets only what they make of the tensors that were given:
nothing is initialised in the place of one that is missing.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Shapes = Mapping[str, tuple[int, ...]]


@dataclass
class Group:
    """Stored tensors that become one or several live ones together."""

    target: str  # the first live name
    converter: Any = None  # None: the one source is the target, under another name
    sources: list[tuple[str, str]] = field(default_factory=list)  # the rule's pattern, the stored name; in order

    @property
    def names(self) -> list[str]:
        return [name for _, name in self.sources]

    def convert(self, tensors: Callable[[str], Tensor], root: nn.Module) -> dict[str, Tensor]:
        """The live tensors that the rule makes of the stored ones."""
        if self.converter is None:
            return {self.target: tensors(self.names[0])}
        rule = copy.deepcopy(self.converter)
        for pattern, name in self.sources:
            rule.add_tensor(self.target, name, pattern, tensors(name))
        made = rule.convert(self.target, model=root, config=root.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def shapes(self, stored: Shapes, root: nn.Module) -> dict[str, tuple[int, ...]]:
        """The live tensors' shapes; none where the rule cannot be applied to what there is."""
        try:
            made = self.convert(lambda name: torch.empty(stored[name], device="meta"), root)
        except Exception:  # whatever a rule makes of tensors that it was not written for
            return {}
        return {name: tuple(value.shape) for name, value in made.items()}


def plan(root: nn.Module, live: Iterable[str], stored: Shapes) -> list[Group]:
    """How transformers would load tensors of the names `stored` into `root`, whose parameters and buffers are `live`.

    Names that lead nowhere are in no group. The rules are those that the model was loaded with where they place
    as many names as the ones that transformers has for its class.
    """
    if not hasattr(root, "config"):
        return []
    # Transformers sorts by the numbers in names, and digits that make none (superscripts) are in no model's.
    stored = {name: shape for name, shape in stored.items() if name.isascii() or not _superscript(name)}
    if not stored:
        return []
    plans = [_grouped(rules, root, dict.fromkeys(live, True), stored) for rules in _rules(root)]
    return max(plans, key=lambda groups: sum(len(group.sources) for group in groups), default=[])


def _superscript(name: str) -> bool:
    return any(part.isdigit() and not part.isdecimal() for part in name.split("."))


class StoredLayout:
    """The live parameters that rules of loading make, as a checkpoint holds them: one group's at a time."""

    def __init__(self, root: nn.Module, like: Mapping[str, Tensor], value: Callable[[str], Tensor]) -> None:
        """`like`: the parameters by their names in `root`, of which only shapes and dtypes are read. `value`: reads
        one."""
        self._root, self._parameters, self._value = root, like, value
        self._chosen: dict[str, tuple[list[Any], bool]] = {}

    @functools.cached_property
    def _like(self) -> dict[str, Tensor]:
        return {name: torch.empty_like(tensor, device="meta") for name, tensor in self._parameters.items()}

    @functools.cached_property
    def _loaded(self) -> list[list[Any]]:
        return _rules(self._root, add_legacy=False)

    @functools.cached_property
    def _rules(self) -> list[list[Any]]:
        return [*self._loaded, *(rules for each in self._loaded if (rules := _unchecked(each)))]

    def shapes(self, wanted: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """All names and shapes that a checkpoint of the model has, by the rules that give most `wanted` names."""
        names = set(wanted)
        found = [made for rules in self._loaded if (made := _reverted(self._root, rules, self._like)) is not None]
        best = max(found, key=lambda made: len(names & made.keys()), default={})
        return {name: tuple(tensor.shape) for name, tensor in best.items()}

    def like(self, group: Group, live: Iterable[str], stored: Shapes) -> dict[str, Tensor]:
        """A group's tensors as a checkpoint holds them, on the meta device; those that no rule gives are left out.

        live: the parameters that the group makes. stored: which shapes are looked for, where rules leave a choice.
        """
        best: dict[str, Tensor] = {}
        score = (0, 0)
        for rules in self._rules:
            for alone in (True, False):  # a name may depend on what else there is
                found = _reverted(self._root, rules, self._tensors(live, alone, self._like.__getitem__)) or {}
                found = {name: found[name] for name in group.names if name in found}
                fitting = sum(tuple(tensor.shape) == tuple(stored[name]) for name, tensor in found.items())
                if (len(found), fitting) > score:
                    best, score = found, (len(found), fitting)
                    self._chosen[group.target] = rules, alone
                if len(found) == len(group.names):
                    break
            if score == (len(group.names), len(group.names)):
                break
        return best

    def values(self, group: Group, live: Iterable[str], stored: Shapes) -> dict[str, Tensor]:
        """As `like`, with the model's values, on the device that they are on."""
        names = self.like(group, live, stored)
        if not names:
            return {}
        rules, alone = self._chosen[group.target]
        found = _reverted(self._root, rules, self._tensors(live, alone, self._value)) or {}
        return {name: found[name] for name in names}

    def _tensors(self, live: Iterable[str], alone: bool, value: Callable[[str], Tensor]) -> dict[str, Tensor]:
        return ({} if alone else self._like) | {name: value(name) for name in live}


def _reverted(root: nn.Module, rules: list[Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Live tensors as transformers saves them by these rules; None where a rule has no way back."""
    from transformers.core_model_loading import revert_weight_conversion

    twin = copy.copy(root)  # shares everything but the attribute that names the rules
    twin._weight_conversions = copy.deepcopy(rules)  # type: ignore[assignment]
    try:
        with torch.no_grad():
            return dict(revert_weight_conversion(twin, dict(tensors)))  # type: ignore[arg-type]
    except Exception:  # whatever a rule makes of tensors that it was not written for
        return None


def _unchecked(rules: list[Any]) -> list[Any]:
    """The rules, with those that convert only where the shape is not the model's own made to convert always; empty
    where there are none. Such a rule says nothing about which layout the checkpoint had."""
    twins = copy.deepcopy(rules)
    checking = [op for rule in twins for op in getattr(rule, "operations", ()) if getattr(op, "check_dims", False)]
    for operation in checking:
        operation.check_dims = False
    return twins if checking else []


def _rules(root: nn.Module, *, add_legacy: bool = True) -> list[list[Any]]:
    """The rules that the model was loaded with, if it was, and those of its class."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping

        known = [get_model_conversion_mapping(root, add_legacy=add_legacy)]  # type: ignore[arg-type]
    except (ImportError, AttributeError):
        return []
    recorded = getattr(root, "_weight_conversions", None)
    return ([recorded] if recorded else []) + known


def _grouped(rules: list[Any], root: nn.Module, live: dict[str, bool], stored: Shapes) -> list[Group]:
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = copy.deepcopy(rules)  # some remember what they have seen
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix = getattr(root, "base_model_prefix", "")
    groups: dict[str, Group] = {}
    for name in sorted(stored, key=dot_natural_key):  # experts in the order of their numbers
        target, pattern = rename_source_key(name, renamings, converters, prefix, live)
        if target not in live and name in live:
            target, pattern = name, None
        if target not in live:
            continue
        if pattern is None:
            # A second name for one parameter, as of a tied head, is a group of its own.
            groups[f"{target} {name}"] = Group(target, None, [(name, name)])
        else:
            group = groups.setdefault(target, Group(target, by_pattern[pattern]))
            group.sources.append((pattern, name))
    return list(groups.values())
