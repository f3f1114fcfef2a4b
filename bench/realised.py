"""Realised against requested coefficients for vectors of 0.3 to 3 bfloat16 steps: the picture in the README.

`python -m bench.realised` writes docs/realised.png.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from alignvec import AlignmentVector, check
from alignvec.check import plot

STEPS = (0.3, 0.6, 1.0, 3.0)


def uniform_steps(weight: Tensor, steps: float, generator: torch.Generator) -> Tensor:
    """A delta of `steps` units in the last place of each bfloat16 weight, up or down, in bfloat16."""
    ulp = torch.exp2(torch.floor(torch.log2(weight.float().abs().clamp_min(1e-30))) - 7)
    sign = torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1
    return (steps * ulp * sign).bfloat16()


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    base = nn.Linear(512, 512, bias=False).bfloat16()
    base.weight.data.copy_(torch.randn(512, 512, generator=generator) * 0.02)
    vectors = {
        f"{steps} bf16 steps": AlignmentVector({"weight": uniform_steps(base.weight.detach(), steps, generator)})
        for steps in STEPS
    }
    rows = check(base, vectors)
    plot(rows, Path("docs/realised.png"))
    for name in vectors:
        own = [row for row in rows if row.vector == name]
        merged = max(abs(row.naive - row.requested) for row in own)
        exact = max(abs(row.alignvec - row.requested) for row in own)
        print(f"{name}: largest error merged {merged:.3f}, alignvec {exact:.1e}")


if __name__ == "__main__":
    main()
