"""Which files in a folder are ours: what the library writes, and may replace when it is told to overwrite."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path

from alignvec.errors import AlignvecError
from alignvec.untrusted import read_json

TEMPLATES = "additional_chat_templates"  # a folder of further chat templates
TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", f"{TEMPLATES}/*"),
    *("vocab*", "merges.txt", "*.model", "*.spm", "*.tiktoken", "*.tokenizer", "tekken.json", "tokenization_*.py"),
    *("dict.txt", "emoji.json", "entity_vocab.json", "byte_maps.json", "normalizer.json"),
)
CONFIGS = ("generation_config.json", "config.json")
REPORT = "merge_report.json"
DESCRIPTIONS = ("alignment_vector.json", "adapter_config.json", REPORT, *CONFIGS)
WEIGHTS = re.compile(r"(alignment_vector|model|adapter_model)(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
INDEX = ".safetensors.index.json"


def is_weights(name: str) -> bool:
    """Whether a file of that name holds, or lists, weights."""
    return name.endswith((".safetensors", INDEX))


def is_tokenizer_file(name: str) -> bool:
    """Whether a file, its name as seen from the folder, belongs to a tokenizer."""
    return any(fnmatchcase(name, pattern) for pattern in TOKENIZER_FILES)


def not_ours(folder: Path) -> str | None:
    """The first entry that no vector, checkpoint, adapter or merge has, as its files and lists of files say."""
    listed = _listed(folder)
    for entry in sorted(folder.iterdir()):
        if entry.name == TEMPLATES and entry.is_dir() and not entry.is_symlink():
            if (foreign := next((e for e in sorted(entry.iterdir()) if not e.is_file()), None)) is not None:
                return f"{TEMPLATES}/{foreign.name}"
        elif entry.is_dir() or not (entry.name in listed or _known(entry.name)):
            return entry.name
    return None


def _known(name: str) -> bool:
    return name in DESCRIPTIONS or WEIGHTS.fullmatch(name) is not None or is_tokenizer_file(name)


def _listed(folder: Path) -> set[str]:
    """Files that an index of shards or the report of a merge names."""
    names: set[str] = set()
    for file in folder.iterdir():
        if not file.name.endswith(INDEX) and file.name != REPORT:
            continue
        try:
            data = read_json(file)
        except AlignvecError:
            continue
        found = data.get("files") if file.name == REPORT else data.get("weight_map")
        listed = found.values() if isinstance(found, dict) else found if isinstance(found, list) else ()
        names.update(name for name in listed if isinstance(name, str))
    return names
