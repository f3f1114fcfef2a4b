"""Where tensors come from: a checkpoint on disk, a hub id, or a live model, all read the same way."""

from __future__ import annotations

import contextlib
import copy
import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from alignvec.checkpoint import Checkpoint, TensorInfo
from alignvec.errors import AlignvecError
from alignvec.hidden import recover
from alignvec.untrusted import mode_of
from alignvec.wrappers import inner_model, is_adapter, is_persistent, live_names, plain_names

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(@[\w.-]+)?")
HUB_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt"),
    *("*.tiktoken", "*.spm", "*.tokenizer"),
)
WORKERS = min(4, os.cpu_count() or 1)
SLOTS = 2 * WORKERS + 1  # jobs running, done or in use at a time
T = TypeVar("T")


class Source(Protocol):
    """Named tensors that can be read piece by piece."""

    label: str
    config: Any
    tensors: dict[str, TensorInfo]

    def read(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor: ...

    def chunks(self, name: str) -> Iterator[Tensor]: ...


class StoredSource:
    """A checkpoint on disk, by the names that its model has, without what wrappers put before them when it was saved.

    One that holds an unmerged PEFT adapter keeps its names.
    """

    def __init__(self, checkpoint: Checkpoint, label: str) -> None:
        self.checkpoint, self.label, self.config = checkpoint, label, checkpoint.config
        adapted = any(is_adapter(name) for name in checkpoint.tensors)
        plain = dict.fromkeys(checkpoint.tensors) if adapted else plain_names(checkpoint.tensors)
        self._there = {plain[name] or name: name for name in checkpoint.tensors}
        self.tensors = {plain: checkpoint.tensors[name] for plain, name in self._there.items()}

    def read(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        return self.checkpoint.read(self._there[name], start, stop, out)

    def chunks(self, name: str) -> Iterator[Tensor]:
        return _chunks(self, name)

    def renamed(self, names: Mapping[str, str]) -> StoredSource:
        """The same tensors, some of them by other names."""
        twin = copy.copy(self)
        twin._there = {names.get(name, name): there for name, there in self._there.items()}
        twin.tensors = {names.get(name, name): info for name, info in self.tensors.items()}
        return twin


class LiveSource:
    """The parameters of a live model, tied ones once, on any device. What is read may be the parameter's own memory.

    ``plain``: by the names that the model has without its wrappers (torch.compile, DDP). ``buffers`` are those that a
    checkpoint of it holds, ``computed`` the names of the others.
    """

    def __init__(self, model: nn.Module, *, plain: bool = False) -> None:
        _, inner = inner_model(model)
        self.label = type(inner).__name__
        self.config = getattr(inner, "config", None)
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        here = live_names(model, [*parameters, *buffers]) if plain else {name: name for name in [*parameters, *buffers]}
        self._values: dict[str, Tensor] = {here[n]: t for n, t in [*parameters.items(), *buffers.items()] if n in here}
        self.tensors = {here[n]: TensorInfo(p.dtype, tuple(p.shape)) for n, p in parameters.items() if n in here}
        persistent = {n for n in buffers if n in here and is_persistent(model, n)}
        self.buffers = {here[n]: TensorInfo(b.dtype, tuple(b.shape)) for n, b in buffers.items() if n in persistent}
        self.computed = {here[name] for name in buffers if name in here and name not in persistent}
        for name in self.tensors:
            if self._values[name].is_meta:
                raise AlignvecError(
                    f"{self.label}: parameter {name} is on the meta device: load the model's weights first"
                )
        self._flat: tuple[str, Tensor] = ("", torch.empty(0))

    def read(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        cached, flat = self._flat
        if cached != name:  # a parameter that is not contiguous is copied once, not for every piece
            flat = self._values[name].detach().reshape(-1)
            self._flat = (name, flat)
        return flat[start:stop].cpu()

    def chunks(self, name: str) -> Iterator[Tensor]:
        return _chunks(self, name)

    def renamed(self, names: Mapping[str, str]) -> LiveSource:
        """The same tensors, some of them by other names."""
        twin = copy.copy(self)
        twin._values = {names.get(name, name): value for name, value in self._values.items()}
        twin.tensors = {names.get(name, name): info for name, info in self.tensors.items()}
        twin.buffers = {names.get(name, name): info for name, info in self.buffers.items()}
        twin.computed = {names.get(name, name) for name in self.computed}
        twin._flat = ("", torch.empty(0))
        return twin


def open_source(source: str | Path | nn.Module, *, plain: bool = False) -> StoredSource | LiveSource:
    """Open a checkpoint folder, a .safetensors file, a hub id (``owner/name``, ``owner/name@revision``) or a model.

    ``plain``: a model's tensors by the names that it has without its wrappers, as a checkpoint's always are.
    """
    if isinstance(source, nn.Module):
        return LiveSource(source, plain=plain)
    path = local_path(source)
    return StoredSource(Checkpoint.open(path), Path(source).name if Path(source).exists() else str(source))


def local_path(source: str | Path, files: Sequence[str] = HUB_FILES) -> Path:
    """The folder or file of a checkpoint; a hub id that is no local path is downloaded to the hub's cache first.

    ``files``: patterns of what is downloaded. Raises AlignvecError for what the hub cannot give.
    """
    path = Path(source)
    recover(path)
    if mode_of(path) is not None or not isinstance(source, str) or not HUB_ID.fullmatch(source):
        return path
    from huggingface_hub import snapshot_download

    name, _, revision = source.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(files)))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise AlignvecError(
            f"{source} is neither a local checkpoint nor a model that the hub could give ({reason}): "
            "check the spelling, or, offline, download it first"
        ) from None


def in_order(jobs: Iterable[Callable[[int], T]]) -> Generator[T, None, None]:
    """The jobs' results in order, while threads work ahead: reading, arithmetic and writing overlap.

    Each job is given the number of a slot, below SLOTS, that is its own until its result is done with: buffers kept by
    slot are reused safely. Inside, torch runs one thread an operation: the jobs are the parallelism.
    """
    waiting: list[Future[T]] = []
    with one_thread(), ThreadPoolExecutor(WORKERS) as pool:
        try:
            for number, job in enumerate(jobs):
                waiting.append(pool.submit(job, number % SLOTS))
                if len(waiting) == SLOTS:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch runs one thread an operation: small ones beside jobs that keep every core busy would spend most of
    their time waiting for a second thread to get its turn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _chunks(source: Source, name: str, step: int = 1 << 20) -> Iterator[Tensor]:
    numel = source.tensors[name].numel
    return (source.read(name, start, min(start + step, numel)) for start in range(0, numel, step))
