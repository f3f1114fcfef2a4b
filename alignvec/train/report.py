"""A trainer's run on a rich progress bar."""

from __future__ import annotations

from typing import Any

from rich.progress import Progress
from transformers import TrainerCallback


class Report(TrainerCallback):
    """Shows the steps of a DPO run, and how often the chosen response of a pair is preferred."""

    def __init__(self, progress: Progress, label: str) -> None:
        self.progress, self.label = progress, label
        self.task = progress.add_task(label, total=None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, total=state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "rewards/accuracies" in logs:
            note = f"{self.label}, preferred {logs['rewards/accuracies']:.0%}"
            self.progress.update(self.task, description=note)
