"""Preference pairs: from files, with errors that name the line, and from questions."""

import json

import pytest

from alignvec.errors import AlignvecError
from alignvec.evaluate import Question

pytest.importorskip("datasets")

from alignvec.cli.train import preferences
from alignvec.train import load_pairs, pairs_from_questions

GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}
TURN = [{"role": "user", "content": "a"}]
QUESTIONS = [
    Question(domain, f"{domain} {i}", {"low": f"low {domain} {i}", "mid": f"mid {domain} {i}", "high": f"high {i}"})
    for i in range(3)
    for domain in ("medical", "legal")
]


def _texts(pairs) -> list[tuple[str, str, str]]:
    return [tuple(pair[key][0]["content"] for key in ("prompt", "chosen", "rejected")) for pair in pairs]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: expected an object"),
        (json.dumps({"prompt": "a", "chosen": "b"}), "line 2: expected an object"),
        (json.dumps({**GOOD, "chosen": " "}), "line 2: .* must be texts"),
        (json.dumps({**GOOD, "prompt": TURN}), "line 2: .* must be texts"),
        (json.dumps({**GOOD, "rejected": "b"}), "line 2: chosen and rejected are the same"),
        (json.dumps({"prompt": TURN, "chosen": TURN, "rejected": [{"role": "x"}]}), "line 2: .* lists of messages"),
        (json.dumps({"prompt": TURN, "chosen": TURN, "rejected": [*TURN, *TURN]}), "texts and conversations"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str, tmp_path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(GOOD) + "\n" + line)
    with pytest.raises(AlignvecError, match=message):
        load_pairs(file)


def test_missing_and_empty_files_are_refused(tmp_path) -> None:
    with pytest.raises(AlignvecError, match="cannot be read"):
        load_pairs(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(AlignvecError, match="no preference pairs"):
        load_pairs(tmp_path / "empty.jsonl")


def test_preferences_are_taken_in_turn() -> None:
    medical = [question for question in QUESTIONS if question.domain == "medical"]
    pairs = _texts(pairs_from_questions(medical, [("high", "mid"), ("mid", "low")], 4))
    assert pairs == [
        ("medical 0", "high 0", "mid medical 0"),
        ("medical 1", "mid medical 1", "low medical 1"),
        ("medical 2", "high 2", "mid medical 2"),
        ("medical 0", "mid medical 0", "low medical 0"),
    ]


def test_a_joint_target_prefers_its_level_to_every_other() -> None:
    pairs = _texts(pairs_from_questions(QUESTIONS, {"medical": "high", "legal": "low"}))
    assert len(set(pairs)) == len(pairs) == 2 * len(QUESTIONS)
    assert all(chosen.startswith("high" if prompt.startswith("medical") else "low") for prompt, chosen, _ in pairs)


def test_unknown_levels_and_domains_are_refused() -> None:
    with pytest.raises(AlignvecError, match="no level 'expert'"):
        pairs_from_questions(QUESTIONS, {"medical": "expert", "legal": "low"})
    with pytest.raises(AlignvecError, match="legal has no preferences"):
        pairs_from_questions(QUESTIONS, {"medical": "high"})


def test_preferences_on_the_command_line() -> None:
    assert preferences(["medical=expert", "legal=a>b, b>c"]) == {"medical": "expert", "legal": [("a", "b"), ("b", "c")]}
    for wrong in ("medical", "medical=a>", "medical=a>b>c"):
        with pytest.raises(AlignvecError, match="--prefer"):
            preferences([wrong])
