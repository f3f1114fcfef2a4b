"""Adapters that are no sum of low-rank deltas, contradict themselves, or are damaged: refused in one sentence."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

peft = pytest.importorskip("peft")

from alignvec.errors import AlignvecError  # noqa: E402
from alignvec.peft import from_peft  # noqa: E402
from tests.models import tiny  # noqa: E402
from tests.storage.adapters import adapted, change, saved  # noqa: E402


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(use_dora=True), "use_dora"),
        (dict(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens"),
        (dict(trainable_token_indices=[3]), "trainable_token_indices"),
        (dict(target_parameters=["experts.down_proj"]), "target_parameters"),
        (dict(layer_replication=[[0, 1], [0, 2]]), "layer_replication"),
        (dict(kasa_config={"beta": 1e-4}), "kasa_config"),
        (dict(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (dict(peft_type="LOHA"), "of type LOHA"),
        (dict(r=3), "has rank 3, but it holds 4"),
        (dict(r=-1), "whole number, positive"),
        (dict(lora_alpha=0), "has to be other than 0"),
        (dict(lora_alpha=None), "has to be other than 0"),
        (dict(alpha_pattern={"(": 3}), "no expression"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_no_plain_lora_is_refused_by_name(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = saved(adapted(tiny(), target_modules=["q_proj"]), tmp_path / "adapter")
    change(folder, **options)
    with pytest.raises(AlignvecError, match=message.replace("(", r"\(")):
        from_peft(folder)


def test_variants_made_by_peft_are_refused(tmp_path: Path) -> None:
    dora = saved(adapted(tiny(), target_modules=["q_proj"], use_dora=True), tmp_path / "dora")
    with pytest.raises(AlignvecError, match="use_dora"):
        from_peft(dora)
    change(dora, use_dora=False)
    with pytest.raises(AlignvecError, match="lora_magnitude_vector"):
        from_peft(dora)
    merged = adapted(tiny(), target_modules=["q_proj"])
    merged.merge_adapter()
    with pytest.raises(AlignvecError, match="merged"):
        from_peft(merged)
    with pytest.raises(AlignvecError, match="biases in place"):
        from_peft(adapted(tiny("Llama"), target_modules=["q_proj"], bias="all"))
    with pytest.raises(AlignvecError, match="no PeftModel"):
        from_peft(tiny())


def test_damaged_adapters_are_refused(tmp_path: Path) -> None:
    folder = saved(adapted(tiny(), target_modules=["q_proj"]), tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    for broken, message in (
        ({name: value for name, value in tensors.items() if name != key}, "no two matrices"),
        (tensors | {key: torch.full_like(tensors[key], math.nan)}, "NaN"),
        (tensors | {key: tensors[key][:5].clone()}, r"as \[5, 4\], and on .* makes it \[48, 4\]"),
        ({name: torch.zeros_like(value) for name, value in tensors.items()}, "changes nothing"),
    ):
        save_file(broken, file)
        with pytest.raises(AlignvecError, match=message):
            from_peft(folder, tiny())
    (folder / "adapter_config.json").unlink()
    with pytest.raises(AlignvecError, match=r"holds no file adapter_config\.json"):
        from_peft(folder)


def test_whole_weights_need_a_base_that_fits(tmp_path: Path) -> None:
    wrapped = adapted(tiny(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    folder = saved(wrapped, tmp_path / "adapter")
    with pytest.raises(AlignvecError, match=r"holds lm_head\.weight whole: give the base"):
        from_peft(folder)
    with pytest.raises(AlignvecError, match=r"lm_head\.weight is \[101, 48\] in adapter"):
        from_peft(folder, tiny(vocab_size=96))
    with pytest.raises(AlignvecError, match=r"has no module"):
        from_peft(folder, tiny(num_hidden_layers=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(r=10**400), "r too large"),
        (dict(r=True), "r True"),
        (dict(lora_alpha=[1]), "lora_alpha"),
        (dict(rank_pattern=[1]), "rank_pattern"),
        (dict(alpha_pattern={"q_proj": "a"}), "alpha_pattern"),
        (dict(target_modules=5), "target_modules=5: it has to be a list of names or"),
        (dict(target_modules=["v_proj"]), "q_proj.lora_A.weight and 3 more, which PEFT does not load onto Mistral"),
        (dict(layers_to_transform=[0]), r"layers.1.self_attn.q_proj.lora_A.weight and 1 more, which PEFT"),
        (dict(exclude_modules=["q_proj"]), "PEFT does not load adapter"),
        (dict(modules_to_save=3), "modules_to_save=3"),
        (dict(init_lora_weights=["pissa"]), "init_lora_weights"),
        (dict(init_lora_weights="loftq"), "merge_and_unload"),
        (dict(peft_type=["LORA"]), "of type"),
        (dict(lora_bias=True), "lacks model.layers.0.self_attn.q_proj.lora_B.bias"),
        (dict(trainable_token_indices=[3]), "lacks model.embed_tokens.trainable_tokens_delta"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_configuration_that_contradicts_the_tensors_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = saved(adapted(tiny(), target_modules=["q_proj"]), tmp_path / "adapter")
    change(folder, **options)
    with pytest.raises(AlignvecError, match=message):
        from_peft(folder, tiny())


@pytest.mark.parametrize("based", [True, False])
def test_tensors_that_peft_ignores_are_refused(based: bool, tmp_path: Path) -> None:
    folder = saved(adapted(tiny(), target_modules=["q_proj"]), tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    value = "base_model.model.model.layers.0.self_attn.v_proj.lora_"
    save_file(tensors | {f"{value}A.weight": torch.ones(4, 48), f"{value}B.weight": torch.ones(24, 4)}, file)
    with pytest.raises(AlignvecError, match=r"v_proj\.lora_A\.weight and 1 more, which PEFT does not load"):
        from_peft(folder, tiny() if based else None)
    save_file(tensors | {"a..b.lora_A.weight": torch.ones(4, 48), "a..b.lora_B.weight": torch.ones(24, 4)}, file)
    with pytest.raises(AlignvecError, match=r"a\.\.b"):
        from_peft(folder, tiny() if based else None)


def test_modules_without_tensors_are_left_as_they_are(tmp_path: Path) -> None:
    folder = saved(adapted(tiny(), target_modules=["q_proj"]), tmp_path / "adapter")
    change(folder, target_modules=["q_proj", "o_proj"])
    assert {name.split(".")[-2] for name in from_peft(folder, tiny())} == {"q_proj"}


def test_a_base_with_code_of_its_own_asks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    folder = saved(adapted(model, target_modules=["q_proj"]), tmp_path / "adapter")
    model.save_pretrained(tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    asked = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    config.write_text(json.dumps(json.loads(config.read_text()) | asked))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    with pytest.raises(AlignvecError, match="give the loaded model as the base"):
        from_peft(folder, tmp_path / "base")
    assert len(from_peft(folder, model)) == 2


def test_a_base_that_an_adapter_is_merged_into_is_refused(tmp_path: Path) -> None:
    folder = saved(adapted(tiny(), target_modules=["q_proj"]), tmp_path / "adapter")
    base = peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["k_proj"], init_lora_weights=False))
    assert len(from_peft(folder, base)) == 2
    base.merge_adapter()
    with pytest.raises(AlignvecError, match=r"merged into model\.layers\.0\.self_attn\.k_proj"):
        from_peft(folder, base)


def test_quantised_layers_are_named_as_such(tmp_path: Path) -> None:
    folder = saved(adapted(tiny(), target_modules=["q_proj"]), tmp_path / "adapter")
    base = copy.deepcopy(tiny())
    layer = base.model.layers[0].self_attn.q_proj
    layer.weight = torch.nn.Parameter(torch.zeros(48 * 48 // 2, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(AlignvecError, match=r"q_proj\.weight is torch\.uint8 .* quantised"):
        from_peft(folder, base)


def test_without_the_peft_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(adapted(tiny(), target_modules=["q_proj"]), tmp_path / "adapter")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(AlignvecError, match="pip install peft"):
        from_peft(folder)


def test_a_tied_head_s_adapter_asks_for_the_base(tmp_path: Path) -> None:
    options: dict[str, Any] = dict(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    folder = saved(adapted(tiny("Qwen2"), **options), tmp_path / "adapter")
    with pytest.raises(AlignvecError, match="give the base"):
        from_peft(folder)
