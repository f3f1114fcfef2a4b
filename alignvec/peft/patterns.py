"""The expressions in an adapter's configuration, tried in bounded time before PEFT evaluates them.

PEFT matches modules' names with Python's `re`, which cannot be stopped and backtracks for ever on some expressions. The
same matches are made in a process of their own first, whose time and memory the system bounds. What ends there ends in
PEFT as well; the rest is refused. Plain names, which nearly all adapters have, need no such trial.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from alignvec.errors import AlignvecError

# Matching one of these takes time in proportion to its length and that of the name.
PLAIN = re.compile(r"(?:[\w.-]|\\[.-])*")
LONGEST = 1 << 18  # characters of all expressions together
SECONDS = 1  # of one processor, for all expressions and names
PATIENCE = 60  # seconds on the clock, where processors are shared
TRIAL = """
import json, re, sys
patterns, names, seconds = json.load(sys.stdin)
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
except (ImportError, OSError, ValueError):
    pass
for number, pattern in enumerate(patterns):
    print(json.dumps([number, None]), flush=True)
    try:
        expression = re.compile(pattern[1])
        match = expression.fullmatch if pattern[0] else expression.match
        for name in names:
            match(name)
    except Exception as error:
        print(json.dumps([number, str(error) or type(error).__name__]), flush=True)
        sys.exit()
print(json.dumps([len(patterns), None]), flush=True)
"""


def require_bounded(config: Mapping[str, Any], names: Iterable[str], label: str) -> None:
    """Raises AlignvecError for what is no regular expression, and for one that takes too long on the names to match.

    config: an adapter's, its types checked.
    """
    written = list(dict.fromkeys(_expressions(config)))
    size = sum(len(text) for _, text, *_ in written)
    if size > LONGEST:
        raise AlignvecError(
            f"adapter {label} has expressions of {size} characters in {written[0][0]} and others: leave names out, "
            f"{LONGEST} are read"
        )
    tried = [each for each in written if not PLAIN.fullmatch(each[1])]
    if not tried:
        return
    number, problem = _tried([(whole, pattern) for _, _, whole, pattern in tried], list(dict.fromkeys(names)))
    if number < len(tried):
        option, shown, *_ = tried[number]
        shown = repr(shown) if len(shown) <= 60 else f"{shown[:60]!r} and more"
        if problem is not None:
            raise AlignvecError(f"adapter {label} has {shown} in {option}, which is no expression ({problem[:200]})")
        raise AlignvecError(
            f"adapter {label} has {shown} in {option}, which takes too long to match with the base's names: write a "
            "simpler expression, or list the modules"
        )


def _expressions(config: Mapping[str, Any]) -> Iterator[tuple[str, str, bool, str]]:
    """(option, what is written there, whether a whole name has to match, the expression that PEFT makes of it)."""
    tied = bool(config.get("ensure_weight_tying"))
    for option in ("target_modules", "exclude_modules"):
        if isinstance(written := config.get(option), str):
            yield option, written, True, written
            if tied:
                yield option, written, True, f"(?:{written}|^$)"
    for option in ("modules_to_save", "target_modules") if tied else ("modules_to_save",):
        if not isinstance(listed := config.get(option) or [], str):
            yield from ((option, written, False, rf"(^|.*\.){written}($|\..*)") for written in listed)
    layers = config.get("layers_pattern") or []
    for written in [layers] if isinstance(layers, str) else layers:
        yield "layers_pattern", written, False, rf"(?:^|.*?\.){written}\.(?P<idx>\d+)\."
    for option in ("rank_pattern", "alpha_pattern"):
        yield from ((option, written, False, rf"(.*\.)?({written})$") for written in config.get(option) or {})


def _tried(patterns: list[tuple[bool, str]], names: list[str]) -> tuple[int, str | None]:
    """How many expressions ended in time, and what is wrong with the next one if it is none."""
    if not sys.executable or getattr(sys, "frozen", False):
        return 0, None
    command = [sys.executable, "-I", "-S", "-c", TRIAL]
    asked = json.dumps([patterns, names, SECONDS]).encode()
    try:
        answer = subprocess.run(command, input=asked, capture_output=True, timeout=PATIENCE).stdout
    except subprocess.TimeoutExpired as late:
        answer = late.stdout or b""
    except OSError:
        return 0, None
    lines = answer.decode().splitlines()
    return tuple(json.loads(lines[-1])) if lines else (0, None)
