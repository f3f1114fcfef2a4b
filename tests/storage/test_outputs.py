"""Where an output goes: what it may replace, what it never does, and what a writer that died left there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import alignvec
from alignvec import AlignmentVector, convert, extract, hidden, merge, surgery
from alignvec.checkpoint import Checkpoint
from alignvec.errors import AlignvecError
from alignvec.folders import output_folder, replaced
from tests.storage.children import by_two_renames

ONE, TWO = ({"w": torch.full((4, 4), value)} for value in (1.0, 2.0))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=["exchanged", "renamed twice"])
def out(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A vector of ones that is there already."""
    if request.param == "renamed twice":
        monkeypatch.setattr(hidden, "exchange", by_two_renames)
    AlignmentVector(ONE).save(tmp_path / "out")
    return tmp_path / "out"


def test_overwriting_leaves_nothing_beside(out: Path) -> None:
    AlignmentVector(TWO).save(out, overwrite=True)
    assert torch.equal(alignvec.load(out)["w"], TWO["w"])
    assert names(out.parent) == ["out"]


def test_a_vector_saved_over_its_own_folder(out: Path) -> None:
    own = alignvec.load(out)
    (own * 3).save(out, overwrite=True)
    assert torch.equal(alignvec.load(out)["w"], 3 * ONE["w"])
    with pytest.raises(AlignvecError, match="changed after it was opened"):
        own["w"]


@pytest.mark.parametrize("foreign", ["notes.txt", ".git/", "thesis.safetensors", "additional_chat_templates/old/"])
def test_what_the_library_did_not_write_stays(out: Path, foreign: str) -> None:
    (out / foreign).mkdir(parents=True) if foreign.endswith("/") else (out / foreign).write_text("mine")
    with pytest.raises(AlignvecError, match=f"out holds {foreign.strip('/')}, which alignvec did not write"):
        AlignmentVector(TWO).save(out, overwrite=True)
    assert (out / foreign).exists()
    assert torch.equal(alignvec.load(out)["w"], ONE["w"])
    assert names(out.parent) == ["out"]


def test_a_file_that_comes_while_the_output_is_written_stays(out: Path) -> None:
    with pytest.raises(AlignvecError, match="holds notes"), output_folder(out, overwrite=True) as folder:  # noqa: PT012
        (folder / "model.safetensors").write_text("new")
        (out / "notes").write_text("mine")
    assert (out / "notes").read_text() == "mine"
    fresh = out.parent / "fresh"
    with pytest.raises(AlignvecError, match="not an empty folder"), output_folder(fresh):  # noqa: PT012
        fresh.mkdir()
        (fresh / "model.safetensors").write_text("another process's")
    assert (fresh / "model.safetensors").read_text() == "another process's"
    assert names(out.parent) == ["fresh", "out"]


def test_shards_by_other_names_and_what_a_merge_copied_are_ours(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (pair[0] / "README.md").write_text("# A model")
    vector = extract(*pair)
    for _ in range(2):
        merge(pair[0], {"v": vector}, {"v": 1.0}, tmp_path / "m", overwrite=True)
    assert (tmp_path / "m" / "README.md").exists()
    (tmp_path / "m" / "LICENSE").write_text("mine")
    with pytest.raises(AlignvecError, match="holds LICENSE"):
        merge(pair[0], {"v": vector}, {"v": 1.0}, tmp_path / "m", overwrite=True)


def test_a_link_is_followed_and_kept(out: Path) -> None:
    place = out.parent
    out.rename(place / "real")
    out.symlink_to("real")
    AlignmentVector(TWO).save(out, overwrite=True)
    assert out.is_symlink()
    assert torch.equal(alignvec.load(place / "real")["w"], TWO["w"])
    (place / "later").symlink_to(place / "made")
    AlignmentVector(ONE).save(place / "later")
    assert torch.equal(alignvec.load(place / "made")["w"], ONE["w"])
    assert names(place) == ["later", "made", "out", "real"]
    with replaced(out / "alignment_vector.json") as file:
        file.write_text("{}")
    assert (place / "real" / "alignment_vector.json").read_text() == "{}"


def _parent_is_file(place: Path) -> Path:
    (place / "file").write_text("x")
    return place / "file" / "out"


def _loop(place: Path) -> Path:
    (place / "loop").symlink_to("loop")
    return place / "loop"


def _here(place: Path) -> Path:
    os.chdir(place)
    return Path(".")


BAD_PLACES: dict[str, Callable[[Path], str | Path]] = {
    "is the current folder": _here,
    "file is no folder": _parent_is_file,
    "leads nowhere": _loop,
    "is no path": lambda place: "a\0b",
    "File name too long": lambda place: place / ("x" * 300),
    "is a mount point": lambda place: "/dev/shm",
    "holds it": lambda place: "/",
}


@pytest.mark.parametrize(("message", "place"), BAD_PLACES.items(), ids=list(BAD_PLACES))
def test_places_that_are_refused(
    message: str, place: Callable[[Path], str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    target = place(tmp_path)
    before = names(tmp_path)
    with pytest.raises(AlignvecError, match=message) as caught:
        AlignmentVector(ONE).save(target, overwrite=True)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == before


def test_a_long_name_that_the_file_system_takes(tmp_path: Path) -> None:
    AlignmentVector(ONE).save(tmp_path / ("x" * 255))
    AlignmentVector(TWO).save(tmp_path / ("x" * 255), overwrite=True)
    assert names(tmp_path) == ["x" * 255]


def test_devices_are_not_replaced() -> None:
    with pytest.raises(AlignvecError, match="/dev/null is no plain file"), replaced(Path("/dev/null")):
        pass


def _bound(base: Path, v: Path) -> AlignmentVector:
    return alignvec.load(v).with_base(base)


INPUTS: dict[str, tuple[str, Callable[[Path, Path, Path], object]]] = {
    "merge, its vector": ("v", lambda b, a, v: merge(b, {"v": v}, {"v": 1}, v, overwrite=True)),
    "merge, its open vector": ("v", lambda b, a, v: merge(b, {"v": alignvec.load(v)}, {"v": 1}, v, overwrite=True)),
    "merge, a term": ("v", lambda b, a, v: merge(b, {"v": _bound(b, v) * 0.5}, {"v": 1}, v, overwrite=True)),
    "merge, through a link": ("v", lambda b, a, v: merge(b, {"v": v}, {"v": 1}, v.parent / "link", overwrite=True)),
    "merge, its base": ("base", lambda b, a, v: merge(b, {"v": v}, {"v": 1}, b, overwrite=True)),
    "merge, a file of a vector's base": (
        "aligned",
        lambda b, a, v: merge(b, {"v": _bound(b, v)}, {"v": 1}, a, tokenizer=a, overwrite=True),
    ),
    "convert": ("v", lambda b, a, v: convert(v, v, "sign", base=b, overwrite=True)),
    "convert, open": ("v", lambda b, a, v: convert(_bound(b, v), v, "sign", overwrite=True)),
    "convert, its base": ("base", lambda b, a, v: convert(v, b, base=b, overwrite=True)),
    "save, its base": ("base", lambda b, a, v: _bound(b, v).save(b, overwrite=True)),
    "extract, its base": ("base", lambda b, a, v: extract(b, a, output=b, overwrite=True)),
    "extract, aligned": ("aligned", lambda b, a, v: extract(b, a / "model.safetensors", output=a, overwrite=True)),
    "surgery": ("v", lambda b, a, v: surgery.truncate(_bound(b, v), 2, output=v, overwrite=True)),
}


@pytest.mark.parametrize(("held", "call"), INPUTS.values(), ids=list(INPUTS))
def test_no_input_is_replaced(tmp_path: Path, held: str, call: Callable[[Path, Path, Path], object]) -> None:
    base, aligned, vector = (tmp_path / name for name in ("base", "aligned", "v"))
    for folder, value in ((base, 0.0), (aligned, 1.0)):
        folder.mkdir()
        save_file({"w": torch.full((8, 8), value, dtype=torch.bfloat16)}, folder / "model.safetensors")
        (folder / "tokenizer.json").write_text("{}")
    extract(base, aligned, output=vector, format="lossless")
    (tmp_path / "link").symlink_to(vector)
    before = {path: path.stat().st_ino for path in tmp_path.rglob("*")}
    with pytest.raises(AlignvecError, match=f"{held} holds the input"):
        call(base, aligned, vector)
    assert {path: path.stat().st_ino for path in tmp_path.rglob("*")} == before


def test_the_folder_of_links_targets_of_a_hub_cache_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file({"w": torch.zeros(2, 2)}, tmp_path / "blobs" / "model.safetensors")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/model.safetensors")
    with pytest.raises(AlignvecError, match="blobs holds the input"):
        merge(
            tmp_path / "snapshot",
            {"v": AlignmentVector({"w": torch.ones(2, 2)})},
            {"v": 1},
            tmp_path / "blobs",
            overwrite=True,
        )


def test_what_cannot_be_read_does_not_take_the_place_of_what_can(out: Path) -> None:
    with (
        pytest.raises(AlignvecError, match=f"{out} is not written, since it could not be read"),
        output_folder(out, overwrite=True, check=AlignmentVector.load) as folder,
    ):
        (folder / "alignment_vector.json").write_text('{"schema": 9}')
    assert torch.equal(alignvec.load(out)["w"], ONE["w"])
    assert names(out.parent) == ["out"]


def test_a_folder_that_is_being_written_is_written_into(out: Path) -> None:
    """As the command line does it, which finds out before it trains whether there is a place for the result."""
    with output_folder(out, overwrite=True) as folder:
        AlignmentVector(TWO).save(folder, overwrite=True)
        assert names(folder) == ["alignment_vector.json", "alignment_vector.safetensors"]
        assert torch.equal(alignvec.load(out)["w"], ONE["w"])
    assert torch.equal(alignvec.load(out)["w"], TWO["w"])
    assert names(out.parent) == ["out"]


def test_a_folder_moved_away_by_a_writer_that_died_comes_back(tmp_path: Path) -> None:
    AlignmentVector(ONE).save(tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / ".out.00000000.partial")
    (tmp_path / "out").rename(tmp_path / ".out.01234567.old")
    assert torch.equal(alignvec.load(tmp_path / "out")["w"], ONE["w"])
    save_file({"w": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "m").mkdir()
    (tmp_path / "model.safetensors").rename(tmp_path / "m" / "model.safetensors")
    (tmp_path / "m").rename(tmp_path / ".m.01234567.old")
    assert list(Checkpoint.open(tmp_path / "m").tensors) == ["w"]
    (tmp_path / ".other.00000000.partial").mkdir()
    (tmp_path / "out").rename(tmp_path / ".out.01234567.old")
    with pytest.raises(AlignvecError, match="not an empty folder"):
        AlignmentVector(TWO).save(tmp_path / "out")
    AlignmentVector(TWO).save(tmp_path / "out", overwrite=True)
    assert names(tmp_path) == [".other.00000000.partial", "m", "out"]
