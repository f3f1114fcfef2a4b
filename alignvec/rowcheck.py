"""Whether a model can give the rows of a batch different coefficients: found by trying, the first time they differ.

Two rows of a few tokens, the second one padded, run through the model together and each alone, all under coefficients
of 0. A module whose inputs together are those of the one row followed by those of the other takes its tokens in the
order of the batch, so that row r of the table belongs to the r-th part of them. Where tokens are sorted by expert,
repeated, or laid out position by position they are not, whatever the weights are: the nearest module around that is
given and gives back its tokens in order runs once for each row, and where there is none rows are refused by name. At
last two rows under different mixes are compared with each alone.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alignvec.coefficients import Coefficients
from alignvec.edit import Edit
from alignvec.errors import AlignvecError, RowsError
from alignvec.roworder import BATCH, OTHER, SHARED, Order, named_tensors
from alignvec.steps import Step, Values

TOKENS = 7  # of a row
PADS = (1, 2)  # before each row's: no two have the same number of tokens that count, and no mask can be left out
SLACK = 0.3  # relative difference of what is the same but for rounding and a flipped choice of experts
KEPT = ("past_key_values", "cache_params", "state")  # of earlier tokens, by the names that models give it
FAR = 0.5  # relative difference of logits
NOISE = 5.0  # times the difference that running together makes under one mix
SMALLEST = 2.0**-128  # of a coefficient that is tried

Calls = dict[Edit, list[Any]]


class RowCheck:
    """One trial of a model. `block` makes a module run once for each row: it gives the edit to tell its order to."""

    def __init__(
        self,
        model: nn.Module,
        coefficients: Coefficients,
        edits: Sequence[Edit],
        block: Callable[[nn.Module, str], Edit],
    ) -> None:
        self.model, self.coefficients, self.edits, self._block = model, coefficients, edits, block
        self._readers: set[Edit] = set()  # of which the model's own code reads parameters

    def run(self) -> list[Edit]:
        """Find out the order of every edited module's inputs; those that cannot have rows.

        Raises:
            AlignvecError: the model cannot be tried, or its rows do not come out as each does alone.
        """
        with torch.inference_mode(False), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            inputs = self._inputs()
            zero: Values = (0.0,) * len(self.coefficients.names)
            together, calls = self._forward(inputs, [zero])
            alone = [self._forward(_row(inputs, row), [zero]) for row in range(2)]
            for edit in self.edits:
                edit.order = _order(calls.get(edit), [own.get(edit) for _, own in alone])
            _distrust(self.edits)
            unplaced = self._enclose(inputs, zero)
            for edit in self.edits:
                edit.unplaced = edit.order is None or not edit.order.batch_major
            if unplaced:
                return unplaced
            base = [output for output, _ in alone]
            noise = _median(together, torch.cat(base))
            if self._readers or any(edit.widens or edit.rowwise or _shared(edit) for edit in self.edits):
                far = self._far(inputs, zero, base[0])
                self._compare(inputs, far, zero, noise)
                self._compare(inputs, far, zero, noise, decoding=True)
            return []

    def _far(self, inputs: dict[str, Any], zero: Values, base: Tensor) -> Values:
        """Coefficients that keep a row finite, and so far from the base that no rounding hides a wrong mix."""

        def under(scale: float) -> tuple[Values, Tensor]:
            mix = tuple(scale for _ in zero)
            return mix, self._forward(_row(inputs, 0), [mix])[0]

        scale = 1.0
        chosen, output = under(scale)
        while scale > SMALLEST and not output.isfinite().all() and base.isfinite().all():
            scale /= 256
            chosen, output = under(scale)
        if not output.isfinite().all():
            return tuple(1.0 for _ in zero)
        for larger in (4 * scale, 16 * scale, 64 * scale):
            if _difference(output, base) > FAR:
                break
            mix, output = under(larger)
            if not output.isfinite().all():
                break
            chosen = mix
        return chosen

    def _compare(self, inputs: dict[str, Any], far: Values, zero: Values, noise: float, decoding: bool = False) -> None:
        """Two rows under different mixes against each alone; decoding: and a token more, from what they keep."""
        try:
            alone = [self._forward(_row(inputs, row), [mix], decoding)[0] for row, mix in enumerate((far, zero))]
            mixed, _ = self._forward(inputs, [far, zero], decoding)
            if not decoding:  # under these coefficients, too, running together makes a difference
                other, _ = self._forward(_row(inputs, 1), [far])
                noise = max(noise, _median(self._forward(inputs, [far])[0], torch.cat([alone[0], other])))
        except RowsError:
            if decoding:  # the model keeps nothing, or what keeps a state refuses rows by its name whenever they come
                return
            raise
        error = _median(mixed, torch.cat(alone))
        if not error <= NOISE * noise + 1e-4:
            raise RowsError(
                f"rows with different coefficients come out of {type(self.model).__name__} other than each does "
                f"alone (by {error:.0%})"
            )

    def _forward(self, inputs: dict[str, Any], mixes: Sequence[Values], decoding: bool = False) -> tuple[Tensor, Calls]:
        """The outputs [batch, positions, features], and what each edited module was called with.

        decoding: the last token of the prompt comes in a call of its own, with what the model kept of the others.
        """
        step = Step(self.coefficients, mixes, next(iter(inputs.values())).shape[0])
        recorded: list[tuple[Edit, Any]] = []
        step.calls = recorded
        try:
            with self.coefficients.within(step), _untouched(self.model):
                outputs = [self.model(**inputs)] if not decoding else self._decoded(inputs)
        except AlignvecError:
            raise
        except Exception as error:
            raise RowsError(
                f"{type(self.model).__name__} cannot be tried on a few tokens, which shows whether the rows of a batch "
                f"can have different coefficients ({error})"
            ) from error
        calls: Calls = defaultdict(list)
        for edit, values in recorded:
            if values is None:
                self._readers.add(edit)
            else:
                calls[edit].append(named_tensors(values))
        return torch.cat([_first(output) for output in outputs], 1), calls

    def _decoded(self, inputs: dict[str, Any]) -> list[Any]:
        prompt = {**inputs, "input_ids": inputs["input_ids"][:, :-1], "use_cache": True}
        if "attention_mask" in inputs:
            prompt["attention_mask"] = inputs["attention_mask"][:, :-1]
        first: Any = self.model(**prompt)
        kept = {name: first[name] for name in KEPT if first.get(name) is not None}
        if not kept:
            raise RowsError(f"{type(self.model).__name__} keeps nothing of earlier tokens")
        last = {**inputs, "input_ids": inputs["input_ids"][:, -1:], "use_cache": True}
        return [first, self.model(**last, **kept)]

    def _inputs(self) -> dict[str, Tensor]:
        config: Any = getattr(self.model, "config", None)
        vocabulary = self._vocabulary(config)
        if vocabulary is None:
            raise RowsError(
                f"{type(self.model).__name__} has no vocabulary, so it is not known which row of a batch its inputs "
                "belong to"
            )
        special = {value for value in _numbers(config) if value < vocabulary}
        plain = [token for token in range(min(vocabulary, 4096)) if token not in special] or [0]
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randint(len(plain), (2, 2 * TOKENS), generator=generator)
        ids = torch.tensor(plain)[chosen].to(self._device())
        mask = torch.ones_like(ids[:, :TOKENS])
        for row, pads in enumerate(PADS):
            mask[row, :pads] = 0
        inputs = {"input_ids": ids[:, :TOKENS], "attention_mask": mask}
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = ids[:, TOKENS:]
        accepted = inspect.signature(type(self.model).forward).parameters
        named = {name: value for name, value in inputs.items() if name in accepted}
        if "use_cache" in accepted:
            named["use_cache"] = False  # type: ignore[assignment]
        if "input_ids" not in named:
            raise RowsError(
                f"{type(self.model).__name__} does not take input_ids, so it is not known which row of a batch its "
                "inputs belong to"
            )
        return named

    def _vocabulary(self, config: Any) -> int | None:
        """How many tokens the model knows: by its configuration, else the fewest that one of its embeddings has."""
        get_text_config = getattr(config, "get_text_config", None)
        vocabulary = getattr(get_text_config() if get_text_config else config, "vocab_size", None)
        if isinstance(vocabulary, int):
            return vocabulary
        sizes = (module.num_embeddings for module in self.model.modules() if isinstance(module, nn.Embedding))
        return min(sizes, default=None)

    def _device(self) -> torch.device:
        embedding = getattr(self.model, "get_input_embeddings", lambda: None)()
        weight = getattr(embedding, "weight", None)
        device = next(iter(self.coefficients.devices)) if weight is None else weight.device
        return next(iter(self.coefficients.devices)) if device.type == "meta" else device

    def _enclose(self, inputs: dict[str, Tensor], zero: Values) -> list[Edit]:
        """Around modules that get their tokens in another order, find modules that do not, and let these run by row.
        Those that none is found around."""
        failing = [edit for edit in self.edits if edit.order is not None and not _placed(edit)]
        if not failing:
            return []
        around = _enclosing(self.model, failing)
        runs = [
            self._observed(own, zero, {module for modules in around.values() for _, module in modules})
            for own in (inputs, _row(inputs, 0), _row(inputs, 1))
        ]
        blocks: dict[nn.Module, Edit] = {}
        for edit, modules in around.items():
            for path, module in modules:
                order = _order(runs[0][module][0], [own[module][0] for own in runs[1:]])
                results = _order(runs[0][module][1], [own[module][1] for own in runs[1:]])
                if order is None or results is None or not (order.batch_major and results.batch_major):
                    continue
                if module not in blocks:
                    blocks[module] = self._block(module, path)
                    blocks[module].order, blocks[module].rowwise = order, True
                failing.remove(edit)
                break
        return failing

    def _observed(
        self, inputs: dict[str, Tensor], zero: Values, modules: set[nn.Module]
    ) -> dict[nn.Module, tuple[list[Any], list[Any]]]:
        """Arguments and results of every call of these modules."""
        seen: dict[nn.Module, tuple[list[Any], list[Any]]] = {module: ([], []) for module in modules}

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen[module][0].append(named_tensors((args, kwargs)))
            seen[module][1].append(named_tensors(output))

        handles = [module.register_forward_hook(note, with_kwargs=True) for module in modules]
        try:
            self._forward(inputs, [zero])
        finally:
            for handle in handles:
                handle.remove()
        return seen


def _distrust(edits: Sequence[Edit]) -> None:
    """Modules that stand side by side in a list (experts) and are not all called alike get tokens that the data choose,
    also where these came as many of either row by chance. So does one of a list that was not given all tokens."""
    beside: dict[str, list[Edit]] = defaultdict(list)
    reached = {_last_number(edit.path)[:2] for edit in edits if edit.order is not None}
    for edit in edits:
        head, number, tail = _last_number(edit.path)
        if number and (edit.order is not None or (head, number) not in reached):  # else a part that its layer left out
            beside[f"{head}.{number.rstrip('0123456789')}*.{tail}"].append(edit)
    for group in beside.values():
        called = [edit for edit in group if edit.order is not None]
        sizes = {next(iter(edit.order.tensors.values()), None) if edit.order else None for edit in group}
        if called and (len(sizes) > 1 or not all(edit.order and edit.order.whole for edit in called)):
            for edit in called:
                if edit.order is not None and edit.order.batch_major:
                    edit.order = Order(False, tensors=edit.order.tensors)


def _last_number(path: str) -> tuple[str, str, str]:
    parts = path.split(".")
    at = max((i for i, part in enumerate(parts) if part[-1:].isdigit()), default=-1)
    return (".".join(parts[:at]), parts[at], ".".join(parts[at + 1 :])) if at >= 0 else (path, "", "")


def _all_tokens(alone: Tensor) -> bool:
    """Whether a row's input has a dimension for sequences, or, flattened, all tokens or several of each."""
    if alone.dim() > 2 and alone.shape[0] == 1:
        return True
    positions = alone.shape[:-1] if alone.is_floating_point() else alone.shape
    return math.prod(positions) % TOKENS == 0


def _shared(edit: Edit) -> bool:
    return edit.order is not None and edit.order.shared


def _placed(edit: Edit) -> bool:
    """Whether a module gets its inputs in the order of the batch, or the same for all of it."""
    return edit.order is not None and (edit.order.batch_major or edit.order.shared)


def _enclosing(model: nn.Module, edits: Sequence[Edit]) -> dict[Edit, list[tuple[str, nn.Module]]]:
    """The modules around each edited one, the nearest first, without the model itself."""
    named = dict(model.named_modules())
    around = {}
    for edit in edits:
        parts = edit.path.split(".")
        paths = [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]
        around[edit] = [(path, named[path]) for path in paths if path in named]
    return around


def _order(together: list[dict[str, Tensor]] | None, alone: Sequence[list[dict[str, Tensor]] | None]) -> Order | None:
    """The order of a module's tensors over all of its calls; None where it was not called."""
    if not together:
        return None
    if any(own is None or len(own) != len(together) for own in alone):
        return Order(False)
    found: dict[str, tuple[str, int]] = {}
    whole = True
    for number, call in enumerate(together):
        whole = whole and any(map(_all_tokens, alone[0][number].values())) if alone[0] else whole
        for place, tensor in call.items():
            parts = [own[number].get(place) for own in alone if own is not None]
            kind = _kind(tensor, [part for part in parts if part is not None])
            leading = tensor.shape[0] if tensor.dim() else 1
            known = found.get(place)
            if known is not None and known[0] != kind:
                kind = OTHER
            found[place] = (kind, leading)
    kinds = {kind for kind, _ in found.values()}
    once = kinds == {SHARED} and all(leading == 1 for _, leading in found.values())
    by_sequence = BATCH in kinds or once
    return Order(OTHER not in kinds and by_sequence, kinds <= {SHARED} and not once, whole or once, found)


def _kind(together: Tensor, alone: list[Tensor]) -> str:
    if len(alone) != 2:
        return OTHER
    one, other = alone
    if one.dim() and one.shape == other.shape and together.shape == (2 * one.shape[0], *one.shape[1:]):
        return BATCH if _difference(together, torch.cat(alone)) < SLACK else OTHER
    if together.shape == one.shape == other.shape and max(_difference(together, part) for part in alone) < SLACK:
        return SHARED
    return OTHER


def _difference(one: Tensor, other: Tensor) -> float:
    """Relative, over numbers that are finite in both."""
    if one.shape != other.shape:
        return float("inf")
    one, other = one.double().reshape(-1), other.double().reshape(-1)
    finite = one.isfinite() & other.isfinite()
    one, other = one[finite], other[finite]
    size = float(other.norm())
    error = float((one - other).norm())
    return error / size if size else (float("inf") if error else 0.0)


def _first(output: Any) -> Tensor:
    """The logits, or whatever the model gives first, as [batch, positions, features]."""
    values = output.values() if isinstance(output, dict) else [output] if isinstance(output, Tensor) else output
    first = next(value for value in values if isinstance(value, Tensor) and value.dim() > 1)
    return first[:, None] if first.dim() == 2 else first.flatten(2)


def _median(one: Tensor, other: Tensor) -> float:
    """The relative difference at half of the positions of the row that is worst off: a choice of experts that rounding
    flips moves a few positions, a wrong mix all. What is finite in neither is no difference."""
    if one.shape != other.shape:
        return float("inf")
    lost = ~(one.isfinite() | other.isfinite())
    one, other = (values.double().masked_fill(lost, 0) for values in (one, other))
    difference = (one - other).norm(dim=-1) / other.norm(dim=-1).clamp(min=1e-30)
    return float(difference.nan_to_num(float("inf")).median(1).values.max())


def _row(inputs: dict[str, Any], row: int) -> dict[str, Any]:
    return {name: value[row, None] if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _numbers(config: Any) -> Iterator[int]:
    """Token ids that a configuration gives a meaning."""
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    nested = [values, *(value for value in values.values() if isinstance(value, dict))]
    for own in nested:
        for name, value in own.items():
            if str(name).endswith(("token_id", "token_index")):
                yield from (item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int))


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards it, and what its modules keep of their calls, is as it was before."""
    before = [(module, dict(module.__dict__), dict(module._buffers)) for module in model.modules()]
    for module, _, _ in before:
        module.training = False
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            for name in module.__dict__.keys() - attributes.keys():
                del module.__dict__[name]
            module.__dict__.update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
