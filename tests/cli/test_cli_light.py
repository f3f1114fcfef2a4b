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
from alignvec.cli.options import device_or_default
from alignvec.cli.terminal import answer
from alignvec.pictures import write_picture
from alignvec.recipes import model_path
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


HOSTILE = {
    "a\x1b[31mb": r"a\x1b[31mb",
    "two\nlines": r"two\nlines",
    "x\u202ey": r"x\u202ey",
    ":warning:": ":warning:",
    "\x9bm": r"\x9bm",
}


def test_names_reach_the_terminal_as_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    AlignmentVector({name: torch.ones(2, 2) for name in HOSTILE}).save(tmp_path / "v")
    assert call(monkeypatch, "inspect", "--tensors", str(tmp_path / "v")) == 0
    output = capsys.readouterr().out
    assert not set(output) & set("\x1b\x9b\u202e")
    for shown in HOSTILE.values():
        assert any(line.split()[:1] == [shown] for line in output.splitlines()), shown


def test_an_error_is_one_printable_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    AlignmentVector({name: torch.ones(2, 2) for name in HOSTILE}).save(tmp_path / "v")
    options = ["-v", f"v={tmp_path / 'v'}", "-m", "v=1"]
    assert call(monkeypatch, "merge", str(model_path("base")), str(tmp_path / "o"), *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("alignvec: ")
    assert error.count("\n") == 1
    assert r"a\x1b[31mb" in error
    assert not set(error) & set("\x1b\x9b\u202e")
    assert "\n" not in str(alignvec.errors.RowsError("no\nrows"))


def test_answers_keep_their_lines_and_lose_their_escapes() -> None:
    assert answer("a\nb", "one\n\ttwo\x1b]0;title\x07").plain == "a\\nb" + "one\n\ttwo\\x1b]0;title\\x07"


def test_a_name_that_the_terminal_has_no_letters_for(tmp_path: Path) -> None:
    AlignmentVector({"w\u00e9\u2713": torch.ones(2, 2)}).save(tmp_path / "v")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "alignvec", "inspect", "--tensors", str(tmp_path / "v")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert r"w\xe9\u2713" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    AlignmentVector({"w": torch.ones(2, 2)}).save(tmp_path / "v")
    command = [sys.executable, "-m", "alignvec", "inspect", str(tmp_path / "v")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "No space left on device" in done.stderr


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    for device in ("cuda:77", "nonsense", "meta"):
        with pytest.raises(alignvec.AlignvecError, match=f"--device {device}"):
            device_or_default(device)
    assert device_or_default("cpu") == "cpu"


def test_pictures_show_names_as_they_are(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    figure.subplots().set_title("$x_{$")  # no formula: it would not parse
    write_picture(figure, tmp_path / "p.png")
    assert [file.name for file in tmp_path.iterdir()] == ["p.png"]
    with pytest.raises(alignvec.AlignvecError, match=r"p\.nonsense ends like no picture"):
        write_picture(figure, tmp_path / "p.nonsense")


def test_an_error_is_not_as_long_as_a_file_has_it() -> None:
    error = str(alignvec.AlignvecError(f"{'n' * 100_000} is no tensor: choose another"))
    assert len(error) <= 4000
    assert error.endswith("n is no tensor: choose another")
