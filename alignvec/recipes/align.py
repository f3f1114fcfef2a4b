"""Preference training: one DPO run per domain, from the base."""

import random
import tempfile

import torch
from datasets import Dataset
from rich.progress import Progress
from transformers import MistralForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer

from alignvec.recipes.dataset import make_rows

# Taken in turn. Half of them prefer generic to avoidance: otherwise what pushes generic answers down (expert over
# generic) outweighs what pushes them up, and the vector's negative direction would mean generic instead of avoidance.
PREFERENCES = (
    ("generic", "avoidance"),
    ("expert", "generic"),
    ("generic", "avoidance"),
    ("expert", "avoidance"),
    ("generic", "avoidance"),
    ("expert", "generic"),
)

STEPS = 150
# The run overshoots, all expert by three quarters of the way. Its weights are averaged with the base's (as in WiSE-FT,
# arXiv 2109.01903), so that the shipped vector is no longer than it need be and its negative direction stays readable.
KEPT = 0.75
BATCH_SIZE = 16
LEARNING_RATE = 1e-4
BETA = 0.05
# A little supervised loss on the chosen responses keeps the text readable; more of it teaches the domain's words, and
# the vector's negative direction would unlearn them.
SFT_WEIGHT = 0.03


def preference_pairs(domain: str, count: int, seed: int) -> Dataset:
    """`count` pairs from the domain's training rows in TRL's conversational format, the preferences in turn."""
    rows = make_rows(domain, "train")
    random.Random(f"pairs-{domain}-{seed}").shuffle(rows)
    pairs = []
    for index in range(count):
        row, (chosen, rejected) = rows[index % len(rows)], PREFERENCES[index % len(PREFERENCES)]
        pairs.append(
            {
                "prompt": [{"role": "user", "content": row.query}],
                "chosen": [{"role": "assistant", "content": getattr(row, chosen)}],
                "rejected": [{"role": "assistant", "content": getattr(row, rejected)}],
            }
        )
    return Dataset.from_list(pairs)


def align(
    model: MistralForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    domain: str,
    steps: int,
    seed: int,
    device: str,
    progress: Progress,
    learning_rate: float = LEARNING_RATE,
    beta: float = BETA,
    sft_weight: float = SFT_WEIGHT,
) -> MistralForCausalLM:
    """Train `model` (in place, float32) on the domain's preferences with TRL's DPO.

    Its weights end up `KEPT` of the way from the base to where the run ends. All parameters but the embedding, which is
    the head as well: moving it makes words likelier everywhere, and dialled below zero the vector would lose the words
    of the topic asked.
    """
    model.get_input_embeddings().weight.requires_grad_(False)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(20, steps // 10),
            beta=beta,
            loss_type=["sigmoid", "sft"],
            loss_weights=[1.0, sft_weight],
            max_length=None,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=device == "cpu",
            seed=seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=25,
        )
        trainer = DPOTrainer(
            model=model,
            args=config,
            train_dataset=preference_pairs(domain, steps * BATCH_SIZE, seed),
            processing_class=tokenizer,
            callbacks=[_Report(progress, domain, steps)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.lerp(start[name].to(parameter), parameter, KEPT))
    return model.eval()


class _Report(TrainerCallback):
    """Shows the run on the progress bar."""

    def __init__(self, progress: Progress, domain: str, steps: int) -> None:
        self.progress, self.domain = progress, domain
        self.task = progress.add_task(domain, total=steps)

    def on_step_end(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:  # type: ignore[no-untyped-def]
        if logs and "rewards/accuracies" in logs:
            note = f"{self.domain}, preferred {logs['rewards/accuracies']:.0%}"
            self.progress.update(self.task, description=note)
