"""A sample of the sweep that makes docs/architectures.md: nothing wrong in silence, nothing that crashes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.architectures.cases import CHECKS
from tests.architectures.configurations import CAUSAL, Architecture, architectures
from tests.architectures.sweep import examine

# One of each kind: a backbone that is bypassed, and a kernel that is handed a convolution's weight.
QUICK = ("opt", "qwen3_5_text")
# Plain and latent attention, experts of four layouts, convolutions, recurrent states, helper methods, calls of super(),
# norms of two inputs, layers that are sequence first, encoders called by generate, images of unequal sizes.
SLOW = (
    *("llama", "gpt2", "gemma2", "deepseek_v3", "mixtral", "llama4_text", "jetmoe", "longcat_flash", "minimax_m2"),
    *("qwen3_next", "mamba", "mamba2", "jamba", "falcon_h1", "zamba2", "lfm2", "recurrent_gemma", "rwkv", "xlstm"),
    *("doge", "roformer", "zaya", "apertus", "gpt_oss", "bert", "xlnet", "moshi", "bart", "t5", "marian", "fsmt"),
    *("llava", "llava_next", "qwen2_vl", "qwen3_vl", "mllama"),
)


def faults(record: dict[str, Any]) -> dict[str, str]:
    """The checks of an architecture that are neither right nor refused."""
    assert "checks" in record, f"{record['name']} was not built: {record['reason']}"
    return {
        check: f"{found['status']}: {found['error']} {found['detail']}"
        for check, found in record["checks"].items()
        if found["status"] not in ("right", "refused", "n/a")
    }


def named(model_type: str) -> Architecture:
    return next(a for a in architectures() if a.model_type == model_type and a.section == CAUSAL)


@pytest.mark.parametrize("model_type", QUICK)
def test_nothing_is_wrong_in_silence(model_type: str) -> None:
    record = examine(named(model_type))
    assert not faults(record)
    assert record["checks"]["uniform"]["status"] == "right"


def test_a_plain_model_is_right_in_everything() -> None:
    record = examine(named("llama"))
    assert {check: found["status"] for check, found in record["checks"].items()} == dict.fromkeys(CHECKS, "right")


@pytest.mark.slow
def test_the_command_finds_no_fault_in_a_sample(tmp_path: Path) -> None:
    """In a process of its own: it forks, which is safe only where no operator has run yet."""
    page = tmp_path / "architectures.md"
    command = [sys.executable, "-m", "tests.architectures", "--output", str(page), "--only", *SLOW]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    records = json.loads(page.with_suffix(".json").read_text())["architectures"]
    assert {record["model_type"] for record in records} == set(SLOW)
    wrong = {record["name"]: found for record in records if (found := faults(record))}
    assert not wrong
    assert page.read_text().startswith("# Architectures")
