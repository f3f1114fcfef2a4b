"""Modules that run by their own forward, once for each row of coefficients where these differ.

Which inputs belong to which row is not guessed: an `Order`, found by trying (`rowcheck.py`), says of every tensor
whether it lies in the order of the sequences of the batch or is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alignvec.errors import RowsError
from alignvec.foreign import ByRow, together
from alignvec.kernels.mixes import widened
from alignvec.tracing import traced

if TYPE_CHECKING:
    from alignvec.edit import Edit
    from alignvec.modules import Aligned
    from alignvec.steps import Step

BATCH, SHARED, OTHER = "batch", "shared", "other"


@dataclass(frozen=True)
class Order:
    """How the inputs of a module lie in a batch.

    batch_major: sequence after sequence, as much of each; or, with a leading size of 1, the same for all sequences.
    shared: the same for all sequences, without a dimension for them. whole: every call had all of a row's tokens.
    tensors: BATCH, SHARED or OTHER for each tensor among the arguments, and its leading size when it was tried.
    """

    batch_major: bool
    shared: bool = False
    whole: bool = True
    tensors: Mapping[str, tuple[str, int]] = field(default_factory=dict)


def mapped(value: Any, change: Callable[[str, Any], Any], place: str = "") -> Any:
    """`change(place, item)` of all in tuples, lists and dicts. Caches and other objects are items, never opened."""
    if isinstance(value, tuple | list) and not isinstance(value, torch.Size):
        items = [mapped(item, change, f"{place}[{number}]") for number, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return type(value)({key: mapped(item, change, f"{place}[{key!r}]") for key, item in value.items()})
    return change(place, value)


def named_tensors(value: Any) -> dict[str, Tensor]:
    """The tensors in a call's arguments or results, by their place."""
    found: dict[str, Tensor] = {}

    def note(place: str, item: Any) -> None:
        if isinstance(item, Tensor):
            found[place] = item

    mapped(value, note)
    return found


def forward_by_row(view: Aligned, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The module's own forward; where the rows of the batch have different coefficients of its vectors, once for each
    row with that row's share of the inputs.

    Raises:
        AlignvecError: rows that differ in a module whose inputs are not known to lie in the batch's order, or that is
            given keys and values of earlier tokens to add to.
    """
    edit = view.edit
    coefficients = edit.coefficients
    if traced():
        return _traced(view, args, kwargs)
    step = coefficients.step
    if step is None:
        first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()), None)
        with coefficients.call(None if first is None else first.shape[0]):
            return forward_by_row(view, args, kwargs)
    if id(view) in step.given:  # its forward calls itself
        return view.original.forward(view, *args, **kwargs)
    if step.calls is not None:
        step.calls.append((edit, (args, kwargs)))
    if step.rows == 1 or not (edit.widens or edit.rowwise):  # its parameters come by row
        return _forward(view, step, args, kwargs)
    if step.alike(edit.vectors) and edit.deltas and not _inner(view):
        with coefficients.within(step.row(0)):
            return _forward(view, step.row(0), args, kwargs)
    parts = []
    for number, (own_args, own_kwargs) in enumerate(_split(edit, step, args, kwargs)):
        with coefficients.within(step.row(number)) as own:
            parts.append(_forward(view, own, own_args, own_kwargs))
    if edit.order is not None and edit.order.shared:
        return together(parts, step.batch or step.rows, edit.refuse_rows)
    return _joined(parts)


def _forward(view: Aligned, step: Step, args: Any, kwargs: Any) -> Any:
    """Under one mix. A module without further parameters below it runs in float32, so that its mix is not rounded."""
    edit = view.edit
    if edit.widens and edit.results is None:
        edit.results = _result_dtypes(view, step, args, kwargs)
    step.given[id(view)] = edit.mixed(view, step) if edit.widens else {}
    kept = _kept(view) if step.calls is not None else {}
    try:
        if not edit.widens:
            return view.original.forward(view, *args, **kwargs)
        dtype = _dtype(view, args, kwargs)
        args, kwargs = mapped((args, kwargs), _widened)
        return _narrowed(view.original.forward(view, *args, **kwargs), edit.results or {}, dtype)
    finally:
        del step.given[id(view)]
        if step.calls is not None and _kept(view) != kept:
            edit.widens = False  # it keeps a state, of the whole batch and in the model's dtype


def _result_dtypes(view: Aligned, step: Step, args: Any, kwargs: Any) -> dict[str, torch.dtype]:
    """The dtypes that the module itself gives of these inputs, by place; routers, say, give float32 in every model."""
    dtype = _dtype(view, args, kwargs)
    if dtype == torch.float32:
        return {}
    kept = dict(view.__dict__)
    step.given[id(view)] = {name: own for name, own in view._parameters.items() if own is not None}
    try:
        with torch.no_grad():
            return {place: t.dtype for place, t in named_tensors(view.original.forward(view, *args, **kwargs)).items()}
    finally:
        del step.given[id(view)]
        view.__dict__.update(kept)


def _kept(view: Aligned) -> dict[str, int]:
    """The tensors that a module keeps in its attributes."""
    return {name: id(value) for name, value in view.__dict__.items() if isinstance(value, Tensor)}


def _traced(view: Aligned, args: Any, kwargs: Any) -> Any:
    """As above, in a graph that is compiled for the number of rows that are staged."""
    edit = view.edit
    coefficients, rows = edit.coefficients, edit.coefficients.rows
    if edit.entered:
        return view.original.forward(view, *args, **kwargs)
    dtype = _dtype(view, args, kwargs)
    alone = rows == 1 or coefficients.thread.traced_row is not None
    if not alone and edit.unplaced:
        edit.refuse_rows()
    edit.entered = True
    parts = []
    for row, (own_args, own_kwargs) in enumerate([(args, kwargs)] if alone else _split(edit, None, args, kwargs)):
        if not alone:
            coefficients.thread.traced_row = row
        if edit.widens:
            own_args, own_kwargs = mapped((own_args, own_kwargs), _widened)
        result = view.original.forward(view, *own_args, **own_kwargs)
        parts.append(_narrowed(result, edit.results or {}, dtype) if edit.widens else result)
    edit.entered = False
    if not alone:
        coefficients.thread.traced_row = None
    return _joined(parts)


def _split(edit: Edit, step: Step | None, args: Any, kwargs: Any) -> Iterator[Any]:
    """The arguments of each row. Without a step, in a graph that is being compiled, the batch is what rows divide."""
    rows = edit.coefficients.rows if step is None else step.rows
    batch = (step and step.batch) or rows
    if edit.order is None:
        edit.refuse_rows()
    kinds: dict[str, str] = {}

    def judge(place: str, item: Any) -> None:
        if isinstance(item, ByRow):
            return
        if isinstance(item, Tensor) and edit.order.shared:  # type: ignore[union-attr]
            kinds[place] = SHARED
        elif isinstance(item, Tensor):
            kinds[place] = _kind(edit, place, item, batch)
        elif hasattr(item, "update"):  # keys and values, or a state: one object for all rows
            raise RowsError(
                f"{edit.path} would have to run once for each row of coefficients, but it keeps what it saw of earlier "
                "tokens for the whole batch",
                "use set() instead of set_rows(), or use_cache=False",
            )

    mapped((args, kwargs), judge)
    for row in range(rows):

        def share(place: str, item: Any, row: int = row) -> Any:
            if isinstance(item, ByRow):
                return item.parts[row]
            if kinds.get(place) != BATCH:
                return item
            size = item.shape[0] // rows
            return item[row * size : (row + 1) * size]

        yield mapped((args, kwargs), share)


def _kind(edit: Edit, place: str, tensor: Tensor, batch: int) -> str:
    assert edit.order is not None
    known, leading = edit.order.tensors.get(place, (SHARED, 1))
    if known == SHARED and leading == 1 and tensor.dim() and tensor.shape[0] != 1:
        known = BATCH if tensor.shape[0] == batch else OTHER  # positions or masks, of each sequence this time
    if known == BATCH and tensor.shape[0] == 1 and batch > 1:
        known = SHARED
    if known == OTHER or (known == BATCH and tensor.shape[0] % batch):
        edit.refuse_rows()
    return known


def _inner(view: Aligned) -> bool:
    """Whether modules below it may have other vectors."""
    return any(hasattr(module, "edit") for module in view.modules() if module is not view)


def _dtype(view: Aligned, args: Any, kwargs: Any) -> torch.dtype:
    """That of the first floating input, else of the module's parameters."""
    tensors = [value for value in (*args, *kwargs.values(), *view._parameters.values()) if isinstance(value, Tensor)]
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)


def _widened(_: str, item: Any) -> Any:
    return widened(item) if isinstance(item, Tensor) and item.is_floating_point() else item


def _narrowed(value: Any, dtypes: Mapping[str, torch.dtype], default: torch.dtype) -> Any:
    def narrow(place: str, item: Any) -> Any:
        floating = isinstance(item, Tensor) and item.is_floating_point()
        return item.to(dtypes.get(place, default)) if floating else item

    return mapped(value, narrow)


def _joined(parts: list[Any]) -> Any:
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, tuple | list):
        return type(first)(_joined(list(items)) for items in zip(*parts, strict=True))
    if isinstance(first, dict):
        return type(first)({key: _joined([part[key] for part in parts]) for key in first})
    return first
