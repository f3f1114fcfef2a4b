"""Sizes that a few bytes claim: judged against the model or the file before memory is asked for."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import alignvec
from alignvec import AlignmentVector
from alignvec.checkpoint import Checkpoint
from alignvec.description import Error
from alignvec.errors import AlignvecError
from alignvec.fingerprint import BaseIdentity, TensorIdentity
from alignvec.formats import Encoded, encode
from alignvec.statistics import total_error
from tests import models
from tests.storage.descriptions import change_description

ROWS, COLUMNS = 37, 72
HUGE = [[0, 2**63], [2**62, 2**62, 0], [-3, 4], [2**63], [1] * 100, [1.0, 2], [True, 4], [None], "34", None, {"a": 1}]


class Layer(nn.Module):
    """One linear layer inside of a module."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.lin = nn.Linear(COLUMNS, ROWS, bias=False, dtype=dtype).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """4 GB of addresses beyond those in use."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def described(folder: Path, change: Callable[[dict], object]) -> Path:  # type: ignore[type-arg]
    """A vector whose description says something else."""
    base = BaseIdentity({}, {"w": TensorIdentity((3, 4), "float32", "0" * 16)})
    AlignmentVector({"w": torch.ones(3, 4)}, base).save(folder)
    return change_description(folder, change)


@pytest.mark.parametrize("shape", HUGE, ids=map(str, range(len(HUGE))))
@pytest.mark.parametrize("place", ["tensors", "base"])
def test_no_shape_is_believed_that_no_tensor_has(tmp_path: Path, place: str, shape: object) -> None:
    def change(data: dict) -> None:  # type: ignore[type-arg]
        (data["tensors"] if place == "tensors" else data["base"]["tensors"])["w"]["shape"] = shape

    with pytest.raises(AlignvecError, match=r"alignment_vector\.json"):
        alignvec.load(described(tmp_path / "v", change))


@pytest.mark.parametrize("shape", HUGE[:2], ids=str)
def test_nor_one_of_a_safetensors_header(tmp_path: Path, shape: list[int]) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(AlignvecError, match=r"model\.safetensors"):
        Checkpoint.open(tmp_path)


NUMBERS = [
    lambda e: e.update(error={"relative": 2.0**501, "norm": 1.0, "snr": 0}),
    lambda e: e.update(error={"relative": 2.0**300, "norm": 2.0**300, "snr": 0}),
    lambda e: e.update(error={"relative": True, "norm": 1.0}),
    lambda e: e.update(error={"relative": 0.5, "norm": "1"}),
    lambda e: e.update(error=[0.5]),
    lambda e: e.update(options={"group": 128}),
]


@pytest.mark.parametrize("change", NUMBERS, ids=map(str, range(len(NUMBERS))))
def test_no_error_or_option_is_believed_that_cannot_be(tmp_path: Path, change: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
    folder = described(tmp_path / "v", lambda data: change(data["tensors"]["w"]))
    with pytest.raises(AlignvecError, match=r"alignment_vector\.json"):
        alignvec.load(folder)


def test_the_largest_errors_that_are_read_can_be_added_up(tmp_path: Path) -> None:
    error = {"relative": 2.0**10, "norm": 2.0**489}
    vector = alignvec.load(described(tmp_path / "v", lambda data: data["tensors"]["w"].update(error=error)))
    assert vector.errors["w"] == Error(2.0**10, 2.0**489)
    assert total_error(vector) == 2.0**10


CHANGES = [
    lambda data: data.update(schema=True),
    lambda data: data.update(schema=2.0),
    lambda data: data.update(format="auto:x"),
    lambda data: data.update(format="f" * 10_000),
    lambda data: data["base"].update(config=[["a", 1]]),
    lambda data: data["base"]["tensors"]["w"].update(dtype="Tensor"),
    lambda data: data["base"]["tensors"]["w"].update(dtype="int8"),
    lambda data: data["tensors"].update({"n" * 2000: data["tensors"]["w"]}),
]


@pytest.mark.parametrize("change", CHANGES, ids=map(str, range(len(CHANGES))))
def test_nor_anything_else_of_another_kind(tmp_path: Path, change: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
    with pytest.raises(AlignvecError, match=r"alignment_vector\.json") as caught:
        alignvec.load(described(tmp_path / "v", change))
    assert len(str(caught.value)) < 500


def test_a_selection_of_a_vector_with_a_selection_of_another_kind(tmp_path: Path) -> None:
    vector = alignvec.load(described(tmp_path / "v", lambda data: data.update(source={"selected": 5})))
    assert vector.select("w").source["selected"] == [{"include": ["w"], "exclude": None}]


OPTIONS = {
    "sign": [{"group": 32 * 1000000001}, {"group": 2**63}, {"group": 32 * (2**70 + 1)}, {"group": -32}, {"group": 33}],
    "int8": [{"group": 10**400}, {"group": True}, {"group": 128.0}],
    "sparse": [{"density": 10**400}, {"density": -1}, {"seed": 2**63}, {"threshold": float("inf")}, {"method": None}],
    "low-rank": [{"rank": 10**400}, {"rank": 2**62}, {"rank": 0}, {"dtype": 1}],
}


@pytest.mark.parametrize(("name", "options"), [(name, each) for name, many in OPTIONS.items() for each in many])
def test_options_are_judged_before_memory_is_asked_for(
    little_memory: None, name: str, options: dict[str, object]
) -> None:
    whole = encode(name, torch.ones(ROWS, COLUMNS))
    with pytest.raises(AlignvecError, match=r"delta lin\.weight"):
        AlignmentVector({"lin.weight": Encoded(name, whole.shape, {**whole.options, **options}, whole.parts)})


@pytest.mark.parametrize("group", [96, 32 * 1001, 32 * (2**25 - 1), 2**30])
def test_a_group_wider_than_the_matrix_is_a_row(little_memory: None, group: int) -> None:
    signs, scales = torch.randint(0, 256, (ROWS, COLUMNS // 8), dtype=torch.uint8), torch.rand(ROWS, 1).bfloat16()
    whole = {"signs": signs, "scales": scales}
    layer, x = Layer(), torch.randn(1, 5, COLUMNS)
    vector = AlignmentVector({"lin.weight": Encoded("sign", (ROWS, COLUMNS), {"group": group}, whole)})
    bits = (signs[:, :, None].int() >> torch.arange(8)) & 1
    delta = scales.double() * (1 - 2 * bits.flatten(1)).double()
    torch.testing.assert_close(vector["lin.weight"].double(), delta, rtol=0, atol=0)
    wanted = x.double() @ (layer.lin.weight.double() + delta).T
    alignvec.attach(layer, {"v": vector}).set(v=1.0)
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-4, atol=1e-4)
    again = encode(f"sign:group={group}", torch.randn(ROWS, COLUMNS))
    assert again.parts["scales"].shape == (ROWS, -(-COLUMNS // group))


def low_rank(rows: int, columns: int) -> Encoded:
    """rank 1: one number a row, and one a column."""
    parts = {"A": torch.ones(1, columns).bfloat16(), "B": torch.full((rows, 1), 0.5).bfloat16()}
    return Encoded("low-rank", (rows, columns), {"rank": 1, "dtype": "bfloat16"}, parts)


def test_a_low_rank_delta_is_read_by_rows_where_the_whole_is_larger_than_the_machine(
    little_memory: None, tmp_path: Path
) -> None:
    AlignmentVector({"w": low_rank(2**18, 2**18)}).save(tmp_path / "v")
    vector = alignvec.load(tmp_path / "v")
    assert torch.equal(vector.read("w", 2**35 - 3, 2**35 + 3), torch.full((6,), 0.5))
    with pytest.raises(AlignvecError, match=r"the values of .* take 274877906944 bytes"):
        vector["w"]
    with pytest.raises(AlignvecError, match=r"the values of w as int8 take 68719476736 bytes"):
        alignvec.convert(vector, tmp_path / "o", "int8")
    assert not (tmp_path / "o").exists()
    with pytest.raises(AlignvecError, match=r"has shape \[262144, 262144\] for lin.weight, the model has \[37, 72\]"):
        alignvec.attach(Layer(), {"v": AlignmentVector({"lin.weight": low_rank(2**18, 2**18)})})


def test_an_encoded_delta_has_no_more_values_than_models_have(tmp_path: Path) -> None:
    with pytest.raises(AlignvecError, match="too large for low-rank"):
        AlignmentVector({"w": low_rank(2**20, 2**20)})
    with pytest.raises(AlignvecError, match="too large for low-rank"):
        AlignmentVector({"w": low_rank(1, 2**24 + 1)})


def test_a_file_of_holes_is_not_read_whole(tmp_path: Path) -> None:
    size = 1 << 42
    header = json.dumps({"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    stored = Checkpoint.open(tmp_path)
    with pytest.raises(AlignvecError, match="4398046511104"):
        stored.tensor("w")
    assert not stored.read("w", 2**30, 2**30 + 3).any()


def test_a_file_too_large_to_be_mapped_is_refused(little_memory: None, tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    os.truncate(tmp_path / "model.safetensors", 1 << 40)
    with pytest.raises(AlignvecError, match=r"model\.safetensors"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("shape", [(2**20, 2**22), (2**31, 2**31)], ids=str)
def test_the_shapes_of_an_identity_take_no_memory(little_memory: None, shape: tuple[int, ...]) -> None:
    model = models.tiny("Mixtral")
    name = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"
    identity = {"model.norm.weight": TensorIdentity((48,), "float32", "0" * 16)}
    identity |= {name.format(expert): TensorIdentity(shape, "float32", "0" * 16) for expert in range(4)}
    vector = AlignmentVector({"model.norm.weight": torch.ones(48)}, BaseIdentity({}, identity))
    with pytest.raises(AlignvecError, match="different base"):
        alignvec.attach(model, {"v": vector})
    alignvec.attach(model, {"v": vector}, transfer=True).detach()


def test_a_name_of_many_characters_is_no_tensor_s(tmp_path: Path) -> None:
    save_file({"n" * 2000: torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(AlignvecError, match="2000 characters"):
        Checkpoint.open(tmp_path)


NUMBERS_IN_NAMES = [
    *("model.layers.²", "model.layers.0.mlp.experts.²", "model.layers.٣.w", "experts." + "9" * 900),
    *("", ".", ".."),
]


@pytest.mark.parametrize("name", NUMBERS_IN_NAMES, ids=map(str, range(len(NUMBERS_IN_NAMES))))
@pytest.mark.parametrize("architecture", ["Mistral", "Mixtral"])
def test_names_that_no_rule_of_loading_was_written_for(architecture: str, name: str) -> None:
    model = models.tiny(architecture)
    for transfer in (False, True):
        with pytest.raises(AlignvecError):
            alignvec.attach(model, {"v": AlignmentVector({name: torch.ones(4, 4)})}, transfer=transfer)
