"""A measured grid as a small file: one count of questions a mix, domain and level."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from alignvec.errors import AlignvecError
from alignvec.folders import replaced
from alignvec.search.landscape import MILLION, Landscape

FORMAT = "alignvec landscape grid 1"


def save_grid(landscape: Landscape, path: str | Path, questions: Mapping[str, int]) -> None:
    """Write what a landscape knows, which must be a full grid, as counts of questions (`questions`: how many a domain).

    A safetensors file with `counts` [points of the first name, ..., domains, levels], uint8 where they fit, else uint16
    or int32; axes, names, domains, levels, questions, the key and the seconds of a mix are in its metadata.
    9,261 mixes of three domains and levels take 83 kB.

    Raises AlignvecError for mixes that make no full grid, and rates that are no whole numbers of questions.
    """
    keys = landscape.keys(landscape.mixes)
    axes = [sorted({key[i] for key in keys}) for i in range(len(landscape.names))]
    product = list(itertools.product(*axes))
    if len(product) != len(keys):
        raise AlignvecError(
            f"the landscape knows {len(keys)} mixes of the {len(product)} that their coefficients combine to: "
            "measure a whole grid to save it"
        )
    if set(questions) != set(landscape.domains) or not all(0 < count < 2**31 for count in questions.values()):
        raise AlignvecError(
            f"questions= needs a count for each of {', '.join(landscape.domains)}, not {dict(questions)}"
        )
    asked = torch.tensor([questions[domain] for domain in landscape.domains], dtype=torch.float64)
    exact = landscape.rates([landscape.mix(key) for key in product]) * asked[:, None]
    counts = exact.round()
    if not bool(exact.isfinite().all()) or float((counts - exact).abs().max()) > 1e-4:
        raise AlignvecError(f"the rates are no whole numbers of {dict(questions)} questions: give the true counts")
    largest = float(counts.max())
    dtype = torch.uint8 if largest < 2**8 else torch.uint16 if largest < 2**16 else torch.int32
    shape = [len(axis) for axis in axes] + list(counts.shape[1:])
    description = {
        "axes": [[value / MILLION for value in axis] for axis in axes],
        "names": landscape.names,
        "domains": landscape.domains,
        "levels": landscape.levels,
        "questions": {domain: questions[domain] for domain in landscape.domains},
        "key": landscape.key,
        "seconds": landscape.seconds / len(keys),
    }
    with replaced(Path(path)) as file:
        save_file({"counts": counts.to(dtype).view(shape)}, file, {"format": FORMAT, "grid": json.dumps(description)})


def load_grid(path: str | Path) -> Landscape:
    """The recorded landscape of a file that `save_grid` wrote; its rates are counts over questions, exactly.

    Raises AlignvecError for a file that is missing, damaged or something else.
    """
    try:
        with safe_open(Path(path), "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise AlignvecError(f"{path} is no recorded landscape")
            counts, given = file.get_tensor("counts").double(), json.loads(metadata["grid"])
        return _landscape(counts, given)
    except OSError as error:
        raise AlignvecError(f"{path} cannot be read: {error.strerror or error}") from None
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, AlignvecError) and str(path) in str(error):
            raise
        raise AlignvecError(f"{path} is a damaged recording of a landscape: {error}") from None


def _landscape(counts: torch.Tensor, given: dict[str, Any]) -> Landscape:
    landscape = Landscape(given["names"], given["domains"], given["levels"], key=given["key"])
    asked = torch.tensor([given["questions"][domain] for domain in landscape.domains], dtype=torch.float64)
    shape = [len(axis) for axis in given["axes"]] + [len(landscape.domains), len(landscape.levels)]
    if list(counts.shape) != shape:
        raise ValueError(f"counts are {list(counts.shape)}, the axes say {shape}")
    rates = (counts / asked[:, None]).view(-1, *shape[-2:])
    for coefficients, rate in zip(itertools.product(*given["axes"]), rates.unbind(), strict=True):
        landscape.record(dict(zip(landscape.names, coefficients, strict=True)), rate, given["seconds"])
    return landscape
