"""What is done to a folder: a few steps, each of them JSON, so that a case that failed can be kept and read."""

from __future__ import annotations

import json
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Step = dict[str, Any]
MARK = "@@mark@@"
# JSON texts that readers trip over.
NASTY = {
    "null": "null",
    "true": "true",
    "zero": "0",
    "minus one": "-1",
    "three": "3",
    "fraction": "0.5",
    "2^31": str(2**31),
    "2^40": str(2**40),
    "2^63": str(2**63),
    "2^64": str(2**64),
    "10^400": "1" + "0" * 400,
    "10^5000": "1" + "0" * 5000,
    "tiny": "5e-324",
    "1e308": "1e308",
    "1e999": "1e999",
    "NaN": "NaN",
    "Infinity": "Infinity",
    "-Infinity": "-Infinity",
    "empty text": '""',
    "long text": '"' + "x" * 100_000 + '"',
    "parentheses": '"' + "(" * 5000 + '"',
    "backtracking": '"(a+)+$"',
    "surrogate": '"\\ud800"',
    "newline": '"\\n\\u001b[31m"',
    "traversal": '"../outside.safetensors"',
    "absolute": '"/dev/zero"',
    "nul": '"a\\u0000b"',
    "empty list": "[]",
    "empty object": "{}",
    "list of null": "[null]",
    "shape of nothing": f"[0, {2**63}]",
    "negative shape": "[-3, 4]",
    "huge shape": f"[{2**20}, {2**22}]",
    "many sizes": "[" + ", ".join(["1"] * 100) + "]",
    "object of a list": '{"a": [1]}',
    "deep": "[" * 200_000 + "]" * 200_000,
    "deep objects": '{"a":' * 500 + "1" + "}" * 500,
    "open": "[" * 200_000,
    "many": "[" + ",".join(["[]"] * 100_000) + "]",
}
NAMES = ("", "..", "model.layers.²", "model.norm.weight/scales", "model.experts.0.w1.weight", "n" * 2000, "[/red]\n")
BYTES = (0x00, 0x7F, 0x80, 0xFF)
PLACES = ("pipe", "folder", "loop", "device", "nothing", "empty", "socket", "dangling", "text")


def plan(draw: random.Random, folder: Path) -> list[Step]:
    """One to three steps for the files of this folder."""
    steps: list[Step] = []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        files = sorted(file.name for file in folder.iterdir() if file.is_file())
        file = draw.choice(files)
        tree = file.endswith((".json", ".safetensors"))
        if file.endswith(".safetensors") and draw.random() < 0.1:
            names = sorted(_parsed((folder / file).read_bytes(), ".safetensors"))
            name = draw.choice(names).partition("/")[0]
            steps.append({"do": "everywhere", "file": file, "name": name, "to": draw.choice((*NAMES, *names))})
        elif tree and draw.random() < 0.55:
            steps.append(_in_tree(draw, folder / file))
        elif draw.random() < 0.8:
            size, data = (folder / file).stat().st_size, _data_start(folder / file)
            at = draw.randrange(data if data < size and draw.random() < 0.8 else 0, max(size, 1))
            length = draw.choice((1, 2, 8, size // 4 + 1))
            do = draw.choice(("fill", "fill", "flip", "cut", "extend"))
            steps.append({"do": do, "file": file, "at": at, "length": length, "byte": draw.choice(BYTES)})
        else:
            steps.append({"do": "place", "file": file, "what": draw.choice(PLACES)})
    return steps


def apply(folder: Path, steps: list[Step]) -> None:
    """Carry the steps out; one that finds nothing to do (a step before took it away) is left out."""
    for step in steps:
        file = folder / step["file"]
        if step["do"] == "place":
            _place(file, step["what"])
        elif step["do"] == "everywhere":
            for each in sorted(each for each in folder.iterdir() if each.is_file() and not each.is_symlink()):
                if each.suffix in (".json", ".safetensors"):
                    each.write_bytes(_renamed(each.read_bytes(), step, each.suffix))
        elif file.is_file() and not file.is_symlink():
            data = file.read_bytes()
            file.write_bytes(_bytes(data, step) if "byte" in step else _tree(data, step, file.suffix))


def _in_tree(draw: random.Random, file: Path) -> Step:
    paths = list(_paths(_parsed(file.read_bytes(), file.suffix)))
    at = draw.choice(paths) if paths else []
    do = draw.choice(("value", "value", "value", "number", "number", "swap", "delete", "twice", "rename", "wrap"))
    if do == "number":
        return {"do": do, "file": file.name, "at": at, "by": draw.choice((-1, 1, 2, 32))}
    if do == "swap":
        return {"do": do, "file": file.name, "at": at, "with": draw.choice(paths) if paths else []}
    return {"do": do, "file": file.name, "at": at, "to": draw.choice(list(NASTY))}


def _paths(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[list[Any]]:
    if path:
        yield list(path)
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from _paths(value, (*path, key))


def _data_start(file: Path) -> int:
    """Where the values of a safetensors file begin; 0 for other files."""
    data = file.read_bytes()
    return 8 + int.from_bytes(data[:8], "little") if file.suffix == ".safetensors" else 0


def _parsed(data: bytes, suffix: str) -> Any:
    if suffix == ".safetensors":
        data = data[8 : 8 + int.from_bytes(data[:8], "little")]
    return json.loads(data)


def _tree(data: bytes, step: Step, suffix: str) -> bytes:
    """The file with one change in its JSON; of a safetensors file the header's, and its length is right."""
    try:
        root = _parsed(data, suffix)
        above, key = root, step["at"][-1]
        for each in step["at"][:-1]:
            above = above[each]
        text = _changed(root, above, key, step).encode()
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return data
    return _with_header(text, data) if suffix == ".safetensors" else text


def _with_header(text: bytes, data: bytes) -> bytes:
    """A safetensors file with another header of the right length, and the values that it had."""
    size = int.from_bytes(data[:8], "little")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def _renamed(data: bytes, step: Step, suffix: str) -> bytes:
    """The file with another name for a tensor, and for its parts."""
    old, new = step["name"], step["to"]

    def renamed(tree: Any) -> Any:
        if isinstance(tree, list):
            return [renamed(each) for each in tree]
        if not isinstance(tree, dict):
            return tree
        names = {key: new + key[len(old) :] if key == old or key.startswith(f"{old}/") else key for key in tree}
        return {names[key]: renamed(value) for key, value in tree.items()}

    try:
        text = json.dumps(renamed(_parsed(data, suffix))).encode()
    except (ValueError, RecursionError):
        return data
    return _with_header(text, data) if suffix == ".safetensors" else text


def _changed(root: Any, above: Any, key: Any, step: Step) -> str:
    value, nasty, mark = above[key], NASTY.get(step.get("to", ""), ""), json.dumps(MARK)
    if step["do"] == "number":
        above[key] = value + step["by"] if abs(step["by"]) == 1 else value * step["by"]
    elif step["do"] == "swap":
        other, there = root, step["with"][-1]
        for each in step["with"][:-1]:
            other = other[each]
        above[key], other[there] = other[there], above[key]
        json.dumps(root)  # one inside of the other makes a circle, which is a ValueError
    elif step["do"] == "value":
        above[key] = MARK
    elif step["do"] == "delete":
        del above[key]
    elif step["do"] == "wrap":
        above[key] = [value]
    elif isinstance(above, list):  # "twice", or a name where there is none
        above.insert(key, value)
    else:
        above[MARK] = value
        nasty = json.dumps(key)
        if step["do"] == "rename":
            del above[key]
            nasty = NASTY[step["to"]] if NASTY[step["to"]].startswith('"') else '"renamed"'
    return json.dumps(root).replace(mark, nasty)


def _bytes(data: bytes, step: Step) -> bytes:
    at, length = min(step["at"], len(data)), step["length"]
    if step["do"] == "cut":
        return data[:at]
    if step["do"] == "extend":
        return data + bytes([step["byte"]]) * length
    changed = bytearray(data)
    for place in range(at, min(at + length, len(data))):
        changed[place] = step["byte"] if step["do"] == "fill" else changed[place] ^ (step["byte"] or 1)
    return bytes(changed)


def _place(file: Path, what: str) -> None:
    """Put something else where a file is."""
    if os.path.lexists(file) and (file.is_symlink() or not file.is_dir()):
        file.unlink()
    if os.path.lexists(file):
        return
    if what == "pipe":
        os.mkfifo(file)
    elif what == "folder":
        file.mkdir()
    elif what == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(file))
    elif what == "empty":
        file.touch()
    elif what == "text":
        file.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif what != "nothing":
        file.symlink_to({"loop": file.name, "device": "/dev/zero", "dangling": "nowhere"}[what])
