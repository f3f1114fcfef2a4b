"""attach: one table-driven walk over a model that swaps in a view for every module whose parameters a vector edits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from alignvec import planner, prepack
from alignvec.alignment import Alignment
from alignvec.coefficients import Coefficients
from alignvec.edit import Deltas, Edit
from alignvec.errors import AlignvecError
from alignvec.fused import fuse as fuse_siblings
from alignvec.kernels.operands import MAX_VECTORS, Operand, dense
from alignvec.modules import Aligned, AlignedLinear, view
from alignvec.names import Delta, live_deltas, parameter_names, parameter_value
from alignvec.swaps import Swap
from alignvec.vector import AlignmentVector
from alignvec.verify import verify_base
from alignvec.wrappers import unwrapped

# Where torch itself keeps parameters: in dictionaries of its own, and of recurrent layers in a list that views replace.
_OWN_REFERENCES = ("_parameters", "_buffers", "_modules", "_flat_weights")


def attach(
    model: nn.Module,
    vectors: Mapping[str, AlignmentVector | str | Path],
    *,
    transfer: bool = False,
    max_rows: int = 256,
    precision: str = "exact",
    execution: str = "auto",
    backend: str = "auto",
    fuse: bool | None = None,
) -> Alignment:
    """Attach alignment vectors to a transformers causal language model, in place, with all coefficients 0.

    Every module whose parameters a vector edits (linear, embedding, norm, head, experts) is replaced by a view that
    computes `W + c_1 D_1 + ... + c_k D_k` on the fly (arXiv 2410.19206); names, tied weights, `generate`, saving and
    moving go on as before. `model.alignment` is the result, too.

    Args:
        model: the base model that the vectors were extracted from.
        vectors: 1 to 16 vectors, or folders they were saved in, by the name to dial them with.
        transfer: attach to a model of the same names and shapes whose values are not those of the vectors' base.
        max_rows: most rows of coefficients that one batch can carry.
        precision: "exact" realises every coefficient to within 1e-3; "merged" gives what a merge rounded to the
            model's dtype gives.
        execution: "split" (one dot per vector), "combine" (the mix formed per tile) or "auto".
        backend: "cpp" (CPUs, compiled), "triton" or "cuda" (GPUs), "torch" (everywhere) or "auto".
        fuse: compute sibling layers that read one tensor (q, k and v; gate and up) in one launch each. By default where
            a GPU's kernels run them.

    Raises:
        AlignvecError: vectors are attached already, none or too many are given, a different base (the message names
            the tensors that differ), tensors that the model lacks, a wrong shape or dtype, NaN or infinity in a delta,
            a parameter that the model holds in a second place, or a forward that was put on a module's object. The
            model is unchanged then.
    """
    for option, value, allowed in (
        ("precision", precision, planner.PRECISIONS),
        ("execution", execution, planner.EXECUTIONS),
        ("backend", backend, planner.BACKENDS),
    ):
        planner.check_choice(option, value, allowed)
    if not isinstance(model, nn.Module) or not isinstance(vectors, Mapping):
        raise AlignvecError('attach takes a model and a dictionary of vectors by name, as in {"medical": vector}')
    for name, vector in vectors.items():
        if not isinstance(vector, AlignmentVector | str | Path):
            raise AlignvecError(f"vector {name!r} is a {type(vector).__name__}; give an AlignmentVector or its folder")
    if any(isinstance(module, nn.DataParallel) for module in model.modules()):
        raise AlignvecError("nn.DataParallel copies modules for every call; use DistributedDataParallel instead")
    model = unwrapped(model)
    if getattr(model, "alignment", None) is not None:
        raise AlignvecError("vectors are already attached to this model; call model.alignment.detach() first")
    if (part := next((path for path, m in model.named_modules() if isinstance(m, Aligned)), None)) is not None:
        raise AlignvecError(
            f"vectors are already attached to {part}, through a model around or inside of this one; detach them first"
        )
    if not 1 <= len(vectors) <= MAX_VECTORS:
        raise AlignvecError(f"{len(vectors)} vectors were given; attach takes 1 to {MAX_VECTORS}")
    if not isinstance(max_rows, int) or max_rows < 1:
        raise AlignvecError(f"max_rows={max_rows} must be a positive integer")
    loaded = {name: v if isinstance(v, AlignmentVector) else AlignmentVector.load(v) for name, v in vectors.items()}
    if not transfer:
        verify_base(model, loaded)
    names = parameter_names(model)
    deltas = [live_deltas(model, names, name, vector, transfer) for name, vector in loaded.items()]
    # Normal tensors even when the caller is in inference mode: later steps may need gradients.
    with torch.inference_mode(False), torch.no_grad():
        walk = _Walk(model, names, deltas, max_rows, tuple(loaded), (execution, precision, backend))
        swaps = walk.swaps()
        if fuse or (fuse is None and planner.resolve_backend(walk.device.type, backend) in planner.GROUPED):
            _fuse(model, swaps)
        return Alignment(model, walk.coefficients, swaps, backend)


class _Walk:
    """The walk's state: which vectors edit which parameter, and the operands made so far."""

    def __init__(
        self,
        model: nn.Module,
        names: dict[str, str],
        deltas: list[dict[str, Delta]],
        max_rows: int,
        vectors: tuple[str, ...],
        choices: tuple[str, str, str],
    ) -> None:
        self.model, self.names, self.deltas, self.choices = model, names, deltas, choices
        self.device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
        planner.resolve_backend(self.device.type, choices[2])
        self.coefficients = Coefficients(vectors, max_rows, self.device)
        self._made: dict[tuple[str, tuple[int, ...], bool], Deltas] = {}

    def swaps(self) -> list[Swap]:
        """One swap for each module that owns an edited parameter; the model itself is not touched."""
        self._require_no_second_reference()
        paths: dict[nn.Module, str] = {}
        for path, module in self.model.named_modules():
            if path:  # nothing holds the model itself, and its own parameters are refused
                paths.setdefault(module, path)
        return [
            Swap(module, view(module, edit))
            for module, path in paths.items()
            if (edit := self._edit(module, path)) is not None
        ]

    def _require_no_second_reference(self) -> None:
        """Raise AlignvecError where a module keeps an edited parameter in an attribute of another kind, too."""
        parameters = dict(self.model.named_parameters())
        edited = {id(parameters[full]): full for deltas in self.deltas for full in deltas}
        for path, module in self.model.named_modules():
            for name, value in module.__dict__.items():
                if name in _OWN_REFERENCES:
                    continue
                items = list(value.values()) if isinstance(value, dict) else value
                for item in items if isinstance(items, list | tuple) else [items]:
                    if isinstance(item, nn.Parameter) and id(item) in edited:
                        raise AlignvecError(
                            f"{path or type(module).__name__}.{name} holds {edited[id(item)]}, which vectors edit, and "
                            "code that reads it there would see the base; leave that tensor out with "
                            "vector.select(exclude=...)"
                        )

    def _edit(self, module: nn.Module, path: str) -> Edit | None:
        """What the vectors do to the parameters that `module` itself owns, or None."""
        owned = {n: self.names[f"{path}.{n}"] for n, p in module._parameters.items() if p is not None}
        edited = {n: full for n, full in owned.items() if any(full in deltas for deltas in self.deltas)}
        if not edited:
            return None
        columns = tuple(i for i, deltas in enumerate(self.deltas) if any(full in deltas for full in edited.values()))
        device = execution_device(module)
        if "forward" in module.__dict__ and not hasattr(module, "_hf_hook"):
            raise AlignvecError(
                f"{path} has a forward that was put on the object (a patched kernel?), which would go past the "
                "vectors; attach to the model as it was loaded"
            )
        if hasattr(module, "parametrizations"):
            raise AlignvecError(
                f"{path} has a parametrization, which computes its weight from others; remove it with "
                "torch.nn.utils.parametrize.remove_parametrizations before attaching"
            )
        made = {}
        for name, full in edited.items():
            try:
                made[name] = self._deltas(module, name, full, columns, device)
            except AlignvecError as error:
                raise error if full in str(error) else AlignvecError(f"{full}: {error}") from None
        return Edit(self.coefficients, columns, made, self.choices, device, path)

    def _deltas(
        self, module: nn.Module, name: str, full: str, columns: tuple[int, ...], device: torch.device
    ) -> Deltas:
        """The deltas of one parameter, made once for all modules that share it."""
        parameter = module._parameters[name]
        assert parameter is not None
        transposed = isinstance(module, Conv1D) and name == "weight"
        key = (full, columns, transposed)
        if key not in self._made:
            read = {i: self.deltas[c][full] for i, c in enumerate(columns) if full in self.deltas[c]}
            value = parameter_value(self.model, full, parameter)
            if parameter.dim() < 2:
                self._made[key] = _stacked(read, value, len(columns), device)
            else:
                absent = _zero(prepack.matrix_shape(value, transposed), value.dtype, device)
                operands = [
                    prepack.operand(read[i](), value, device, transposed=transposed) if i in read else absent
                    for i in range(len(columns))
                ]
                self._made[key] = Deltas(operands, transposed=transposed)
        return self._made[key]


def _fuse(model: nn.Module, swaps: Sequence[Swap]) -> None:
    views = {swap.original: swap.aligned for swap in swaps}
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = defaultdict(list)
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                places[child].append((parent, name))
    children: dict[nn.Module, dict[str, AlignedLinear]] = defaultdict(dict)
    for module, aligned in views.items():
        own_forward = type(aligned).forward is AlignedLinear.forward
        if isinstance(aligned, AlignedLinear) and own_forward and len(places[module]) == 1:
            ((parent, name),) = places[module]
            children[parent][name] = aligned
    for named in children.values():
        fuse_siblings(named)


def _stacked(read: Mapping[int, Delta], value: torch.Tensor, k: int, device: torch.device) -> Deltas:
    """Of a parameter of one dimension, or none: one tensor [k, features], in a dtype that holds every vector's."""
    present = {i: delta() for i, delta in read.items()}
    values = {i: prepack.dense(encoded, value, device).reshape(-1) for i, encoded in present.items()}
    dtypes = {delta.dtype for delta in values.values()}
    stack = torch.zeros(k, value.numel(), dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32, device=device)
    for i, delta in values.items():
        stack[i].copy_(delta)
    return Deltas([], stack=stack)


def _zero(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Operand:
    """The operand of a vector that leaves a parameter as it is: one value in memory."""
    return dense(torch.zeros(1, 1, dtype=dtype, device=device).expand(shape))


def execution_device(module: nn.Module) -> torch.device:
    """Where the module computes: its parameters' device, or the one that accelerate brings offloaded ones to."""
    device = next(p.device for p in module._parameters.values() if p is not None)
    if device.type != "meta":
        return device
    brought_to = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if brought_to is None:
        raise AlignvecError(
            f"{type(module).__name__} has parameters on the meta device; load the model's weights first"
        )
    return torch.device(brought_to)
