"""Tuned tables: those in the repository, which one is taken, what is looked up, and files that are no tables."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alignvec import AlignvecError, planner
from alignvec.kernels import configs
from alignvec.kernels.configs import Config
from alignvec.planner import devices

SPEC = "codes:4:64:128"


@pytest.fixture(autouse=True)
def _own_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.delenv("ALIGNVEC_TUNED", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    planner.forget()
    yield
    planner.forget()


def entry(**changes: Any) -> dict[str, Any]:
    config = dict(block_m=16, block_n=32, block_k=64, num_warps=4, num_stages=3, split_k=2)
    made = dict(execution="split", precision="exact", vectors="3*int4:group=128", dtype="bfloat16", tokens=16)
    made |= dict(out_features=4096, in_features=14336, vector_bytes=90_000_000, seconds=5e-5, config=config)
    return made | changes


def data(**changes: Any) -> dict[str, Any]:
    numbers = dict(name="NVIDIA H200", read_bandwidth=4.3e12, matrix_16=6.9e14, matrix_32=5e13, vector_32=6.7e13)
    numbers |= dict(launch=2e-6, vendor_bandwidth=0.9, kernel_matrix=0.6, multiprocessors=132, source="a test")
    return {"device": numbers, "matches": ["NVIDIA H200"], "about": {}, "entries": [entry()]} | changes


def save(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_the_tables_of_the_repository() -> None:
    tables = {table.device.name: table for table in configs.packaged()}
    assert set(tables) == {"NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "AMD Instinct MI300X"}
    for name, table in tables.items():
        assert table.serves(name)
        assert configs.table(name) is table
        assert ("not measured" in table.device.source) == (name != "NVIDIA H200")
        assert sum(other.serves(name) for other in tables.values()) == 1
    assert tables["NVIDIA H200"].device.read_bandwidth == 4.33e12
    assert not tables["NVIDIA H200"].serves("NVIDIA H200 MIG 1g.18gb")
    assert configs.table("NVIDIA GeForce RTX 4090") is None


@pytest.mark.parametrize("name", ["H200", "h100", "A100", "mi300x", "cpu"])
def test_a_device_is_found_by_part_of_its_name(name: str) -> None:
    assert name.lower() in planner.find(name).name.lower()


def test_a_device_that_is_not_known() -> None:
    with pytest.raises(AlignvecError, match=r"'abacus' is not known: it is 'cpu', 'cuda:0' and so on, or .*H200"):
        planner.find("abacus")
    if not torch.cuda.is_available():
        with pytest.raises(AlignvecError, match="there is no device 'cuda:0' here"):
            planner.find("cuda:0")


def test_a_gpu_without_a_table_goes_by_its_clocks() -> None:
    h200 = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, clock_rate=1_980_000)
    h200.memory_clock_rate, h200.memory_bus_width = 3_201_000, 6144
    made, known = devices.generic(h200), planner.find("H200")
    for figure in ("read_bandwidth", "matrix_16", "matrix_32", "vector_32"):
        assert getattr(made, figure) == pytest.approx(getattr(known, figure), rel=0.1)
    assert "estimated" in made.source
    for capability in ((6, 1), (8, 9), (12, 1)):
        h200.major, h200.minor = capability
        assert devices.generic(h200).matrix_16 > 0
    del h200.memory_clock_rate
    assert devices.generic(h200).read_bandwidth > 0


def test_which_table_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def origin() -> str:
        planner.forget()
        table = configs.table("NVIDIA H200")
        assert table is not None
        return table.origin

    assert origin() == "alignvec's own"
    save(configs.user_folder() / "nvidia-h200.json", data())
    assert origin() == "the user's cache"
    monkeypatch.setenv("ALIGNVEC_TUNED", str(save(tmp_path / "other.json", data(matches=["AMD"]))))
    assert origin() == "the user's cache"
    assert "that of ALIGNVEC_TUNED is for another GPU" in planner.explain.table_in_use("NVIDIA H200")
    monkeypatch.setenv("ALIGNVEC_TUNED", str(save(tmp_path / "mine.json", data())))
    assert origin() == "ALIGNVEC_TUNED"
    assert "mine.json, ALIGNVEC_TUNED: 1 measurements; a test" in planner.explain.table_in_use("NVIDIA H200")
    monkeypatch.setenv("ALIGNVEC_TUNED", str(tmp_path / "absent.json"))
    with pytest.raises(AlignvecError, match=r"cannot read the tuned table .*absent\.json: No such file"):
        origin()


def test_lookup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    far = entry(tokens=2048, config=entry()["config"] | {"block_m": 128})
    passing = entry(execution="materialise", tokens=1, config=None)
    monkeypatch.setenv("ALIGNVEC_TUNED", str(save(tmp_path / "t.json", data(entries=[entry(), far, passing]))))

    def found(tokens: int, execution: str = "split", specs: tuple[str, ...] = (SPEC,) * 3, **shape: int) -> Any:
        sizes = {"out_features": 4096, "in_features": 14336, **shape}
        return configs.lookup("NVIDIA H200", execution, specs, "bfloat16", tokens, **sizes)

    near = Config(16, 32, 64, 4, 3, 2)
    assert [found(tokens) for tokens in (4, 9, 16, 33, 64)] == [near] * 5
    assert found(1) is found(65) is None  # more than a factor of 4 away
    assert found(1024).block_m == 128
    assert found(16, execution="combine") is found(1, execution="materialise") is None
    assert found(16, specs=(SPEC,) * 2) is found(16, specs=(SPEC, SPEC, "codes:8:64:128")) is None
    assert found(16, out_features=4097) is None
    assert configs.lookup("NVIDIA H200", "split", [SPEC] * 3, "float16", 16, 4096, 14336) is None
    assert configs.lookup("no such GPU", "split", [SPEC] * 3, "bfloat16", 16, 4096, 14336) is None


def test_signatures_name_formats_in_any_order() -> None:
    row = 1 << 30
    specs = (f"codes:1:64:{row}", f"dense:0:0:{row}", SPEC, f"dense:0:0:{row}", f"lossless:4:64:{row}")
    text = "2*dense+1*int4:group=128+1*lossless:bits=4+1*sign:group=row"
    assert configs.signature(specs) == configs.signature(specs[::-1]) == text


def _hostile() -> dict[str, Any]:
    def device(**changes: Any) -> dict[str, Any]:
        return data(device=data()["device"] | changes)

    def config(**changes: Any) -> dict[str, Any]:
        return data(entries=[entry(config=entry()["config"] | changes)])

    lacking = copy.deepcopy(data())
    del lacking["entries"][0]["seconds"]
    return {
        "not JSON": ("{", "Expecting"),
        "empty": ("", "Expecting value"),
        "a list": ([], "the table is no object"),
        "deep": ("[" * 100_000, "nested too deep"),
        "no bytes of text": ("\x00", "Expecting value"),
        "another object": ({"device": {}}, "the table lacks 'about'"),
        "more": (data(code="import os"), "has an unknown 'code'"),
        "device": (device(read_bandwidth="fast"), "device read_bandwidth is 'fast', not a number"),
        "zero": (device(matrix_16=0), "device matrix_16 is 0"),
        "negative": (device(launch=-1.0), "device launch is -1.0"),
        "infinite": (json.dumps(data()).replace("4300000000000.0", "1e999"), "read_bandwidth is inf"),
        "NaN": (json.dumps(data()).replace("4300000000000.0", "NaN"), "read_bandwidth is nan"),
        "true": (device(launch=True), "device launch is True"),
        "share": (device(kernel_matrix=1.5), "up to 1"),
        "multiprocessors": (device(multiprocessors=1.5), "multiprocessors is 1.5, not a whole number"),
        "name": (device(name="x" * 2000), "device name is no text"),
        "matches": (data(matches="NVIDIA H200"), "matches is no list"),
        "entries": (data(entries={}), "entries is no list"),
        "entry": (data(entries=[entry(), 3]), "entry 1 is no object"),
        "lacking": (lacking, "entry 0 lacks 'seconds'"),
        "execution": (data(entries=[entry(execution="guess")]), "entry 0 has execution 'guess', not one of split"),
        "unhashable": (data(entries=[entry(dtype=["bfloat16"])]), "entry 0 has dtype"),
        "tokens": (data(entries=[entry(tokens=17)]), "entry 0 has 17 tokens, not a power of two"),
        "twice": (data(entries=[entry(), entry()]), "two entries measure the same thing, split exact 3"),
        "block": (config(block_n=48), "entry 0 config block_n is 48, not a power of two"),
        "huge block": (config(block_k=1 << 30), "block_k is 1073741824, not a whole number from 1 to 1024"),
        "string block": (config(num_warps="4"), "num_warps is '4'"),
        "stages": (config(num_stages=0), "num_stages is 0"),
        "long number": (json.dumps(data()).replace("5e-05", "9" * 5000), "is no tuned table"),
    }


@pytest.mark.parametrize(("content", "reason"), _hostile().values(), ids=_hostile())
def test_what_is_no_table_is_refused_in_a_sentence(content: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(AlignvecError) as caught:
        configs.read(save(tmp_path / "bad.json", content))
    message = str(caught.value)
    assert reason in message
    assert "bad.json" in message
    assert "\n" not in message
    assert len(message) < 400 + len(str(tmp_path))


def test_files_that_are_no_text_or_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "binary.json"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(AlignvecError, match="is no tuned table"):
        configs.read(path)
    monkeypatch.setattr(configs, "LARGEST", 10)
    with pytest.raises(AlignvecError, match="is larger than"):
        configs.read(save(tmp_path / "large.json", data()))
    monkeypatch.undo()
    with pytest.raises(AlignvecError, match="cannot read the tuned table"):
        configs.read(tmp_path)
