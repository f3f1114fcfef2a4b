"""A description has a checksum of its own: edits, old vectors, checksums that are malformed or missing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import alignvec
from alignvec import AlignmentVector
from alignvec.cli.inspect import inspect
from alignvec.errors import AlignvecError
from tests.storage.descriptions import Change, change_and_seal, change_description

NAME = "lm_head.weight"


def test_a_description_that_was_changed(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Laid out in another way it is the same; an edit is refused, and the way on that the sentence names works."""
    alignvec.extract(*pair, output=tmp_path / "v")
    file = tmp_path / "v" / "alignment_vector.json"
    data = json.loads(file.read_text())
    file.write_text(json.dumps(dict(reversed(data.items()))))
    assert alignvec.load(tmp_path / "v").verified
    data["source"]["note"] = "mine"
    file.write_text(json.dumps(data, indent=4))
    with pytest.raises(
        AlignvecError, match=r"alignment_vector\.json is damaged, or was edited: .*verify=False"
    ) as caught:
        alignvec.load(tmp_path / "v")
    way = re.search(r"write it anew: (.*)$", str(caught.value))
    assert way is not None
    eval(way[1], {"alignvec": alignvec, "folder": tmp_path / "v"})
    assert alignvec.load(tmp_path / "v").source["note"] == "mine"
    assert alignvec.load(tmp_path / "v").verified


def remove(*path: str) -> Change:
    def change(data: dict[str, Any]) -> None:
        for step in path[:-1]:
            data = data[step]
        del data[path[-1]]

    return change


REFUSED = {
    "of one tensor": (remove("tensors", NAME, "checksum"), f"tensor {NAME} has no checksum"),
    "of one part": (remove("tensors", NAME, "checksum", "scales"), f"{NAME} does not have a checksum for each of its"),
    "shorter": (
        lambda d: d["tensors"][NAME]["checksum"].update(scales="ab"),
        f"{NAME}/scales does not fit",
    ),
    "a number": (lambda d: d["tensors"][NAME]["checksum"].update(scales=7), f"{NAME}/scales does not fit"),
    "a list": (lambda d: d["tensors"][NAME].update(checksum=[]), f"tensor {NAME} has no checksum"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=list(REFUSED))
def test_checksums_that_are_malformed(pair: tuple[Path, Path], tmp_path: Path, change: Change, message: str) -> None:
    alignvec.extract(*pair, format="int4", output=tmp_path / "v")
    change_and_seal(tmp_path / "v", change)
    with pytest.raises(AlignvecError, match=message):
        alignvec.load(tmp_path / "v")
    assert len(alignvec.load(tmp_path / "v", verify=False))


def test_a_description_without_its_own_or_of_a_later_kind(pair: tuple[Path, Path], tmp_path: Path) -> None:
    alignvec.extract(*pair, output=tmp_path / "v")
    file = tmp_path / "v" / "alignment_vector.json"
    data = json.loads(file.read_text())
    for found, message in (
        (None, "damaged, or was edited"),
        (3, "damaged, or was edited"),
        ("sha9:1", "later version"),
    ):
        file.write_text(json.dumps(data | {"checksum": found}))
        with pytest.raises(AlignvecError, match=message):
            alignvec.load(tmp_path / "v")


def test_vectors_of_early_versions_have_none(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = alignvec.extract(*pair, format="int4", output=tmp_path / "v")
    inspect([tmp_path / "v"])
    assert "checksums" not in capsys.readouterr().out
    early = alignvec.load(change_description(tmp_path / "v"))
    assert not early.verified
    assert all(torch.equal(early[name], made[name]) for name in made)
    inspect([tmp_path / "v"])
    assert "no checksums: an early version wrote it; alignvec convert writes it anew" in capsys.readouterr().out
    for write in (early.save, lambda out: alignvec.convert(tmp_path / "v", out)):
        write(tmp_path / write.__name__)
        assert alignvec.load(tmp_path / write.__name__).verified


def test_what_json_changes_is_sealed_as_it_is_read(tmp_path: Path) -> None:
    source = {"steps": (1, 2), 10: "ten", 9: "nine", "name": "\ud83d\ude00 é"}
    AlignmentVector({"w": torch.ones(2)}, source=source).save(tmp_path / "v")
    found = alignvec.load(tmp_path / "v").source
    assert found == {"steps": [1, 2], "10": "ten", "9": "nine", "name": "\N{GRINNING FACE} é"}


def test_tensors_of_no_values_and_of_one(tmp_path: Path) -> None:
    AlignmentVector({"empty": torch.ones(0, 24), "scalar": torch.ones(())}).save(tmp_path / "v")
    found = {name: delta.shape for name, delta in alignvec.load(tmp_path / "v").items()}
    assert found == {"empty": (0, 24), "scalar": ()}
