"""Adapters changed at random in configuration, names and values: read as PEFT reads them, or refused."""

from __future__ import annotations

import copy
import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

peft = pytest.importorskip("peft")

from alignvec.errors import AlignvecError  # noqa: E402
from alignvec.peft import from_peft  # noqa: E402
from tests.models import tiny  # noqa: E402
from tests.storage.adapters import adapted, assert_same, saved  # noqa: E402

ROUNDS = 60
ODD: list[Any] = [
    *(None, True, False, 0, 1, 2, -1, 3, 2**31, 10**400, 0.5, 1e39, float("nan"), float("inf"), "", "x", "("),
    *("q_proj", ".*", r".*\.(q_proj|v_proj)$", r"layers\.0\..*", "all-linear", [], {}, [1], [0], ["q_proj"]),
    *(["v_proj", "o_proj"], {"q_proj": 2}, {"q_proj": "2"}, {r".*\.1\..*": 5}, {"a": {"b": []}}, [[]], "\ud800"),
]
OPTIONS = (
    *("r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "use_rslora", "bias"),
    *("lora_bias", "modules_to_save", "layers_to_transform", "layers_pattern", "init_lora_weights", "use_dora"),
    *("fan_in_fan_out", "trainable_token_indices", "ensure_weight_tying", "target_parameters", "task_type"),
)


def mutated(config: dict[str, Any], tensors: dict[str, Tensor], rng: random.Random) -> None:
    """Changes one to three things in place."""
    for _ in range(rng.randint(1, 3)):
        key = rng.choice(list(tensors))
        match rng.randrange(8):
            case 0:
                tensors.pop(key)
            case 1:
                there = key.replace(*rng.choice([(".0.", ".1."), ("q_proj", "k_proj"), ("model.", ""), ("A", "B")]))
                tensors[there] = tensors[key].clone()
            case 2:
                tensors[key] = tensors[key][:-1].clone()
            case 3:
                tensors[key] = tensors[key].to(rng.choice([torch.float16, torch.bfloat16, torch.int8, torch.float64]))
            case 4:
                tensors[key] = tensors[key] * rng.choice([0, 1e30, torch.inf, torch.nan])
            case _:
                config[rng.choice(OPTIONS)] = rng.choice(ODD)
        if not tensors:
            return


@pytest.mark.parametrize("seed", range(3))
def test_mutated_adapters(seed: int, tmp_path: Path) -> None:
    rng, model = random.Random(seed), tiny("Llama")
    wrapped = adapted(model, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2})
    folder = saved(wrapped, tmp_path / "adapter")
    config_file, file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    original, values = json.loads(config_file.read_text()), load_file(file)
    read, messages = 0, {""}
    for _ in range(ROUNDS):
        config, tensors = copy.deepcopy(original), dict(values)
        mutated(config, tensors, rng)
        config_file.write_text(json.dumps(config))
        save_file(tensors, file)
        try:
            vector = from_peft(folder, model)
        except AlignvecError as error:
            messages.add(str(error))
            continue
        read += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()
            except Exception as error:
                pytest.fail(f"read {config}, which PEFT does not load: {error}")
            assert_same(model, vector, loaded)
    assert read
    assert max(map(len, messages)) < 700
    assert not any("\n" in message for message in messages)
