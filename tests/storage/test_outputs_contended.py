"""Outputs that other processes move or replace meanwhile, and folders that may be read or written in part alone."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

import alignvec
from alignvec import AlignmentVector, hidden
from alignvec.checkpoint import Checkpoint
from alignvec.errors import AlignvecError
from alignvec.folders import steady
from tests.storage.children import by_two_renames

ONE, TWO = ({"w": torch.full((4, 4), value)} for value in (1.0, 2.0))
as_somebody = pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write anything")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A vector of ones that is there already."""
    AlignmentVector(ONE).save(tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOENT], ids=["renamed twice", "exchanged"])
def test_a_target_that_another_writer_is_moving(out: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(*_: object) -> None:
        if out.exists():
            out.rename(out.with_name(".out.01234567.old"))
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(hidden, "exchange", moved)
    AlignmentVector(TWO).save(out, overwrite=True)
    assert torch.equal(alignvec.load(out)["w"], TWO["w"])


def test_a_target_that_goes_while_it_is_looked_at(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from alignvec import folders

    def gone(folder: Path) -> None:
        shutil.rmtree(folder)
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(folder))

    monkeypatch.setattr(folders, "not_ours", gone)
    AlignmentVector(TWO).save(out, overwrite=True)
    assert torch.equal(alignvec.load(out)["w"], TWO["w"])


def test_what_a_killed_writer_removed_in_part_does_not_come_back(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    removed = shutil.rmtree

    def killed(folder: Path, **_: object) -> None:
        if (folder / "alignment_vector.json").exists() and torch.equal(AlignmentVector.load(folder)["w"], ONE["w"]):
            (folder / "alignment_vector.json").unlink()
            raise KeyboardInterrupt
        removed(folder, ignore_errors=True)

    monkeypatch.setattr(hidden, "exchange", by_two_renames)
    monkeypatch.setattr(hidden.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        AlignmentVector(TWO).save(out, overwrite=True)
    monkeypatch.undo()
    out.rename(out.with_name("elsewhere"))
    with pytest.raises(AlignvecError, match="there is no such folder"):
        alignvec.load(out)
    assert torch.equal(alignvec.load(out.with_name("elsewhere"))["w"], TWO["w"])


def test_a_folder_that_is_made_again_is_another_one(tmp_path: Path) -> None:
    """File systems give a new folder the number of one that was just removed."""
    folder = tmp_path / "out"
    folder.mkdir()

    def replaced() -> None:
        with steady(folder):
            folder.rmdir()
            folder.mkdir()

    with pytest.raises(AlignvecError, match="was replaced while it was opened"):
        replaced()


def test_a_folder_that_leftovers_left_meanwhile(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process gave it back between the look and the move."""
    shutil.rmtree(out)
    monkeypatch.setattr(hidden, "_beside", lambda target, kind: [target.with_name(".out.01234567.old")])
    hidden.put_back(out)
    assert not out.exists()


@as_somebody
def test_a_folder_above_that_may_be_written_and_not_listed(out: Path) -> None:
    out.parent.chmod(0o333)
    try:
        AlignmentVector(TWO).save(out, overwrite=True)
        assert torch.equal(alignvec.load(out)["w"], TWO["w"])
    finally:
        out.parent.chmod(0o755)


@as_somebody
def test_a_folder_that_may_not_be_changed_stays(out: Path) -> None:
    out.chmod(0o555)
    try:
        with pytest.raises(AlignvecError, match="may not be changed, so it will not be overwritten"):
            AlignmentVector(TWO).save(out, overwrite=True)
        assert torch.equal(alignvec.load(out)["w"], ONE["w"])
        assert [path.name for path in out.parent.iterdir()] == ["out"]
    finally:
        out.chmod(0o755)


@as_somebody
@pytest.mark.parametrize("opened", [alignvec.load, Checkpoint.open, lambda folder: Checkpoint.open(folder / "x")])
def test_a_folder_that_may_not_be_looked_into(out: Path, opened) -> None:  # type: ignore[no-untyped-def]
    out.chmod(0)
    try:
        with pytest.raises(AlignvecError, match="Permission denied"):
            opened(out)
    finally:
        out.chmod(0o755)
