"""Lossless vectors of float16 checkpoints: steps are taken from float16's own bits, and from no copy that lost some."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import alignvec
from alignvec import AlignmentVector, AlignvecError
from tests.attach.transferred import added, new
from tests.storage.descriptions import change_description

NAME = "model.layers.0.self_attn.q_proj.weight"


class Made:
    """A float16 model, its tuned copy, both on disk, and the lossless vector between them."""

    def __init__(self, folder: Path) -> None:
        self.base = new("Llama").half()
        self.aligned = copy.deepcopy(self.base)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in self.aligned.parameters():
                parameter.add_((1e-3 * torch.randn(parameter.shape)).half())
        self.rounded = copy.deepcopy(self.base).bfloat16()
        self.folders = {}
        for name, model in (("base", self.base), ("aligned", self.aligned), ("rounded", self.rounded)):
            model.save_pretrained(folder / name)
            self.folders[name] = folder / name
        alignvec.extract(self.folders["base"], self.folders["aligned"], format="lossless", output=folder / "v")
        self.vector = alignvec.load(folder / "v")
        self.live = alignvec.extract(self.base, self.aligned, format="lossless", output=folder / "live")
        assert self.live.base == self.vector.base
        assert alignvec.extract(self.base, self.aligned).base == self.vector.base


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("float16"))


def require_exact(model: nn.Module, vector: AlignmentVector, made: Made) -> None:
    """Every delta is the float64 difference of the two checkpoints."""
    moved = added(model, vector)
    after = dict(made.aligned.named_parameters())
    before = dict(made.base.named_parameters())
    for name, parameter in model.named_parameters():
        expected = parameter.double() + after[name].double() - before[name].double()
        assert torch.equal(moved[name], expected), name


def test_models_that_hold_the_bits(made: Made) -> None:
    require_exact(made.base, made.vector, made)
    for dtype in (torch.float16, torch.float32):
        model = copy.deepcopy(made.base).to(dtype)
        alignvec.attach(model, {"v": made.vector}).materialise(v=1.0)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, made.aligned.get_parameter(name).to(dtype), rtol=0, atol=1e-7)


@pytest.mark.parametrize("cast", ["bfloat16", "bfloat16 float16", "bfloat16 float32"])
def test_models_that_were_rounded_to_bfloat16(made: Made, cast: str) -> None:
    model = copy.deepcopy(made.base)
    for dtype in cast.split():
        model = model.to(getattr(torch, dtype))
    with pytest.raises(AlignvecError, match=r"vector 'v' is lossless in float16 and the model holds its base's values"):
        alignvec.attach(model, {"v": made.vector})
    require_exact(model, made.vector.with_base(made.folders["base"]), made)
    dense = alignvec.extract(made.base, made.aligned, dtype="float32")
    alignvec.attach(model, {"v": dense}).detach()


def test_bfloat16_steps_are_not_taken_from_what_float16_left(tmp_path: Path) -> None:
    base = new("Llama").bfloat16()
    with torch.no_grad():
        base.lm_head.weight.mul_(1e-6)
    aligned = copy.deepcopy(base)
    with torch.no_grad():
        aligned.lm_head.weight.mul_(1.5)
    vector = alignvec.extract(base, aligned, format="lossless", output=tmp_path / "v")
    vector = alignvec.load(tmp_path / "v")
    with pytest.raises(AlignvecError, match=r"lossless in bfloat16 and .*rounded \(lm_head.weight\): load it as bf"):
        alignvec.attach(copy.deepcopy(base).half().bfloat16(), {"v": vector})


def test_stored_copies_in_bfloat16_are_another_base(made: Made, tmp_path: Path) -> None:
    with pytest.raises(AlignvecError, match=r"rounded is not the base that the vector was extracted from .*other val"):
        made.vector.with_base(made.folders["rounded"])
    with pytest.raises(AlignvecError, match="rounded is not the base"):
        alignvec.convert(made.vector, tmp_path / "dense", "dense", base=made.folders["rounded"])
    for dtype in (None, "float32"):
        with pytest.raises(AlignvecError, match=r"different base than rounded: .* other values"):
            alignvec.merge(made.folders["rounded"], {"v": made.vector}, {"v": 0.5}, tmp_path / "m", dtype=dtype)
    alignvec.merge(made.folders["base"], {"v": made.vector}, {"v": 1.0}, tmp_path / "m")
    merged, after = (load_file(f / "model.safetensors") for f in (tmp_path / "m", made.folders["aligned"]))
    assert all(torch.equal(merged[name].view(torch.int16), value.view(torch.int16)) for name, value in after.items())


def test_vectors_of_early_versions_do_not_know_the_bits(made: Made, tmp_path: Path) -> None:
    """They are refused where steps are taken from bits, and go on verifying where they are not."""
    made.vector.save(tmp_path / "v")
    alignvec.extract(made.base, made.aligned, output=tmp_path / "dense")
    for folder in ("v", "dense"):
        change_description(
            tmp_path / folder,
            lambda data: [entry.update(float16=entry["checksum"]) for entry in data["base"]["tensors"].values()],
        )
    early = alignvec.load(tmp_path / "v")
    with pytest.raises(AlignvecError, match=r"does not record the bits of its base's values .*: extract it anew"):
        alignvec.attach(copy.deepcopy(made.base), {"v": early})
    with pytest.raises(AlignvecError, match=r"does not record the bits .* so base cannot be compared with them"):
        alignvec.merge(made.folders["base"], {"v": early}, {"v": 1.0}, tmp_path / "m")
    with pytest.raises(AlignvecError, match=r"give its base with verify=False"):
        early.with_base(made.folders["base"])
    require_exact(made.base, early.with_base(made.folders["base"], verify=False), made)
    dense = alignvec.load(tmp_path / "dense")
    for model in (made.base, made.rounded):
        alignvec.attach(copy.deepcopy(model), {"v": dense}).detach()
    alignvec.merge(made.folders["rounded"], {"v": dense}, {"v": 1.0}, tmp_path / "m")


def test_sums_of_vectors_of_two_float16_bases(made: Made) -> None:
    other = copy.deepcopy(made.base).bfloat16().half()
    with pytest.raises(AlignvecError, match=r"different bases cannot be added .*other values"):
        made.vector + alignvec.extract(other, made.aligned)
