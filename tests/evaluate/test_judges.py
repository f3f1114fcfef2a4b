"""Judges of texts: the classifier on held-out responses, the endpoint's against a server that misbehaves."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from alignvec.errors import AlignvecError
from alignvec.evaluate import Question
from alignvec.evaluate.judge import ClassifierJudge, EndpointJudge
from alignvec.evaluate.judge.endpoint import level_in
from alignvec.recipes.dataset import LEVELS, QUERIES, make_row, split_personas, split_topics

pytest.importorskip("sklearn")
pytest.importorskip("openai")


def questions(part: int, count: int, domains: tuple[str, ...] = tuple(QUERIES)) -> list[Question]:
    """Of the training (0) or held-out (1) topics and personas; the whole data set takes longer to make."""
    import random

    made, rng = [], random.Random(part)
    for domain in domains:
        for _ in range(count):
            topic = rng.choice(split_topics(domain)[part])
            intent = rng.choice(list(topic.facts))
            row = make_row(topic, intent, rng.choice(split_personas()[part]), "test", rng)
            made.append(Question(domain, row.query, {level: getattr(row, level) for level in LEVELS}))
    return made


@pytest.fixture(scope="module")
def classifier() -> ClassifierJudge:
    return ClassifierJudge.train(questions(0, 150))


def test_the_classifier_knows_the_levels_of_topics_it_never_saw(classifier: ClassifierJudge) -> None:
    held_out = questions(1, 60)
    assert classifier.levels == LEVELS
    assert classifier.accuracy(held_out) > 0.97
    texts = [question.responses["expert"] for question in held_out]
    assert classifier.judge([question.query for question in held_out], texts).count("expert") > 170
    assert classifier.probabilities(texts).sum(1) == pytest.approx(1)


def test_the_classifier_abstains_on_nothing_and_refuses_bad_input(classifier: ClassifierJudge) -> None:
    refusal = questions(1, 1)[0].responses["avoidance"]
    assert classifier.judge(["a", "b"], [" ", refusal]) == [None, "avoidance"]
    assert classifier.judge([], []) == []
    with pytest.raises(AlignvecError, match="one query a text"):
        classifier.judge(["a"], [])
    with pytest.raises(AlignvecError, match="no questions"):
        ClassifierJudge.train([])
    with pytest.raises(AlignvecError, match="cannot be trained"):
        ClassifierJudge.train([Question("d", "q", {"one": "!", "two": "?"})])


def test_a_reply_names_one_level_or_none() -> None:
    levels = ("avoidance", "generic", "expert")
    for reply in ('{"level": "expert"}', "Expert.", " **expert**\n", '```json\n{"level": "expert"}\n```'):
        assert level_in(reply, levels) == "expert", reply
    for reply in ("", "generic or expert", "not expert", '{"level": "master"}', '{"level": ["expert"]}', "[1]", "{}"):
        assert level_in(reply, levels) is None, reply


class Stub:
    """An endpoint that answers with what `script` says: a status, or the text of a reply."""

    def __init__(self) -> None:
        self.requests: list[dict] = []
        self.script: list[int | str] = []
        self.always: int | str = '{"level": "generic"}'
        self.schemas = True
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.requests.append(body)
                step = stub.script.pop(0) if stub.script else stub.always
                if not stub.schemas and "response_format" in body:
                    step = 400
                message = {"role": "assistant", "content": step}
                answer = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": []}
                if isinstance(step, str):
                    answer["choices"] = [{"index": 0, "finish_reason": "stop", "message": message}]
                payload = json.dumps(answer if isinstance(step, str) else {"error": {"message": "oops"}}).encode()
                self.send_response(200 if isinstance(step, str) else step)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(payload)))
                self.send_header("retry-after-ms", "1")
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *arguments: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    made = Stub()
    thread = threading.Thread(target=made.server.serve_forever, daemon=True)
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


def test_the_endpoint_is_asked_strictly_and_once_for_each_text(stub: Stub, tmp_path: Path) -> None:
    file = tmp_path / "replies.jsonl"
    judge = EndpointJudge("m", base_url=stub.url, cache=file)
    assert judge.judge(["q", "q", "p"], ["a", "a", "b"]) == ["generic"] * 3
    assert len(stub.requests) == 2
    first = stub.requests[0]
    assert first["temperature"] == 0
    schema = first["response_format"]["json_schema"]
    assert schema["strict"]
    assert schema["schema"]["properties"]["level"]["enum"] == ["avoidance", "generic", "expert"]
    assert "layperson" in first["messages"][0]["content"]
    assert json.loads(first["messages"][1]["content"])["question"] in ("q", "p")
    with file.open("a") as cut:
        cut.write('{"key": "half a li')
    again = EndpointJudge("m", base_url=stub.url, cache=file)
    assert again.judge(["q", "p", "r"], ["a", "b", "c"]) == ["generic"] * 3
    assert len(stub.requests) == 3
    assert len(file.read_text().splitlines()) == 3


def test_garbage_is_no_verdict(stub: Stub) -> None:
    stub.script = ["as I see it, generic, maybe expert", "{}"]
    assert EndpointJudge("m", base_url=stub.url, concurrency=1).judge(["q"] * 3, list("abc")) == [None, None, "generic"]


def test_a_server_without_schemas_is_asked_in_words(stub: Stub) -> None:
    stub.schemas, stub.always = False, "expert"
    judge = EndpointJudge("m", base_url=stub.url, concurrency=1)
    assert judge.judge(["q"] * 2, list("ab")) == ["expert"] * 2
    assert ["response_format" in request for request in stub.requests] == [True, False, False]


def test_a_busy_server_is_asked_again(stub: Stub) -> None:
    stub.script = [429, 503]
    assert EndpointJudge("m", base_url=stub.url).judge(["q"], ["a"]) == ["generic"]
    assert len(stub.requests) == 3


def test_a_failing_server_ends_in_one_sentence_and_what_came_is_kept(stub: Stub, tmp_path: Path) -> None:
    file = tmp_path / "replies.jsonl"
    stub.script, stub.always = ['{"level": "expert"}'], 500
    judge = EndpointJudge("m", base_url=stub.url, retries=1, concurrency=1, cache=file)
    with pytest.raises(AlignvecError, match=r"judge m at http://127.*failed, after 1 retries"):
        judge.judge(["q"] * 4, list("abcd"))
    assert len(file.read_text().splitlines()) == 1
    stub.always = 200  # an error in the guise of success
    with pytest.raises(AlignvecError, match="without a completion"):
        EndpointJudge("m", base_url=stub.url, cache=file).judge(["q"], ["e"])
    assert len(file.read_text().splitlines()) == 1
    stub.always = 401
    with pytest.raises(AlignvecError, match="set MY_KEY"):
        EndpointJudge("m", base_url=stub.url, key_variable="MY_KEY").judge(["q"], ["a"])
    stub.always = 400
    with pytest.raises(AlignvecError, match="failed"):
        EndpointJudge("m", base_url=stub.url).judge(["q"], ["a"])


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AlignvecError, match="timeout"):
        EndpointJudge("m", timeout=0)
    with pytest.raises(AlignvecError, match="levels"):
        EndpointJudge("m", levels={"one": "all there is"})
    (tmp_path / "other.jsonl").write_text('{"domain": "medical"}\n')
    with pytest.raises(AlignvecError, match="line 1"):
        EndpointJudge("m", cache=tmp_path / "other.jsonl")
