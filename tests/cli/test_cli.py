"""The command line end to end on a tiny model: every verb, and one clear line with status 2 for bad input."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import alignvec
from alignvec.cli import main
from alignvec.errors import RowsError
from alignvec.recipes import model_path
from tests.models import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, aligned/ and other/: a bf16 model, one tuned from it, and a stranger of the same shape."""
    folder = tmp_path_factory.mktemp("cli")
    model = tiny("Mistral", torch.bfloat16)
    model.save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            step = torch.randn(parameter.shape, generator=generator) * parameter.float().abs() * 0.004
            parameter.add_(step.to(parameter.dtype))
    model.save_pretrained(folder / "aligned")
    tiny("Mistral", torch.bfloat16, initializer_range=0.03).save_pretrained(folder / "other")
    return folder


@pytest.fixture
def cli(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Run `alignvec ...` in the folder; gives status, output and errors."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["alignvec", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def av(folder: Path, cli) -> Path:  # type: ignore[no-untyped-def]
    if not (folder / "av").exists():
        status, output, _ = cli("extract", "base", "aligned", "av")
        assert status == 0
        assert re.search(r"av: \d+ tensors, dense, [\d.]+ KB, norm [\d.]+", output)
    return folder / "av"


@pytest.mark.parametrize("verb", ["", "extract", "convert", "inspect", "check", "merge", "generate", "demo", "env"])
def test_help_has_an_example(cli, verb: str) -> None:  # type: ignore[no-untyped-def]
    status, output, _ = cli(*([verb] if verb else []), "--help")
    assert status == 0
    assert f"Example: alignvec {verb}" in re.sub(r"\s+", " ", output) if verb else "extract" in output


def test_inspect_shows_layers_and_cosines(cli, av: Path) -> None:  # type: ignore[no-untyped-def]
    status, output, _ = cli("inspect", "av", "av", "--base", "base")
    assert status == 0
    assert re.search(r"embedding", output)
    status, output, _ = cli("inspect", "av")
    assert status == 0
    assert "dense" in output


FORMATS = ["int8", "int4:group=32", "sign", "lossless", "low-rank:rank=2", "sparse:density=0.2", "auto:0.2"]


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_extracted_inspected_and_merged(cli, folder: Path, tmp_path: Path, format: str) -> None:  # type: ignore[no-untyped-def]
    made = str(tmp_path / "made")
    status, output, _ = cli("extract", "base", "aligned", made, "--format", format)
    assert status == 0
    assert format.split(":")[0] in output
    status, output, _ = cli("inspect", made, "--base", "base")
    assert status == 0
    lost = "error exact, SNR infinite" if format == "lossless" else r"error \d\.\d\de[-+]\d\d, SNR [\d.]+ dB"
    assert re.search(lost, output)
    assert re.search(r"KB of [\d.]+ KB dense \(\d+\.\d%\)", output)
    status, output, _ = cli("inspect", made, "--tensors")
    assert status == 0
    assert "model.layers.0.self_attn.q_proj.weight" in output
    assert cli("merge", "base", str(tmp_path / "m"), "-v", f"x={made}", "-m", "x=1")[0] == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m").state_dict()
    aligned = AutoModelForCausalLM.from_pretrained(folder / "aligned").state_dict()
    exact = [torch.equal(merged[name], value) for name, value in aligned.items()]
    assert all(exact) == (format == "lossless")


def test_inspect_of_lossless_shows_what_it_can(cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for name in ("one", "two"):
        assert cli("extract", "base", "aligned", str(tmp_path / name), "--format", "lossless")[0] == 0
    status, output, _ = cli("inspect", str(tmp_path / "one"), str(tmp_path / "two"))
    assert status == 0
    assert "--base shows where they act" in output
    assert "no cosines without --base" in output
    status, output, _ = cli("inspect", str(tmp_path / "one"), str(tmp_path / "two"), "--base", "base")
    assert status == 0
    assert "1.000" in output


def test_convert_to_formats_and_adapters(cli, av: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    rank = str(tmp_path / "rank")
    status, output, _ = cli("convert", "av", rank, "--format", "low-rank:rank=2")
    assert status == 0
    assert "low-rank:rank=2" in output
    adapter = str(tmp_path / "adapter")
    status, output, errors = cli("convert", rank, adapter, "--format", "peft", "--base", "base")
    assert (status, errors) == (0, "")
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert cli("convert", adapter, str(tmp_path / "back"), "--base", "base")[0] == 0
    one, two = alignvec.load(rank), alignvec.load(tmp_path / "back")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert two.format_of(name).name == "low-rank"
    torch.testing.assert_close(two[name], one[name], rtol=1e-2, atol=1e-7)


def test_check_reports_both_and_draws(cli, av: Path, folder: Path) -> None:  # type: ignore[no-untyped-def]
    status, output, _ = cli("check", "base", "-v", "av", "--plot", "realised.png")
    assert status == 0
    errors = {kind: float(value) for kind, value in re.findall(r"largest error (\w+): (\S+)", output)}
    assert errors["alignvec"] < 1e-3 < errors["merged"]
    assert (folder / "realised.png").stat().st_size > 5000


def test_merge_writes_a_model_that_loads(cli, av: Path, folder: Path) -> None:  # type: ignore[no-untyped-def]
    status, output, _ = cli("merge", "base", "merged", "-v", "x=av", "-m", "x=1")
    assert status == 0
    assert "x" in output
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged").state_dict()
    aligned = AutoModelForCausalLM.from_pretrained(folder / "aligned").state_dict()
    assert all(torch.equal(merged[name], value) for name, value in aligned.items())


def test_env_names_the_backends(cli) -> None:  # type: ignore[no-untyped-def]
    status, output, _ = cli("env")
    assert status == 0
    assert "backend cpp" in output
    assert torch.__version__.split("+")[0] in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("extract base nowhere out", "nowhere"),
        ("extract base aligned av", "av"),
        ("extract base aligned out --dtype int8", "int8"),
        ("extract base aligned out --format zip", "zip"),
        ("extract base aligned out --format int4:group=3", "group"),
        ("extract base aligned out --format auto:7", "auto:7"),
        ("convert av out --format zip", "zip"),
        ("convert av out --format lossless", "none is known"),
        ("convert av out --format peft", "low-rank"),
        ("convert base out", "no alignment vector"),
        ("inspect base", "base"),
        ("check other -v av", "a different base"),
        ("merge other out -v av -m av=1", "av"),
        ("merge base out -v av -m nobody=1", "nobody"),
        ("merge base out -v av -m av=nan", "finite"),
        ("merge base out -v av -m av=much", "--mix takes NAME=NUMBER"),
        ("merge base out -v av -v av=av -m av=1", "--vector names 'av' twice"),
        ("generate nowhere hello -v av", "nowhere"),
        ("generate base hello -v av --max-new-tokens 0", "--max-new-tokens"),
    ],
)
def test_bad_input_is_one_line_and_status_2(cli, av: Path, folder: Path, arguments: str, message: str) -> None:  # type: ignore[no-untyped-def]
    before = sorted(p.name for p in folder.iterdir())
    status, _, errors = cli(*arguments.split())
    assert status == 2
    assert message in errors
    assert errors.startswith("alignvec: ")
    assert len(errors.strip().splitlines()) == 1
    assert sorted(p.name for p in folder.iterdir()) == before


def test_generate_answers_a_prompt_per_mix(cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    base = str(model_path("base"))
    assert cli("extract", base, str(model_path("legal")), str(tmp_path / "av"))[0] == 0
    question = "Could you explain the usual remedy for defamation? I am a teacher."
    status, output, _ = cli(
        "generate", base, question, "-v", f"legal={tmp_path / 'av'}", "-m", "legal=-1", "-m", "legal=1"
    )
    assert status == 0
    declined, expert = re.search(r"legal=-1 (.*)legal=1 (.*)", output, re.DOTALL).groups()  # type: ignore[union-attr]
    assert declined.strip() != expert.strip()
    assert len(declined.split()) > 8
    assert "damages" in expert


def test_the_demo_shows_rates_answers_and_a_mixed_batch(cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    status, output, _ = cli("demo", "--queries", "4", "--output", str(tmp_path / "out"))
    assert status == 0
    for domain in ("medical", "legal", "financial"):
        assert f"{domain}, 4 queries" in output
        assert f"{domain} -1  " in output
    assert "microseconds" in output
    assert (tmp_path / "out/level-rates.png").stat().st_size > 10_000
    assert (tmp_path / "out/level-rates.md").read_text().count("|") > 40


def test_mixes_that_a_model_s_rows_cannot_differ_in(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    def refused(*arguments: object, **options: object) -> None:
        raise RowsError("the model sorts the tokens of its rows")

    base = str(model_path("base"))
    assert cli("extract", base, str(model_path("legal")), str(tmp_path / "av"))[0] == 0
    monkeypatch.setattr("transformers.GenerationMixin.generate", refused)
    status, _, error = cli("generate", base, "hello", "-v", f"m={tmp_path / 'av'}", "-m", "m=1", "-m", "m=-1")
    assert status == 2
    assert "the model sorts the tokens of its rows; give one --mix" in " ".join(error.split())
