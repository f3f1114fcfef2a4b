"""The packages that training takes, and the bars that they draw."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator

from alignvec.errors import AlignvecError


def require(*packages: str) -> None:
    """AlignvecError unless the packages are installed."""
    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        raise AlignvecError(f'training needs {", ".join(missing)}: pip install "alignvec[train]"')


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of datasets, transformers and TRL: one bar of ours is enough."""
    import datasets
    from transformers.utils import logging

    drawn = not datasets.are_progress_bars_disabled(), logging.is_progress_bar_enabled()
    before = os.environ.get("TQDM_DISABLE")
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    os.environ["TQDM_DISABLE"] = "1"  # TRL asks for it when it draws
    try:
        yield
    finally:
        if drawn[0]:
            datasets.enable_progress_bars()
        if drawn[1]:
            logging.enable_progress_bar()
        if before is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = before
