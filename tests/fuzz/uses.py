"""What is done with a mutated folder. Each use ends well, raises AlignvecError, or has found a fault."""

from __future__ import annotations

import copy
import io
import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import alignvec
from alignvec.checkpoint import Checkpoint
from alignvec.cli import inspect as inspecting
from alignvec.errors import AlignvecError
from alignvec.peft import to_peft
from tests.fuzz import subjects

HUGE = 1e30  # the norm of a vector whose mixes may overflow
TAME = 50.0  # the size of deltas up to which logits are compared: beyond, activations overflow by right


class WrongError(Exception):
    """A folder was read, and what came of it contradicts itself."""


class Uses:
    """The whole base, in memory, and what mutated folders are used with."""

    def __init__(self, whole: Path, scratch: Path) -> None:
        self.whole, self.scratch = whole, scratch
        self.model = subjects.load(whole / "base")
        self.parameters = {name: parameter.clone() for name, parameter in self.model.named_parameters()}
        self.tokens = torch.tensor([[3, 1, 4, 1, 5, 9]])
        self.written: dict[str, torch.Tensor] | None = None  # what a vector with its first checksums has to read as

    def of(self, kind: str) -> list[Callable[[Path], None]]:
        """The uses of a kind of folder. One that is refused does not keep the next from being tried."""
        if kind == "vector":
            return [
                self.read,
                self.inspect,
                self.attach,
                self.transfer,
                self.merge,
                self.convert,
                self.check,
                self.save,
                self.peft,
            ]
        if kind == "adapter":
            return [self.adapter, self.adapter_alone]
        return [self.extract_from, self.extract_to, self.merge_into, self.base_of_adapter, self.tokenizer]

    def changed(self) -> str:
        """What uses have left of themselves in the model; empty if nothing."""
        now = dict(self.model.named_parameters())
        if now.keys() != self.parameters.keys():
            return "the model has other parameters"
        changed = [name for name, kept in self.parameters.items() if not torch.equal(kept, now[name])]
        return f"the model's {changed[0]} was changed" if changed else ""

    def values(self, folder: Path) -> dict[str, torch.Tensor]:
        """All deltas of a vector."""
        return {name: delta.clone() for name, delta in self._load(folder).items()}

    def read(self, folder: Path) -> None:
        vector = self._load(folder)
        self._read(vector)
        if self.written is not None:
            if vector.names != tuple(self.written):
                raise WrongError(f"it has the deltas {list(vector.names)}, and was written with others")
            for name, delta in self.written.items():
                if vector[name].dtype != delta.dtype or not torch.equal(vector[name], delta):
                    raise WrongError(f"{name} is not what was written, and passed for it")

    def inspect(self, folder: Path) -> None:
        shown = io.StringIO()
        inspecting.console.file = shown
        inspecting.inspect([folder], base=None, tensors=False)
        inspecting.inspect([folder], base=str(self.whole / "base"), tensors=True)

    def attach(self, folder: Path) -> None:
        self._attach(folder, transfer=False)

    def transfer(self, folder: Path) -> None:
        self._attach(folder, transfer=True)

    def merge(self, folder: Path) -> None:
        self._merge(self.whole / "base", alignvec.load(folder))

    def convert(self, folder: Path) -> None:
        base = self.whole / "base"
        for format in (None, "int8"):
            vector = alignvec.load(folder)  # the one that is compared: files may change between two loads
            made = alignvec.convert(vector, self._output(), format, base=base)
            assert made is not None
            made = made.with_base(base) if made.needs_base else made
            self._read(made)
            if format is None:
                self._same(self._bound(vector), made, 0.0)

    def check(self, folder: Path) -> None:
        vector = self._load(folder)
        for row in alignvec.check(self.whole / "base", {"v": vector}, [1.0]):
            if not math.isfinite(row.alignvec) and vector.norm() < HUGE:
                raise WrongError(f"a realised coefficient of {row.alignvec}")

    def save(self, folder: Path) -> None:
        vector = alignvec.load(folder)
        vector.save(self._output())
        self._same(self._bound(vector), self._load(self.scratch / "output"), 0.0)

    def peft(self, folder: Path) -> None:
        vector = self._load(folder)
        base = self.whole / "base" if vector.format.startswith("low-rank") else None
        to_peft(vector, self._output(), base)
        back = alignvec.from_peft(self.scratch / "output", self.whole / "base")
        self._same(vector, back, 1e-2, slack=2.0**-23)  # whole modules are stored as base + delta, which rounds

    def adapter(self, folder: Path) -> None:
        vector = alignvec.from_peft(folder, self.whole / "base")
        self._read(vector)
        self._compare(vector, transfer=False)

    def adapter_alone(self, folder: Path) -> None:
        vector = alignvec.from_peft(folder)
        self._read(vector)
        self._compare(vector, transfer=True)

    def extract_from(self, folder: Path) -> None:
        for format in ("dense", "int4"):
            self._read(alignvec.extract(folder, self.whole / "aligned", format=format))

    def extract_to(self, folder: Path) -> None:
        self._read(alignvec.extract(self.whole / "aligned", folder, output=self._output(), format="lossless"))

    def merge_into(self, folder: Path) -> None:
        self._merge(folder, alignvec.load(self.whole / "vector" / "int8"))
        self._merge(folder, alignvec.load(self.whole / "vector" / "lossless"), dtype="float32")

    def base_of_adapter(self, folder: Path) -> None:
        self._read(alignvec.from_peft(self.whole / "adapter" / "attention", folder))

    def tokenizer(self, folder: Path) -> None:
        vector = alignvec.load(self.whole / "vector" / "int4")
        alignvec.merge(self.whole / "base", {"v": vector}, {"v": 0.5}, self._output(), tokenizer=folder)

    def _load(self, folder: Path) -> alignvec.AlignmentVector:
        return self._bound(alignvec.load(folder))

    def _bound(self, vector: alignvec.AlignmentVector) -> alignvec.AlignmentVector:
        return vector.with_base(self.whole / "base") if vector.needs_base else vector

    def _read(self, vector: alignvec.AlignmentVector) -> None:
        """All values are finite, however they are asked for."""
        for name, info in vector.tensors.items():
            values = vector[name]
            if tuple(values.shape) != info.shape or not values.isfinite().all():
                raise WrongError(f"{name} was read as {list(values.shape)}, finite: {bool(values.isfinite().all())}")
            start, stop = info.numel // 3, info.numel // 3 * 2
            if not torch.equal(vector.read(name, start, stop), values.reshape(-1)[start:stop]):
                raise WrongError(f"{name} has other values when a part of it is read")
        if not math.isfinite(vector.norm()):
            raise WrongError(f"the norm is {vector.norm()}")
        vector.statistics()
        vector.select(include=list(vector.names)[:1] or None)

    def _same(
        self, one: alignvec.AlignmentVector, other: alignvec.AlignmentVector, tolerance: float, slack: float = 0.0
    ) -> None:
        """Two vectors have the same deltas; one that is all zero may be left out."""
        for name in {*one, *other}:
            mine, theirs = (vector[name].double() if name in vector else torch.zeros(1) for vector in (one, other))
            off = (mine - theirs).abs()
            if off.numel() and not off.amax() <= tolerance * mine.abs().amax() + slack:
                raise WrongError(f"{name} is off by {float(off.amax())}")

    def _attach(self, folder: Path, transfer: bool) -> None:
        self._compare(alignvec.load(folder), transfer)

    def _compare(self, vector: alignvec.AlignmentVector, transfer: bool) -> None:
        """What is attached computes with the deltas that are read."""
        alignment = alignvec.attach(self.model, {"v": vector}, transfer=transfer)
        try:
            alignment.set(v=1.0)
            found = self.model(self.tokens).logits.double()
        finally:
            alignment.detach()
        readable = vector.with_base(self.whole / "base", verify=False) if vector.needs_base else vector
        merged: nn.Module = copy.deepcopy(self.model).double()
        parameters = dict(merged.named_parameters())
        for name in readable:
            delta = readable[name].double()
            if delta.numel() and float(delta.abs().amax()) > TAME:
                return
            parameters[name] += delta
        wanted = merged(self.tokens).logits
        off, size = float((found - wanted).abs().amax()), float(wanted.abs().amax())
        if not off <= 0.1 * size + 0.1:
            # Attention between large deltas may magnify what bfloat16 rounds: a merged model's error tells by how much.
            rounded = float((merged.bfloat16()(self.tokens).logits.double() - wanted).abs().amax())
            if not off <= 4 * rounded:
                raise WrongError(f"logits are off by {off} of {size}, those of a merged model by {rounded}")

    def _merge(self, base: Path, vector: alignvec.AlignmentVector, dtype: str | None = None) -> None:
        report = alignvec.merge(base, {"v": vector}, {"v": 0.5}, self._output(), dtype=dtype)
        stored = Checkpoint.open(report.output)
        for name in stored.tensors:
            if name in vector and not stored.tensor(name).isfinite().all():
                raise WrongError(f"{name} was merged to values that are not finite")

    def _output(self) -> Path:
        output = self.scratch / "output"
        shutil.rmtree(output, ignore_errors=True)
        return output


def outcome(use: Callable[[Path], None], folder: Path) -> str:
    """ "right", "damaged" or "refused" (by a checksum, or otherwise), or what is wrong."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            use(folder)
    except AlignvecError as error:
        if len(str(error)) >= 5000:
            return f"a refusal of {len(str(error))} characters: {error!s:.100}"
        if not str(error).isprintable():
            return f"a refusal that is no printable line: {str(error)!r:.200}"
        return "damaged" if "is damaged" in str(error) else "refused"
    except BaseException as error:
        frames = []
        trace = error.__traceback__
        while trace is not None:
            frames.append(f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}")
            trace = trace.tb_next
        where = " ".join(frames[-4:])
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]} ({where})"
    return "right"
