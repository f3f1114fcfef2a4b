"""Mutate and use folders: `python -m tests.fuzz [--minutes N] [--seed N] [--kind vector|adapter|checkpoint] [--kept]`.

Prints, by kind, how many uses of folders were right, refused as damaged by a checksum, refused otherwise, or failed;
ends with status 1, and a line of JSON a failure, where something but a right result or an AlignvecError came out. Such
a line belongs into seeds.json, which `--kept` replays.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

KEPT = Path(__file__).with_name("seeds.json")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, help="the first seed; default: by the clock")
    parser.add_argument("--cases", type=int, default=10**9, help="stop after so many")
    parser.add_argument("--kind", choices=("vector", "adapter", "checkpoint"))
    parser.add_argument("--kept", action="store_true", help="the cases that failed once, and no others")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers

    from tests.fuzz.run import BATCH, TITLE, Case, Count, opened, report

    torch.set_num_threads(1)  # threads of OpenMP do not survive a fork
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    fuzz = opened()
    counts: dict[str, Count] = {}
    failures = 0
    start, first = time.monotonic(), int(time.time()) if options.seed is None else options.seed
    try:
        seed = first
        while True:
            if options.kept:
                cases = [Case(each["kind"], each["subject"], each["steps"]) for each in json.loads(KEPT.read_text())]
            else:
                cases = [
                    fuzz.draw(each, options.kind) for each in range(seed, min(seed + BATCH, first + options.cases))
                ]
            for case, what in report(fuzz.run(cases), counts):
                failures += 1
                print(json.dumps(case.to_json() | {"seed": case.seed, "found": what}), flush=True)
            seed += len(cases)
            if options.kept or seed >= first + options.cases or time.monotonic() - start > options.minutes * 60:
                break
    finally:
        shutil.rmtree(fuzz.folder, ignore_errors=True)
    number = len(cases) if options.kept else seed - first
    print(f"{number} cases from seed {first} in {time.monotonic() - start:.0f} s")
    print(TITLE)
    for kind, count in sorted(counts.items()):
        print(count.line(kind))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
