"""The files of a tokenizer beside a model: what they say, where two of them differ, and putting them elsewhere."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignvec.errors import AlignvecError
from alignvec.folders import write_json
from alignvec.owned import CONFIGS, TEMPLATES, TOKENIZER_FILES, is_tokenizer_file
from alignvec.pairing import EMBEDDINGS
from alignvec.printable import shown
from alignvec.sources import Source, StoredSource, local_path
from alignvec.untrusted import present, read_json, read_text

if TYPE_CHECKING:
    from alignvec.vector import AlignmentVector

MAIN = ("tokenizer*", "vocab*", "*.model", "*.spm", "*.tiktoken", "*.tokenizer", "tekken.json")  # one of them is needed
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class TokenizerWarning(UserWarning):
    """A merged model keeps its base's tokenizer, and the model that a vector comes from has another one."""


def files(folder: Path) -> Iterator[Path]:
    """The tokenizer's files, sorted by name, those of further chat templates last."""
    for place in (folder, folder / TEMPLATES):
        for file in sorted(place.iterdir()) if place.is_dir() else ():
            if file.is_file() and is_tokenizer_file(file.relative_to(folder).as_posix()):
                yield file


def is_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a tokenizer that can be loaded."""
    return any(fnmatchcase(file.name, pattern) for file in files(folder) for pattern in MAIN)


def traits(folder: Path) -> dict[str, str]:
    """What a tokenizer is known by, as text or 16 hex digits; empty for a folder without one.

    The keys: ``chat template``, ``vocabulary``, ``added tokens``, one for each special token that is set, and
    ``eos_token_id``, the tokens that end an answer. Settings that change with versions or with use (truncation, side
    of the padding, how a file is laid out) do not count.
    """
    if not is_tokenizer(folder):
        return {}
    found: dict[str, str] = {}
    vocabulary, added = _tokens(folder)
    if vocabulary:
        found["vocabulary"] = _digest(sorted(vocabulary.items()))
    found["added tokens"] = _digest(sorted(added.items()))
    if templates := _templates(folder):
        found["chat template"] = _digest(templates)
    special = {**_read(folder / "special_tokens_map.json"), **_read(folder / "tokenizer_config.json")}
    for name in SPECIAL:
        token = special.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[name] = token
    for file in CONFIGS:
        if (ids := _read(folder / file).get("eos_token_id")) is not None:
            several = ids if isinstance(ids, list) else [ids]
            numbers = all(isinstance(token, int) for token in several)
            found["eos_token_id"] = json.dumps(sorted(several) if numbers else several)
            break
    return found


def differing(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """What differs between two tokenizers' ``traits``; nothing where one of them is not known.

    A vocabulary, and tokens that end an answer, are compared where both say them.
    """
    if not one or not other:
        return []
    both = ("vocabulary", "eos_token_id")
    keys = [key for key in dict.fromkeys([*one, *other]) if key not in both or (key in one and key in other)]
    return sorted(key for key in keys if one.get(key) != other.get(key))


def tokenizer_record(source: Source) -> dict[str, Any]:
    """``{"tokenizer": traits}`` for what a vector keeps as its ``source``; empty for a live model, or without one."""
    if not isinstance(source, StoredSource):
        return {}
    path = source.checkpoint.path
    found: dict[str, str] = {}
    with contextlib.suppress(AlignvecError):  # weights can be extracted beside a file that is no JSON
        found = traits(path if path.is_dir() else path.parent)
    return {"tokenizer": found} if found else {}


def notes_on(
    base: str, folder: Path, vectors: Mapping[str, AlignmentVector], coefficients: Mapping[str, float]
) -> tuple[str, ...]:
    """A sentence for each vector in use that comes from a model with another tokenizer than the one in ``folder``, as
    far as its extraction recorded it. ``base``: what the model in ``folder`` is called."""
    recorded = {label: vector.source.get("tokenizer") for label, vector in vectors.items() if coefficients[label]}
    own: dict[str, str] = {}
    with contextlib.suppress(AlignvecError):
        own = traits(folder) if any(recorded.values()) else {}
    notes = []
    for label, theirs in recorded.items():
        if isinstance(theirs, dict) and (parts := differing(own, theirs)):
            aligned = shown(vectors[label].source.get("aligned", "the aligned model"))
            notes.append(
                f"the merged model has the tokenizer of {base}; vector {label!r} comes from {aligned}, whose tokenizer "
                f"has another {shown(', '.join(parts))}: give tokenizer=FOLDER (--tokenizer) to write that one"
            )
    return tuple(notes)


def replacement_for(base: StoredSource, given: str | Path) -> Path:
    """The folder of a tokenizer, or of a hub id's, all of whose tokens have a row in the base's embedding.

    Raises AlignvecError for a folder without a tokenizer, and for a tokenizer with more tokens than rows.
    """
    folder = local_path(given, files=[*TOKENIZER_FILES, *CONFIGS])
    if not is_tokenizer(folder):
        raise AlignvecError(f"{given} holds no tokenizer: give a folder with tokenizer.json, or a hub id")
    vocabulary, added = _tokens(folder)
    highest = max([*vocabulary.values(), *added.values()], default=-1)
    embedding = next((name for name, info in base.tensors.items() if name.endswith(EMBEDDINGS) and info.shape), None)
    if embedding is not None and highest >= (rows := base.tensors[embedding].shape[0]):
        raise AlignvecError(
            f"the tokenizer of {given} has tokens up to {highest}, and {embedding} of the merged model has {rows} "
            "rows: give one that fits the base's vocabulary"
        )
    return folder


def copy_tokenizer(source: Path, target: Path) -> None:
    """Put the tokenizer of ``source`` in the place of what ``target`` has, with the ids of the tokens that begin, end
    and pad an answer in the configs that are there."""
    for file in list(files(target)):
        file.unlink()
    for file in files(source):
        place = target / file.relative_to(source)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, place)
    said = _read(source / "config.json") | _read(source / "generation_config.json")
    ids = {key: said[key] for key in IDS if said.get(key) is not None}
    for name in CONFIGS if ids else ():
        if (target / name).is_file():
            write_json(target / name, _read(target / name) | ids)


def _tokens(folder: Path) -> tuple[dict[str, int], dict[str, int]]:
    """The vocabulary (tokenizer.json's, else vocab.json's), and the tokens that were added to it."""
    data = _read(folder / "tokenizer.json")
    model = data.get("model") if isinstance(data.get("model"), dict) else {}
    assert isinstance(model, dict)
    listed = model.get("vocab") or _read(folder / "vocab.json")
    if isinstance(listed, dict):
        vocabulary = {str(token): int(index) for token, index in listed.items() if isinstance(index, int)}
    else:  # a Unigram model: pairs of token and score
        pairs = listed if isinstance(listed, list) else []
        vocabulary = {str(entry[0]): index for index, entry in enumerate(pairs) if isinstance(entry, list) and entry}
    added = {str(token): index for token, index in _read(folder / "added_tokens.json").items()}
    listed = data.get("added_tokens")
    for entry in listed if isinstance(listed, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("id"), int):
            added[str(entry.get("content"))] = entry["id"]
    return vocabulary, {
        token: index for token, index in added.items() if isinstance(index, int) and vocabulary.get(token) != index
    }


def _templates(folder: Path) -> dict[str, str]:
    """Chat templates by name, wherever the version that wrote them put them."""
    given = _read(folder / "tokenizer_config.json").get("chat_template")
    given = given or _read(folder / "chat_template.json").get("chat_template")
    found = {"default": given} if isinstance(given, str) else {}
    if isinstance(given, list):
        found = {str(entry.get("name")): str(entry.get("template")) for entry in given if isinstance(entry, dict)}
    if (file := folder / "chat_template.jinja").is_file():
        found["default"] = read_text(file)
    for file in sorted((folder / TEMPLATES).glob("*.jinja")):
        found[file.stem] = read_text(file)
    return found


def _read(file: Path) -> dict[str, Any]:
    return read_json(file) if present(file) else {}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
