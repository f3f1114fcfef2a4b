"""No test of the command line asks the hub for anything."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str, **options: object) -> str:
        raise OSError("tests are offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
