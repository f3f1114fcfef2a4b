"""Hostile, truncated and inconsistent files of encoded vectors: one clear error, when opened or when read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import alignvec
from alignvec import extract
from alignvec.errors import AlignvecError
from tests.storage.descriptions import Change, change_description

NAME = "lm_head.weight"
FORMATS = ["int8", "int4", "sign", "lossless:width=2", "low-rank:rank=3", "sparse:density=0.2"]
FILE = "alignment_vector.safetensors"

Parts = dict[str, Tensor]


def entry(change: Change) -> Callable[[Path], object]:
    """Edits what the description says of one tensor."""
    return lambda folder: change_description(folder, lambda data: change(data["tensors"][NAME]))


def parts(change: Callable[[Parts], object]) -> Callable[[Path], None]:
    """Edits the parts of the vector, by their names in the file."""

    def damage(folder: Path) -> None:
        change_description(folder)
        values = {name: value.clone() for name, value in load_file(folder / FILE).items()}
        change(values)
        save_file(values, folder / FILE)

    return damage


def shorten(values: Parts) -> None:
    for name in [name for name in values if name.startswith(f"{NAME}/")]:
        values[name] = values[name][:-1].clone()


OPENED = {
    "missing": parts(lambda v: next(v.pop(name) for name in list(v) if name.startswith(f"{NAME}/"))),
    "another dtype": parts(lambda v: v.update({n: t.double() for n, t in v.items() if n.startswith(f"{NAME}/")})),
    "more than there should be": parts(lambda v: v.update({f"{NAME}/more": torch.ones(2)})),
    "shape": entry(lambda e: e.update(shape=[60, 24])),
    "no shape": entry(lambda e: e.pop("shape")),
    "negative shape": entry(lambda e: e.update(shape=[-61, -24])),
    "huge shape": entry(lambda e: e.update(shape=[2**62, 2**62])),
    "one dimension": entry(lambda e: e.update(shape=[61 * 24])),
    "format": entry(lambda e: e.update(format="zip")),
    "dense": entry(lambda e: e.update(format="dense", options={})),
    "format of another type": entry(lambda e: e.update(format=["int4"])),
    "unknown option": entry(lambda e: e["options"].update(more=3)),
    "no options": entry(lambda e: e.update(options=None)),
    "options of another type": entry(lambda e: e.update(options={k: [v] for k, v in e["options"].items()})),
    "no option": entry(lambda e: e.update(options={})),
    "zero options": entry(lambda e: e["options"].update(dict.fromkeys(e["options"], -1))),
    "error": entry(lambda e: e.update(error={"relative": "small"})),
    "entry": entry(lambda e: e.clear()),
    "truncated": lambda folder: (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-7]),
}


@pytest.mark.parametrize("damage", OPENED.values(), ids=list(OPENED))
@pytest.mark.parametrize("format", FORMATS)
def test_refused_when_opened(
    pair: tuple[Path, Path], tmp_path: Path, format: str, damage: Callable[[Path], object]
) -> None:
    extract(*pair, format=format, output=tmp_path / "v")
    damage(tmp_path / "v")
    with pytest.raises(AlignvecError) as caught:
        alignvec.load(tmp_path / "v")
    assert "alignment_vector" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format", [f for f in FORMATS if "sparse" not in f])
def test_parts_of_another_size_are_refused_when_opened(pair: tuple[Path, Path], tmp_path: Path, format: str) -> None:
    extract(*pair, format=format, output=tmp_path / "v")
    parts(shorten)(tmp_path / "v")
    with pytest.raises(AlignvecError, match="does not fit"):
        alignvec.load(tmp_path / "v")


def change(part: str, edit: Callable[[Tensor], object]) -> Callable[[Path], None]:
    return parts(lambda values: edit(values[f"{NAME}/{part}"]))


READ = {
    "int8: scale": ("int8", change("scales", lambda t: t[0, 0].fill_(torch.nan))),
    "int4: scale": ("int4", change("scales", lambda t: t[0].fill_(torch.inf))),
    "int8: overflow": ("int8", change("scales", lambda t: t[0].fill_(torch.finfo(t.dtype).max))),
    "sign: scale": ("sign", change("scales", lambda t: t[0].fill_(torch.nan))),
    "lossless: rows": ("lossless:width=2", change("side_start", lambda t: t[30:40].fill_(2**31 - 1))),
    "lossless: start": ("lossless:width=2", change("side_start", lambda t: t[:1].fill_(-(2**31)))),
    "lossless: end": ("lossless:width=2", change("side_start", lambda t: t[-1:].fill_(1))),
    "lossless: column": ("lossless:width=2", change("side_columns", lambda t: t.fill_(24))),
    "lossless: order": ("lossless:width=2", change("side_columns", lambda t: t.fill_(3))),
    "lossless: bits": ("lossless:width=2", change("side_bits", lambda t: t.fill_(-1))),
    "lossless: field": ("lossless:width=2", change("steps", lambda t: t.fill_(0))),
    "low-rank: factor": ("low-rank:rank=3", change("A", lambda t: t[0, 0].fill_(torch.nan))),
    "low-rank: overflow": (
        "low-rank:rank=3",
        parts(lambda v: [v[f"{NAME}/{p}"].fill_(torch.finfo(torch.bfloat16).max) for p in "AB"]),
    ),
    "sparse: bitmap": ("sparse:density=0.2", change("bitmap", lambda t: t.fill_(0xFF))),
    "sparse: value": ("sparse:density=0.2", change("values", lambda t: t[0].fill_(torch.nan))),
}


@pytest.mark.parametrize(("format", "damage"), READ.values(), ids=list(READ))
def test_refused_when_read(
    pair: tuple[Path, Path], tmp_path: Path, format: str, damage: Callable[[Path], object]
) -> None:
    extract(*pair, format=format, output=tmp_path / "v")
    damage(tmp_path / "v")
    vector = alignvec.load(tmp_path / "v").with_base(pair[0])
    assert torch.isfinite(vector["model.embed_tokens.weight"]).all()
    for use in (lambda: vector[NAME], vector.norm, lambda: (vector * 2).save(tmp_path / "w")):
        with pytest.raises(AlignvecError, match=NAME):
            use()
    assert not (tmp_path / "w").exists()
    merge = {"v": vector}, {"v": 1.0}, tmp_path / "m"
    with pytest.raises(AlignvecError):
        alignvec.merge(pair[0], *merge)
    assert not (tmp_path / "m").exists()


def test_no_delta_of_a_fitting_range_is_read_past_the_damage(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A range of rows is checked as far as it is read: what lies elsewhere is nobody's business yet."""
    extract(*pair, format="int8", output=tmp_path / "v")
    change("scales", lambda t: t[60].fill_(torch.nan))(tmp_path / "v")
    vector = alignvec.load(tmp_path / "v")
    assert torch.isfinite(vector.read(NAME, 0, 60 * 24)).all()
    with pytest.raises(AlignvecError, match="holds NaN"):
        vector.read(NAME, 60 * 24, 61 * 24)
    with pytest.raises(AlignvecError, match="holds NaN"):
        vector.encoded(NAME)
