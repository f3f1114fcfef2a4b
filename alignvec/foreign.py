"""An edited parameter in the hands of code that is not ours: what it sees is the mix.

Much code reads `module.weight` itself: a recurrent layer hands it to a kernel, a router multiplies by it, a helper
method shifts by it. Inside a step such a read gives one of two tensors. `Mix` holds the mixed values rounded to the
parameter's dtype, and beside them in float32: torch's functions compute with the latter and round their result once, so
that the coefficient is realised as exactly as by our operators; a foreign kernel that takes the memory itself gets the
rounded values. `Unformed` stands for a parameter that code rarely reads for its values (`linear.weight.dtype`): it
becomes a mix when it is used, and has no memory that a kernel could read unnoticed. Where the rows of the batch have
different coefficients the mix is a `ByRow`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from alignvec.errors import AlignvecError

# What asks a tensor for no value. Properties are recognised by their getters.
_PROPERTIES = (
    *("device", "dtype", "grad", "grad_fn", "is_cpu", "is_cuda", "is_leaf", "is_meta", "is_sparse", "layout", "ndim"),
    *("requires_grad", "shape"),
)
_METHODS = (
    *("dim", "element_size", "get_device", "is_complex", "is_contiguous", "is_floating_point", "is_inference"),
    *("nelement", "numel", "size", "storage_offset", "stride", "__len__", "__hash__"),
)
_METADATA = {getattr(Tensor, name) for name in _METHODS} | {getattr(Tensor, name).__get__ for name in _PROPERTIES}
_CASTS = ("float", "double", "to", "type", "type_as", "bfloat16", "half")
_MEMORY = ("data_ptr", "untyped_storage", "storage", "numpy", "clone", "__dlpack__", "__dlpack_device__", "__array__")


class _Foreign(Tensor):
    """A tensor that stands for edited parameters: what asks for no value is answered, all else goes to `_call`."""

    _call: Any  # of the function, its name, arguments and keyword arguments

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs or {})
        return cls._call(func, getattr(func, "__name__", ""), args, kwargs or {})


class Mix(_Foreign):
    """The mixed values of a parameter, rounded, and in `exact` float32."""

    exact: Tensor

    @staticmethod
    def of(exact: Tensor, dtype: torch.dtype) -> Tensor:
        """exact: float32 values. A plain tensor where the dtype holds them as they are."""
        if dtype in (exact.dtype, torch.float64):
            return exact.to(dtype)
        made: Mix = exact.to(dtype).as_subclass(Mix)  # with the gradient, for kernels that take the memory
        made.exact = exact
        return made

    @classmethod
    def _call(cls, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        if name == "detach":
            _refuse_reentrant(args[0].exact)
        if _writes(name, args, kwargs):  # to a tensor of the caller's, in its dtype
            if any(isinstance(target, Mix) for target in (*args[:1], kwargs.get("out"))):
                _refuse_write(name)
            return _as_rounded(func, args, kwargs)
        if name in _MEMORY or name.endswith("_like") or name.startswith("new_"):
            return _as_rounded(func, args, kwargs)
        if name in _CASTS:
            return _cast(func, args, kwargs)
        tensors = [item for item in tree_flatten((args, kwargs))[0] if isinstance(item, Tensor)]
        narrow = _result_dtype(tensors)
        own = all(isinstance(item, Mix) for item in tensors)
        args, kwargs = tree_map_only(Tensor, _widened, (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if "dtype" in kwargs or narrow == torch.float32:
            return result

        def narrowed(value: Tensor) -> Tensor:
            if value.dtype != torch.float32:
                return value
            return Mix.of(value, narrow) if own else value.to(narrow)  # of a mix alone: still a mix

        return tree_map_only(Tensor, narrowed, result)


def _writes(name: str, args: Any, kwargs: Any) -> bool:
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or kwargs.get("out") is not None


def _as_rounded(func: Any, args: Any, kwargs: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        plain = tree_map_only(Mix, lambda mix: mix.as_subclass(Tensor), (args, kwargs))
        return func(*plain[0], **plain[1])


def _cast(func: Any, args: Any, kwargs: Any) -> Any:
    """A mix in another dtype has its exact values there; on another device it stays a mix."""
    rounded = _as_rounded(func, args, kwargs)
    if not isinstance(args[0], Mix) or not isinstance(rounded, Tensor):
        return rounded
    exact = args[0].exact.to(rounded.device)
    if rounded.dtype == args[0].dtype:
        return Mix.of(exact, rounded.dtype)
    return exact.to(rounded.dtype, copy=True)


class Unformed(_Foreign):
    """A parameter as it looks, whose mix is formed when it is used."""

    form: Callable[[], Tensor]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Unformed(size={tuple(self.shape)}, dtype={self.dtype})"

    @staticmethod
    def of(parameter: Tensor, form: Callable[[], Tensor]) -> Tensor:
        """form: gives the mix that takes its place."""
        made: Unformed = torch.Tensor._make_wrapper_subclass(
            Unformed,
            parameter.shape,
            strides=parameter.stride(),
            dtype=parameter.dtype,
            device=parameter.device,
            requires_grad=parameter.requires_grad,
        )
        made.form = form
        return made

    @classmethod
    def _call(cls, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        if _writes(name, args, kwargs) and isinstance(args[0], Unformed):
            if name in ("div_", "mul_") and args[1:] == (1,):  # Rwkv rescales its first layers by 1
                return args[0]
            _refuse_write(name)
        args, kwargs = tree_map_only(Unformed, lambda unformed: unformed.form(), (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        raise AlignvecError(
            f"{func} got a parameter that vectors edit, from code that does not call its module; materialise() the mix"
        )


class ByRow(_Foreign):
    """What differs by row without having a dimension for it: a parameter's mix, or what a module makes of positions
    that all sequences share. Functions run once for each row, with that row's share of what is laid out by sequence.

    parts: a tensor for each row of coefficients. batch: sequences of the step. spread: whether the leading dimension
    has become that of the batch, of which every part then has its share. refuse: raises for the module that it is of.
    """

    parts: list[Tensor]
    batch: int
    spread: bool
    refuse: Callable[[], NoReturn]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ByRow({len(self.parts)} x {tuple(self.parts[0].shape)}, dtype={self.dtype})"

    @staticmethod
    def of(parts: list[Tensor], batch: int, refuse: Callable[[], NoReturn], spread: bool = False) -> Tensor:
        first = parts[0]
        shape = (first.shape[0] * len(parts), *first.shape[1:]) if spread else first.shape
        made: ByRow = torch.Tensor._make_wrapper_subclass(ByRow, shape, dtype=first.dtype, device=first.device)
        made.parts, made.batch, made.refuse, made.spread = list(parts), batch, refuse, spread
        return made

    @classmethod
    def _call(cls, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        args, kwargs = tree_map_only(Unformed, lambda unformed: unformed.form(), (args, kwargs))
        own = next(item for item in tree_flatten((args, kwargs))[0] if isinstance(item, ByRow))
        if name == "detach":
            _refuse_reentrant(*own.parts)
        in_place = _writes(name, args, {})
        if in_place and isinstance(args[0], ByRow):
            _refuse_write(name)
        args, spread = _spread(own, name, args)
        rows = len(own.parts)
        split = False

        def share(row: int) -> Callable[[Tensor], Tensor]:
            def of(tensor: Tensor) -> Tensor:
                nonlocal split, spread
                if isinstance(tensor, ByRow):
                    spread = spread or tensor.spread
                    return tensor.parts[row]
                if isinstance(tensor, Mix | torch.nn.Parameter) or not tensor.dim() or tensor.shape[0] == 1:
                    return tensor
                if tensor.dim() == 1 and tensor.shape[0] != own.batch:
                    return tensor  # features or positions
                if tensor.dim() == 1 or tensor.shape[0] % own.batch:
                    own.refuse()  # nobody can tell
                split = True
                size = tensor.shape[0] // rows
                return tensor[row * size : (row + 1) * size]

            return of

        if name.endswith("_like") or name.startswith("new_"):  # of its shape and dtype, not of its values
            return func(own.parts[0], *args[1:], **kwargs) if args[0] is own else func(*args, **kwargs)
        results = []
        for row in range(rows):
            own_args, own_kwargs = tree_map_only(Tensor, share(row), (args, kwargs))
            try:
                results.append(func(*own_args, **own_kwargs))
            except (RuntimeError, IndexError):
                if split:  # what was cut in parts is not laid out by sequence
                    own.refuse()
                raise
        if in_place:
            return args[0]
        return _side_by_side(results) if split else together(results, own.batch, own.refuse, spread)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        next(item for item in tree_flatten((args, kwargs or {}))[0] if isinstance(item, ByRow)).refuse()


def _spread(own: ByRow, name: str, args: Any) -> tuple[Any, bool]:
    """`expand` of a leading 1 to the batch: of every row to its share of it."""
    if name not in ("expand", "repeat", "broadcast_to") or not isinstance(args[0], ByRow) or args[0].spread:
        return args, False
    sizes = tuple(args[1]) if len(args) == 2 and isinstance(args[1], tuple | list) else tuple(args[1:])
    leads = len(sizes) > args[0].dim() or args[0].shape[0] == 1
    if not sizes or not leads or sizes[0] != own.batch or own.batch == 1:
        return args, False
    return (args[0], own.batch // len(own.parts), *sizes[1:]), True


def together(results: list[Any], batch: int, refuse: Callable[[], NoReturn], spread: bool = False) -> Any:
    """Results of the same function for each row: tensors as one by row, anything else only where it is the same."""
    first = results[0]
    if isinstance(first, Tensor):
        return ByRow.of(results, batch, refuse, spread)
    if isinstance(first, tuple | list):
        items = [together(list(parts), batch, refuse, spread) for parts in zip(*results, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    if any(result != first for result in results):
        refuse()
    return first


def _side_by_side(results: list[Any]) -> Any:
    first = results[0]
    if isinstance(first, Tensor):
        return torch.cat(results)
    items = [_side_by_side(list(parts)) for parts in zip(*results, strict=True)]
    return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)


def _result_dtype(tensors: list[Tensor]) -> torch.dtype:
    """What torch would give of these tensors; of a mix its parameter's dtype counts."""
    with torch._C.DisableTorchFunctionSubclass():
        dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    return functools.reduce(torch.promote_types, dtypes)


def _widened(tensor: Tensor) -> Tensor:
    if isinstance(tensor, Mix):
        return tensor.exact
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _refuse_reentrant(*values: Tensor) -> None:
    """torch.utils.checkpoint, reentrant, goes on from copies of a layer's arguments: no gradient comes back to values
    that stand beside a tensor."""
    if torch._C._current_graph_task_id() != -1 and any(value.requires_grad for value in values):
        raise AlignvecError(
            "a layer that is computed again in the backward pass was given a parameter that vectors edit; checkpoint "
            "with use_reentrant=False"
        )


def _refuse_write(name: str) -> NoReturn:
    raise AlignvecError(
        f"the model's code changes a parameter that vectors edit in its forward pass ({name}): the base would change "
        "and the vectors would not; switch that off in the model's configuration (rescale_every=0 of RWKV)"
    )
