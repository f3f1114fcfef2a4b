"""`alignvec surgery` end to end, one run a verb."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import alignvec
from alignvec import AlignmentVector
from alignvec.cli import main

NAMES = ("model.layers.0.mlp.up_proj.weight", "model.norm.weight")


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    for name in ("one", "two"):
        AlignmentVector({NAMES[0]: torch.randn(8, 6), NAMES[1]: torch.randn(6)}).save(name)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["alignvec", "surgery", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return run


def test_every_verb(cli) -> None:  # type: ignore[no-untyped-def]
    both = ("-v", "one", "-v", "second=two")
    for arguments, made in (
        (("ties", "ties", *both, "--density", "0.5"), ["ties"]),
        (("ties", "parts", *both, "--parts", "--dtype", "bfloat16"), ["parts/one", "parts/second"]),
        (("dare", "one", "dare", "--density", "0.5"), ["dare"]),
        (("truncate", "one", "small", "--rank", "2"), ["small"]),
        (("tsv", "tsv", *both, "--format", "int8"), ["tsv/one", "tsv/second"]),
        (("isotropic", "iso", *both), ["iso"]),
        (("remove-shared-mean", "apart", *both), ["apart/one", "apart/second", "apart/shared"]),
    ):
        status, output, errors = cli(*arguments)
        assert (status, errors) == (0, ""), arguments
        for folder in made:
            assert f"{folder}: " in output
            assert alignvec.load(folder).source["operation"].replace("_", "-").startswith(arguments[0])


def test_cosines_are_shown(cli) -> None:  # type: ignore[no-untyped-def]
    status, output, _ = cli("cosines", "-v", "one", "-v", "two", "--by", "kind")
    assert status == 0
    expected = alignvec.load("one").cosine(alignvec.load("two"))
    assert f"{expected:.3f}" in output
    assert "mlp.up_proj" in output


def test_bad_input_ends_in_a_line_and_2(cli) -> None:  # type: ignore[no-untyped-def]
    for arguments in (
        ("ties", "x", "-v", "one", "--density", "2"),
        ("truncate", "one", "x", "--rank", "0"),
        ("cosines", "-v", "one"),
        ("dare", "three", "x"),
        ("tsv", "one", "-v", "one", "-v", "two", "--by", "x"),
    ):
        status, _, errors = cli(*arguments)
        assert status == 2, arguments
        assert errors
    assert sorted(path.name for path in Path().iterdir()) == ["one", "two"]


def test_help_has_examples(cli) -> None:  # type: ignore[no-untyped-def]
    for verb in ("ties", "dare", "truncate", "tsv", "isotropic", "remove-shared-mean", "cosines"):
        status, output, _ = cli(verb, "--help")
        assert status == 0
        assert f"Example: alignvec surgery {verb}" in output
