"""The paper's experiments on a tiny random model: they run, and their data make the report."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from alignvec import AlignvecError
from alignvec.evaluate import Question, save_questions
from alignvec.search import load_grid
from bench.paper import experiments, report
from bench.paper.__main__ import main
from bench.paper.experiments import joint, targets
from bench.paper.setting import COEFFICIENTS, open_setting
from tests.models import random_vector, tiny

LEVELS = ("avoidance", "generic", "expert")
TEXTS = ("abc", "de", "fghi", "jk", "lmno", "p", "qrst", "uv", "wxyz")


@pytest.fixture(scope="module")
def setting_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TOML setting with a tiny base, two vectors and a few questions."""
    folder = tmp_path_factory.mktemp("setting")
    model = tiny(max_position_embeddings=1024)
    model.save_pretrained(folder / "base")
    letters = "abcdefghijklmnopqrstuvwxyz"
    made = Tokenizer(models.WordLevel({"<s>": 1, "</s>": 2} | {c: i + 10 for i, c in enumerate(letters)}, "<s>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    fast.save_pretrained(folder / "base")
    questions = [
        Question(domain, TEXTS[i], {level: TEXTS[i + 1 + j] for j, level in enumerate(LEVELS)})
        for domain in ("one", "two")
        for i in range(4)
    ]
    save_questions(folder / "questions.jsonl", questions)
    for seed, domain in enumerate(("one", "two")):
        random_vector(model, seed).save(folder / domain)
    (folder / "tiny.toml").write_text(
        'base = "base"\nquestions = "questions.jsonl"\ntrain = "questions.jsonl"\ndtype = "float32"\n'
        '[vectors]\none = "one"\ntwo = "two"\n'
    )
    return folder / "tiny.toml"


def test_experiments_run_and_make_the_report(
    setting_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "TRIALS", {"tpe": (4, 5)})
    monkeypatch.setattr(joint, "STEPS", 2)
    names = ["sweeps", "interference", "targets", "realised", "baselines", "joint", "transfer"]
    options = dict(device="cpu", scale=1.0, results=tmp_path / "results", report=tmp_path / "report")
    main(names, setting=[str(setting_file)], keep=False, **options)
    kept = {path.stem for path in (tmp_path / "results" / "tiny").iterdir()}
    # There is no safety vector to transfer with.
    assert kept == {"sweeps", "interference", "targets", "landscape", "joint", "realised", "baselines"}
    kept.remove("landscape")
    assert len(load_grid(tmp_path / "results" / "tiny" / "landscape.safetensors")) == 21**2
    found = json.loads((tmp_path / "results" / "tiny" / "targets.json").read_text())["data"]
    assert len(found["targets"]) == 9
    assert found["searches"]["hierarchical"]["within"] == 9
    assert found["check"]["mean"] < 0.05
    sweeps = json.loads((tmp_path / "results" / "tiny" / "sweeps.json").read_text())
    assert sweeps["versions"]["torch"]
    rates = sweeps["data"]["vectors"]["one"]["mean"]
    assert len(rates) == len(COEFFICIENTS)
    assert all(sum(levels) == pytest.approx(1) for mix in rates for levels in mix)
    first = rates[COEFFICIENTS.index(0.0)]
    assert first == sweeps["data"]["vectors"]["two"]["mean"][COEFFICIENTS.index(0.0)]  # both are the base there
    text = (tmp_path / "report" / "README.md").read_text()
    for name in kept:
        assert experiments.module(name).TITLE in text
        assert (tmp_path / "report" / f"{name}-tiny.png").stat().st_size > 10_000
    assert "Did the claims hold?" in text

    written = (tmp_path / "results" / "tiny" / "sweeps.json").read_bytes()
    main(["sweeps"], setting=[str(setting_file)], keep=True, **options)
    assert (tmp_path / "results" / "tiny" / "sweeps.json").read_bytes() == written


def test_the_kept_report_shows_the_kept_data(tmp_path: Path) -> None:
    report.write_report(report.RESULTS, tmp_path)
    kept = Path("docs/paper/README.md")
    assert (tmp_path / "README.md").read_text() == kept.read_text(), "run python -m bench.paper.report"


def test_refusals(setting_file: Path, tmp_path: Path) -> None:
    with pytest.raises(AlignvecError, match="no experiment sweps"):
        experiments.chosen(["sweps"])
    with pytest.raises(AlignvecError, match="neither a TOML file nor one of mistral-4m"):
        open_setting("mistral-7b")
    text = setting_file.read_text()
    broken = setting_file.with_name("broken.toml")
    for old, new, message in (
        ("questions =", "asked =", "is no setting"),
        ('two = "two"', "", "has questions of two, but no vector"),
        ('base = "base"', "base = ", "is no setting"),
    ):
        broken.write_text(text.replace(old, new))
        with pytest.raises(AlignvecError, match=message):
            open_setting(str(broken))
    (tmp_path / "any").mkdir()
    (tmp_path / "any" / "sweeps.json").write_text("{")
    with pytest.raises(AlignvecError, match="holds no data of an experiment"):
        report.read(tmp_path)
