"""Adapters of experts: PEFT's target_parameters, and adapters from when every expert was a layer of its own."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

peft = pytest.importorskip("peft")

from alignvec.errors import AlignvecError  # noqa: E402
from alignvec.peft import from_peft, to_peft  # noqa: E402
from tests.storage.adapters import assert_same, change, expected, randomise, saved  # noqa: E402

COMMON = dict(
    vocab_size=53,
    hidden_size=32,
    intermediate_size=40,
    moe_intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": dict(num_local_experts=4),
    "Qwen2Moe": dict(num_experts=4, shared_expert_intermediate_size=24),
    "Qwen3Moe": dict(num_experts=4),
    "GptOss": dict(num_local_experts=4),  # [experts, in, out], biases beside
    "Llama4Text": dict(num_local_experts=4, intermediate_size_mlp=40),  # [experts, in, out]
    "GraniteMoe": dict(num_local_experts=4),  # under other names on disk
    "Phimoe": dict(num_local_experts=4),
}
PER_EXPERT = ("Mixtral", "Qwen2Moe", "Qwen3Moe", "Phimoe")


def tiny(family: str, **options: Any) -> nn.Module:
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(**{**COMMON, **FAMILIES[family], **options})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def targets(model: nn.Module) -> list[str]:
    names = [name for name, _ in model.named_parameters()]
    found = {".".join(name.split(".")[-2:]) for name in names if "experts." in name and "bias" not in name}
    return sorted(found | {".".join(n.split(".")[-2:]) for n in names if n.endswith((".gate.weight", "router.weight"))})


@pytest.mark.parametrize("family", FAMILIES)
def test_target_parameters_are_what_peft_merges(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    parameters = targets(model)
    assert len(parameters) == 3
    options = dict(target_parameters=parameters, init_lora_weights=False)
    first = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], **options)
    wrapped = peft.get_peft_model(copy.deepcopy(model), first)
    wrapped.add_adapter("second", peft.LoraConfig(r=2, target_modules=[], use_rslora=True, **options))
    randomise(wrapped)
    folder = saved(wrapped, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "base")
    copy.deepcopy(wrapped).merge_and_unload().save_pretrained(tmp_path / "merged")
    for vector in (from_peft(wrapped), from_peft(folder, model)):
        assert_same(model, vector, wrapped)
    before, after = (load_file(tmp_path / each / "model.safetensors") for each in ("base", "merged"))
    for vector in (from_peft(folder, tmp_path / "base"), from_peft(wrapped, tmp_path / "base")):
        assert set(vector) == {name for name in before if not torch.equal(before[name], after[name])}
        for name in vector:
            torch.testing.assert_close(before[name].double() + vector[name], after[name].double(), rtol=0, atol=1e-6)
    wrapped.base_model.set_adapter(["default", "second"])
    assert_same(model, from_peft(wrapped), wrapped)
    with pytest.raises(AlignvecError, match=r"target_parameters \(.*experts.*\): give the base"):
        from_peft(folder)


def test_a_parameter_of_one_expert_and_of_plain_layers() -> None:
    model = tiny("Mixtral", num_local_experts=1, num_experts_per_tok=1)
    names = ["experts.down_proj", "experts.gate_up_proj", "q_proj.weight", "embed_tokens.weight"]
    config = peft.LoraConfig(target_modules=[], target_parameters=names, init_lora_weights=False)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    assert_same(model, from_peft(wrapped), wrapped)
    transposed = tiny("GptOss", num_local_experts=1, num_experts_per_tok=1)
    config = peft.LoraConfig(target_modules=[], target_parameters=["experts.gate_up_proj"], init_lora_weights=False)
    with pytest.raises(AlignvecError, match=r"gate_up_proj is \[1, 80, 32\], which is no sum with \[1, 32, 80\]"):
        from_peft(peft.get_peft_model(transposed, config))  # nor does PEFT merge it


def test_experts_saved_whole_need_the_loaded_base(tmp_path: Path) -> None:
    model = tiny("Mixtral")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["experts"], init_lora_weights=False)
    wrapped = randomise(peft.get_peft_model(copy.deepcopy(model), config))
    folder = saved(wrapped, tmp_path / "adapter")
    for vector in (from_peft(wrapped), from_peft(folder, model)):
        assert_same(model, vector, wrapped)
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(AlignvecError, match=r"experts\.\w+ under one name: give the loaded model"):
        from_peft(folder, tmp_path / "base")


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_vectors_of_experts_and_routers_go_out_whole(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    options = dict(target_parameters=targets(model), init_lora_weights=False)
    vector = from_peft(peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["q_proj"], **options)))
    to_peft(vector, tmp_path / "out", model)
    assert_same(model, vector, peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "out")))


def earlier(model: nn.Module, folder: Path, **options: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """An adapter by the names that a checkpoint has, and its deltas in float64 by hand."""
    model.save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(5)
    state, deltas = {}, {}
    for name, value in load_file(folder / "base" / "model.safetensors").items():
        if value.dim() == 2 and any(part in name for part in (".experts.", ".gate.", "q_proj")):
            path = name.removesuffix(".weight")
            a, b = (torch.randn(shape, generator=generator) for shape in ((4, value.shape[1]), (value.shape[0], 4)))
            state |= {f"base_model.model.{path}.lora_A.weight": a, f"base_model.model.{path}.lora_B.weight": b}
            scale = options["lora_alpha"] / (math.sqrt(4) if options.get("use_rslora") else 4)
            deltas[name] = scale * b.double() @ a.double()
    (folder / "adapter").mkdir()
    save_file(state, folder / "adapter" / "adapter_model.safetensors")
    leaves = sorted({name.split(".")[-2] for name in deltas})
    config = {"peft_type": "LORA", "r": 4, "target_modules": leaves, "lora_dropout": 0.05, **options}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return folder / "adapter", deltas


@pytest.mark.parametrize("family", PER_EXPERT)
@pytest.mark.parametrize("options", [dict(), dict(use_rslora=True), dict(target_modules="all-linear")], ids=str)
def test_adapters_of_single_experts_on_a_checkpoint(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    folder, deltas = earlier(tiny(family), tmp_path, lora_alpha=6, **options)
    for base in (tmp_path / "base", None):
        vector = from_peft(folder, base)
        assert set(vector) == set(deltas)
        for name, delta in deltas.items():
            assert vector.format_of(name).name == "low-rank"
            torch.testing.assert_close(vector[name].double(), delta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_adapters_of_single_experts_on_a_live_model(family: str, tmp_path: Path) -> None:
    """PEFT joins them, with all its tests and numbers; where it changes their scale they are refused."""
    model = tiny(family)
    folder, _ = earlier(model, tmp_path, lora_alpha=6)
    change(folder, lora_dropout=0.0)
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder))
    for vector in (from_peft(folder, model), from_peft(wrapped)):
        parameters, merged = dict(model.named_parameters()), expected(wrapped)
        assert set(vector) == {name for name in merged if not torch.equal(merged[name], parameters[name])}
        for name in vector:
            total = parameters[name].double() + vector[name].double()
            torch.testing.assert_close(total, merged[name].double(), rtol=0, atol=1e-5)
    own = load_file(folder / "adapter_model.safetensors")
    expert = min(key for key in own if ".experts." in key).removeprefix("base_model.model.").partition(".lora_")[0]
    for options, lost in (
        (dict(use_rslora=True), "the scale of use_rslora"),
        (dict(alpha_pattern={expert.rpartition(".")[2]: 3}), "alpha_pattern"),
    ):
        change(folder, **{"use_rslora": False, "alpha_pattern": {}, **options})
        with pytest.raises(AlignvecError, match=rf"PEFT loses .*{lost}.* as files"):
            from_peft(folder, model)


def test_experts_that_peft_cannot_place_are_refused(tmp_path: Path) -> None:
    model = tiny("Phimoe")
    folder, _ = earlier(model, tmp_path, lora_alpha=6)
    with pytest.raises(AlignvecError, match="as files if its experts are layers of their own"):
        from_peft(folder, model)
