"""alignvec tune: the search, and a whole run on a tiny shape with a timer that only calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from alignvec import AlignvecError, planner, tune
from alignvec.cli.app import app
from alignvec.kernels import configs
from alignvec.kernels.configs import Config

FIRST = Config(16, 32, 64, 4, 3)


@pytest.fixture(autouse=True)
def _forget() -> Any:
    yield
    planner.forget()


def test_the_search_keeps_the_best_value_of_each_field() -> None:
    tried = []

    def seconds(config: Config) -> float:
        tried.append(config)
        return abs(config.block_n - 64) + abs(config.num_warps - 8) + abs(config.split_k - 2)

    fields = {"block_n": (16, 32, 64, 128), "split_k": (1, 2, 4), "num_warps": (4, 8)}
    took, best = tune.search(FIRST, fields, seconds)
    assert (took, best) == (0, Config(16, 64, 64, 8, 3, 2))
    assert len(tried) == len(set(tried)) == 1 + 3 + 2 + 1


def test_a_configuration_that_fails_does_not_count() -> None:
    def seconds(config: Config) -> float:
        if config.block_n > 32:
            raise RuntimeError("out of resource: shared memory\nand more")
        return 1 / config.block_n

    assert tune.search(FIRST, {"block_n": (16, 64, 128)}, seconds)[1] == FIRST
    with pytest.raises(AlignvecError, match=r"none of 3 tile configurations runs a layer here; .* RuntimeErr"):
        tune.search(FIRST, {"block_n": (64, 128)}, lambda config: seconds(Config(16, 64, 64, 4, 3)))


def test_cases_cover_executions_by_tokens() -> None:
    made = tune.cases([(64, 64)], ["int4", "low-rank", "lossless"], [1, 15, 16, 2000], 3, "bfloat16")
    assert {case.tokens for case in made} == {1, 16, 2048}
    assert {case.execution for case in made if case.tokens == 1} == {"split", "materialise"}
    assert {case.execution for case in made if case.tokens == 16} == {"split"}
    large = [(case.execution, case.precision, case.format) for case in made if case.tokens == 2048]
    assert ("combine", "merged", "int4") in large
    assert all(execution == "combine" and format != "low-rank" for execution, _, format in large)
    assert len({case.key for case in made}) == len(made)
    assert not any("lossless" in case.format for case in tune.cases([(64, 64)], ["lossless"], [1], 3, "float32"))


def test_a_run_in_the_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries are of the fastest right configuration, a further run adds what is left, and kernels find them."""
    pytest.importorskip("triton")
    monkeypatch.setattr(tune, "moves", lambda case: {"block_n": (16, 32), "num_stages": (2,)})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ticks = iter(range(10_000, 0, -1))
    calls = 0

    def timer(functions: Sequence[Callable[[], object]]) -> float:
        nonlocal calls
        for function in functions:
            function()
        calls += 1
        return 1e-6 * next(ticks)  # later is faster: the last configuration tried wins

    path = tmp_path / "folder" / "tuned.json"
    options: dict[str, Any] = dict(shapes=[(48, 64)], vectors=2, device=device, timer=timer)
    options |= dict(formats=["int4:group=32"])
    monkeypatch.setattr(tune, "measure_device", lambda name, *_: planner.find(device))
    first = tune.tune(path, tokens=[1], budget=0, **options)
    assert (first.added, first.left, first.failed) == (0, 3, ())
    second = tune.tune(path, tokens=[3], **options)
    assert (second.added, second.left, second.failed) == (1, 0, ())
    third = tune.tune(path, tokens=[1, 3], **options)
    assert (third.added, third.left, third.failed) == (3, 0, ())
    assert tune.tune(path, tokens=[1, 3], **options).added == 0
    table = configs.read(path)
    assert table.entries == third.table.entries
    assert {"date", "torch"} <= set(table.about)
    assert not list(path.parent.glob("*.partial"))
    for entry in table.entries:
        assert (entry.out_features, entry.in_features, entry.dtype) == (48, 64, "bfloat16")
        if entry.execution == "materialise":
            assert entry.config is None
        else:
            assert entry.config is not None
            assert entry.config.num_stages == 2  # tried last
    monkeypatch.setenv("ALIGNVEC_TUNED", str(path))
    planner.forget()
    name = table.device.name
    found = configs.lookup(name, "split", ["codes:4:32:32"] * 2, "bfloat16", 4, 48, 64)
    assert found == next(e.config for e in table.entries if e.tokens == 4)


def test_wrong_results_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = pytest.importorskip("alignvec.kernels.linear")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setattr(linear, "linear", lambda x, weight, *_, **__: x.new_ones(x.shape[0], weight.shape[0]))
    monkeypatch.setattr(tune, "measure_device", lambda name, *_: planner.find(device))
    options: dict[str, Any] = dict(shapes=[(16, 32)], formats=["dense"], tokens=[2], device=device)
    tuned = tune.tune(tmp_path / "t.json", timer=lambda calls: 1.0, **options)
    assert tuned.added == 0
    assert "the last gave ValueError: a relative error of" in tuned.failed[0]
    assert not (tmp_path / "t.json").exists()


def test_a_table_of_another_device_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    h200 = planner.find("H200")
    tune.write(configs.Table(h200, ("NVIDIA H200x",), (), {}), path)
    before = path.read_bytes()
    with pytest.raises(AlignvecError, match="is the table of NVIDIA H200, not of cpu; choose another --output"):
        tune.tune(path, device="cpu", timer=lambda calls: 1.0)
    assert path.read_bytes() == before
    with pytest.raises(AlignvecError, match="format 'int5' is not known"):
        tune.tune(tmp_path / "new.json", formats=["int5"], device="cpu", timer=lambda calls: 1.0)


def test_bandwidth_and_matrix_rate_are_measured() -> None:
    measured = tune.measure_device("a CPU", "cpu", lambda calls: [call() for call in calls] and 1.0, size=1 << 16)
    assert measured.name == "a CPU"
    assert measured.read_bandwidth == 1 << 16
    assert measured.matrix_16 == 2 * 90**3
    assert json.dumps(measured.source)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune")
def test_without_a_gpu_there_is_nothing_to_tune(tmp_path: Path) -> None:
    output = tmp_path / "t.json"
    result = CliRunner().invoke(app, ["tune", "--output", str(output)])
    assert isinstance(result.exception, AlignvecError)  # which `main` turns into one line and exit status 2
    assert str(result.exception) == "tuning measures a GPU, and there is none here for device 'cuda'"
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--shape", "4096"], "--shape takes OUTxIN, such as 4096x14336, not '4096'"),
        (["--shape", "0x64"], "--shape takes OUTxIN"),
        (["--tokens", "0"], "--tokens must be at least 1"),
        (["--dtype", "int8"], "--dtype='int8' is not one of"),
    ],
    ids=lambda value: "" if isinstance(value, str) else value[0],
)
def test_options_that_make_no_sense(arguments: list[str], reason: str) -> None:
    result = CliRunner().invoke(app, ["tune", *arguments])
    assert isinstance(result.exception, AlignvecError)
    assert reason in str(result.exception)
