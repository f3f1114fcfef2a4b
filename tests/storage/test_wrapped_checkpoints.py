"""Checkpoints that were saved from a wrapper, from a bare backbone or with an adapter; live models are only read."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import alignvec
from alignvec import AlignvecError, extract
from tests.storage.checkpoints import aligned, weights, write_checkpoint


def before_all(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name


def fsdp(name: str) -> str:
    parts = name.split(".")
    return "_fsdp_wrapped_module." + ".".join(
        f"{part}._fsdp_wrapped_module._checkpoint_wrapped_module" if part.isdigit() else part for part in parts
    )


def adapted(name: str) -> str:
    return "base_model.model." + name.replace("q_proj.", "q_proj.base_layer.")


WRAPPED = {
    "compile": before_all("_orig_mod."),
    "DDP": before_all("module."),
    "DDP of compile": before_all("module._orig_mod."),
    "FSDP": fsdp,
    "PEFT": adapted,
    "trainer": before_all("model."),
}


@pytest.mark.parametrize("sides", ["aligned", "base", "both"])
@pytest.mark.parametrize("kind", list(WRAPPED))
def test_names_of_wrappers(kind: str, sides: str, tmp_path: Path) -> None:
    base, after = weights(), aligned(weights())
    wrap = WRAPPED[kind]
    left, right = (
        write_checkpoint(
            tmp_path / side, {wrap(n): t for n, t in tensors.items()} if sides in (side, "both") else tensors
        )
        for side, tensors in (("base", base), ("aligned", after))
    )
    vector = extract(left, right, dtype="float32")
    plain = kind != "trainer" or sides == "aligned"  # a vector has the base's names; "model." may be the model's own
    expected = {n: after[n].float() - t.float() for n, t in base.items() if n.startswith(("model.l", "model.e", "lm"))}
    expected = {name: delta for name, delta in expected.items() if delta.any()}
    assert {name if plain else wrap(name) for name in expected} == set(vector)
    for name, delta in expected.items():
        assert torch.equal(vector[name if plain else wrap(name)], delta)
    report = alignvec.merge(left, {"v": vector}, {"v": 1.0}, tmp_path / "merged")
    merged = load_file(report.output / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(merged[name if plain else wrap(name)], after[name])


def headless(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the backbone alone would be saved."""
    return {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}


def test_a_backbone_against_the_full_model(tmp_path: Path) -> None:
    base, after = weights(), aligned(weights())
    full, backbone = write_checkpoint(tmp_path / "full", base), write_checkpoint(tmp_path / "bare", headless(after))
    for pair in ((full, backbone), (backbone, full)):
        with pytest.raises(AlignvecError, match=r"lm_head.weight is stored in full .* bare lacks it .*bare backbone"):
            extract(*pair)
    del base["lm_head.weight"]  # a tied head is stored nowhere
    vector = extract(write_checkpoint(tmp_path / "tied", base), backbone, dtype="float32")
    for name, delta in vector.items():
        assert torch.equal(delta, after[name].float() - base[name].float())
    assert "model.layers.0.self_attn.q_proj.weight" in vector


@pytest.mark.parametrize(
    "left_out", [("model.norm.weight",), ("model.layers.1.mlp.up_proj.weight", "lm_head.weight")], ids=["norm", "two"]
)
def test_what_is_missing_is_named_and_not_taken_for_a_tied_head(left_out: tuple[str, ...], tmp_path: Path) -> None:
    after = {name: tensor for name, tensor in aligned(weights()).items() if name not in left_out}
    left = write_checkpoint(tmp_path / "base", weights())
    with pytest.raises(AlignvecError, match=f"{left_out[0]} is missing in aligned") as caught:
        extract(left, write_checkpoint(tmp_path / "aligned", after))
    assert "tie" not in str(caught.value)


def test_unmerged_adapters_and_quantised_checkpoints_are_named(tmp_path: Path) -> None:
    base, after = weights(), aligned(weights())
    left = write_checkpoint(tmp_path / "base", base)
    lora = {adapted(n): t for n, t in after.items()} | {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(2, 24)
    }
    with pytest.raises(AlignvecError, match=r"lora has a PEFT adapter .*lora_A.* from_peft"):
        extract(left, write_checkpoint(tmp_path / "lora", lora))
    moved = {name: tensor + 1 if "lora_A" in name else tensor for name, tensor in lora.items()}
    both = extract(tmp_path / "lora", write_checkpoint(tmp_path / "tuned", moved))  # a model that has one built in
    assert list(both) == ["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"]
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(AlignvecError, match="PEFT adapter, which from_peft reads"):
        extract(left, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(AlignvecError, match="pickled checkpoints are not read"):
        extract(left, tmp_path / "adapter")
    name = "model.layers.1.mlp.up_proj.weight"
    packed = {**after, name: torch.zeros(444, 1, dtype=torch.uint8)}
    four = write_checkpoint(tmp_path / "four", packed, quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(AlignvecError, match=r"four is quantised \(bitsandbytes\).*extract from unquantised models"):
        extract(left, four)
    packed[name] = torch.zeros(37, 24, dtype=torch.int8)
    with pytest.raises(AlignvecError, match=f"dtypes differ: {name} is bfloat16 in base and int8 in eight") as caught:
        extract(left, write_checkpoint(tmp_path / "eight", packed), dtype="float32")
    assert "dtype=" not in str(caught.value)


class Buffered(nn.Module):
    """A linear layer, a persistent buffer of floats, one of integers, and one that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.inner.register_buffer("bias_of_experts", torch.zeros(3))
        self.inner.register_buffer("steps", torch.zeros(1, dtype=torch.int64))
        self.inner.register_buffer("table", torch.ones(3), persistent=False)


def test_moved_buffers_of_live_models_are_not_dropped(tmp_path: Path) -> None:
    base = Buffered()
    after = copy.deepcopy(base)
    with torch.no_grad():
        after.inner.weight.add_(1)
    after.inner.table.add_(5)
    stored = write_checkpoint(tmp_path / "base", base.state_dict())
    for left in (base, stored):
        assert set(extract(left, after)) == {"inner.weight"}
    after.inner.bias_of_experts[1] = 2
    for left in (base, stored):
        vector = extract(left, after)
        assert torch.equal(vector["inner.bias_of_experts"], torch.tensor([0.0, 2.0, 0.0]))
        assert torch.equal(vector["inner.weight"], after.inner.weight - base.inner.weight)
    after.inner.steps += 1
    for left in (base, stored):
        with pytest.raises(AlignvecError, match=r"integer tensors differ.*inner.steps"):
            extract(left, after)


FORMATS = ["dense", "int8", "int4", "sign", "sparse:density=0.5", "low-rank:rank=2", "auto:0.5", "lossless"]


@pytest.mark.parametrize("to_disk", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_live_models_are_read_not_written(format: str, to_disk: bool, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if format == "lossless" else torch.float32
    base = nn.ModuleDict({"a": nn.Linear(32, 24), "b": nn.Linear(24, 32, bias=False)}).to(dtype)
    base.add_module("norm", nn.LayerNorm(32))  # float32 beside bfloat16
    after = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in after.parameters():
            parameter.add_((0.01 * torch.randn(parameter.shape)).to(parameter.dtype))
    before = [{n: p.clone() for n, p in model.state_dict().items()} for model in (base, after)]
    vector = extract(base, after, format=format, output=tmp_path / "v" if to_disk else None)
    for _ in range(2):
        vector.norm()
    for model, values in zip((base, after), before, strict=True):
        assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    error = (vector["norm.weight"].float() - (after.norm.weight - base.norm.weight)).abs().max()
    assert float(error) < 1e-6


@pytest.mark.parametrize("bare", ["aligned", "base", "both"])
def test_a_buffer_that_moved_is_found_on_a_bare_backbone(bare: str) -> None:
    sizes = dict(vocab_size=96, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8, v_head_dim=8)
    heads |= dict(qk_nope_head_dim=8, qk_rope_head_dim=8)
    experts = dict(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1)
    config = transformers.DeepseekV3Config(**sizes, **heads, **experts, tie_word_embeddings=True)
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(config)
    after = copy.deepcopy(base)
    moved = torch.tensor([0.5, -0.25, 0.0, 1.0])
    after.model.layers[1].mlp.gate.e_score_correction_bias += moved
    after.model.norm.weight.data += 0.25
    left = base.model if bare in ("base", "both") else base
    vector = extract(left, after.model if bare in ("aligned", "both") else after)
    found = {name.removeprefix("model."): vector[name] for name in vector}
    assert found.keys() == {"layers.1.mlp.gate.e_score_correction_bias", "norm.weight"}
    assert torch.equal(found["layers.1.mlp.gate.e_score_correction_bias"], moved)


def test_a_live_model_that_transposes_what_it_loads_is_to_be_saved_first(tmp_path: Path) -> None:
    base = {"experts.up": torch.randn(2, 4, 6), "norm.weight": torch.ones(4)}
    folder = write_checkpoint(tmp_path / "b", base)
    live = nn.Module()
    live.experts, live.norm = nn.Module(), nn.LayerNorm(4, bias=False)
    live.experts.up = nn.Parameter(base["experts.up"].transpose(1, 2) + 1)
    with pytest.raises(AlignvecError, match=r"shapes differ.*save Module \(save_pretrained\) and extract from the two"):
        extract(folder, live)
