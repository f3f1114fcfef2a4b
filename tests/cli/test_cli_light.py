"""Help and version come without torch, and text of models and files is printed as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import alignvec
from alignvec.cli import main
from alignvec.vector import AlignmentVector

ROOT = Path(__file__).parents[2]
CODE = """
import contextlib, io, sys
from alignvec.cli import main
from alignvec.cli.app import app
from alignvec.cli.surgery import surgery
import typer
verbs = [[], ["surgery"], *([name] for name in typer.main.get_command(app).commands)]
verbs += [["surgery", name] for name in typer.main.get_command(surgery).commands]
for arguments in [["--version"], *([*verb, "--help"] for verb in verbs)]:
    sys.argv = ["alignvec", *arguments]
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        main()
    heavy = [name for name in ("torch", "transformers", "numpy", "matplotlib") if name in sys.modules]
    assert not heavy, (arguments, heavy)
print(len(verbs))
"""


def test_help_of_every_verb_imports_nothing_heavy() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["alignvec", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"alignvec {alignvec.__version__}\n"


def test_names_in_brackets_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    AlignmentVector({"[/red]": torch.ones(2), "[bold]w": torch.ones(2, 2)}).save(tmp_path / "[v]")
    assert call(monkeypatch, "inspect", str(tmp_path / "[v]"), "--tensors") == 0
    shown = capsys.readouterr().out
    for text in ("[/red]", "[bold]w", "[v]"):
        assert text in shown
