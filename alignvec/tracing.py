"""Whether the code that is running is being traced into a graph, in this thread."""

from __future__ import annotations

import torch


def traced() -> bool:
    """True while torch.compile or torch.export traces the caller.

    `torch.compiler.is_compiling` is a flag of the whole process: a thread that runs eagerly sees it while another one
    compiles.
    """
    if torch.compiler.is_dynamo_compiling():
        return True
    return torch.compiler.is_exporting() and _faking()


def _faking() -> bool:
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
