"""Reading refuses what is broken; writing is readable by the safetensors library, and whole or absent."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from alignvec.checkpoint import Checkpoint, TensorInfo
from alignvec.errors import AlignvecError
from alignvec.folders import output_folder
from alignvec.writer import ShardWriter, parse_size
from tests.storage.checkpoints import weights, write_checkpoint

INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00003.safetensors"


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [1, 3])
def test_reads_every_dtype_and_part(tmp_path: Path, shards: int) -> None:
    stored = weights()
    for dtype in (torch.float64, torch.float32, torch.float16, torch.int8, torch.uint8, torch.bool, torch.int32):
        stored[f"as.{dtype}"] = (torch.arange(35) % 2).view(5, 7).to(dtype)
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "c", stored, shards))
    assert checkpoint.config["model_type"] == "mistral"
    assert checkpoint.tensors.keys() == stored.keys()
    for name, tensor in stored.items():
        assert checkpoint.tensors[name].shape == tensor.shape
        assert torch.equal(checkpoint.tensor(name), tensor)
        assert torch.equal(
            checkpoint.read(name, 1, 1 + tensor.numel() // 2), tensor.flatten()[1 : 1 + tensor.numel() // 2]
        )
    for twin in (pickle.loads(pickle.dumps(checkpoint)), copy.deepcopy(checkpoint)):
        assert torch.equal(twin.tensor("lm_head.weight"), stored["lm_head.weight"])


def test_reads_into_a_buffer_and_from_a_single_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", weights())
    checkpoint = Checkpoint.open(folder / "model.safetensors")
    buffer = torch.empty(100, dtype=torch.uint8)
    part = checkpoint.read("lm_head.weight", 3, 20, buffer)
    assert part.data_ptr() == buffer.data_ptr()
    assert torch.equal(part, weights()["lm_head.weight"].flatten()[3:20])


def truncate(folder: Path) -> None:
    file = folder / FIRST
    file.write_bytes(file.read_bytes()[:-10])


def garble_header(folder: Path) -> None:
    file = folder / FIRST
    file.write_bytes(file.read_bytes()[:8] + b"!" + file.read_bytes()[9:])


def overlap(folder: Path) -> None:
    header = json.dumps(
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        }
    ).encode()
    (folder / FIRST).write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))


def huge_header(folder: Path) -> None:
    (folder / FIRST).write_bytes((2**60).to_bytes(8, "little") + b"{}")


def swap_shards(folder: Path) -> None:
    one, two = folder / FIRST, folder / "model-00002-of-00003.safetensors"
    one.rename(folder / "x")
    two.rename(one)
    (folder / "x").rename(two)


def traverse(folder: Path) -> None:
    edit_index(folder, lambda m: m.update({"lm_head.weight": "../outside.safetensors"}))
    save_file(weights(), folder.parent / "outside.safetensors")


def absolute(folder: Path) -> None:
    edit_index(folder, lambda m: m.update({"lm_head.weight": str(folder / FIRST)}))


def pickled(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def quantised(folder: Path) -> None:
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (folder / FIRST).write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))


BROKEN = {
    truncate: f"{FIRST} is truncated",
    garble_header: f"{FIRST} is truncated, corrupted",
    overlap: f"{FIRST} is truncated, corrupted",
    huge_header: f"{FIRST} is truncated, corrupted",
    swap_shards: "was a shard renamed",
    traverse: "'../outside.safetensors'",
    absolute: "only .safetensors files beside it",
    quantised: "tensor a is stored as F8_E4M3",
    pickled: "convert to safetensors",
    lambda f: (f / FIRST).unlink(): f"{FIRST}, which is missing",
    lambda f: edit_index(f, lambda m: m.pop("lm_head.weight")): "holds lm_head.weight, but the index does not name it",
    lambda f: edit_index(f, lambda m: m.update(ghost=FIRST)): f"says that {FIRST} holds ghost",
    lambda f: (f / INDEX).write_text('{"weight_map": [1]}'): "has no weight_map",
    lambda f: (f / INDEX).write_text("{"): "cannot be read as JSON",
    lambda f: (f / "config.json").write_text("[]"): "config.json must hold a JSON object",
    lambda f: save_file({}, f / "model.safetensors"): "holds both",
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.items(), ids=[m[-24:] for m in BROKEN.values()])
def test_broken_checkpoints_are_refused(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    folder = write_checkpoint(tmp_path / "c", weights(), 3)
    damage(folder)
    with pytest.raises(AlignvecError) as caught:
        Checkpoint.open(folder)
    assert message in str(caught.value)


def test_paths_that_hold_nothing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"")
    for path, message in (("nowhere", "does not exist"), (".", "holds neither"), ("weights.bin", "convert")):
        with pytest.raises(AlignvecError, match=message):
            Checkpoint.open(tmp_path / path)


def test_a_file_that_changed_since_it_was_opened_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", weights())
    checkpoint = Checkpoint.open(folder)
    save_file({"lm_head.weight": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(AlignvecError, match="changed after it was opened"):
        checkpoint.tensor("lm_head.weight")


DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.int8])
TENSORS = st.lists(st.tuples(DTYPES, st.lists(st.integers(0, 5), max_size=3), st.booleans()), max_size=8)


@settings(max_examples=60, deadline=None)
@given(TENSORS, st.one_of(st.none(), st.integers(1, 300)))
def test_written_files_load_with_the_safetensors_library(tmp_path_factory, plan, limit) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("w")
    tensors = {f"t.{i}é": torch.randn(shape).mul(9).to(dtype) for i, (dtype, shape, _) in enumerate(plan)}
    kept = {name for (name, _), (_, _, keep) in zip(tensors.items(), plan, strict=True) if keep}
    expected = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with ShardWriter(folder, "model", expected, limit) as writer:
        for name, tensor in tensors.items():
            writer.begin(name, tensor.dtype, tuple(tensor.shape))
            half = tensor.numel() // 2
            writer.write(tensor.flatten()[:half])
            if name in kept:
                writer.write(tensor.flatten()[half:])
                writer.end()
            else:
                writer.roll_back()
        writer.close()
    files = list(folder.glob("*.safetensors"))
    loaded = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert loaded.keys() == kept
    assert all(torch.equal(loaded[name], tensors[name]) for name in kept)
    assert not list(folder.glob("*.partial"))
    assert list(Checkpoint.open(folder).tensors.keys() ^ kept) == []
    if limit is not None:
        assert all(sum(t.nbytes for t in load_file(f).values()) <= limit or len(load_file(f)) == 1 for f in files)
    assert (len(files) > 1) == (folder / INDEX).exists()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_behind_on_failure(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with output_folder(tmp_path / "deep" / "out") as folder:
            (folder / "file").write_text("x")
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_kept_unless_told(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with output_folder(out) as folder:  # empty: fine
        (folder / "model.safetensors").write_text("old")
    with pytest.raises(AlignvecError, match="not an empty folder"), output_folder(out):
        pass
    with pytest.raises(ZeroDivisionError), output_folder(out, overwrite=True):
        raise ZeroDivisionError
    assert (out / "model.safetensors").read_text() == "old"
    with output_folder(out, overwrite=True) as folder:
        (folder / "b").write_text("new")
    assert [file.name for file in out.iterdir()] == ["b"]
    with pytest.raises(AlignvecError, match="holds no safetensors file"), output_folder(out, overwrite=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_input_is_never_overwritten(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", weights())
    with pytest.raises(AlignvecError, match="holds the input"), output_folder(folder, overwrite=True, inputs=[folder]):
        pass


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), (77, 77), ("200kb", 200_000)])
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "5 parsecs", 0, "nan"])
def test_bad_sizes_are_refused(text: str | int) -> None:
    with pytest.raises(AlignvecError, match="max_shard_size"):
        parse_size(text)
