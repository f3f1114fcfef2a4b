"""The experiments, in the order of the report."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

from alignvec.errors import AlignvecError

NAMES = (
    "sweeps",
    "interference",
    "targets",
    "joint",
    "transfer",
    "formats",
    "realised",
    "baselines",
    "generation",
)
# What a second model is run through, unless experiments are named.
SHORT = {"qwen3-2m": ("sweeps", "interference")}


def chosen(names: Sequence[str]) -> tuple[str, ...]:
    """The named experiments in the report's order, by default all; AlignvecError for an unknown one."""
    if unknown := set(names) - set(NAMES):
        raise AlignvecError(f"no experiment {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    return tuple(name for name in NAMES if not names or name in names)


def module(name: str) -> ModuleType:
    return importlib.import_module(f"bench.paper.experiments.{name}")
