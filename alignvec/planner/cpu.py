"""What the linear operator costs on a CPU, in csrc/cpu and in plain torch, and when csrc/cpu forms a mix."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import torch

from alignvec.kernels.configs import Device
from alignvec.planner.backends import resolve_backend
from alignvec.planner.problem import Cost, Problem

# Rows of a batch that decodes: up to here tokens whose mixes the host does not know may each have their own.
BATCH = 256
NEVER = 1 << 40
# Products of bf16 activations with operands by kind and bits, dense ones 1: on Zen 5, and on a Xeon that has AMX.
PRODUCT = {("codes", 8): 1.3, ("codes", 4): 0.8, ("codes", 1): 0.5, ("sparse", 0): 1.5}
PRODUCT |= {("lossless", bits): 1.7 for bits in (2, 4, 8)}
PRODUCT_BESIDE_TILES = {("codes", 8): 2.4, ("codes", 4): 1.45, ("codes", 1): 1.1, ("sparse", 0): 1.4}
PRODUCT_BESIDE_TILES |= {("lossless", bits): 2.8 for bits in (2, 4, 8)}


def cpu_capability() -> str:
    """The instruction set that csrc/cpu runs, where it is live."""
    import alignvec.compiled.cpu  # noqa: F401 - defines the operator

    return str(torch.ops.alignvec.cpu_capability())


@functools.cache
def tiles() -> bool:
    """Whether a mix of bf16 numbers is multiplied by AMX's tiles: eight times as fast as by the kernels of `split`."""
    return resolve_backend("cpu") == "cpp" and cpu_capability() == "amx"


def device(threads: int) -> Device:
    """Figures for each thread of torch: what csrc/cpu reached, or what plain torch's small products do."""
    if resolve_backend("cpu") == "cpp":
        bandwidth, narrow, wide, where = 20e9, 250e9, 120e9, "Zen 5"
        if tiles():
            bandwidth, narrow, wide, where = 14e9, 84e9, 86e9, "a Xeon beside its tiles"
        rates = f"{bandwidth / 1e9:.0f} GB/s and {narrow / 1e9:.0f} (bf16) or {wide / 1e9:.0f} GFLOP/s a thread"
        source = f"{rates}, as csrc/cpu did on {where}"
    else:
        narrow, wide, source = 60e9, 60e9, "30 GB/s and 60 GFLOP/s for each thread of torch, assumed"
        bandwidth = 30e9
    return Device(
        "cpu",
        read_bandwidth=bandwidth * threads,
        matrix_16=narrow * threads,
        matrix_32=wide * threads,
        vector_32=wide * threads,
        launch=5e-6,
        vendor_bandwidth=1.0,
        kernel_matrix=1.0,
        multiprocessors=threads,
        source=source,
    )


def combine_tokens(vectors: Iterable[tuple[str, int]], pair: bool) -> int:
    """The tokens of one mix from which csrc/cpu forms it rather than adding products, as measured.

    vectors: kind and bits of each. A mix takes time for each vector and spares its product; held as a `pair` of bf16
    numbers it takes one product more itself, and by tiles a quarter of one in all. Low-rank vectors stay out of it:
    beside them alone the mix is the base.
    """
    own = [vector for vector in vectors if vector[0] != "low-rank"]
    if not own:
        return 20 if pair and tiles() else NEVER
    if pair and tiles():
        return math.ceil((13 + 7 * len(own)) / (0.75 + sum(PRODUCT_BESIDE_TILES.get(vector, 1.0) for vector in own)))
    spared = sum(PRODUCT.get(vector, 1.0) if pair else 1.0 for vector in own) - (1 if pair else 0)
    return math.ceil((10 * len(own) if pair else 24) / spared) if spared > 0 else NEVER


def cost(p: Problem, execution: str) -> Cost:
    return _compiled(p, execution) if resolve_backend("cpu") == "cpp" else _torch(p, execution)


def _compiled(p: Problem, execution: str) -> Cost:
    """csrc/cpu: every weight is read once; forming a mix takes what it spares `combine_tokens` tokens.

    All products are taken for dense ones: the executions compare as they are chosen, coded vectors cost a little else.
    """
    d, full = p.device, len(p.kinds)
    rate = d.matrix_16 if p.dtype == "bfloat16" else d.matrix_32
    token = 2 * p.weights / rate
    products: float = 1 + full
    seconds = p.tokens * products * token
    if execution == "combine":
        products = (0.25 if tiles() else 2) if p.pair else 1
        kinds = [(kind, int(bits)) for kind, bits, *_ in (spec.split(":") for spec, _ in p.vectors)]
        form = min(combine_tokens(kinds, p.pair), 10 * BATCH) * max(1 + full - products, 0.5) * token
        seconds = p.tokens * products * token + (p.mixes or min(p.tokens, BATCH)) * form
    seconds += 2 * p.tokens * p.low_rank / rate
    read = (p.weights * p.itemsize + p.vector_bytes) / d.read_bandwidth
    return Cost(d.launch + max(read, seconds), "bytes" if read > seconds else "FLOPs")


def _torch(p: Problem, execution: str) -> Cost:
    """Plain torch: nothing overlaps, 16-bit weights are raised to float32, a mix moves 12 bytes a weight and vector."""
    d, full = p.device, len(p.kinds)
    unpacked = sum(kind != "dense" for kind in p.kinds)
    matrices = 1 + full if execution == "split" else 1
    moved = p.weights * (p.itemsize + 12 * unpacked) + p.vector_bytes
    moved += p.weights * (6 * matrices if p.itemsize == 2 else 0)
    moved += 0 if execution == "split" else 12 * p.weights * full * (p.mixes or min(p.tokens, BATCH))
    terms = {
        "bytes": moved / d.read_bandwidth,
        "FLOPs": 2 * p.tokens * (matrices * p.weights + p.low_rank) / d.matrix_32,
    }
    return Cost(matrices * d.launch + sum(terms.values()), max(terms, key=lambda name: terms[name]))
