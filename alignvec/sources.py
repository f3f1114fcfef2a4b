"""Where tensors come from: a checkpoint on disk, a hub id, or a live model, all read the same way."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from alignvec.checkpoint import Checkpoint, TensorInfo
from alignvec.errors import AlignvecError

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
    """A checkpoint on disk."""

    def __init__(self, checkpoint: Checkpoint, label: str) -> None:
        self.checkpoint, self.label = checkpoint, label
        self.config, self.tensors = checkpoint.config, checkpoint.tensors
        self.read = checkpoint.read

    def chunks(self, name: str) -> Iterator[Tensor]:
        return _chunks(self, name)


class LiveSource:
    """The parameters of a live model, tied ones once, on any device; buffers are not looked at."""

    def __init__(self, model: nn.Module) -> None:
        self.label = type(model).__name__
        self.config = getattr(model, "config", None)
        self._parameters = dict(model.named_parameters())
        self.buffers = {name for name, _ in model.named_buffers()}
        self.tensors = {name: TensorInfo(p.dtype, tuple(p.shape)) for name, p in self._parameters.items()}
        for name, parameter in self._parameters.items():
            if parameter.is_meta:
                raise AlignvecError(
                    f"{self.label}: parameter {name} is on the meta device: load the model's weights first"
                )
        self._flat: tuple[str, Tensor] = ("", torch.empty(0))

    def read(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        cached, flat = self._flat
        if cached != name:  # a parameter that is not contiguous is copied once, not for every piece
            flat = self._parameters[name].detach().reshape(-1)
            self._flat = (name, flat)
        return flat[start:stop].cpu()

    def chunks(self, name: str) -> Iterator[Tensor]:
        return _chunks(self, name)


def open_source(source: str | Path | nn.Module) -> StoredSource | LiveSource:
    """Open a checkpoint folder, a .safetensors file, a hub id (``owner/name``, ``owner/name@revision``) or a model."""
    if isinstance(source, nn.Module):
        return LiveSource(source)
    path = local_path(source)
    return StoredSource(Checkpoint.open(path), Path(source).name if Path(source).exists() else str(source))


def local_path(source: str | Path, files: Sequence[str] = HUB_FILES) -> Path:
    """The folder or file of a checkpoint; a hub id that is no local path is downloaded to the hub's cache first.

    ``files``: patterns of what is downloaded. Raises AlignvecError for what the hub cannot give.
    """
    path = Path(source)
    if path.exists() or not isinstance(source, str) or not HUB_ID.fullmatch(source):
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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    waiting: list[Future[T]] = []
    with ThreadPoolExecutor(WORKERS) as pool:
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
            torch.set_num_threads(threads)


def _chunks(source: Source, name: str, step: int = 1 << 20) -> Iterator[Tensor]:
    numel = source.tensors[name].numel
    return (source.read(name, start, min(start + step, numel)) for start in range(0, numel, step))
