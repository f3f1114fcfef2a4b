"""What each format loses on the vectors of the shipped models, against float64.

`python -m bench.formats` encodes base -> medical, legal and financial in every format and stores, for each:
- bytes, and the encoding's relative error and signal-to-noise ratio over all parameters;
- the error of the operator's output on a layer of each kind, with the decoded deltas in float64 as the truth: what the
  arithmetic adds to the encoding, for bfloat16 and float32 activations;
- the error of the logits at coefficient 1 against the aligned model, as a share of what alignment changed.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

import alignvec
from alignvec import AlignmentVector, prepack
from alignvec.kernels import eager, reference
from alignvec.loading import load_model, load_tokenizer
from alignvec.recipes.dataset import make_rows
from alignvec.recipes.models import model_path
from alignvec.recipes.tokenizer import EOS, prompt_text
from bench import record

FORMATS = (
    "dense",
    "lossless",
    "int8:group=128",
    "int4:group=32",
    "int4:group=64",
    "int4:group=128",
    "sign",
    "sign:group=128",
    "low-rank:rank=64",
    "low-rank:rank=16",
    "sparse:density=0.1",
    "sparse:density=0.1,method=dare",
    "sparse:density=0.1,method=ties",
    "auto:0.25",
)
DOMAINS = ("medical", "legal", "financial")
QUERIES = 24
LAYER = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")

SHOWN = {
    "of_dense": ".1%",
    "relative_error": ".1e",
    "snr_db": ".1f",
    "operator_error_bfloat16": ".1e",
    "operator_error_float32": ".1e",
    "logit_error": ".1e",
    "logit_largest": ".2g",
}

Row = dict[str, Any]


def main(
    output: Annotated[Path, typer.Option(help="Where the data go.")] = record.RESULTS / "formats.json",
    domains: Annotated[str, typer.Option(help="Which vectors.")] = ",".join(DOMAINS),
) -> None:
    """Measure every format on the shipped models."""
    console = Console()
    console = console if console.is_terminal else Console(width=140)
    disable_progress_bar()
    kept: dict[str, Any] = {"bench": "formats", **record.environment("cpu"), "rows": []}
    for domain in domains.split(","):
        pair = _Pair(domain)
        for text in track(FORMATS, description=domain, console=console, transient=True):
            kept["rows"].append({"domain": domain, "format": text, **pair.measure(text)})
    report(console, kept["rows"])
    record.write(output, kept)
    console.print(f"wrote {output}")


class _Pair:
    """Base and aligned model, and what alignment changes of the logits on held-out queries."""

    def __init__(self, domain: str) -> None:
        self.folders = model_path("base"), model_path(domain)
        self.base, self.aligned = (_model(folder, torch.bfloat16) for folder in self.folders)
        self.deltas = {
            name: after.detach().double() - before.detach().double()
            for (name, before), after in zip(self.base.named_parameters(), self.aligned.parameters(), strict=True)
        }
        self.wide = _model(self.folders[0], torch.float32)
        tokenizer = load_tokenizer(self.folders[0])
        rows = make_rows(domain, "test")[:QUERIES]
        texts = [prompt_text(row.query) + row.expert + EOS for row in rows]
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        self.ids, self.mask = batch["input_ids"], batch["attention_mask"]
        self.before = self._logits(self.wide)
        self.after = self._logits(_model(self.folders[1], torch.float32))

    def measure(self, text: str) -> Row:
        vector = alignvec.extract(*self.folders, format=text)
        base: dict[str, Tensor] = dict(self.base.named_parameters())
        lost = total = 0.0
        for name, delta in self.deltas.items():
            decoded = vector[name].double() if name in vector else torch.zeros(())
            lost += float((decoded - delta).square().sum())
            total += float(delta.square().sum())
        error = math.sqrt(lost / total)
        dense = sum(2 * self.deltas[name].numel() for name in vector)
        row: Row = {"bytes": vector.nbytes, "of_dense": vector.nbytes / dense, "relative_error": error}
        row["snr_db"] = -20 * math.log10(error) if error else None
        row["width"] = _widths(vector)
        row |= {f"operator_error_{dtype}": self._operator(vector, base, dtype) for dtype in ("bfloat16", "float32")}
        alignment = alignvec.attach(self.wide, {"av": vector})
        alignment.set(av=1.0)
        off = self._logits(self.wide) - self.after
        alignment.detach()
        row["logit_error"] = float(off.norm() / (self.before - self.after).norm())
        return row | {"logit_largest": float(off.abs().max()), "logit_rms": float(off.square().mean().sqrt())}

    def _operator(self, vector: AlignmentVector, base: dict[str, Tensor], dtype_name: str) -> float:
        """Relative error of the bfloat16 layers' outputs at coefficient 1, over one layer of each kind."""
        dtype, generator = getattr(torch, dtype_name), torch.Generator().manual_seed(0)
        columns, table = torch.zeros(1, dtype=torch.int32), torch.ones(1, 1)
        rows = torch.ones(1, dtype=torch.int32)
        lost = total = 0.0
        for name in (f"model.layers.1.{layer}.weight" for layer in LAYER):
            weight = base[name].detach()
            x = torch.randn(16, weight.shape[1], generator=generator).to(dtype)
            operands = [prepack.operand(vector.encoded(name), weight, weight.device)]
            arguments = (x, weight, None, operands, None, columns, table, rows)
            truth = reference.linear(*arguments)
            lost += float((eager.linear(*arguments).double() - truth).square().sum())
            total += float(truth.square().sum())
        return math.sqrt(lost / total)

    @torch.no_grad()
    def _logits(self, model: nn.Module) -> Tensor:
        """Logits of the tokens of all queries and their expert answers, [tokens, vocabulary]."""
        return model(input_ids=self.ids, attention_mask=self.mask, use_cache=False).logits[self.mask.bool()].double()


def _model(folder: Path, dtype: torch.dtype) -> nn.Module:
    return load_model(folder, dtype=dtype).eval()


def _widths(vector: AlignmentVector) -> list[int]:
    """Bits of a step that lossless chose for its tensors."""
    formats = [vector.format_of(name) for name in vector]
    return sorted({int(spec.options["width"]) for spec in formats if spec.name == "lossless"})


def report(console: Console, rows: list[Row]) -> None:
    """A table for each vector, a line for each format."""
    for domain in dict.fromkeys(row["domain"] for row in rows):
        columns = ("", "of dense", "encoding error", "SNR dB", "output bf16", "output fp32", "logits", "largest")
        table = Table(*columns, title=domain)
        for row in (row for row in rows if row["domain"] == domain):
            table.add_row(row["format"], *(_shown(row[key], form) for key, form in SHOWN.items()))
        console.print(table)


def _shown(value: float | None, form: str) -> str:
    return "exact" if value is None else format(value, form)


if __name__ == "__main__":
    record.command(main)
