"""A progress bar for long streamed work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def bytes_bar(description: str, total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """Gives a function to call with the number of bytes just done; draws nothing unless ``shown``."""
    if not shown:
        yield lambda count: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(description, total=total)
        yield lambda count: progress.advance(task, count)
