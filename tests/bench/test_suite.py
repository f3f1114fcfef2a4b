"""The suite's frame, and its sections from end to end on the tiny model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import alignvec
from alignvec.errors import AlignvecError
from alignvec.recipes.models import model_path
from bench import kernels, opponents, record, run
from bench import measure as bench_measure
from bench.layers import Shape
from bench.record import Row
from bench.suite import kernels as section
from bench.suite import merge, merging, micro, models, registry, switching
from bench.suite.case import Case, Setting, median_of
from bench.suite.remerge import Remerge, store
from bench.suite.report import shown, verdict
from bench.timing import Times

CASES = (
    Case("memory", "one", {"k": 1}, target=2.0),
    Case("memory", "one", {"k": 2}, "x", "higher"),
    Case("memory", "none", missing="it is not there"),
)


def _section(cases: Sequence[Case] = CASES, give: Any = None) -> SimpleNamespace:
    def measure(setting: Setting, cases: Sequence[Case]) -> Iterator[Row]:
        yield from (case.row([3.0, 1.0, 2.0]) for case in reversed(cases))

    return SimpleNamespace(cases=lambda setting: list(cases), measure=give or measure)


def test_rows_come_in_the_order_of_the_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "section", lambda name: _section())
    path = tmp_path / "suite.json"
    run.main(["memory"], device="cpu", output=path, quick=True)
    kept = record.read(path)
    assert (kept["bench"], kept["model"]) == ("suite", "tiny")
    first, second, third = kept["rows"]
    assert (first["parameters"], second["parameters"]) == ({"k": 1}, {"k": 2})
    assert [first[key] for key in ("median", "p20", "p80", "samples", "target", "missing")] == [
        2.0, pytest.approx(1.4), pytest.approx(2.6), 3, 2.0, None,
    ]  # fmt: skip
    assert (third["missing"], third["median"], third["samples"]) == ("it is not there", None, 0)
    assert {row["commit"] for row in kept["rows"]} == {kept["commit"]}
    assert median_of(kept["rows"], "one", k=2) == 2.0
    assert median_of(kept["rows"], "none") is None


def test_a_section_that_leaves_a_case_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(setting: Setting, cases: Sequence[Case]) -> Iterator[Row]:
        yield cases[0].row([1.0])

    def twice(setting: Setting, cases: Sequence[Case]) -> Iterator[Row]:
        yield from (cases[0].row([1.0]) for _ in range(2))

    for give, said in ((short, "no row for one {'k': 2}"), (twice, "two rows for one {'k': 1}")):
        monkeypatch.setattr(registry, "section", lambda name, give=give: _section(give=give))
        with pytest.raises(AlignvecError, match=said):
            run.main(["memory"], device="cpu", quick=True)


def test_only_the_sections_that_run_lose_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registry, "SECTIONS", ("memory", "merge"))
    monkeypatch.setattr(registry, "section", lambda name: _section([Case(name, "one")]))
    path = tmp_path / "suite.json"
    run.main(["merge"], device="cpu", output=path, quick=True)
    run.main(["memory"], device="cpu", output=path, quick=True)
    assert [row["section"] for row in record.read(path)["rows"]] == ["memory", "merge"]
    kept = record.read(path)
    kept["versions"]["torch"] = "0.1"
    record.write(path, kept)
    run.main(["memory"], device="cpu", output=path, quick=True)
    assert [row["section"] for row in record.read(path)["rows"]] == ["memory"]
    assert "versions changed: the rows of merge" in " ".join(capsys.readouterr().out.split())


def test_a_run_that_is_cut_short_keeps_what_it_did_not_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(setting: Setting, cases: Sequence[Case]) -> Iterator[Row]:
        raise AlignvecError("broken")
        yield

    path = tmp_path / "suite.json"
    monkeypatch.setattr(registry, "SECTIONS", ("memory", "merge"))
    monkeypatch.setattr(registry, "section", lambda name: _section([Case(name, "one")]))
    run.main([], device="cpu", output=path, quick=True)
    later = {"memory": _section([Case("memory", "two")]), "merge": _section([Case("merge", "two")], broken)}
    monkeypatch.setattr(registry, "section", lambda name: later[name])
    with pytest.raises(AlignvecError, match="broken"):
        run.main([], device="cpu", output=path, quick=True)
    assert [(row["section"], row["name"]) for row in record.read(path)["rows"]] == [("memory", "two"), ("merge", "one")]


def test_another_device_s_results_are_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "section", lambda name: _section())
    path = tmp_path / "suite.json"
    run.main(["memory"], device="cpu", output=path, quick=True)
    kept = record.read(path) | {"device": "another"}
    path.write_text(record.json.dumps(kept))
    with pytest.raises(AlignvecError, match="holds results of 'another'"):
        run.main(["memory"], device="cpu", output=path, quick=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sections": ["speed"]}, "there is no section 'speed'; choose among"),
        ({"model": "huge"}, "--model 'huge' is not one of mistral-7b, small, tiny"),
        ({"device": "cuda"}, "there is no GPU"),
    ],
)
def test_refusals(options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.torch.cuda, "is_available", lambda: False)
    with pytest.raises(AlignvecError, match=said):
        run.main(**{"device": "cpu", **options})


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"target": None, "better": "lower", "unit": "s", "median": 1.0}, ("", "")),
        ({"target": 2.0, "better": "lower", "unit": "s", "median": 2.0}, ("<= 2 s", "met")),
        ({"target": 2e-3, "better": "lower", "unit": "s", "median": 3e-3}, ("<= 2 ms", "missed")),
        ({"target": 1000.0, "better": "higher", "unit": "x", "median": 1001.0}, (">= 1,000 x", "met")),
        ({"target": 1000.0, "better": "higher", "unit": "x", "median": 999.0}, (">= 1,000 x", "missed")),
    ],
)
def test_verdicts_of_rows(row: Row, said: tuple[str, str]) -> None:
    assert verdict(row) == said


def test_values_have_prefixes() -> None:
    assert shown(1.5e10, "B") == "15 GB"
    assert shown(4.2e-6, "s") == "4.2 us"
    assert shown(0.0, "s") == "0 s"
    assert shown(1.25, "x") == "1.25 x"


def test_memory(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run.main(["memory"], device="cpu", quick=True, output=tmp_path / "suite.json")
    rows = record.read(tmp_path / "suite.json")["rows"]
    one = median_of(rows, "merged copies", mixes=1)
    assert one is not None
    assert median_of(rows, "merged copies", mixes=30) == 30 * one
    dense = median_of(rows, "dense", mixes=1)
    assert 4 * one < dense < 4.1 * one  # type: ignore[operator]
    assert one < median_of(rows, "sign", mixes=30) < 1.25 * one  # type: ignore[operator]


def test_switching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switching.importlib.util, "find_spec", lambda name: None)
    run.main(["switching"], device="cpu", quick=True, output=tmp_path / "suite.json")
    rows = record.read(tmp_path / "suite.json")["rows"]
    assert {row["name"] for row in rows if row["missing"]} == {switching.PEFT, opponents.COMPILED}
    once = {name: median_of(rows, name, clock="device") for name in (switching.ONE_PASS["dense"], switching.SWITCH)}
    assert median_of(rows, switching.RATIO) == once[switching.ONE_PASS["dense"]] / once[switching.SWITCH]  # type: ignore[operator]


def test_a_gpu_has_graphs_and_two_clocks() -> None:
    listed = switching.cases(Setting("mistral-7b", "cuda"))
    clocks = [(c.parameters["clock"], c.parameters["graph"]) for c in listed if c.name == switching.ONE_PASS["dense"]]
    assert clocks == [("host", False), ("device", False), ("device", True)]
    assert next(case for case in listed if case.name == switching.RATIO).target == 1000
    assert not any(case.missing for case in listed if case.name == opponents.COMPILED)


def test_files_that_do_not_fit_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting("tiny", "cpu", quick=True)
    free = 1.5 * models.parameter_bytes(models.build(setting))
    monkeypatch.setattr(switching.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    chosen = [case for case in switching.cases(setting) if case.name in (switching.LOAD, switching.FROM_FILES)]
    missing = {row["name"]: row["missing"] for row in _measured(switching, setting, chosen)}
    assert missing[switching.LOAD] is None
    assert "do not fit in the 0 GB" in missing[switching.FROM_FILES]


def _measured(section: Any, setting: Setting, chosen: Sequence[Case]) -> list[Row]:
    """The rows of some cases, with those that they are compared with."""
    wanted = [case for case in section.cases(setting) if not case.missing]
    return [row for row in section.measure(setting, wanted) if row["name"] in {case.name for case in chosen}]


def test_every_re_merge_writes_the_same_mix(tmp_path: Path) -> None:
    model = models.build(Setting("tiny", "cpu"))
    vectors = models.vectors(model, "dense", 2)
    mix = {"v1": 300.0, "v2": -200.0}
    alignment = alignvec.attach(model, vectors)
    merge = Remerge(alignment, mix)
    base, *others = store(tmp_path, model, vectors)
    ways = merge.by_torch()
    ways |= {"one pass": merge.one_pass, "files": lambda: merge.from_files(base, tuple(others))}
    del ways[opponents.COMPILED]
    for name, call in ways.items():
        for out in merge.outs.values():
            out.fill_(float("nan"))
        call()
        for full, parameter in model.named_parameters():
            truth = parameter.double() + sum(c * vectors[label][full].double() for label, c in mix.items())
            torch.testing.assert_close(merge.outs[parameter].double(), truth, msg=f"{name}: {full}", rtol=0, atol=1e-6)
    merge.load(base)
    assert all(torch.equal(out, parameter) for parameter, out in merge.outs.items())


@pytest.mark.parametrize("text", ["dense", "lossless", "int8", "int4:group=64", "sign", "low-rank:rank=8", "sparse"])
def test_random_vectors_have_the_size_of_real_ones(text: str) -> None:
    model = models.build(Setting("tiny", "cpu"))
    made = models.vectors(model, text, 2)
    assert list(made) == ["v1", "v2"]
    first, second = made.values()
    assert set(first) == {name for name, _ in model.named_parameters()}
    if text != "lossless":  # its steps are the base's, and of float32 ones there are none
        name = "model.layers.0.mlp.down_proj.weight"
        assert first[name].float().std() == pytest.approx(2e-5, rel=0.35)
        assert text in ("sign", "int8", "int4:group=64") or not torch.equal(first[name], second[name])
    alignment = alignvec.attach(model, made)
    alignment.set(v1=1.0)
    logits = model(torch.tensor([[1, 2, 3]])).logits
    assert logits.isfinite().all()
    alignment.detach()


def test_mixes_differ() -> None:
    made = models.mixes(16, 3)
    assert len({tuple(mix.values()) for mix in made}) == 16
    assert all(value for mix in made for value in mix.values())


@pytest.mark.parametrize("section", ["switching", "memory", "merge"])
def test_pictures(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plot = pytest.importorskip("bench.plot", exc_type=ImportError)
    listed = registry.section(section).cases(Setting("mistral-7b", "cuda"))
    rows = [case.row([1.0 + at, 2.0]) if at % 5 else case.skipped("no") for at, case in enumerate(listed)]
    kept = {"bench": "suite", **record.environment("cpu"), "model": "tiny", "rows": rows}
    record.write(tmp_path / "suite.json", kept)
    plot.main(tmp_path / "suite.json")
    assert {path.name for path in tmp_path.glob("*.png")} == {f"suite-{section}.png"}
    assert (tmp_path / f"suite-{section}.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    plot.main()
    with pytest.raises(AlignvecError, match="name that file"):
        plot.main(output=tmp_path / "one.png")


def test_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "child", merging.run)  # in this process
    run.main(["merge"], device="cpu", quick=True, output=tmp_path / "suite.json")
    rows = record.read(tmp_path / "suite.json")["rows"]
    assert {row["missing"] for row in rows if row["name"] == merging.MERGES[merging.MERGEKIT]} == {
        None if merge.importlib.util.find_spec("mergekit") else "mergekit is not installed"
    }
    seconds, rate = (median_of(rows, "merge, dense", figure=figure) for figure in ("time", "throughput"))
    size = sum(file.stat().st_size for file in model_path("base").glob("*.safetensors"))
    assert 2.5 * size < seconds * rate <= 3 * size  # type: ignore[operator]


def test_every_extraction_and_merge_gives_the_same(tmp_path: Path) -> None:
    merge.write(Setting("tiny", "cpu"), torch.nn.Linear(1, 1), tmp_path)
    for way in (merging.EXTRACTS["lossless"], merging.EXTRACTS[merging.LOOP], merging.EXTRACTS["dense"]):
        merging.run(way, tmp_path, 1)
        found = next((tmp_path / "output").glob("*.safetensors"))
        if way != merging.EXTRACTS["lossless"]:
            deltas = load_file(found)
        (tmp_path / "output").rename(tmp_path / way.removeprefix("extract, "))
    loop = load_file(tmp_path / merging.LOOP / "model.safetensors")
    assert all(torch.equal(deltas[name], loop[name]) for name in deltas)
    assert not any(loop[name].any() for name in loop.keys() - deltas.keys())
    results = {}
    for text in ("dense", "lossless", merging.LOOP):
        merging.run(merging.MERGES[text], tmp_path, 1)
        (file,) = (tmp_path / "output").glob("*.safetensors")
        results[text] = load_file(file)
    for name, value in results["dense"].items():
        torch.testing.assert_close(results["lossless"][name], value, rtol=1e-2, atol=1e-4)
        torch.testing.assert_close(results[merging.LOOP][name], value, rtol=1e-2, atol=1e-4)


def test_a_process_of_its_own(tmp_path: Path) -> None:
    alone = merge.child(merging.IMPORTS, tmp_path, 1)
    assert alone["seconds"] == []
    assert 1e8 < alone["peak"] < 4e9
    with pytest.raises(AlignvecError, match=r"extract, dense .* failed: .*base"):
        merge.child(merging.EXTRACTS["dense"], tmp_path, 1)


def test_checkpoints_that_do_not_fit_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge.shutil, "disk_usage", lambda path: SimpleNamespace(free=1e6))
    listed = [case for case in merge.cases(Setting("tiny", "cpu")) if not case.missing]
    rows = list(merge.measure(Setting("tiny", "cpu"), listed))
    assert len(rows) == len(listed)
    assert all("do not fit in the 0 GB that are free" in row["missing"] for row in rows)


def test_the_micro_level(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting("tiny", "cpu", quick=True)
    listed = micro.cases(setting)

    def pytest_benchmark(*arguments: str, **environment: str) -> None:
        assert arguments[:2] == ("pytest", "bench/test_micro.py")
        assert environment == {micro.DEVICE: "cpu"}
        output = next(text for text in arguments if text.startswith("--benchmark-json=")).partition("=")[2]
        each = [{"extra_info": {"case": case.name}, "stats": {"data": [1e-6, 3e-6]}} for case in listed]
        Path(output).write_text(record.json.dumps({"benchmarks": each}))

    monkeypatch.setattr(micro, "python", pytest_benchmark)
    rows = list(micro.measure(setting, listed))
    assert [row["name"] for row in rows] == [case.name for case in listed]
    assert all((row["median"], row["samples"]) == (pytest.approx(2e-6), 2) for row in rows)


@pytest.mark.parametrize("case", micro.cases(Setting("tiny", "cpu")), ids=lambda case: case.name)
def test_micro_calls(case: Case) -> None:
    if case.missing:
        pytest.skip(case.missing)
    micro.call(Setting("tiny", "cpu"), case.name)()


def test_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner's rows are those of `bench.kernels`, which it runs."""
    measured = []

    def once(calls: dict[str, list[Any]], *_: Any) -> dict[str, Times]:
        return {name: Times(1e-3 * (i + 1), 0.9e-3 * (i + 1), 1.2e-3 * (i + 1), 9) for i, name in enumerate(calls)}

    def python(*arguments: str) -> None:
        assert arguments[0] == "bench.kernels"
        assert "--quick" in arguments
        output = Path(arguments[arguments.index("--output") + 1])
        kernels.main("cpu", output, quick=True)
        measured.extend(record.read(output)["rows"])

    monkeypatch.setattr(kernels, "SHAPES", {"cpu": (Shape("qkv", (64, 32, 32), 96),)})
    monkeypatch.setattr(kernels, "read_bandwidth", lambda device, repeats: 1e10)
    monkeypatch.setattr(bench_measure, "copies", lambda nbytes, device: 2)
    monkeypatch.setattr(bench_measure, "times", once)
    monkeypatch.setattr(section, "python", python)
    run.main(["kernels"], device="cpu", quick=True, output=tmp_path / "suite.json")
    rows = record.read(tmp_path / "suite.json")["rows"]
    totals = [row for row in measured if row["shape"] == "all" and row["section"] != "set"]
    dense = next(row for row in totals if row["case"] == "dense" and row.get("tokens") == 1 and row["target"])
    assert median_of(rows, "dense", tokens=1, dtype="bfloat16") == 1e-3 * dense["median_ms"]
    ratio = next(row for row in rows if row["name"] == f"dense, {section.RATIO}")
    assert (ratio["median"], ratio["target"], ratio["samples"]) == (pytest.approx(dense["ratio"]), dense["target"], 9)
    assert ratio["p20"] == pytest.approx(0.9 * ratio["median"])
    assert len([row for row in rows if row["unit"] == "s"]) == len(totals)
    speed = next(row for row in rows if row["name"] == f"re-merge, dense, {section.SPEEDUP}")
    assert speed["p20"] == pytest.approx(speed["median"] / 1.2)
    assert any(opponents.COMPILED in case.name for case in section.cases(Setting("mistral-7b", "cuda")))
