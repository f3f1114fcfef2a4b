"""What is measured, and what each is meant to take: the table of the benchmark as data."""

from __future__ import annotations

from dataclasses import dataclass

FORMATS: dict[str, tuple[str, ...]] = {
    "base only": (),
    "dense": ("dense",) * 3,
    "lossless": ("lossless:width=4",) * 3,
    "int8": ("int8:group=128",) * 3,
    "int4": ("int4:group=128",) * 3,
    "sign": ("sign",) * 3,
    "low-rank 64": ("low-rank:rank=64",) * 3,
    "sign, k = 8": ("sign",) * 8,
    "sparse 10 %": ("sparse:density=0.1",) * 3,
    "dense, int4, sign": ("dense", "int4:group=128", "sign"),
}
MORE_ON_CPU = {"dense, k = 1": ("dense",), "dense, k = 8": ("dense",) * 8}
WIDE = ("base only", "dense", "int4", "sign")  # what a CPU measures in float32, too
PLAIN = ("dense", "int4")  # what a CPU measures in plain torch, too
PLAIN_TOKENS = (1, 256)

# Most that a decode step with 1 or 16 tokens, rows of different mixes, is meant to take: times the merged model.
DECODE = {
    "base only": 0.93,
    "dense": 3.4,
    "lossless": 2.3,
    "int8": 2.3,
    "int4": 1.7,
    "sign": 1.2,
    "low-rank 64": 1.1,
    "sign, k = 8": 1.45,
}
# The same on a CPU, 1 token in bfloat16. Dense: the bytes of four matrices over those of one, and 15 %.
DECODE_CPU = {"dense": 4.6, "int4": 1.9, "sign": 1.35}
PREFILL = {"merged": 1.10, "exact": 2.2}  # dense, one mix, 2048 tokens and more
PREFILL_KEPT = {"exact": 2.0}  # the same with a materialised mix that has not changed
REMERGE = 0.85  # share of the read bandwidth, dense
REMERGE_CPU = 2.0  # times the speed of torch's copy and add_, dense
SET_MICROSECONDS = 20.0

TOKENS = {"cuda": (1, 16, 2048, 4, 64, 256, 4096), "cpu": (1, 4, 16, 256)}
QUICK = {"cuda": (1, 16, 2048), "cpu": (1, 16)}
DECODE_TOKENS = 256  # up to here every token is a row of a batch


@dataclass(frozen=True)
class Case:
    """One line of the table of a GPU or a CPU, its `kind`. `way`: "operator" is alignvec's, all others are what it is
    measured against."""

    name: str
    formats: tuple[str, ...]
    tokens: int
    rows: int
    dtype: str
    execution: str = "auto"
    precision: str = "exact"
    way: str = "operator"
    kind: str = "cuda"

    @property
    def section(self) -> str:
        return "decode" if self.tokens <= DECODE_TOKENS else "prefill"

    @property
    def target(self) -> float | None:
        """The largest ratio to merged weights that is meant to be seen."""
        if self.way not in ("operator", "kept"):
            return None
        if self.kind == "cpu":
            return DECODE_CPU.get(self.name) if self.tokens == 1 and self.dtype == "bfloat16" else None
        if self.section == "decode":
            return DECODE.get(self.name) if self.tokens in (1, 16) and self.rows == self.tokens else None
        if self.formats != FORMATS["dense"] or self.rows > 1:
            return None
        return (PREFILL_KEPT if self.way == "kept" else PREFILL).get(self.precision)


def cases(kind: str, tokens: int, quick: bool = False) -> list[Case]:
    """All cases with that many tokens of a GPU ("cuda") or a CPU; the merged weights of each dtype come first."""
    formats = {name: own for name, own in FORMATS.items() if not quick or name in DECODE}
    return _on_cpu(formats if quick else formats | MORE_ON_CPU, tokens) if kind == "cpu" else _on_gpu(formats, tokens)


def _on_cpu(formats: dict[str, tuple[str, ...]], tokens: int) -> list[Case]:
    """One mix, and up to 16 tokens one for each; bfloat16 in every format, float32 in a few."""
    made: list[Case] = []
    for dtype, names in (("bfloat16", tuple(formats)), ("float32", WIDE)):
        made.append(Case("merged", (), tokens, 1, dtype, way="merged", kind="cpu"))
        for rows in sorted({1, tokens if tokens <= 16 else 1}):
            made += [Case(name, formats[name], tokens, rows, dtype, kind="cpu") for name in names]
        if dtype == "bfloat16" and tokens in PLAIN_TOKENS:
            plain = {f"{name}, plain torch": formats[name] for name in PLAIN}
            made += [Case(name, own, tokens, 1, dtype, way="torch", kind="cpu") for name, own in plain.items()]
    return made


def _on_gpu(formats: dict[str, tuple[str, ...]], tokens: int) -> list[Case]:
    dense, low_rank, dtype = FORMATS["dense"], FORMATS["low-rank 64"], "bfloat16"
    made = [Case("merged", (), tokens, 1, dtype, way="merged")]
    if tokens <= DECODE_TOKENS:
        made += [Case(name, own, tokens, tokens, dtype, "split") for name, own in formats.items()]
        made.append(Case("dense, concatenated K", dense, tokens, tokens, dtype, way="concatenated"))
        made.append(Case("low-rank 64, torch", low_rank, tokens, tokens, dtype, way="low-rank"))
    if tokens == DECODE_TOKENS:
        made.append(Case("dense", dense, tokens, 16, dtype, "combine"))
    if tokens > DECODE_TOKENS:
        for precision in ("merged", "exact"):
            some = {name: own for name, own in formats.items() if own}
            made += [Case(name, own, tokens, 1, dtype, "combine", precision) for name, own in some.items()]
            made.append(Case("dense", dense, tokens, 1, dtype, "materialise", precision))
        made.append(Case("dense", dense, tokens, 16, dtype, "combine"))
        made.append(Case("dense, mix kept", dense, tokens, 1, dtype, "kept", way="kept"))
    return made
