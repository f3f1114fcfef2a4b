"""Changed vectors pass for whole ones where they are sealed again, and are found where they are not."""

from __future__ import annotations

import json
import os
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import alignvec
from alignvec import AlignmentVector
from alignvec.errors import AlignvecError
from tests.fuzz import mutations
from tests.fuzz.run import alternating

NAME, FILE, TEXT = "layers.0.weight", "alignment_vector.safetensors", "alignment_vector.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    values = torch.arange(64, dtype=torch.float32).view(2, 32).bfloat16()
    AlignmentVector({NAME: values, "norm": torch.ones(3)}).save(tmp_path / "v")
    return tmp_path / "v"


CHANGED: list[mutations.Step] = [{"do": "number at", "file": FILE, "name": NAME, "at": 33, "value": 0x3F80}]  # 1.0
LARGER: list[mutations.Step] = [
    {"do": "set", "file": TEXT, "at": ["tensors", NAME, "shape"], "json": "[3, 32]"},
    {"do": "tensor", "file": FILE, "name": NAME, "dtype": "F32", "shape": [3, 32]},
]
DROPPED: list[mutations.Step] = [
    {"do": "delete", "file": TEXT, "at": ["tensors", NAME]},
    {"do": "drop", "file": FILE, "name": NAME},
]


@pytest.mark.parametrize("steps", [CHANGED, LARGER, DROPPED])
@pytest.mark.parametrize("last", ["seal", "unseal"])
def test_what_is_sealed_again_or_has_no_seal_is_read(folder: Path, steps: list[mutations.Step], last: str) -> None:
    mutations.apply(folder, [*steps, {"do": last}])
    vector = alignvec.load(folder)
    assert vector.verified == (last == "seal")
    stored = load_file(folder / FILE)
    assert set(vector) == set(stored)
    assert all(torch.equal(vector[name], stored[name]) for name in vector)
    if steps is CHANGED:
        assert float(vector[NAME][1, 1]) == 1.0
    assert not mutations.kept_seal([*steps, {"do": last}])


@pytest.mark.parametrize("steps", [CHANGED, LARGER, DROPPED])
def test_what_keeps_its_seal_is_found(folder: Path, steps: list[mutations.Step]) -> None:
    mutations.apply(folder, steps)
    with pytest.raises(AlignvecError, match="is damaged"):
        dict(alignvec.load(folder).items())
    assert mutations.kept_seal(steps)


def test_what_cannot_be_read_is_left_as_it_is(folder: Path) -> None:
    (folder / TEXT).write_text("[1")
    mutations.apply(folder, [{"do": "seal"}, {"do": "unseal"}])
    assert (folder / TEXT).read_text() == "[1"


def test_links_files_and_code_are_put_where_nothing_is(folder: Path) -> None:
    steps: list[mutations.Step] = [
        {"do": "link", "file": "other.safetensors", "to": FILE, "hard": True},
        {"do": "link", "file": "third.safetensors", "to": FILE, "hard": False},
        {"do": "write", "file": "a.json", "text": "{}"},
        {"do": "code", "file": "code.py"},
        {"do": "write", "file": FILE, "text": "never"},
        {"do": "set", "file": "config.json", "at": ["auto_map"], "json": '{"AutoConfig": "code.Config"}'},
        {"do": "place", "file": "templates/tool.jinja", "what": "outside"},
    ]
    mutations.apply(folder, steps)
    assert (folder / "other.safetensors").samefile(folder / FILE)
    assert (folder / "third.safetensors").is_symlink()
    assert (folder / "a.json").read_text() == "{}"
    runpy.run_path(str(folder / "code.py"))
    assert os.environ.pop(mutations.RAN) == "1"
    assert json.loads((folder / "config.json").read_text()) == {"auto_map": {"AutoConfig": "code.Config"}}
    assert (folder / "templates" / "tool.jinja").is_symlink()
    assert set(alignvec.load(folder)) == {NAME, "norm"}


def test_files_that_alternate_are_read_as_what_was_written_or_refused(folder: Path, tmp_path: Path) -> None:
    """The changed file has no right checksum, so that what is read is the whole one's."""
    AlignmentVector(dict(alignvec.load(folder).items())).save(tmp_path / "case")
    whole = alignvec.load(folder)[NAME]
    mutations.apply(tmp_path / "case", CHANGED)
    read = 0
    with alternating(tmp_path / "case", folder):
        for _ in range(300):
            try:
                read += torch.equal(alignvec.load(tmp_path / "case")[NAME], whole)
            except AlignvecError:
                continue
    assert read
