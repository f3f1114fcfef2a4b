"""The views that stand in a model for its modules, wherever they stand by now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from alignvec.edit import Edit
from alignvec.errors import AlignvecError
from alignvec.modules import Aligned, carry, view


@dataclass
class Swap:
    """One module of the model and the view that stands in for it."""

    original: nn.Module
    aligned: Aligned


class Swaps:
    """The swaps of a model. Only our own views are taken away; what somebody put around one, or in its place, stays."""

    def __init__(self, model: nn.Module, swaps: Sequence[Swap]) -> None:
        self.model = model
        self._swaps = list(swaps)
        self._places: list[tuple[nn.Module, str, nn.Module]] = []  # parent, name, view
        self.standing = False  # whether the views stand in the model, and not the originals

    def __len__(self) -> int:
        return len(self._swaps)

    def __iter__(self) -> Iterator[Swap]:
        return iter(self._swaps)

    def clear(self) -> None:
        self._swaps.clear()
        self._places.clear()

    def put_views(self) -> None:
        """Let the views stand where the originals do."""
        _put(self.model, {swap.original: swap.aligned for swap in self._swaps})
        self._places = self._find()
        self.standing = True

    def put_originals(self) -> list[str]:
        """Let the originals stand where the views do. The names of views that stand nowhere."""
        self._places.clear()
        self.standing = False
        put = _put(self.model, {swap.aligned: swap.original for swap in self._swaps})
        return [swap.aligned.edit.path for swap in self._swaps if swap.aligned not in put]

    def require_in_place(self) -> None:
        """Raise AlignvecError where a view is no longer part of the model, or a parameter has another shape."""
        for parent, name, aligned in self._places:
            if parent._modules.get(name) is not aligned:
                break
        else:
            return
        places = self._find()
        found = {aligned for _, _, aligned in places}
        for swap in self._swaps:
            if swap.aligned not in found:
                raise AlignvecError(
                    f"{swap.aligned.edit.path}, which vectors edit, was replaced after attach; call "
                    "alignment.detach(), replace it, and attach vectors that fit"
                )
        self._places = places

    def run_by_row(self, module: nn.Module, path: str) -> Edit:
        """Let a module run once for each row of coefficients."""
        if isinstance(module, Aligned):
            return module.edit
        one = self._swaps[0].aligned.edit
        edit = Edit(one.coefficients, (), {}, one.choices, one.device, path)
        self._swaps.append(Swap(module, view(module, edit)))
        self.put_views()
        return edit

    def _find(self) -> list[tuple[nn.Module, str, nn.Module]]:
        views = {swap.aligned for swap in self._swaps}
        return [
            (parent, name, child)
            for parent in self.model.modules()
            for name, child in parent._modules.items()
            if child in views
        ]


def _put(model: nn.Module, wanted: Mapping[nn.Module, nn.Module]) -> set[nn.Module]:
    """Replace modules wherever the model holds them; those that were found."""
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None and child in wanted
    ]
    found = {child for _, _, child in places}
    for module in found:
        carry(module, wanted[module])
    for parent, name, child in places:
        parent._modules[name] = wanted[child]
    return found
