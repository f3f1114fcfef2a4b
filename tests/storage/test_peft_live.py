"""Live models with adapters: several at once, scales changed at run time, and transformers' own adapters."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")

from alignvec import AlignmentVector  # noqa: E402
from alignvec.errors import AlignvecError  # noqa: E402
from alignvec.peft import from_peft  # noqa: E402
from tests.models import tiny  # noqa: E402
from tests.storage.adapters import adapted, assert_same, expected, randomise, saved  # noqa: E402

TOKENS = torch.arange(3, 27).view(2, 12)


def several() -> tuple[nn.Module, nn.Module]:
    """A model, and the same with three adapters, of which two share v_proj; the first and second are active."""
    model = tiny()
    wrapped = adapted(model, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    second = peft.LoraConfig(r=2, lora_alpha=5, use_rslora=True, target_modules=["v_proj", "embed_tokens"])
    wrapped.add_adapter("second", second)
    wrapped.add_adapter("third", peft.LoraConfig(r=3, target_modules=["o_proj"]))
    wrapped.base_model.set_adapter(["default", "second"])
    return model, randomise(wrapped)


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {
        ".".join(name.split(".")[-4:]): module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def assert_same_logits(model: nn.Module, vector: AlignmentVector, adapters: nn.Module) -> None:
    """base + vector computes what the live model with its adapters computes."""
    added = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, parameter in added.named_parameters():
            parameter += vector[name].double() if name in vector else 0
        want = adapters(TOKENS).logits.double()
        torch.testing.assert_close(added(TOKENS).logits, want, rtol=1e-5, atol=1e-4)
        assert not torch.allclose(model.double()(TOKENS).logits, want, atol=1e-2)


def test_active_adapters_are_added_up_and_others_left_out() -> None:
    model, wrapped = several()
    vector = from_peft(wrapped)
    assert_same(model, vector, wrapped)
    assert {name.split(".")[-2] for name in vector} == {"q_proj", "v_proj", "embed_tokens", "lm_head"}
    assert vector.format_of("model.layers.0.self_attn.v_proj.weight").options["rank"] == 4 + 2
    assert vector.source["adapter"] == "second, default"
    assert_same_logits(model, vector, wrapped)


def test_active_adapters_may_differ_by_layer() -> None:
    model, wrapped = several()
    found = layers(wrapped)
    found["layers.0.self_attn.v_proj"].set_adapter(["second"])
    found["layers.1.self_attn.v_proj"].set_adapter(["second", "second"])
    found["layers.1.self_attn.q_proj"].set_adapter([])
    assert_same(model, from_peft(wrapped), wrapped)


def test_scales_are_those_of_the_moment() -> None:
    model, wrapped = several()
    found = layers(wrapped)
    found["layers.0.self_attn.q_proj"].set_scale("default", -1.5)
    found["layers.1.self_attn.q_proj"].set_scale("default", 0.0)
    found["layers.0.self_attn.v_proj"].set_scale("second", 0.3)
    found["layers.1.self_attn.v_proj"].scale_layer(3.0)
    vector = from_peft(wrapped)
    assert_same(model, vector, wrapped)
    assert "model.layers.1.self_attn.q_proj.weight" not in vector
    for layer in found.values():
        layer.unscale_layer()
    assert_same(model, from_peft(wrapped), wrapped)
    found["layers.0.self_attn.q_proj"].scaling["default"] = float("nan")
    with pytest.raises(AlignvecError, match=r"scale nan on model\.layers\.0\.self_attn\.q_proj"):
        from_peft(wrapped)


def test_a_sum_is_bfloat16_only_where_that_is_exact() -> None:
    model = tiny(dtype=torch.bfloat16)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=False)
    second = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=False)
    wrapped.add_adapter("second", second, autocast_adapter_dtype=False)
    name = "model.layers.0.self_attn.q_proj.weight"
    layer = layers(wrapped)["layers.0.self_attn.q_proj"]
    exact = {
        each: scale * layer.lora_B[each].weight.double() @ layer.lora_A[each].weight.double()
        for each, scale in (("default", 2.0), ("second", 1.5))
    }
    for active, dtype in ((["default"], "bfloat16"), (["default", "second"], "float32")):
        wrapped.base_model.set_adapter(active)
        encoded = from_peft(wrapped).encoded(name)
        assert encoded.options["dtype"] == dtype
        total = encoded.parts["B"].double() @ encoded.parts["A"].double()
        torch.testing.assert_close(total, sum(exact[each] for each in active), rtol=1e-12, atol=1e-12)


def test_disabled_and_merged_adapters_are_refused_with_a_way_out() -> None:
    model, wrapped = several()
    with wrapped.disable_adapter(), pytest.raises(AlignvecError, match=r"disabled: call enable_adapters\(True\)"):
        from_peft(wrapped)
    one = layers(wrapped)["layers.1.self_attn.v_proj"]
    one.enable_adapters(False)
    with pytest.raises(AlignvecError, match=r"of model\.layers\.1\.self_attn\.v_proj are disabled"):
        from_peft(wrapped)
    one.enable_adapters(True)
    one.merge(adapter_names=["second"])
    with pytest.raises(AlignvecError, match=r"second is merged into model\.layers\.1\.self_attn\.v_proj"):
        from_peft(wrapped)
    one.unmerge()
    assert_same(model, from_peft(wrapped), wrapped)
    for layer in wrapped.modules():
        if isinstance(layer, (peft.tuners.lora.LoraLayer, peft.utils.ModulesToSaveWrapper)):
            layer.set_adapter([])
    with pytest.raises(AlignvecError, match="no active adapter"):
        from_peft(wrapped)


def test_what_is_around_a_model_with_adapters_is_seen_through() -> None:
    _, wrapped = several()
    names = set(from_peft(wrapped))
    for model in (wrapped.base_model, wrapped.get_base_model(), torch.compile(wrapped), nn.DataParallel(wrapped)):
        assert set(from_peft(model)) == names


def test_adapters_of_transformers_itself(tmp_path: Path) -> None:
    model = tiny()
    folder = saved(adapted(model, target_modules=["q_proj"]), tmp_path / "adapter")
    own = copy.deepcopy(model)
    own.load_adapter(str(folder), "one")
    own.add_adapter(peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "down_proj", "embed_tokens"]), "two")
    randomise(own)
    for active in ("one", "two", ["one", "two"]):
        own.set_adapter(active)
        vector = from_peft(own)
        assert vector.base is not None
        assert set(vector.base.tensors) == {name for name, _ in model.named_parameters()}
        assert_same_logits(copy.deepcopy(model), vector, own)
    own.disable_adapters()
    with pytest.raises(AlignvecError, match="disabled"):
        from_peft(own)
    own.enable_adapters()
    own.set_adapter("one")
    own.save_pretrained(tmp_path / "again")
    again = from_peft(tmp_path / "again", own)
    for name, delta in from_peft(own).items():
        torch.testing.assert_close(again[name], delta, rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ["Mistral", "Qwen2"])
def test_trained_tokens_are_rows(architecture: str, tmp_path: Path) -> None:
    model = tiny(architecture)
    wrapped = adapted(model, target_modules=["q_proj"], trainable_token_indices=[3, 50, 7])
    folder = saved(wrapped, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "base")
    for vector in (from_peft(wrapped), from_peft(folder, model), from_peft(folder, tmp_path / "base")):
        assert_same(model, vector, wrapped)
        assert vector["model.embed_tokens.weight"].any(dim=1).nonzero().flatten().tolist() == [3, 7, 50]


@pytest.mark.parametrize(
    "options", [dict(target_modules=["q_proj", "embed_tokens"]), dict(modules_to_save=["lm_head"])]
)
def test_weights_tied_by_peft_are_edited_once(options: dict[str, list[str]], tmp_path: Path) -> None:
    model = tiny("Qwen2")
    wrapped = adapted(model, **{"target_modules": ["q_proj"], **options}, ensure_weight_tying=True)
    folder = saved(wrapped, tmp_path / "adapter")
    for vector in (from_peft(wrapped), from_peft(folder, model)):
        assert "model.embed_tokens.weight" in vector
        assert_same_logits(copy.deepcopy(model), vector, wrapped)  # merging would add a shared weight's delta twice


def test_training_variants_that_merge_as_plain_lora(tmp_path: Path) -> None:
    model = tiny()
    velora = {"num_groups": 8, "init_type": "random", "scale": 1.0}
    for options in (dict(init_lora_weights="mica"), dict(velora_config=velora)):
        wrapped = adapted(model, target_modules=["q_proj"], **options)
        folder = saved(wrapped, tmp_path / next(iter(options)))
        for vector in (from_peft(wrapped), from_peft(folder, model)):
            assert_same(model, vector, wrapped)


def test_another_kind_of_adapter_beside_a_lora() -> None:
    model = tiny()
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    mixed = peft.get_peft_model(copy.deepcopy(model), config, mixed=True)
    mixed.add_adapter("other", peft.LoHaConfig(target_modules=["k_proj"], init_weights=False))
    vector = from_peft(mixed)
    for name, parameter in expected(mixed).items():
        delta = vector[name].double() if name in vector else 0
        torch.testing.assert_close(dict(model.named_parameters())[name].double() + delta, parameter.double())
    mixed.set_adapter(["default", "other"])
    with pytest.raises(AlignvecError, match="other is of type LOHA"):
        from_peft(mixed)
