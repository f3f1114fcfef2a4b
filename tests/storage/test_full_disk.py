"""A disk that takes no more: one sentence that names the output, what was there stays, and nothing is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import alignvec
from alignvec import AlignmentVector, convert, extract
from alignvec.errors import AlignvecError
from alignvec.evaluate.judge.replies import Replies
from alignvec.folders import replaced
from alignvec.search.storage import Header, Storage
from tests.storage.children import ON_DISK, context, limited

SHAPE = (256, 256)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an aligned model, and two vectors, each file of them larger than what a child may write."""
    place = tmp_path_factory.mktemp("models")
    for name, seed in (("base", 0), ("aligned", 1)):
        (place / name).mkdir()
        values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).bfloat16()
        save_file({"lin.weight": values}, place / name / "model.safetensors")
    extract(place / "base", place / "aligned", output=place / "dense")
    convert(place / "dense", place / "low", "low-rank:rank=64")
    return place


@pytest.mark.parametrize("there", [True, False], ids=["over a vector", "afresh"])
@pytest.mark.parametrize("writer", ON_DISK)
def test_no_room(writer: str, there: bool, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    if there:
        AlignmentVector({"w": torch.ones(2)}).save(output)
    here, answer = context.Pipe(duplex=False)
    process = context.Process(target=limited, args=(writer, folder, output, answer))
    process.start()
    kind, message = here.recv()
    process.join()
    assert kind == "AlignvecError", message
    assert f"{output} cannot be written: File too large" in message
    assert "\n" not in message
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_dir()) == (["deep", "out"] if there else [])
    if there:
        assert alignvec.load(output)["w"].tolist() == [1.0, 1.0]


@pytest.fixture
def full(tmp_path: Path):  # type: ignore[no-untyped-def]
    """A disk of 64 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("no disk can be mounted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_disk_that_is_full(full: Path, folder: Path) -> None:
    AlignmentVector({"w": torch.ones(2)}).save(full / "out")
    for name, writer in ON_DISK.items():
        with pytest.raises(AlignvecError, match="out cannot be written") as caught:
            writer(folder, full / "out")
        assert "No space left on device" in str(caught.value), name
        assert [path.name for path in full.iterdir()] == ["out"]
    assert alignvec.load(full / "out")["w"].tolist() == [1.0, 1.0]
    with (
        pytest.raises(AlignvecError, match=r"table\.json cannot be written: No space"),
        replaced(full / "table.json") as file,
    ):
        file.write_bytes(bytes(100_000))
    assert [path.name for path in full.iterdir()] == ["out"]


def test_the_command_line_says_it_in_a_line(full: Path, folder: Path) -> None:
    command = [sys.executable, "-m", "alignvec", "extract", folder / "base", folder / "aligned", full / "v"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"alignvec: {full}/v cannot be written: No space left on device; ")
    assert "Traceback" not in done.stderr
    assert list(full.iterdir()) == []


def test_a_file_of_lines_keeps_whole_lines_alone(full: Path) -> None:
    replies, storage = Replies(full / "replies"), Storage(full / "mixes", Header(("a",), ("d",), ("l", "m"), "key"))
    storage.append([([0], [[0.5, 0.5]], 1.0)])
    replies.add("first", "x")
    with pytest.raises(AlignvecError, match="replies cannot be written: No space left"):
        replies.add("second", "x" * 100_000)
    (full / "filler").write_bytes(bytes(52_000))
    with pytest.raises(AlignvecError, match="mixes cannot be written: No space left"):
        storage.append([([number], [[0.5, 0.5]], 1.0) for number in range(400)])
    (full / "filler").unlink()
    replies.add("third", "y")
    storage.append([([7], [[0.5, 0.5]], 1.0)])
    assert len(Replies(full / "replies")) == 2
    mixes = [mix for mix, _, _ in Storage(full / "mixes", Header(("a",), ("d",), ("l", "m"), "key")).records]
    assert mixes == [[0.0], [7e-6]]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(folder: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(AlignvecError, match="cannot be written: Permission denied; choose an output that you may"):
        ON_DISK["extract"](folder, tmp_path / "out")


def test_rates_that_no_file_could_give_back(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "mixes", Header(("a",), ("d",), ("l",), "key"))
    with pytest.raises(AlignvecError, match="hold NaN or infinity"):
        storage.append([([0], [[float("nan")]], 1.0)])
    assert not (tmp_path / "mixes").exists()
