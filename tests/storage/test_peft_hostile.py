"""Adapters and bases made to hang, to run code, or to take far more memory than their files: refused at once."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

peft = pytest.importorskip("peft")

from alignvec.errors import AlignvecError  # noqa: E402
from alignvec.peft import from_peft  # noqa: E402
from tests.models import tiny  # noqa: E402
from tests.storage.adapters import ATTENTION, adapted, assert_same, change, saved  # noqa: E402

ENDLESS = r"(\w+\.?)+z"  # tries every way to cut a name into words
NESTED = "(" * 5000 + ")" * 5000
SLOW = 20  # seconds, which a machine with other work to do may take to refuse what takes PEFT hours


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(adapted(tiny(), target_modules=["q_proj"]), tmp_path / "adapter")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def refused(folder: Path, base: Any, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(AlignvecError, match=message) as caught:
        from_peft(folder, base)
    assert time.monotonic() - start < SLOW
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(target_modules=rf".*({ENDLESS})"), r"in target_modules, which takes too long"),
        (dict(exclude_modules=ENDLESS), "in exclude_modules, which takes too long"),
        (dict(modules_to_save=[ENDLESS]), "in modules_to_save, which takes too long"),
        (dict(rank_pattern={r"((.*)*)*x": 4}), "in rank_pattern, which takes too long"),
        (dict(layers_pattern=[ENDLESS], layers_to_transform=[0]), "in layers_pattern, which takes too long"),
        (dict(target_modules=NESTED), r"and more in target_modules, which is no expression \(maximum recursion"),
        (dict(alpha_pattern={NESTED: 2}), "and more in alpha_pattern, which is no expression"),
        (dict(layers_pattern="(", layers_to_transform=[0]), "in layers_pattern, which is no expression"),
        (dict(target_modules="(?:" + "a|" * 200_000 + "b)"), "expressions of 400005 characters in target_modules"),
        (dict(rank_pattern={f"m{i}": 4 for i in range(50_000)}), "50000 entries in rank_pattern, and the base has"),
        (dict(target_modules=[f"m{i}" for i in range(50_000)]), "50000 entries in target_modules"),
        (dict(layers_to_transform=list(range(50_000))), "50000 entries in layers_to_transform"),
        (dict(trainable_token_indices=list(range(50_000))), "50000 entries in trainable_token_indices"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_expressions_and_lists_that_hang_peft(options: dict[str, Any], message: str, folder: Path) -> None:
    change(folder, **options)
    refused(folder, tiny(), message)


@pytest.mark.parametrize(
    "target",
    [
        r".*\.(q_proj|v_proj)$",
        r"^(?!.*vision).*(?:q_proj|k_proj).*$",
        r"(?i).*\.[QO]_PROJ",
        r"^(model)(?!.*(lm_head|emb))(\.[^.]+)*?\.(q_proj|k_proj|v_proj|o_proj)$",
        rf"model\.layers\.\d+\.self_attn\.({'|'.join(ATTENTION)})",
    ],
)
def test_expressions_in_use_are_read_as_peft_reads_them(target: str, tmp_path: Path) -> None:
    model = tiny()
    wrapped = adapted(model, target_modules=target, rank_pattern={r".*\.1\..*": 2}, alpha_pattern={"(q|k)_proj": 3})
    vector = from_peft(saved(wrapped, tmp_path / "adapter"), model)
    assert_same(model, vector, wrapped)
    assert len(vector) >= 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rank_pattern="q_proj"), "rank_pattern='q_proj'"),
        (dict(rank_pattern={"q_proj": 10**400}), r"rank_pattern\['q_proj'\] too large"),
        (dict(rank_pattern={"q_proj": 4.0}), r"rank_pattern\['q_proj'\] 4.0"),
        (dict(r=2**30), "has rank 1073741824, but it holds 4"),
        (dict(r="4"), "whole number"),
        (dict(lora_alpha=float("nan")), "lora_alpha nan"),
        (dict(lora_alpha=1e300), "lora_alpha 1e.300"),
        (dict(use_rslora="false"), "use_rslora='false': it has to be true or false"),
        (dict(bias={}), "bias={}"),
        (dict(target_modules=[["q_proj"]]), r"target_modules=\[\['q_proj'\]\]"),
        (dict(trainable_token_indices=[-1]), "trainable_token_indices"),
        (dict(trainable_token_indices=[3, 3]), "without a number twice"),
        (dict(layers_to_transform=[10**400]), "layers_to_transform"),
        (dict(kasa_config={}), "kasa_config"),
        (dict(peft_type="x" * 10**6), "of type x{60}[.]{3}, and"),
        (dict(init_lora_weights="x" * 10**6), "init_lora_weights='x{59}"),
        (dict(target_modules=["q_proj", "v_proj"], init_lora_weights=False), "nothing for .*v_proj.* random values"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_values_of_another_kind_or_size(options: dict[str, Any], message: str, folder: Path) -> None:
    change(folder, **options)
    refused(folder, tiny(), message)


@pytest.mark.parametrize("kind", ["IA3", "ADALORA", "VERA", "PROMPT_TUNING", "PREFIX_TUNING", "LOHA", "OFT", "C3A"])
def test_other_kinds_of_adapters_are_named(kind: str, folder: Path) -> None:
    change(folder, peft_type=kind)
    refused(folder, None, f"of type {kind}, and only LORA is read")


def test_tensors_that_contradict_each_other(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    a, b = f"{path}.lora_A.weight", f"{path}.lora_B.weight"
    plain = {name: value for name, value in tensors.items() if name != a}
    for broken, message in (
        (tensors | {a: torch.full_like(tensors[a], torch.inf)}, r"infinity in .*q_proj\.lora_A"),
        (tensors | {a: tensors[a] * 1e30, b: tensors[b] * 1e30}, r"q_proj\.weight by values beyond"),
        (tensors | {a: torch.zeros(4, 48), b: tensors[b] * torch.nan}, r"NaN .* in .*q_proj\.lora_B"),
        (tensors | {a: torch.zeros(4, 48), b: torch.ones(40, 4)}, r"as \[40, 4\], and on .* makes it \[48, 4\]"),
        (tensors | {a: torch.ones(4, 48, dtype=torch.int64)}, "int64"),
        (tensors | {a: torch.ones(3, 48)}, "rank 4, but it holds 3"),
        (tensors | {b: torch.ones(48, 4, 1)}, r"\[48, 4, 1\]"),
        (tensors | {f"{path}.lora_B.bias": torch.ones(48)}, r"lora_B\.bias, which PEFT does not load"),
        (plain | {a.removeprefix("base_model.model."): tensors[a]}, "does not begin with base_model.model."),
        (tensors | {a.replace("layers", "_orig_mod.layers"): tensors[a].clone()}, "twice"),
        (tensors | {"base_model.model." + "a." * 200 + "lora_A.weight": torch.ones(4, 4)}, "no module has such a name"),
    ):
        save_file(broken, file)
        refused(folder, tiny(), message)


def test_files_that_are_no_adapters(folder: Path) -> None:
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    weights.rename(folder / "adapter_model.bin")
    refused(folder, None, r"holds no file adapter_model\.safetensors: pickles are not read")
    os.mkfifo(weights)
    refused(folder, None, r"holds no file adapter_model\.safetensors")
    config.unlink()
    os.mkfifo(config)
    refused(folder, None, r"holds no file adapter_config\.json")


@pytest.mark.parametrize(
    "options",
    [
        dict(num_hidden_layers=10**7),
        dict(num_hidden_layers=60_000),
        dict(num_hidden_layers=10**400),
        dict(num_hidden_layers=-1),
        dict(num_hidden_layers="2"),
        dict(num_labels=10**9),
        dict(hidden_size=10**12),
        dict(hidden_size=-48),
        dict(hidden_size=64),
        dict(vocab_size=10**9),
        dict(layer_types=["full_attention"] * 10**6),
        dict(model_type="mixtral", num_local_experts=60_000),
        dict(model_type="t5"),
        dict(model_type="unheard-of"),
        dict(model_type=["mistral"]),
        dict(model_type="bert"),
        dict(dtype="os"),
        dict(rope_parameters=5),
        dict(quantization_config=5),
        dict(auto_map=5),
        dict(model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}),
        dict(attn_implementation="someone/kernel"),
        dict(experts_implementation="someone/kernel"),
    ],
    ids=lambda options: "-".join(f"{key}={value}"[:30] for key, value in options.items()),
)
def test_bases_whose_configuration_is_nonsense(
    options: dict[str, Any], folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    config = base / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | options))
    refused(folder, base, "base|adapter")
