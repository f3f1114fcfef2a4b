"""What is done to a folder: a few steps, each of them JSON, so that a case that failed can be kept and read."""

from __future__ import annotations

import json
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.fuzz import hostile
from tests.fuzz.files import data_start, parsed, with_header, with_tensor, with_value, without_tensors
from tests.fuzz.seals import DESCRIPTION, seal, unseal

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
LINKS = {"loop": "{name}", "device": "/dev/zero", "dangling": "nowhere", "outside": "/etc/hostname", "parent": ".."}
RAN = "ALIGNVEC_FUZZ_RAN"  # the variable of the environment that code of a folder sets when it is run
CODE = f"import os\n\nos.environ['{RAN}'] = '1'\n\n\nclass Config:\n    pass\n\n\nModel = Tokenizer = Config\n"
# After all others: checksums made anew, or taken out, and files that change places with the whole ones while they are
# read.
LAST = ("seal", "unseal", "alternate")


def plan(draw: random.Random, folder: Path) -> list[Step]:
    """One to three steps for the files of this folder, or some that belong together, and what is done after them.

    Half of the changed vectors keep their checksums, most others get those of what is there now.
    """
    steps = hostile.draw_steps(draw, folder) if draw.random() < 0.4 else _random_steps(draw, folder)
    if steps and draw.random() < 0.15:
        steps += hostile.draw_steps(draw, folder)
    if (folder / DESCRIPTION).exists() and draw.random() < 0.5:
        steps.append({"do": draw.choice(("seal", "seal", "seal", "unseal"))})
    if draw.random() < 0.03:
        steps.append({"do": "alternate"})
    return steps


def kept_seal(steps: list[Step]) -> bool:
    """Whether a vector's checksums are those that it was written with."""
    return not any(step["do"] in ("seal", "unseal") for step in steps)


def _random_steps(draw: random.Random, folder: Path) -> list[Step]:
    steps: list[Step] = []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        files = sorted(file.name for file in folder.iterdir() if file.is_file())
        file = draw.choice(files)
        tree = file.endswith((".json", ".safetensors"))
        if file.endswith(".safetensors") and draw.random() < 0.1:
            names = sorted(parsed((folder / file).read_bytes(), ".safetensors"))
            name = draw.choice(names).partition("/")[0]
            steps.append({"do": "everywhere", "file": file, "name": name, "to": draw.choice((*NAMES, *names))})
        elif tree and draw.random() < 0.55:
            steps.append(_in_tree(draw, folder / file))
        elif draw.random() < 0.8:
            whole = (folder / file).read_bytes()
            size, data = len(whole), data_start(whole) if file.endswith(".safetensors") else 0
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
        if step["do"] in LAST:
            {"seal": seal, "unseal": unseal}.get(step["do"], lambda folder: None)(folder)
            continue
        file = folder / step["file"]
        if step["do"] == "place":
            _place(file, step["what"])
        elif step["do"] in ("write", "code"):
            if not os.path.lexists(file):
                file.write_text(step.get("text", CODE))
        elif step["do"] == "link":
            _link(file, folder / step["to"], step["hard"])
        elif step["do"] == "set" and len(step["at"]) == 1 and not os.path.lexists(file):
            file.write_text(_set({}, step))
        elif step["do"] == "everywhere":
            for each in sorted(each for each in folder.iterdir() if each.is_file() and not each.is_symlink()):
                if each.suffix in (".json", ".safetensors"):
                    each.write_bytes(_renamed(each.read_bytes(), step, each.suffix))
        elif file.is_file() and not file.is_symlink():
            data = file.read_bytes()
            file.write_bytes(_bytes(data, step) if "byte" in step else _change(data, step, file.suffix))


def _in_tree(draw: random.Random, file: Path) -> Step:
    paths = list(_paths(parsed(file.read_bytes(), file.suffix)))
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


def _change(data: bytes, step: Step, suffix: str) -> bytes:
    """The file with one change, if there is a place for it."""
    try:
        if step["do"] == "tensor":
            return with_tensor(data, step["name"], step["dtype"], step["shape"], bytes([step.get("filled", 0)]))
        if step["do"] == "drop":
            return without_tensors(data, step["name"])
        if step["do"] == "number at":
            return with_value(data, step["name"], step["at"], step["value"])
        return _tree(data, step, suffix)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError, OverflowError):
        return data


def _tree(data: bytes, step: Step, suffix: str) -> bytes:
    """The file with one change in its JSON; of a safetensors file the header's, and its length is right."""
    root = parsed(data, suffix)
    if step["do"] == "set":
        text = _set(root, step).encode()
    else:
        above, key = root, step["at"][-1]
        for each in step["at"][:-1]:
            above = above[each]
        text = _changed(root, above, key, step).encode()
    return with_header(text, data) if suffix == ".safetensors" else text


def _set(root: Any, step: Step) -> str:
    """The JSON with a value in a place that need not be there yet."""
    above = root
    for each in step["at"][:-1]:
        above = above[each]
    above[step["at"][-1]] = json.loads(step["json"])
    return json.dumps(root)


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
        text = json.dumps(renamed(parsed(data, suffix))).encode()
    except (ValueError, RecursionError):
        return data
    return with_header(text, data) if suffix == ".safetensors" else text


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


def _link(file: Path, to: Path, hard: bool) -> None:
    if not os.path.lexists(file) and to.is_file():
        if hard:
            os.link(to, file)
        else:
            file.symlink_to(to.name)


def _place(file: Path, what: str) -> None:
    """Put something else where a file is, or could be."""
    if not file.parent.exists():
        file.parent.mkdir()
    if not file.parent.is_dir():
        return
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
        file.symlink_to(LINKS[what].format(name=file.name))
