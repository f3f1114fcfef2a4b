"""An edited parameter in the hands of code that is not ours: what it sees is the mix.

Much code reads `module.weight` itself: a recurrent layer hands it to a kernel, a router multiplies by it, a helper
method shifts by it. Inside a step such a read gives one of two tensors. `Mix` holds the mixed values rounded to the
parameter's dtype, and beside them in float32: torch's functions compute with the latter and round their result once, so
that the coefficient is realised as exactly as by our operators; a foreign kernel that takes the memory itself gets the
rounded values. `Unformed` stands for a parameter that code rarely reads for its values (`linear.weight.dtype`): it
becomes a mix when it is used, and has no memory that a kernel could read unnoticed.
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
_CASTS = ("float", "double", "to", "type")


class Mix(Tensor):
    """The mixed values of a parameter, rounded, and in `exact` float32."""

    exact: Tensor

    @staticmethod
    def of(exact: Tensor, dtype: torch.dtype) -> Tensor:
        """exact: float32 values. A plain tensor where the dtype holds them as they are."""
        if dtype == exact.dtype:
            return exact
        made: Mix = torch.Tensor._make_subclass(Mix, exact.detach().to(dtype))
        made.exact = exact
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs)
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.endswith("__"):
            if isinstance(args[0], Mix):
                _refuse_write(name)
            with torch._C.DisableTorchFunctionSubclass():  # it writes to a tensor of the caller's, in its dtype
                return func(*args, **kwargs)
        tensors = [item for item in tree_flatten((args, kwargs))[0] if isinstance(item, Tensor)]
        narrow = _result_dtype(tensors)
        own = all(isinstance(item, Mix) for item in tensors)
        args, kwargs = tree_map_only(Tensor, _widened, (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if name in _CASTS or "dtype" in kwargs or narrow == torch.float32:
            return result

        def narrowed(value: Tensor) -> Tensor:
            if value.dtype != torch.float32:
                return value
            return Mix.of(value, narrow) if own else value.to(narrow)  # of a mix alone: still a mix

        return tree_map_only(Tensor, narrowed, result)


class Unformed(Tensor):
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
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs)
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.endswith("__") and isinstance(args[0], Unformed):
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


def _result_dtype(tensors: list[Tensor]) -> torch.dtype:
    """What torch would give of these tensors; of a mix its parameter's dtype counts."""
    with torch._C.DisableTorchFunctionSubclass():
        dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    return functools.reduce(torch.promote_types, dtypes)


def _widened(tensor: Tensor) -> Tensor:
    if isinstance(tensor, Mix):
        return tensor.exact
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _refuse_write(name: str) -> NoReturn:
    raise AlignvecError(
        f"the model's code changes a parameter that vectors edit in its forward pass ({name}): the base would change "
        "and the vectors would not; switch that off in the model's configuration (rescale_every=0 of RWKV)"
    )
