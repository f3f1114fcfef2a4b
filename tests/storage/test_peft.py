"""LoRA adapters made by the peft package, imported and exported: the same weights and the same logits."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

peft = pytest.importorskip("peft")

from alignvec import AlignmentVector  # noqa: E402
from alignvec.errors import AlignvecError  # noqa: E402
from alignvec.fingerprint import identify  # noqa: E402
from alignvec.formats import Encoded, encode  # noqa: E402
from alignvec.peft import from_peft, to_peft  # noqa: E402
from tests.models import tiny  # noqa: E402
from tests.storage.adapters import ATTENTION, adapted, assert_same, expected, saved  # noqa: E402

TOKENS = torch.arange(3, 27).view(2, 12)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("Mistral", dict(target_modules=ATTENTION)),
    "uneven-scale": ("Mistral", dict(target_modules=["down_proj", "up_proj"], lora_alpha=7, r=5)),
    "rslora": ("Mistral", dict(target_modules="all-linear", use_rslora=True)),
    "patterns": (
        "Mistral",
        dict(
            target_modules=ATTENTION,
            use_rslora=True,
            rank_pattern={"q_proj": 2, r"layers\.1\.self_attn\.[ko]_proj": 6},
            alpha_pattern={r"^model\.layers\.0\.self_attn\.v_proj": 3, "o_proj": 16},
        ),
    ),
    "one-layer": ("Mistral", dict(target_modules=["q_proj"], layers_to_transform=[1])),
    "head": ("Mistral", dict(target_modules=["lm_head", "gate_proj"])),
    "embedding": ("Mistral", dict(target_modules=["embed_tokens", "q_proj"])),
    "full-modules": ("Mistral", dict(target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])),
    "lora-bias": ("Llama", dict(target_modules=["q_proj", "down_proj"], lora_bias=True, lora_alpha=3)),
    "bias-of-lora-modules": ("Llama", dict(target_modules=["q_proj"], bias="lora_only")),
    "all-biases": ("Llama", dict(target_modules=["q_proj"], bias="all")),
    "conv1d": ("GPT2", dict(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    "conv1d-and-embedding": ("GPT2", dict(target_modules=["c_proj", "wpe"])),
    "orthogonal": ("Mistral", dict(target_modules=["q_proj"], init_lora_weights="orthogonal")),
}


@pytest.mark.parametrize("case", CASES)
def test_base_and_vector_are_what_peft_merges(case: str, tmp_path: Path) -> None:
    architecture, options = CASES[case]
    model = tiny(architecture)
    wrapped = adapted(model, **options)
    folder = saved(wrapped, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "base")
    own = model if "bias" in options else None  # biases are trained in place
    for vector in (from_peft(folder, tmp_path / "base"), from_peft(folder, model), from_peft(wrapped, own)):
        assert_same(model, vector, wrapped)
        assert vector.base is not None
        assert not vector.base.differences(identify(model))
    before, after = dict(model.named_parameters()), expected(wrapped)
    assert set(vector.names) == {name for name in before if not torch.equal(before[name], after[name])}


def test_without_a_base_the_deltas_are_the_same(tmp_path: Path) -> None:
    model = tiny()
    wrapped = adapted(model, target_modules=["embed_tokens", *ATTENTION])
    vector = from_peft(saved(wrapped, tmp_path / "adapter"))
    assert vector.base is None
    assert_same(model, vector, wrapped)


@pytest.mark.parametrize(
    ("alpha", "dtype", "stored"),
    [
        (8, torch.bfloat16, "bfloat16"),
        (2, torch.bfloat16, "bfloat16"),
        (6, torch.bfloat16, "float32"),
        (8, torch.float32, "float32"),
        (8, torch.float16, "float32"),
    ],
)
def test_the_scale_is_folded_in_exactly(alpha: int, dtype: torch.dtype, stored: str, tmp_path: Path) -> None:
    wrapped = adapted(tiny(), target_modules=["q_proj"], lora_alpha=alpha, r=4)
    folder = saved(wrapped, tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    tensors = {name: value.to(dtype) for name, value in load_file(file).items()}
    save_file(tensors, file)
    vector = from_peft(folder)
    name = "model.layers.1.self_attn.q_proj"
    encoded = vector.encoded(f"{name}.weight")
    assert encoded.options == {"rank": 4, "dtype": stored}
    a, b = (tensors[f"base_model.model.{name}.lora_{key}.weight"].float() for key in "AB")
    assert torch.equal(encoded.parts["A"].float(), a)
    assert torch.equal(encoded.parts["B"].float(), b * (alpha / 4))


def test_a_negative_alpha_subtracts_as_peft_does(tmp_path: Path) -> None:
    model = tiny()
    options: dict[str, Any] = dict(lora_alpha=-4, alpha_pattern={"k_proj": -0.5})
    wrapped = adapted(model, target_modules=["q_proj", "k_proj"], **options)
    for vector in (from_peft(wrapped), from_peft(saved(wrapped, tmp_path / "adapter"))):
        assert_same(model, vector, wrapped)


def test_another_active_adapter_is_imported_as_such() -> None:
    model = tiny()
    wrapped = adapted(model, target_modules=["q_proj"])
    wrapped.add_adapter("second", peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["v_proj"]))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if ".second." in name:
                parameter.normal_()
    wrapped.set_adapter("second")
    vector = from_peft(wrapped)
    assert {name.split(".")[-2] for name in vector} == {"v_proj"}
    assert_same(model, vector, wrapped)


def test_one_side_of_tied_weights_is_refused_and_both_sides_are_one_delta(tmp_path: Path) -> None:
    model = tiny("Qwen2")
    for options in (
        dict(target_modules=["embed_tokens"]),
        dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    ):
        wrapped = adapted(model, **options)
        with pytest.raises(AlignvecError, match="ties to it"):
            from_peft(saved(wrapped, tmp_path / str(len(options))), model)
    both = adapted(model, target_modules=["embed_tokens", "lm_head"])
    layers = dict(both.base_model.model.named_modules())
    with torch.no_grad():  # as ensure_weight_tying has it
        layers["lm_head"].lora_A["default"].weight.copy_(layers["model.embed_tokens"].lora_embedding_B["default"].T)
        layers["lm_head"].lora_B["default"].weight.copy_(layers["model.embed_tokens"].lora_embedding_A["default"].T)
    vector = from_peft(saved(both, tmp_path / "both"), model)
    assert vector.names == ("model.embed_tokens.weight",)


def test_an_imported_vector_attaches(tmp_path: Path) -> None:
    import alignvec

    model = tiny()
    wrapped = adapted(model, target_modules=ATTENTION)
    with torch.no_grad():
        logits = wrapped(TOKENS).logits
    vector = from_peft(saved(wrapped, tmp_path / "adapter"), model)
    alignment = alignvec.attach(model, {"lora": vector})
    alignment.set(lora=1.0)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "case", ["plain", "uneven-scale", "patterns", "head", "embedding", "full-modules", "lora-bias", "conv1d"]
)
def test_an_exported_adapter_gives_the_same_logits(case: str, tmp_path: Path) -> None:
    architecture, options = CASES[case]
    model = tiny(architecture)
    wrapped = adapted(model, **options)
    vector = from_peft(wrapped)
    to_peft(vector, tmp_path / "exported", model)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "exported")).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS).logits, wrapped(TOKENS).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(loaded(TOKENS).logits, model(TOKENS).logits, atol=1e-2)
    again = from_peft(tmp_path / "exported", model)
    assert set(again) == set(vector)
    for name in vector:
        torch.testing.assert_close(again[name].float(), vector[name].float(), rtol=0, atol=0)


def test_an_encoded_vector_is_exported_without_its_base(tmp_path: Path) -> None:
    model = tiny()
    ranks = {
        "model.layers.0.self_attn.q_proj.weight": 3,
        "model.layers.1.mlp.up_proj.weight": 3,
        "model.layers.1.self_attn.k_proj.weight": 5,
        "model.embed_tokens.weight": 3,
    }
    parameters = dict(model.named_parameters())
    deltas = {
        name: encode(f"low-rank:rank={rank},dtype=float32", torch.randn(parameters[name].shape) * 0.1)
        for name, rank in ranks.items()
    }
    vector = AlignmentVector(deltas, identify(model))
    to_peft(vector, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 3)
    assert config["rank_pattern"] == config["alpha_pattern"] == {r"model\.layers\.1\.self_attn\.k_proj": 5}
    assert_same(model, vector, peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "adapter")))


def test_what_no_adapter_can_hold_is_not_exported(tmp_path: Path) -> None:
    model, output = tiny("Qwen2"), tmp_path / "adapter"
    parameters = dict(model.named_parameters())

    def low_rank(name: str) -> Encoded:
        return encode("low-rank:rank=2", torch.randn(parameters[name].shape))

    query, up = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"
    for deltas, base, message in (
        ({query: torch.randn(48, 48)}, None, "no low-rank delta"),
        ({query: low_rank(query), up: encode("int4", torch.randn(72, 48))}, model, "is stored as int4:group=128"),
        ({query: low_rank(query), "model.norm.weight": torch.randn(48)}, None, r"model\.norm\.weight is dense"),
        ({"model.embed_tokens.weight": low_rank("model.embed_tokens.weight")}, None, "tied"),
        ({"model.embed_tokens.weight": low_rank("model.embed_tokens.weight")}, model, "tied"),
    ):
        with pytest.raises(AlignvecError, match=message):
            to_peft(AlignmentVector(deltas, identify(model)), output, base)
        assert not output.exists()
    gpt2 = tiny("GPT2")
    name = "transformer.h.0.attn.c_proj.weight"
    vector = AlignmentVector({name: encode("low-rank:rank=2", torch.randn(48, 48))}, identify(gpt2))
    with pytest.raises(AlignvecError, match="Conv1D"):
        to_peft(vector, output)
    to_peft(vector, output, gpt2)
    with pytest.raises(AlignvecError, match="not an empty folder"):
        to_peft(vector, output, gpt2)
    to_peft(vector, output, gpt2, overwrite=True)
