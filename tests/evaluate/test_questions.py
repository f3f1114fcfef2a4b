"""Question files, whole and damaged."""

from pathlib import Path

import pytest

from alignvec import AlignvecError
from alignvec.evaluate import Question, load_questions, save_questions
from alignvec.recipes.dataset import LEVELS, make_rows

GOOD = '{"domain": "d", "query": "q", "responses": {"no": "a", "yes": "b"}}'


def test_questions_survive_the_file(tmp_path: Path) -> None:
    questions = [row.question() for row in make_rows("legal", "test")[:3]]
    questions.append(Question("völkerrecht", "Wie?", dict.fromkeys(LEVELS, "So – nicht.")))
    save_questions(tmp_path / "deep" / "questions.jsonl", questions)
    assert load_questions(tmp_path / "deep" / "questions.jsonl") == questions
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["questions.jsonl"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no questions"),
        (GOOD + "\n{", "line 2: expected an object"),
        (GOOD + "\n\n[1]", "line 3: expected an object"),
        ('{"domain": "d", "query": "q", "responses": {"no": "a", "yes": " "}}', "not empty"),
        ('{"domain": "d", "query": 3, "responses": {"no": "a", "yes": "b"}}', "must be texts"),
        ('{"domain": "d", "query": "q", "responses": {"no": "a"}}', "two levels at least"),
        (GOOD + "\n" + GOOD.replace("yes", "maybe"), "levels no, maybe, the first question has no, yes"),
        ("\udcff", "cannot be read"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(AlignvecError, match=message):
        load_questions(file)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AlignvecError, match="cannot be read"):
        load_questions(tmp_path / "none.jsonl")
