"""Preference training whose product is an alignment vector: TRL's DPO (arXiv 2305.18290) of weights, or of a LoRA."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from alignvec.errors import AlignvecError
from alignvec.loading import load_model
from alignvec.train.packages import quiet, require
from alignvec.train.pairs import COLUMNS, is_conversation, load_pairs
from alignvec.train.resume import checkpoint, claim
from alignvec.vector import AlignmentVector

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

METHODS = ("full", "lora")
PRECISIONS = ("auto", "float32", "mixed", "bfloat16")


def train_dpo(
    base: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Dataset | str | Path,
    *,
    method: str = "full",
    frozen: Sequence[str] = ("embedding",),
    rank: int = 16,
    alpha: float | None = None,
    targets: str | Sequence[str] = "all-linear",
    keep: float = 1.0,
    steps: int | None = None,
    epochs: float = 1.0,
    learning_rate: float | None = None,
    batch_size: int = 8,
    gradient_accumulation: int = 1,
    beta: float = 0.1,
    sft_weight: float = 0.0,
    max_length: int | None = None,
    precision: str = "auto",
    dtype: str | torch.dtype | None = None,
    device: str = "auto",
    seed: int = 0,
    work_folder: str | Path | None = None,
    dpo: Mapping[str, Any] | None = None,
    callbacks: Iterable[TrainerCallback] = (),
    progress: bool = False,
) -> AlignmentVector:
    """Train on preference pairs with DPO; gives `W_trained - W_base` with the base's identity.

    The base is not touched: a folder is loaded, a live model copied. Log-probabilities of the reference, which is the
    base, are computed before training, so that one model is in memory.

    Args:
        base: a transformers folder, or a live model without attached vectors.
        pairs: prompt, chosen and rejected in one of TRL's formats, or the JSON lines that `load_pairs` reads.
        method: "full" trains the weights, and gives dense deltas; "lora" trains an adapter (PEFT), and gives low-rank
            deltas as they are.
        frozen: with "full", what stays as it is: patterns of parameter names (`"*norm*"`), and "embedding", which is
            also the head where the two are tied. Moving it makes words likelier everywhere, and dialled below zero the
            vector would lose them.
        rank, alpha, targets: of the LoRA; alpha is twice the rank by default, targets are names of modules.
        keep: how far the result goes from the base to where the run ends. Averaging weights (WiSE-FT,
            arXiv 2109.01903) undoes an overshoot.
        steps: of the optimiser; default: `epochs` passes over the pairs.
        learning_rate: default 1e-6, with "lora" 1e-5.
        batch_size: pairs at a time on a device, of which `gradient_accumulation` batches make a step.
        sft_weight: of the supervised loss on chosen responses beside DPO's.
        max_length: prompt and response, in tokens, cut at the end; default: not cut.
        precision: "float32"; "mixed": float32 weights, computed in bfloat16; "bfloat16": weights too, which suits a
            LoRA's base, while small updates of full training are rounded away. "auto": "float32" on a CPU, on GPUs
            "bfloat16" for a LoRA and else "mixed".
        dtype: of dense deltas; default: the base's, which keeps differences to 8 bits in bfloat16.
        device: "cpu", or "auto": what accelerate finds.
        work_folder: keeps checkpoints, ten a run, from which a run that was cut short goes on when it is called again.
        dpo: any other field of TRL's DPOConfig, such as `{"optim": "adamw_bnb_8bit", "gradient_checkpointing": False}`.
        callbacks: transformers' callbacks.
        progress: draw a bar.

    Raises:
        AlignvecError: an option out of range or unknown, malformed pairs, a base with vectors attached, a work folder
            of another run, missing packages; before anything is trained. Also when training changed nothing, or ended
            in NaN.
    """
    require("trl", "datasets", "accelerate", *(["peft"] if method == "lora" else []))
    _check(method, precision, device, keep=keep, steps=steps, epochs=epochs, batch_size=batch_size, rank=rank)
    given = load_pairs(pairs) if isinstance(pairs, (str, Path)) else pairs
    _check_pairs(given, tokenizer)
    device = "cuda" if device == "auto" and torch.cuda.is_available() else device
    if precision == "auto":
        precision = "float32" if device in ("cpu", "auto") else "bfloat16" if method == "lora" else "mixed"
    settings: dict[str, Any] = {
        "max_steps": -1 if steps is None else steps,
        "num_train_epochs": epochs,
        "learning_rate": learning_rate or (1e-6 if method == "full" else 1e-5),
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": gradient_accumulation,
        "beta": beta,
        "loss_type": ["sigmoid", "sft"] if sft_weight else ["sigmoid"],
        "loss_weights": [1.0, sft_weight] if sft_weight else None,
        "max_length": max_length,
        "bf16": precision != "float32",
        "use_cpu": device == "cpu",
        "precompute_ref_log_probs": method == "full",
        "seed": seed,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 25,
        **(dpo or {}),
    }
    if steps is not None:
        wanted = steps * batch_size * gradient_accumulation
        given = given.shuffle(seed=seed).select(range(wanted)) if len(given) > wanted else given
    model = _own_copy(base, torch.bfloat16 if precision == "bfloat16" else torch.float32)
    lora = _lora(rank, alpha, targets) if method == "lora" else None
    if lora is None:
        _check_layout(base, model)
        _freeze(model, frozen)
    with ExitStack() as stack:
        stack.enter_context(quiet())
        if work_folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            settings["save_strategy"] = "no"
        else:
            folder = claim(work_folder, given, {"method": method, "rank": rank, "frozen": list(frozen)} | settings)
            settings = {"save_steps": 0.1, "save_total_limit": 1} | settings
        trainer = _trainer(model, tokenizer, given, folder, settings, lora)
        for callback in [*callbacks, *([_bar(stack)] if progress else [])]:
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=checkpoint(folder))
        trained = trainer.accelerator.unwrap_model(trainer.model)
    return _low_rank(base, trained, keep) if lora is not None else _dense(base, trained, keep, dtype)


def _trainer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Dataset, folder: Path, settings: dict, lora: Any
) -> Any:
    import dataclasses

    from transformers import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    known = {field.name for field in dataclasses.fields(DPOConfig)}
    if unknown := sorted(settings.keys() - known | settings.keys() & {"output_dir"}):
        raise AlignvecError(f"dpo has {', '.join(unknown)}, which cannot be set: see the fields of trl.DPOConfig")
    try:
        config = DPOConfig(output_dir=str(folder), **settings)
        trainer = DPOTrainer(
            model=model, args=config, train_dataset=pairs, processing_class=copy.copy(tokenizer), peft_config=lora
        )
    except (ValueError, TypeError) as error:
        raise AlignvecError(f"TRL does not take these options: {error}") from error
    trainer.remove_callback(PrinterCallback)
    return trainer


def _check(
    method: str, precision: str, device: str, *, keep: float, steps: int | None, epochs: float, **positive: int
) -> None:
    for name, value, allowed in (
        ("method", method, METHODS),
        ("precision", precision, PRECISIONS),
        ("device", device, ("auto", "cpu", "cuda")),
    ):
        if value not in allowed:
            raise AlignvecError(f"{name}={value!r} is not one of {', '.join(allowed)}")
    if not 0 < keep <= 1:
        raise AlignvecError(f"keep={keep} must be above 0 and at most 1")
    for name, number in {"steps": 1 if steps is None else steps, "epochs": epochs, **positive}.items():
        if number <= 0:
            raise AlignvecError(f"{name}={number} must be positive")


def _check_pairs(pairs: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    if missing := [column for column in COLUMNS if column not in pairs.column_names]:
        raise AlignvecError(f"the pairs have no column {missing[0]}: they need prompt, chosen and rejected")
    if not len(pairs):
        raise AlignvecError("there are no preference pairs: give at least one")
    if is_conversation(pairs[0]) and not tokenizer.chat_template:
        raise AlignvecError("the pairs are conversations and the tokenizer has no chat template: write them as texts")


def _own_copy(base: str | Path | PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    if isinstance(base, (str, Path)):
        model: PreTrainedModel = load_model(base, dtype=dtype)
        return model
    if getattr(base, "alignment", None) is not None:
        raise AlignvecError("vectors are attached to the base; call model.alignment.detach() first")
    return copy.deepcopy(base).to(dtype)  # type: ignore[arg-type]


def _check_layout(base: str | Path | PreTrainedModel, model: PreTrainedModel) -> None:
    """AlignvecError unless live weights are laid out as the checkpoint's: the vector is a difference of the two."""
    from alignvec.pairing import match
    from alignvec.sources import open_source

    match(open_source(base), open_source(model), torch.float32)


def _freeze(model: PreTrainedModel, frozen: Sequence[str]) -> None:
    embedding = model.get_input_embeddings().weight
    unused = set(frozen) - {"embedding"}
    for name, parameter in model.named_parameters():
        matching = {pattern for pattern in frozen if fnmatch(name, pattern)}
        unused -= matching
        parameter.requires_grad_(not (matching or ("embedding" in frozen and parameter is embedding)))
    if unused:
        raise AlignvecError(f"frozen={sorted(unused)[0]!r} matches no parameter of the model: correct or drop it")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise AlignvecError("frozen matches every parameter: leave something to train")


def _lora(rank: int, alpha: float | None, targets: str | Sequence[str]) -> Any:
    from peft import LoraConfig

    modules = targets if isinstance(targets, str) else list(targets)
    scale = 2 * rank if alpha is None else alpha
    return LoraConfig(r=rank, lora_alpha=scale, target_modules=modules, task_type="CAUSAL_LM")  # type: ignore[arg-type]


@torch.no_grad()
def _low_rank(base: str | Path | PreTrainedModel, trained: Any, keep: float) -> AlignmentVector:
    from alignvec.peft import from_peft

    for name, parameter in trained.named_parameters():
        if ".lora_B." in name:
            parameter.mul_(keep)
    return from_peft(trained, base)


@torch.no_grad()
def _dense(
    base: str | Path | PreTrainedModel, trained: PreTrainedModel, keep: float, dtype: str | torch.dtype | None
) -> AlignmentVector:
    from alignvec.extract import extract
    from alignvec.peft.base import Base

    known = Base.open(base)
    moved = {name: parameter for name, parameter in trained.named_parameters() if parameter.requires_grad}
    if keep < 1:
        for name, parameter in moved.items():
            parameter.copy_(torch.lerp(known.value(name).to(parameter), parameter, keep))
    return extract(base, trained, dtype=dtype or known.value(next(iter(moved))).dtype)


def _bar(stack: ExitStack) -> TrainerCallback:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from alignvec.train.report import Report

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Report(stack.enter_context(Progress(*columns)), "training")
