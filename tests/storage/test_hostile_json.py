"""The text of folders that strangers made: one clear error that names the file, whatever it holds, and no hang."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import alignvec
from alignvec import AlignmentVector, from_peft
from alignvec.checkpoint import Checkpoint
from alignvec.errors import AlignvecError
from alignvec.tokenizer_files import traits
from alignvec.untrusted import MOST_OBJECTS, MOST_TEXT, MOST_VALUES, parse_json, read_json
from tests.storage.checkpoints import weights, write_checkpoint

DEEP = "[" * 200_000
VECTOR, DATA = "alignment_vector.json", "alignment_vector.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A vector, a checkpoint in shards and an adapter's configuration: every file that is parsed."""
    AlignmentVector({"w": torch.ones(3, 4), "b": torch.ones(4)}).save(tmp_path / "v")
    write_checkpoint(tmp_path / "c", weights(), 3)
    (tmp_path / "c" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    return tmp_path


def opened(file: Path) -> None:
    """What reads a file, by its name."""
    if file.parent.name == "v":
        alignvec.load(file.parent)
    elif file.name == "tokenizer.json":
        traits(file.parent)
    elif file.name == "adapter_config.json":
        from_peft(file.parent)
    else:
        Checkpoint.open(file.parent)


FILES = [f"v/{VECTOR}", "c/model.safetensors.index.json", "c/config.json", "c/tokenizer.json", "c/adapter_config.json"]
TEXTS = {
    "brackets": DEEP,
    "nested": DEEP + "]" * 200_000,
    "nested a little": '{"a": ' + "[" * 70 + "]" * 70 + "}",
    "objects": '{"a":' * 5000,
    "digits": '{"a": ' + "1" * 5000 + "}",
    "surrogate": '{"a": "\\ud800"}',
    "surrogate in a name": '{"\\uDC00": 1}',
    "array": "[1]",
    "number": "1e400",
    "nothing": "",
    "many objects": "[" + "{}," * MOST_OBJECTS + "{}]",
    "many values": "[" + "1," * MOST_VALUES + "1,1]",
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("text", TEXTS.values(), ids=list(TEXTS))
def test_text_that_is_no_small_object_is_refused(folder: Path, name: str, text: str) -> None:
    file = folder / name
    file.write_text(text)
    with pytest.raises(AlignvecError, match=file.name) as caught:
        opened(file)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_bytes_that_are_no_text_are_refused(folder: Path, name: str) -> None:
    file = folder / name
    file.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(AlignvecError, match=file.name):
        opened(file)


@pytest.mark.parametrize("name", FILES)
def test_a_file_beyond_the_limit_is_not_read(folder: Path, name: str) -> None:
    os.truncate(folder / name, MOST_TEXT + 1)  # a hole: it takes no room
    with pytest.raises(AlignvecError, match=f"{Path(name).name} is larger than {MOST_TEXT} bytes"):
        opened(folder / name)


def pipe(file: Path) -> None:
    os.mkfifo(file)


def bound(file: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        os.chdir(file.parent)  # a socket's path is short
        made.bind(file.name)


PLACED: dict[str, Callable[[Path], object]] = {
    "a pipe": pipe,
    "a folder": Path.mkdir,
    "a socket": bound,
    "a device": lambda file: file.symlink_to("/dev/zero"),
    "symbolic links": lambda file: file.symlink_to(file.name),
    "a link that leads nowhere": lambda file: file.symlink_to("nowhere"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", [*FILES[1:3], f"v/{DATA}", "c/model-00001-of-00003.safetensors"])
@pytest.mark.parametrize("place", PLACED.values(), ids=list(PLACED))
def test_what_is_no_file_is_refused_and_not_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, place: Callable[[Path], object]
) -> None:
    monkeypatch.chdir(folder)
    file = folder / name
    file.unlink()
    place(file)
    kind = next(kind for kind, each in PLACED.items() if each is place)
    with pytest.raises(AlignvecError, match=f"{file.name} .*{kind}"):
        opened(file)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("place", PLACED.values(), ids=list(PLACED))
def test_a_description_or_an_adapter_that_is_no_file_is_not_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, place: Callable[[Path], object]
) -> None:
    monkeypatch.chdir(folder)
    for file in (folder / "v" / VECTOR, folder / "c" / "adapter_config.json"):
        file.unlink()
        place(file)
        with pytest.raises(AlignvecError, match=file.name):
            opened(file)


@pytest.mark.timeout(20)
def test_a_file_replaced_by_a_pipe_after_it_was_opened_is_not_waited_for(folder: Path) -> None:
    vector = alignvec.load(folder / "v")
    (folder / "v" / DATA).unlink()
    os.mkfifo(folder / "v" / DATA)
    with pytest.raises(AlignvecError, match="is a pipe"):
        vector.norm()


@pytest.mark.parametrize("name", ["x" * 5000 + ".safetensors", "a\0b.safetensors"])
def test_an_index_cannot_name_a_file_that_no_folder_can_hold(folder: Path, name: str) -> None:
    index = folder / "c" / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(data))
    with pytest.raises(AlignvecError) as caught:
        Checkpoint.open(folder / "c")
    assert len(str(caught.value)) < 600


EXACT = ("NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400, str(2**64), '{"b": 1, "b": 2}')


@pytest.mark.parametrize("text", EXACT, ids=[text[:12] for text in EXACT])
def test_numbers_and_keys_that_the_library_never_writes_are_refused_in_its_own_files(folder: Path, text: str) -> None:
    file = folder / "v" / VECTOR
    data = file.read_text().replace('"source": {}', f'"source": {{"a": {text}}}')
    file.write_text(data)
    with pytest.raises(AlignvecError, match=VECTOR):
        alignvec.load(folder / "v")


def test_files_of_others_may_hold_such_numbers(tmp_path: Path) -> None:
    """A tokenizer's model_max_length is 10^30, and a Mamba's time_step_limit ends at infinity."""
    file = tmp_path / "config.json"
    file.write_text('{"model_max_length": 1000000000000000019884624838656, "time_step_limit": [0.0, Infinity]}')
    assert read_json(file) == {"model_max_length": 10**30 + 19884624838656, "time_step_limit": [0.0, float("inf")]}
    assert parse_json(b'{"a": 18446744073709551615, "b": -1.5e300}', file, exact=True) == {
        "a": 2**64 - 1,
        "b": -1.5e300,
    }


TOKENIZERS = {
    "vocabulary": ("tokenizer.json", {"model": {"vocab": 5}}),
    "list of anything": ("tokenizer.json", {"model": {"vocab": [None, [], [[1], 2], "a"]}}),
    "added": ("tokenizer.json", {"added_tokens": 7}),
    "added by name": ("added_tokens.json", {"a": [1], "b": 10**400}),
    "end": ("config.json", {"eos_token_id": [1, "a", None, [2]]}),
    "template": ("tokenizer_config.json", {"chat_template": [1, {"name": [], "template": {}}]}),
}


@pytest.mark.parametrize(("name", "data"), TOKENIZERS.values(), ids=list(TOKENIZERS))
def test_a_tokenizer_of_any_json_has_traits(tmp_path: Path, name: str, data: object) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / name).write_text(json.dumps(data))
    assert "added tokens" in traits(tmp_path)
