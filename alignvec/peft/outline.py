"""The model that a checkpoint's configuration describes, without values and no larger than its files allow."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook as on_module
from torch.nn.modules.module import register_module_parameter_registration_hook as on_parameter

from alignvec.errors import AlignvecError
from alignvec.loading import load_config
from alignvec.sources import StoredSource
from alignvec.untrusted import brief

# What configurations call numbers of parts: transformers loops over them before it makes the first part.
COUNTED = re.compile(r"num_.*|n_(layer|head|expert).*|.*layers?")
MOST = 1 << 16  # of such a number, and of entries in a configuration
LARGEST = 1 << 40  # of any other whole number
VALUES = 8  # of parameters, that a byte of a file may stand for: quantised files hold a bit a value at least
PARTS = 16  # modules that a stored tensor may stand for
SPARE = 10_000


def outline(source: StoredSource, folder: Path) -> nn.Module:
    """The causal language model that transformers builds from the folder's config.json, on the meta device, tied.

    Raises:
        AlignvecError: a configuration that transformers builds nothing from by itself, that describes more than the
            files can hold, or that asks for code.
    """
    from transformers import AutoModelForCausalLM

    _require_modest(source.config, source.label)
    try:
        with warnings.catch_warnings(), torch.device("meta"), _bounded(source):
            warnings.simplefilter("ignore")
            config = load_config(folder, local_files_only=True)
            model: nn.Module = AutoModelForCausalLM.from_config(
                config, trust_remote_code=False, attn_implementation="eager"
            )
            model.tie_weights()  # type: ignore[operator]
    except AlignvecError:
        raise
    except Exception as error:
        raise AlignvecError(
            f"transformers builds no causal language model from {folder} by itself ({brief(error, 300)}): "
            "give the loaded model as the base"
        ) from None
    return model


def _require_modest(config: Mapping[str, Any], label: str) -> None:
    """Raises AlignvecError for whole numbers that no model has, and for more entries than a configuration has."""
    entries = 0
    waiting: list[tuple[str, Any]] = list(config.items())
    while waiting:
        key, value = waiting.pop()
        entries += 1
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(key, each) for each in value]
        most = MOST if COUNTED.fullmatch(key) else LARGEST
        if type(value) is int and abs(value) > most:
            raise AlignvecError(
                f"config.json of {label} has {key[:60]} beyond {most}, which no model has: mend it, or give the "
                "loaded model as the base"
            )
        if entries + len(waiting) > MOST:
            raise AlignvecError(
                f"config.json of {label} has more than {MOST} entries, below {key[:60]} for one: mend it, or give the "
                "loaded model as the base"
            )


@contextmanager
def _bounded(source: StoredSource) -> Iterator[None]:
    """Stops the building of a model that has more modules or values than the source's files can be the values of."""
    thread = threading.get_ident()
    stored = source.tensors.values()
    parts, values = SPARE + PARTS * len(stored), SPARE + VALUES * sum(info.nbytes for info in stored)

    def count(number: int, size: int) -> None:
        nonlocal parts, values
        if threading.get_ident() != thread:
            return
        parts, values = parts - number, values - size
        if parts < 0 or values < 0:
            raise AlignvecError(
                f"config.json of {source.label} describes a model that is far larger than its {len(stored)} tensors: "
                "give a base whose files fit together"
            )

    def module(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        count(1, 0)

    def parameter(parent: nn.Module, name: str, value: Tensor | None) -> None:
        count(0, 0 if value is None else value.numel())

    hooks = [on_module(module), on_parameter(parameter)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
