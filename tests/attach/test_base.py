"""Which models are accepted as a vector's base: tensors that are no parameters, float16, quantised weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import alignvec
from alignvec import AlignmentVector, AlignvecError
from alignvec.names import live_deltas, parameter_names
from alignvec.verify import verify_base
from tests.attach.transferred import FAMILIES, added, new, tuned
from tests.storage.descriptions import change_description

NEXT = dict(
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    layer_types=["linear_attention", "full_attention"],
)


def saved(model: nn.Module, folder: Path, extra: dict[str, Tensor] | None = None) -> Path:
    """A checkpoint of the model that also holds the tensors `extra`."""
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(load_file(file) | (extra or {}), file, {"format": "pt"})
    return folder


EXTRA = {
    "mtp": ("Qwen3Next", NEXT, {"mtp.fc.weight": torch.randn(32, 64), "mtp.norm.weight": torch.randn(32)}),
    "layer 61": (
        "DeepseekV3",
        FAMILIES["DeepseekV3"],
        {"model.layers.61.eh_proj.weight": torch.randn(32, 64), "model.layers.61.enorm.weight": torch.ones(32)},
    ),
    "rotary": ("Llama", {}, {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(4) for i in range(2)}),
    "masks": (
        "GPT2",
        {},
        {
            "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8).tril(),
            "transformer.h.0.attn.masked_bias": torch.ones(()),
        },
    ),
    "positions": ("Llama", {}, {"model.position_ids": torch.arange(8)}),
}


@pytest.mark.parametrize("where", ["both", "base", "aligned"])
@pytest.mark.parametrize("kind", list(EXTRA))
def test_tensors_that_the_model_does_not_load(kind: str, where: str, tmp_path: Path) -> None:
    family, options, extra = EXTRA[kind]
    model = new(family, **options)
    base = saved(model, tmp_path / "base", None if where == "aligned" else extra)
    aligned = saved(tuned(model), tmp_path / "aligned", None if where == "base" else extra)
    vector = alignvec.extract(base, aligned, dtype="float32", output=tmp_path / "v")
    assert not vector.tensors.keys() & extra.keys()
    live, expected = AutoModelForCausalLM.from_pretrained(base), AutoModelForCausalLM.from_pretrained(aligned)
    verify_base(live, {"v": vector})
    moved = added(live, vector)
    for name, value in expected.named_parameters():
        torch.testing.assert_close(moved[name], value.double(), rtol=0, atol=1e-6)
    report = alignvec.merge(base, {"v": vector}, {"v": 1.0}, tmp_path / "merged")
    merged = load_file(report.output / "model.safetensors")
    assert where == "aligned" or all(torch.equal(merged[name], value) for name, value in extra.items())


def test_an_edited_prediction_head_is_refused_by_name(tmp_path: Path) -> None:
    model, extra = new("Qwen3Next", **NEXT), {"mtp.fc.weight": torch.randn(32, 64)}
    base = saved(model, tmp_path / "base", extra)
    aligned = saved(tuned(model), tmp_path / "aligned", {"mtp.fc.weight": extra["mtp.fc.weight"] + 1})
    vector = alignvec.extract(base, aligned)
    assert torch.equal(vector["mtp.fc.weight"], (extra["mtp.fc.weight"] + 1) - extra["mtp.fc.weight"])
    for transfer in (False, True):
        with pytest.raises(AlignvecError, match=r"does not have: mtp.fc.weight;.*vector.select"):
            alignvec.attach(AutoModelForCausalLM.from_pretrained(base), {"v": vector}, transfer=transfer)


def test_correction_biases(tmp_path: Path) -> None:
    """A persistent buffer: it belongs to the base, is compared, and a delta for it is refused at attach."""
    model = new("Glm4Moe", **FAMILIES["Glm4Moe"])
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    aligned = tuned(model)
    base = saved(model, tmp_path / "base")
    vector = alignvec.extract(base, saved(aligned, tmp_path / "still"))
    live = AutoModelForCausalLM.from_pretrained(base)
    alignvec.attach(live, {"v": vector}).detach()
    live.get_buffer(name)[0] += 1
    with pytest.raises(AlignvecError, match=rf"1 of 35 tensors differ \({name}\)"):
        alignvec.attach(live, {"v": vector})
    aligned.get_buffer(name)[1] += 0.5
    for moved in (
        alignvec.extract(base, saved(aligned, tmp_path / "moved")),
        alignvec.extract(model, aligned),
    ):
        assert torch.equal(moved[name], torch.tensor([0, 0.5, 0, 0]))
        with pytest.raises(AlignvecError, match=rf"buffers of Glm4MoeForCausalLM, not parameters: {name}"):
            alignvec.attach(AutoModelForCausalLM.from_pretrained(base), {"v": moved})


def small_values(model: nn.Module) -> nn.Module:
    """Matrices of a real model's size, many of whose values float16 does not hold."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(1e-3)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_the_base_loaded_as_float16(dtype: torch.dtype, tmp_path: Path) -> None:
    model = small_values(new("Llama").to(dtype))
    base, aligned = saved(model, tmp_path / "base"), saved(tuned(model), tmp_path / "aligned")
    vector = alignvec.extract(base, aligned, output=tmp_path / "v")
    live = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16)
    assert not torch.equal(live.lm_head.weight.to(dtype), model.lm_head.weight)
    verify_base(live, {"v": vector, "live": alignvec.extract(model, tuned(model))})
    merged = alignvec.merge(saved(live, tmp_path / "half"), {"v": vector}, {"v": 0.0}, tmp_path / "merged").output
    assert torch.equal(load_file(merged / "model.safetensors")["lm_head.weight"], live.lm_head.weight)
    with torch.no_grad():
        live.model.layers[1].mlp.up_proj.weight.add_(2e-6 * torch.randn(48, 32))
    with pytest.raises(AlignvecError, match=r"1 of 21 tensors differ \(model.layers.1.mlp.up_proj.weight\)"):
        verify_base(live, {"v": vector})


def test_a_vector_that_was_saved_without_float16_checksums(tmp_path: Path) -> None:
    model = small_values(new("Llama").bfloat16())
    base, aligned = saved(model, tmp_path / "base"), saved(tuned(model), tmp_path / "aligned")
    alignvec.extract(base, aligned, output=tmp_path / "v")
    change_description(
        tmp_path / "v", lambda data: [entry.pop("float16") for entry in data["base"]["tensors"].values()]
    )
    vector = alignvec.load(tmp_path / "v")
    for dtype in (torch.bfloat16, torch.float32):
        verify_base(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), {"v": vector})
    half = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16)
    with pytest.raises(AlignvecError, match=r"base's bfloat16 values are in float16.*load the model as bfloat16"):
        verify_base(half, {"v": vector})


def test_lossless_steps_are_not_taken_from_rounded_values(tmp_path: Path) -> None:
    model = small_values(new("Llama").bfloat16())
    base, aligned = saved(model, tmp_path / "base"), saved(tuned(model), tmp_path / "aligned")
    alignvec.extract(base, aligned, format="lossless", output=tmp_path / "v")
    vector, dense = alignvec.load(tmp_path / "v"), alignvec.extract(base, aligned, dtype="float32")
    half = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16)
    verify_base(half, {"v": vector})
    with pytest.raises(AlignvecError, match="with_base"):
        added(half, vector)
    moved = added(half, vector.with_base(base))
    for name, parameter in half.named_parameters():
        assert torch.equal(moved[name] - parameter.double(), dense[name].double()), name


def quantised(dtype: torch.dtype, shape: tuple[int, ...] | None, method: str) -> nn.Module:
    """A model as loaders of quantised weights leave it: projections of another dtype, and mostly another shape."""
    model = new("Llama")
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.detach()
            made = weight.to(dtype) if shape is None else torch.zeros(shape, dtype=dtype)
            module.weight = nn.Parameter(made, requires_grad=False)
    if method:
        model.config.quantization_config = {"quant_method": method}
    return model


@pytest.mark.parametrize(
    ("dtype", "shape", "method"),
    [(torch.uint8, (512, 1), "bitsandbytes"), (torch.int8, None, "bitsandbytes"), (torch.float8_e4m3fn, None, "fp8"),
     (torch.uint8, (512, 1), "")],
)  # fmt: skip
@pytest.mark.parametrize("transfer", [False, True])
def test_quantised_models(dtype: torch.dtype, shape: tuple[int, ...], method: str, transfer: bool) -> None:
    base = new("Llama")
    vector = alignvec.extract(base, tuned(base))
    model = quantised(dtype, shape, method)
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(AlignvecError, match=rf"q_proj.weight, which is {kind}.* quantised.*load the model unquantised"):
        alignvec.attach(model, {"v": vector}, transfer=transfer)
    norm = AlignmentVector({"model.norm.weight": vector["model.norm.weight"]}, vector.base)
    with pytest.raises(AlignvecError, match=r"is quantised.*unquantised, or attach with transfer=True"):
        verify_base(model, {"v": norm})
    assert set(live_deltas(model, parameter_names(model), "v", norm, True)) == {"model.norm.weight"}


def test_layers_of_packed_integers() -> None:
    base = new("Llama")
    vector = alignvec.extract(base, tuned(base))
    for module in base.model.layers.modules():
        if isinstance(module, nn.Linear):
            del module.weight
            module.register_buffer("qweight", torch.zeros(4, 32, dtype=torch.int32))
    base.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(AlignvecError, match=r"quantised \(gptq\), does not hold as weights: .*load the model unquant"):
        alignvec.attach(base, {"v": vector}, transfer=True)
    norm = AlignmentVector({"model.norm.weight": vector["model.norm.weight"]}, vector.base)
    with pytest.raises(AlignvecError, match=r"gptq.*it does not hold model.layers.0.self_attn.q_proj.weight as"):
        verify_base(base, {"v": norm})


class Packed(nn.Parameter):
    """As torchao's weights: a class of its own that says that it is floating."""


def test_weights_that_a_class_packs() -> None:
    base = new("Llama")
    vector = alignvec.extract(base, tuned(base))
    base.model.layers[0].mlp.up_proj.weight = Packed(base.model.layers[0].mlp.up_proj.weight.detach())
    verify_base(base, {"v": vector})
    base.config.quantization_config = {"quant_method": "torchao"}
    with pytest.raises(
        AlignvecError, match=r"up_proj.weight, which is Packed in the model: it is quantised \(torchao\)"
    ):
        alignvec.attach(base, {"v": vector}, transfer=True)


def test_a_shortened_base_is_a_different_one() -> None:
    base = new("Llama")
    vector = alignvec.extract(base, tuned(base))
    one = AlignmentVector({n: d for n, d in vector.items() if "layers.0" in n}, vector.base)
    short = new("Llama", num_hidden_layers=1)
    short.load_state_dict(base.state_dict(), strict=False)
    with pytest.raises(AlignvecError, match=r"num_hidden_layers is 2, the model's 1, which lacks model.layers.1"):
        verify_base(short, {"v": one})
