"""What counts as the base of a vector when merging, and refusals that say what is the matter."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import alignvec
from alignvec import AlignmentVector, extract, merge
from alignvec.checkpoint import Checkpoint
from alignvec.errors import AlignvecError
from alignvec.fingerprint import BaseIdentity, identify
from tests.storage.checkpoints import aligned, weights, write_checkpoint

HEAD, EMBEDDING, MATRIX = "lm_head.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"
CONFIG = {"model_type": "mistral", "hidden_size": 24}
NEVER_LOADED = {
    "model.rotary_emb.inv_freq": torch.rand(12),
    "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8),
    "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    "mtp.layers.0.mlp.up_proj.weight": torch.rand(4, 4),
}


def floating(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


def vector(base: dict[str, Tensor], *, drop: tuple[str, ...] = ()) -> AlignmentVector:
    """Deltas of a matrix and the embedding, with the identity of `base`."""
    deltas = {name: torch.full(base[name].shape, 0.25) for name in (MATRIX, EMBEDDING) if name in base}
    return AlignmentVector(
        {name: delta for name, delta in deltas.items() if name not in drop}, identify(floating(base), CONFIG)
    )


def test_the_base_may_hold_more_than_the_vector_knows(tmp_path: Path) -> None:
    more = {**NEVER_LOADED, "model.layers.0.mlp.gate.e_score_correction_bias": torch.rand(3)}
    base = write_checkpoint(tmp_path / "base", weights() | more)
    merge(base, {"v": vector(weights())}, {"v": -1}, tmp_path / "m")
    merged = Checkpoint.open(tmp_path / "m")
    assert torch.equal(merged.tensor(MATRIX), (weights()[MATRIX].double() - 0.25).bfloat16())
    assert all(torch.equal(merged.tensor(name), tensor) for name, tensor in more.items())


def test_what_no_model_loads_may_be_missing(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", weights(), architectures=["Qwen3NextForCausalLM"])
    merge(base, {"v": vector(weights() | NEVER_LOADED)}, {"v": 1}, tmp_path / "m")
    assert torch.equal(Checkpoint.open(tmp_path / "m").tensor(MATRIX), (weights()[MATRIX].double() + 0.25).bfloat16())


def test_a_parameter_may_not_be_missing_nor_a_head_be_more(tmp_path: Path) -> None:
    part = weights()
    del part["model.norm.weight"]
    with pytest.raises(AlignvecError, match=r"different base.*model\.norm\.weight: missing in part.*: use the one"):
        merge(write_checkpoint(tmp_path / "part", part), {"v": vector(weights())}, {"v": 1}, tmp_path / "m")
    other = write_checkpoint(tmp_path / "deeper", weights(), num_hidden_layers=3)
    deeper = AlignmentVector({MATRIX: torch.ones(24, 24)}, identify(floating(weights()), {"num_hidden_layers": 2}))
    with pytest.raises(AlignvecError, match=r"num_hidden_layers: 2 in the vector's base, 3 in deeper"):
        merge(other, {"v": deeper}, {"v": 1}, tmp_path / "m")
    tied = weights()
    del tied[HEAD]
    base = write_checkpoint(tmp_path / "base", weights())
    with pytest.raises(AlignvecError, match=r"different base.*lm_head\.weight of base has values of its own"):
        merge(base, {"v": vector(tied)}, {"v": 1}, tmp_path / "m", transfer=True)


@pytest.mark.parametrize("transfer", [False, True])
def test_a_quantised_base(tmp_path: Path, transfer: bool) -> None:
    four_bits = weights() | {MATRIX: torch.zeros(288, 1, dtype=torch.uint8), MATRIX + ".absmax": torch.ones(9)}
    base = write_checkpoint(tmp_path / "bnb", four_bits)
    with pytest.raises(AlignvecError, match=r"bnb holds .*q_proj\.weight as uint8: it is quantised"):
        merge(base, {"v": vector(weights())}, {"v": 1}, tmp_path / "m", transfer=transfer)
    packed = {name: tensor for name, tensor in weights().items() if name != MATRIX}
    packed[MATRIX.replace("weight", "qweight")] = torch.zeros(3, 24, dtype=torch.int32)
    base = write_checkpoint(tmp_path / "gptq", packed, quantization_config={"quant_method": "gptq"})
    with pytest.raises(AlignvecError, match=r"gptq is quantised, says its config, and lacks .*q_proj\.weight"):
        merge(base, {"v": vector(weights())}, {"v": 1}, tmp_path / "m", transfer=transfer)


@pytest.mark.parametrize(
    ("rename", "said"),
    [
        (lambda name: "_orig_mod." + name, "without their prefix '_orig_mod.' they would"),
        (lambda name: name.removeprefix("model."), "they lack the prefix 'model.'"),
        (lambda name: name.replace(".layers.", ".blocks."), "where the architecture is the same, extract it from"),
    ],
    ids=["compiled", "backbone", "other"],
)
def test_names_that_have_no_place(tmp_path: Path, rename, said: str) -> None:  # type: ignore[no-untyped-def]
    base = write_checkpoint(tmp_path / "base", weights())
    deltas = {rename(name): delta for name, delta in vector(weights()).items() if "layers" in name}
    with pytest.raises(AlignvecError) as caught:
        merge(base, {"v": AlignmentVector(deltas)}, {"v": 1}, tmp_path / "m")
    assert said in str(caught.value)
    assert "transfer" not in str(caught.value)


def test_other_values_and_other_dtypes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    made = extract(*pair)
    with pytest.raises(
        AlignvecError, match=r"7 of 10 tensors have other values .*; use that base, or, if .* \(--transfer\)"
    ):
        merge(pair[1], {"v": made}, {"v": 1}, tmp_path / "m")


def test_a_base_stored_as_float16(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """float16 has no room for the smallest values of bfloat16: a second checksum knows it, steps on bits do not do."""
    tiny = {name: tensor * 2**-20 for name, tensor in floating(weights()).items()}
    half = write_checkpoint(tmp_path / "half", {name: tensor.half() for name, tensor in tiny.items()})
    known = identify(tiny, CONFIG)
    made = AlignmentVector({MATRIX: torch.ones(24, 24)}, known)
    merge(half, {"v": made}, {"v": 0.5}, tmp_path / "m")
    assert torch.equal(Checkpoint.open(tmp_path / "m").tensor(MATRIX), (tiny[MATRIX].half().double() + 0.5).half())
    early = BaseIdentity(known.config, {n: dataclasses.replace(t, float16=None) for n, t in known.tensors.items()})
    with pytest.raises(AlignvecError, match=r"9 of 10 tensors .*, bfloat16 then and float16 here"):
        merge(half, {"v": AlignmentVector({MATRIX: torch.ones(24, 24)}, early)}, {"v": 1}, tmp_path / "n")
    small, after = write_checkpoint(tmp_path / "small", tiny), write_checkpoint(tmp_path / "after", aligned(tiny))
    steps = extract(small, after, format="lossless", output=tmp_path / "steps").select("*q_proj.weight")
    with pytest.raises(AlignvecError, match=r"different base than half: 1 of 10 tensors"):
        merge(half, {"v": alignvec.load(tmp_path / "steps").select(steps.names)}, {"v": 1}, tmp_path / "n")


def test_a_damaged_base_is_called_that(tmp_path: Path) -> None:
    damaged = weights()
    damaged[MATRIX][0, 0] = torch.inf
    base = write_checkpoint(tmp_path / "base", damaged)
    with pytest.raises(AlignvecError, match=r"the base's tensor .*q_proj\.weight holds NaN or infinity"):
        merge(base, {"v": AlignmentVector({MATRIX: torch.ones(24, 24)})}, {"v": 1}, tmp_path / "m")
    with pytest.raises(AlignvecError, match="merge reads a stored base"):
        merge(torch.nn.Linear(2, 2), {"v": vector(weights())}, {"v": 1}, tmp_path / "m")  # type: ignore[arg-type]


def test_folders_that_are_no_vectors(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    save_file({"a": torch.ones(1)}, tmp_path / "adapter" / "adapter_model.safetensors")
    for folder, said in (
        (pair[1], r"it is a model: alignvec\.extract"),
        (tmp_path / "adapter", r"it is a PEFT adapter: alignvec\.from_peft"),
        (tmp_path / "ghost", "there is no such folder"),
    ):
        with pytest.raises(AlignvecError, match=f"is no alignment vector: .*{said}"):
            merge(pair[0], {"v": folder}, {"v": 1}, tmp_path / "m")
