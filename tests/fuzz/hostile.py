"""Changes that somebody makes who knows what is checked: files that are sound one by one and contradict each other."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from alignvec import formats
from alignvec.checkpoint import DTYPES
from alignvec.errors import AlignvecError
from tests.fuzz.fields import CODE, CONFIGS, EDGES, FIELDS, FRACTIONS, LABELS, SOURCES, TEXTS
from tests.fuzz.files import header_of

Step = dict[str, Any]
DESCRIPTION = "alignment_vector.json"
NAMES_OF_DTYPES = {dtype: name for name, dtype in DTYPES.items()}
LINKS = ("chat_template.jinja", "additional_chat_templates", "additional_chat_templates/tool.jinja", "vocab.json")
PLACES = ("pipe", "folder", "loop", "device", "socket", "dangling", "text", "outside", "parent")


def draw_steps(draw: random.Random, folder: Path) -> list[Step]:
    """Steps that belong together; none where the folder has nothing of the kind."""
    names = {file.name for file in folder.iterdir()}
    kinds = [_labels, _shards, _links]
    if DESCRIPTION in names:
        kinds = [_labels, _shards, _sources, *[_entries] * 4, *[_numbers] * 3, *[_options] * 2]
    elif "adapter_config.json" in names:
        kinds = [_labels, *[_fields] * 4, *[_tensors] * 2]
    else:
        kinds += [_fields, _fields, _fields, _tensors]
    return draw.choice(kinds)(draw, folder)


def _entries(draw: random.Random, folder: Path) -> list[Step]:
    """A tensor of another format, shape or option, with parts that fit what its entry says now."""
    tensors = _tensors_of(folder)
    sized = {name: entry if isinstance(entry, dict) else {"shape": entry} for name, entry in tensors.items()}
    wide = sorted(name for name in sized if len(sized[name]["shape"]) > 1)
    name = draw.choice(wide if draw.random() < 0.8 else sorted(sized))
    before = sized[name].get("format", "dense")
    kind = draw.choice((before, draw.choice(sorted(formats.FORMATS))))
    shape = list(sized[name]["shape"])
    if draw.random() < 0.3:
        shape[draw.randrange(len(shape))] = draw.choice([size for size in EDGES if 0 <= size <= 128])
    elif draw.random() < 0.2:
        shape = draw.choice(([1, *shape], [*shape, 1], shape[::-1], shape[1:], [2**36], [2**20, 2**16], [2**24, 3]))
    options = dict(formats.FORMATS[kind].OPTIONS)
    options |= sized[name].get("options") or {} if kind == before else {}
    if kind == "lossless" and not options["dtype"]:
        options |= {"width": draw.choice((2, 3, 8)), "dtype": draw.choice(("bfloat16", "bfloat16", "float16"))}
    if options and draw.random() < 0.5:
        key = draw.choice(sorted(options))
        near = {str: TEXTS, float: [*FRACTIONS, 1], int: EDGES}[type(formats.FORMATS[kind].OPTIONS[key])]
        options[key] = draw.choice(near)
    steps = [
        _set(DESCRIPTION, ["tensors", name, "shape"], shape),
        _set(DESCRIPTION, ["tensors", name, "format"], kind),
        _set(DESCRIPTION, ["tensors", name, "options"], options),
    ]
    if draw.random() < 0.8:
        steps.append(_set(DESCRIPTION, ["base", "tensors", name, "shape"], shape))
    try:
        layout = formats.layout(kind, tuple(shape), options)
    except (AlignvecError, ValueError, TypeError, OverflowError):
        return steps
    file = _file_of(folder, name)
    if kind != before:
        steps.append({"do": "drop", "file": file, "name": name})
    count = draw.choice((0, 1, 5, 40))
    for part, (dtypes, sizes) in layout.items():
        dtype = NAMES_OF_DTYPES[draw.choice(dtypes if isinstance(dtypes, tuple) else (dtypes,))]
        fitting = [count if size is None else size for size in sizes]
        key = f"{name}/{part}" if part else name
        filled = {"filled": draw.choice((0, 1, 0x3C, 0x7F, 0xFF))}
        steps.append({"do": "tensor", "file": file, "name": key, "dtype": dtype, "shape": fitting, **filled})
    return steps


def _options(draw: random.Random, folder: Path) -> list[Step]:
    """A value near a limit in a tensor's entry, its parts as they were."""
    tensors = _tensors_of(folder)
    name = draw.choice(sorted(tensors))
    entry = tensors[name]
    paths = [["options", key] for key in entry["options"]] if isinstance(entry, dict) else []
    paths += [["shape", at] for at in range(len(entry["shape"]))] if isinstance(entry, dict) else []
    paths += [["error", key] for key in ("relative", "norm")] if isinstance(entry, dict) else []
    at = ["tensors", name, *(draw.choice(paths) if paths else [0])]
    return [_set(DESCRIPTION, at, draw.choice([*EDGES, *FRACTIONS, *TEXTS]))]


def _sources(draw: random.Random, folder: Path) -> list[Step]:
    """What a vector says of where it comes from, and of its base's configuration."""
    steps = []
    for _ in range(draw.choice((1, 1, 2, 4))):
        place, table = draw.choice((("source", SOURCES), ("source", SOURCES), ("base", CONFIGS)))
        field = draw.choice(sorted(table))
        at = [place, field] if place == "source" else [place, "config", field]
        steps.append(_set(DESCRIPTION, at, draw.choice(table[field])))
    return steps


def _numbers(draw: random.Random, folder: Path) -> list[Step]:
    """Integers in parts: bitmaps that count other values, rows of a side table that go back, scales, any part."""
    steps: list[Step] = []
    files = sorted(folder.glob("*.safetensors"))
    for _ in range(draw.choice((1, 1, 2, 2, 4))):
        file = draw.choice(files)
        header = {name: entry for name, entry in header_of(file.read_bytes()).items() if name != "__metadata__"}
        told = [name for name in header if name.endswith(("/bitmap", "/side_start", "/side_columns", "/side_bits"))]
        name = draw.choice(sorted(told) if told and draw.random() < 0.8 else sorted(header))
        count = max(1, _count(header[name]["shape"]))
        at = draw.choice((0, count - 1, draw.randrange(count)))
        value = draw.choice((0, 1, -1, 2**15, 2**31, 2**31 - 1, 0x7F80, 0x7F7F, 0xFF, at, draw.randrange(1 << 16)))
        steps.append({"do": "number at", "file": file.name, "name": name, "at": at, "value": value})
    return steps


def _labels(draw: random.Random, folder: Path) -> list[Step]:
    """Another name of a dtype, or offsets and shapes near limits, in a safetensors header."""
    file = draw.choice(sorted(folder.glob("*.safetensors")))
    header = {name: entry for name, entry in header_of(file.read_bytes()).items() if name != "__metadata__"}
    name = draw.choice(sorted(header))
    what = draw.choice(("dtype", "dtype", "shape", "data_offsets", "data_offsets"))
    if what == "dtype":
        return [_set(file.name, [name, what], draw.choice(LABELS))]
    if not header[name][what]:
        return [_set(file.name, [name, what], [2**32, 2**32])]
    at = draw.randrange(len(header[name][what]))
    value = draw.choice((*EDGES, header[name][what][at] + 1, header[name][what][at] - 1))
    return [_set(file.name, [name, what, at], value)]


def _shards(draw: random.Random, folder: Path) -> list[Step]:
    """A tensor that two shards hold, or an index that names a shard by two names."""
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    source, target = draw.choice(files), draw.choice(files)
    header = header_of((folder / source).read_bytes())
    name = draw.choice(sorted(key for key in header if key != "__metadata__"))
    entry = header[name]
    steps: list[Step] = [
        {"do": "tensor", "file": target, "name": name, "dtype": entry["dtype"], "shape": entry["shape"]}
    ]
    index = next((file.name for file in folder.glob("*.index.json")), None)
    if index is None:
        stem = files[0].removesuffix(".safetensors")
        places = draw.choice((["a.safetensors"], ["a.safetensors", "b.safetensors"]))
        mapped = {key: draw.choice(places) for key in header if key != "__metadata__"}
        steps = [{"do": "write", "file": f"{stem}.safetensors.index.json", "text": json.dumps({"weight_map": mapped})}]
        steps += [{"do": "link", "file": place, "to": files[0], "hard": True} for place in places]
        return [*steps, {"do": "place", "file": files[0], "what": draw.choice(("nothing", "dangling"))}]
    if draw.random() < 0.6:
        other = draw.choice(("other.safetensors", source.upper(), f"./{source}", f"{source}/", f"x/../{source}"))
        steps = [_set(index, ["weight_map", name], other)]
        if "/" not in other:
            steps.append({"do": "link", "file": other, "to": source, "hard": draw.random() < 0.5})
    return steps


def _links(draw: random.Random, folder: Path) -> list[Step]:
    """What a tokenizer's files may be instead of files."""
    return [{"do": "place", "file": draw.choice(LINKS), "what": draw.choice(PLACES)}]


def _fields(draw: random.Random, folder: Path) -> list[Step]:
    """One to three fields of a configuration, and code that they may lead to."""
    held = [file for file in FIELDS if (folder / file).exists()] or ["config.json"]
    missing = [file for file in FIELDS if file not in held] if "config.json" in held else []
    steps: list[Step] = []
    for _ in range(draw.choice((1, 1, 2, 3))):
        file = draw.choice(held if not missing or draw.random() < 0.85 else missing)
        field = draw.choice(sorted(FIELDS[file]))
        steps.append(_set(file, [field], draw.choice(FIELDS[file][field])))
    return [*steps, {"do": "code", "file": CODE}]


def _tensors(draw: random.Random, folder: Path) -> list[Step]:
    """A tensor of another dtype or shape, of which the file is sound."""
    file = draw.choice(sorted(folder.glob("*.safetensors")))
    header = header_of(file.read_bytes())
    name = draw.choice(sorted(key for key in header if key != "__metadata__"))
    shape, dtype = list(header[name]["shape"]), header[name]["dtype"]
    if shape and draw.random() < 0.7:
        shape[draw.randrange(len(shape))] = draw.choice([size for size in EDGES if 0 <= size <= 128])
    elif draw.random() < 0.5:
        shape = draw.choice(([*shape, 1], [1, *shape], shape[::-1], []))
    if draw.random() < 0.5:
        dtype = draw.choice([label for label in LABELS if label])
    return [{"do": "tensor", "file": file.name, "name": name, "dtype": dtype, "shape": shape}]


def _set(file: str, at: list[Any], value: Any) -> Step:
    return {"do": "set", "file": file, "at": at, "json": json.dumps(value)}


def _count(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _tensors_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text())["tensors"]
    return found


def _file_of(folder: Path, name: str) -> str:
    """The shard that holds a delta's first part."""
    for file in sorted(folder.glob("*.safetensors")):
        if any(key.partition("/")[0] == name for key in header_of(file.read_bytes())):
            return file.name
    raise KeyError(name)
