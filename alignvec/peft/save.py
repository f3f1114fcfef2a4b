"""A low-rank alignment vector in, a LoRA adapter out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from alignvec.checkpoint import Checkpoint
from alignvec.errors import AlignvecError
from alignvec.folders import output_folder, write_json
from alignvec.inputs import read_from
from alignvec.pairing import EMBEDDINGS, HEADS
from alignvec.peft.base import CONFIG, PREFIX, STEM, Base
from alignvec.vector import AlignmentVector
from alignvec.writer import require_names

CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # model types with layers stored as [in, out]


def to_peft(
    vector: AlignmentVector,
    output: str | Path,
    base: str | Path | nn.Module | None = None,
    *,
    overwrite: bool = False,
    inputs: Sequence[Path] = (),
) -> None:
    """Write a low-rank vector as a LoRA adapter that `PeftModel.from_pretrained` loads onto the base.

    Low-rank deltas become LoRA with `lora_alpha = r`, dense deltas of the same modules' biases its `lora_bias`. Dense
    deltas of other modules, and low-rank ones of modules that LoRA is not known of (routers), are added to the base's
    values and stored whole, as `modules_to_save`.

    Args:
        base: the vector's base, a checkpoint or a live model. Needed for `modules_to_save`, and for models with Conv1D
            layers (GPT-2), which cannot be told from linear ones by their names.
        inputs: folders that `output` must not replace, beside those that the vector and the base are read from.

    Raises:
        AlignvecError: a delta that is neither low-rank nor dense, no low-rank one at all, an embedding tied to the head
            (PEFT edits one side only), dense deltas without a base, a base of other shapes, an occupied `output`.
            Nothing is written then.
    """
    known = None if base is None else Base.open(base)
    if known is None and vector.base is not None and vector.base.config.get("model_type") in CONV1D:
        raise AlignvecError("the vector's base has Conv1D layers: give the base, which says where")
    live = dict(zip(vector, vector, strict=True)) if known is None else known.live_names(vector.tensors)
    for name, info in vector.tensors.items():
        if known is not None and info.shape != (shape := known.shape(live[name])):
            raise AlignvecError(
                f"delta {name} is {list(info.shape)}, and {known.label} has {list(shape)}: give the vector's own base"
            )
    state: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    kinds = set()
    for name in vector:
        if vector.format_of(name).name == "low-rank" and not _whole(live[name], known):
            path, kind, factors = _factors(vector, name, live[name], known)
            ranks[path] = next(iter(factors.values())).shape[0]
            kinds.add(kind)
            state |= factors
    if not ranks:
        raise AlignvecError("the vector has no low-rank delta: convert it to format low-rank first")
    biased = _add_biases(vector, live, ranks, state)
    if biased and "embedding" in kinds:
        raise AlignvecError("PEFT has no LoRA bias beside LoRA of an embedding: leave one of them out of the vector")
    saved = _add_modules(vector, live, ranks, known, state)
    require_names(state)
    rank = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {re.escape(path): other for path, other in ranks.items() if other != rank}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base) if isinstance(base, (str, Path)) else vector.source.get("base"),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
        "modules_to_save": sorted(saved) or None,
        "lora_bias": biased,
        "bias": "none",
        "fan_in_fan_out": "conv1d" in kinds,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
    }
    read = [*inputs, *read_from(vector), *([Path(base)] if isinstance(base, (str, Path)) else [])]
    with output_folder(output, overwrite=overwrite, inputs=read, check=partial(Checkpoint.open, stem=STEM)) as folder:
        save_file({PREFIX + key: value.contiguous() for key, value in state.items()}, folder / f"{STEM}.safetensors")
        write_json(folder / CONFIG, config)


def _whole(live: str, base: Base | None) -> bool:
    """Whether a low-rank delta has to be stored as whole values: it is of no layer that LoRA is known of (a router)."""
    return base is not None and not base.adaptable(live.rpartition(".")[0])


def _factors(vector: AlignmentVector, name: str, live: str, base: Base | None) -> tuple[str, str, dict[str, Tensor]]:
    """The module's path, its kind, and what PEFT calls the two factors, A before B."""
    path, _, leaf = live.rpartition(".")
    encoded = vector.encoded(name)
    if leaf != "weight" or len(encoded.shape) != 2:
        raise AlignvecError(f"{name} {list(encoded.shape)} is no module's weight matrix, which is what LoRA edits")
    kind = base.kind(path) if base is not None else "embedding" if live.endswith(EMBEDDINGS) else "linear"
    a, b = encoded.parts["A"].cpu(), encoded.parts["B"].cpu()
    if _tied(vector, live, base):
        raise AlignvecError(f"{name} is tied to another weight, of which PEFT would edit one: untie them in the base")
    if kind != "linear":
        a, b = b.T, a.T
    if kind == "embedding":
        return path, kind, {f"{path}.lora_embedding_A": a, f"{path}.lora_embedding_B": b}
    return path, kind, {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}


def _tied(vector: AlignmentVector, live: str, base: Base | None) -> bool:
    """Whether another module shares this weight; without the base, from the names that the vector knows of it."""
    if base is not None:
        return bool(base.tied(live))
    return (
        live.endswith(EMBEDDINGS)
        and vector.base is not None
        and not any(name.endswith(HEADS) for name in vector.base.tensors)
    )


def _add_biases(vector: AlignmentVector, live: dict[str, str], ranks: dict[str, int], state: dict[str, Tensor]) -> bool:
    """Deltas of LoRA modules' biases as the biases of their B; PEFT has them for all modules, or none."""
    deltas = {
        path: vector[name].cpu()
        for name in vector
        for path, _, leaf in [live[name].rpartition(".")]
        if path in ranks and leaf == "bias"
    }
    for path in ranks if deltas else ():
        if (b := state.get(f"{path}.lora_B.weight")) is not None:
            state[f"{path}.lora_B.bias"] = deltas.get(path, torch.zeros(b.shape[0]))
    return bool(deltas)


def _add_modules(
    vector: AlignmentVector, live: dict[str, str], ranks: dict[str, int], base: Base | None, state: dict[str, Tensor]
) -> list[str]:
    """Dense deltas, added to the base's values: the modules that hold them, whole."""
    edits: dict[str, dict[str, str]] = {}
    for name in vector:
        path, _, leaf = live[name].rpartition(".")
        spec = vector.format_of(name)
        if path in ranks and leaf in ("weight", "bias"):
            continue
        if path in ranks or (spec.name != "dense" and not (spec.name == "low-rank" and _whole(live[name], base))):
            raise AlignvecError(
                f"{name} is stored as {spec}, which no LoRA holds: convert the vector to low-rank first"
            )
        if base is None:
            raise AlignvecError(f"{name} is dense, so PEFT stores its module whole: give the base to add it to")
        if base.tied(live[name]):
            raise AlignvecError(
                f"{name} is tied to another weight, of which PEFT would edit one: untie them in the base"
            )
        edits.setdefault(path, {})[leaf] = name
    for path, names in edits.items():
        assert base is not None
        for leaf, value in base.parameters_of(path).items():
            total = value.double() + vector[names[leaf]].double() if leaf in names else value
            narrow = total.to(value.dtype)
            state[f"{path}.{leaf}"] = narrow if torch.equal(narrow.double(), total.double()) else total.float()
    return list(edits)
