"""Vectors of which some tensors are left out: nothing is read for it, and every use of the rest stays right."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch

import alignvec
from alignvec import AlignmentVector, convert, extract, merge
from alignvec.checkpoint import Checkpoint
from alignvec.errors import AlignvecError
from alignvec.selection import selected_in_each
from tests.storage.checkpoints import aligned, weights, write_checkpoint

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
FORMATS = ["dense", "lossless", "int8", "int4:group=32", "sign", "low-rank:rank=2", "sparse:density=0.2", "auto:0.5"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("stored", [False, True], ids=["memory", "disk"])
def test_every_format_keeps_what_it_keeps(pair: tuple[Path, Path], tmp_path: Path, format: str, stored: bool) -> None:
    whole = extract(*pair, format=format, output=tmp_path / "v" if stored else None)
    part = whole.select("model.*", exclude=["*.embed_tokens.*", "*.bias"])
    assert set(part.names) == {
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.mlp.experts",
        "model.layers.1.scale",
    }
    assert list(part) == [name for name in whole if name in part]
    assert (part.base, part.format) == (whole.base, whole.format)
    for name in part:
        assert part.format_of(name) == whole.format_of(name)
        assert torch.equal(part[name], whole[name])
        assert part.errors.get(name) == whole.errors.get(name)
    assert HEAD not in part
    assert HEAD not in part.errors
    with pytest.raises(AlignvecError, match="no delta named"):
        part[HEAD]
    part.save(tmp_path / "part")
    again = alignvec.load(tmp_path / "part")
    again = again.with_base(pair[0]) if again.needs_base else again
    assert again.names == part.names
    assert again.base == whole.base
    assert all(torch.equal(again[name], whole[name]) for name in part)
    assert part.nbytes == sum(whole.stored_bytes(name) for name in part)


@pytest.mark.parametrize("format", ["dense", "lossless", "int4:group=32"])
def test_merging_a_part_leaves_the_rest_as_the_base_has_it(
    pair: tuple[Path, Path], tmp_path: Path, format: str
) -> None:
    extract(*pair, format=format, output=tmp_path / "v")
    part = alignvec.load(tmp_path / "v").select(exclude=HEAD)
    deltas = {name: delta.double() for name, delta in (part.with_base(pair[0]) if part.needs_base else part).items()}
    merge(pair[0], {"v": part}, {"v": 0.5}, tmp_path / "m")
    merged = Checkpoint.open(tmp_path / "m")
    for name, before in weights().items():
        expected = (before.double() + 0.5 * deltas[name]).to(before.dtype) if name in deltas else before
        assert torch.equal(merged.tensor(name), expected), name


def test_a_part_of_a_lossless_vector_gives_the_aligned_tensors_bit_for_bit(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    vector = extract(*pair, format="lossless", output=tmp_path / "v")
    for kept in ("*.mlp.*", ["*.bias", "*.scale"]):  # matrices are steps; of one dimension, dense
        merge(pair[0], {"v": vector.select(kept)}, {"v": 1}, tmp_path / "m", overwrite=True)
        merged, after = Checkpoint.open(tmp_path / "m"), aligned(weights())
        for name, before in weights().items():
            wanted = after[name] if name in vector.select(kept) else before
            assert torch.equal(merged.tensor(name).view(-1).view(torch.uint8), wanted.view(-1).view(torch.uint8)), name


def test_converting_a_part(pair: tuple[Path, Path], tmp_path: Path) -> None:
    whole = extract(*pair, dtype="float32", output=tmp_path / "v")
    made = convert(tmp_path / "v", tmp_path / "c", "int8", include="*.mlp.*", exclude="*.experts")
    assert made is not None
    assert made.names == ("model.layers.1.mlp.up_proj.weight",)
    assert made.format_of(made.names[0]).name == "int8"
    torch.testing.assert_close(made[made.names[0]], whole[made.names[0]].float(), rtol=0, atol=5e-5)
    lossless = convert(whole.select("*.mlp.*"), tmp_path / "l", "lossless", base=pair[0])
    assert lossless is not None
    assert all(torch.equal(lossless[name], whole[name]) for name in lossless)


def test_parts_of_sums_and_of_lossless_ones(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", aligned(weights(), seed=2))
    one, two = extract(*pair, dtype="float32"), extract(pair[0], other)
    total = (0.5 * one + two.select(exclude=HEAD)).select([HEAD, "*.mlp.*"])
    assert torch.equal(total[HEAD], 0.5 * one[HEAD])
    name = "model.layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(total[name], 0.5 * one[name] + two[name].float())
    assert len(total) == 3
    extract(*pair, format="lossless", output=tmp_path / "l")
    lossless = alignvec.load(tmp_path / "l")
    assert lossless.select("*.mlp.*").needs_base
    assert not lossless.select("*.bias").needs_base
    assert not (0.5 * lossless + one).select("*.bias").needs_base
    exact = aligned(weights())[name].float() - weights()[name].float()
    bound = lossless.select("*.mlp.*").with_base(pair[0])
    assert torch.equal(bound[name], exact)
    assert torch.equal(lossless.with_base(pair[0]).select("*.mlp.*")[name], exact)


def test_nothing_is_read(pair: tuple[Path, Path], tmp_path: Path) -> None:
    extract(*pair, output=tmp_path / "v")
    vector = alignvec.load(tmp_path / "v")
    for file in (tmp_path / "v").glob("*.safetensors"):
        file.unlink()
    part = vector.select("*.mlp.*")
    assert len(part) == 2
    with pytest.raises(AlignvecError, match="cannot be read"):
        part[part.names[0]]


def test_a_part_holds_no_memory_of_the_rest(pair: tuple[Path, Path]) -> None:
    part = extract(*pair).select("*.mlp.up_proj.*")
    values = sum(info.nbytes for info in part.tensors.values())
    assert len(pickle.dumps(part)) < values + 10_000
    assert torch.equal(copy.deepcopy(part)[part.names[0]], part[part.names[0]])


def test_what_is_kept_of_where_it_came_from(pair: tuple[Path, Path]) -> None:
    part = extract(*pair).select("model.*").select(exclude=("*.bias",))
    assert part.source["aligned"] == "aligned"
    assert "rounding_error" not in part.source
    assert part.source["selected"] == [
        {"include": ["model.*"], "exclude": None},
        {"include": None, "exclude": ["*.bias"]},
    ]


def test_refused() -> None:
    vector = AlignmentVector({HEAD: torch.ones(2), EMBEDDING: torch.ones(2)})
    with pytest.raises(AlignvecError, match=r"pattern 'lm_heads\.\*' matches none of the vector's 2 tensors \(lm_head"):
        vector.select(exclude=["model.*", "lm_heads.*"])
    with pytest.raises(AlignvecError, match=r"pattern 'LM_HEAD\.\*'"):
        vector.select(include="LM_HEAD.*")
    with pytest.raises(AlignvecError, match="no tensor is left"):
        vector.select("lm_head.*", "*.weight")
    with pytest.raises(AlignvecError, match="not 3"):
        vector.select([3])  # type: ignore[list-item]
    assert vector.select().names == vector.select([], []).names == vector.names


def test_patterns_over_several_vectors() -> None:
    one = AlignmentVector({HEAD: torch.ones(2), EMBEDDING: torch.ones(2)})
    two = AlignmentVector({EMBEDDING: torch.ones(2), "model.norm.weight": torch.ones(3)})
    chosen = selected_in_each({"one": one, "two": two}, exclude=["lm_head.*", "*norm*"])
    assert {label: vector.names for label, vector in chosen.items()} == {"one": (EMBEDDING,), "two": (EMBEDDING,)}
    with pytest.raises(AlignvecError, match="no tensor of vector 'two' matches"):
        selected_in_each({"one": one, "two": two}, include="lm_head.*")
    with pytest.raises(AlignvecError, match="vector 'one': no tensor is left"):
        selected_in_each({"one": one, "two": two}, exclude=["lm_head.*", "*embed*"])
    with pytest.raises(AlignvecError, match="pattern 'ghost' matches none"):
        selected_in_each({"one": one, "two": two}, exclude="ghost")
