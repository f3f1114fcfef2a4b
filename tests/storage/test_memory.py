"""Peak memory of extract, convert and merge on checkpoints of gigabytes: the largest tensor counts, not their sum."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alignvec.checkpoint import TensorInfo
from alignvec.folders import write_json
from alignvec.writer import ShardWriter

Shapes = dict[str, tuple[int, ...]]
SHAPES: Shapes = {"model.embed_tokens.weight": (32768, 4096)} | {
    f"model.layers.{i}.{name}": shape
    for i in range(14)
    for name, shape in {"mlp.up_proj.weight": (14336, 4096), "mlp.bias": (14336,), "norm.weight": (4096,)}.items()
}
LARGEST = max(2 * torch.Size(shape).numel() for shape in SHAPES.values())

PROGRAM = """
import json, re, sys, time
import alignvec
status = lambda: open("/proc/self/status").read()
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", status())[1]) * 1024  # ru_maxrss counts the parent
folder, start, result = sys.argv[1], peak(), {}
clock = time.perf_counter()
vector = alignvec.extract(f"{folder}/base", f"{folder}/aligned", output=f"{folder}/v", max_shard_size="700MB")
result["extract"] = (peak() - start, time.perf_counter() - clock)
clock = time.perf_counter()
alignvec.merge(f"{folder}/base", {"v": vector}, {"v": 0.5}, f"{folder}/m")
result["merge"] = (peak() - start, time.perf_counter() - clock)
print(json.dumps(result))
"""

ENCODE = """
import json, re, sys, time
import alignvec
status = lambda: open("/proc/self/status").read()
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", status())[1]) * 1024
from alignvec.formats import auto
auto.CANDIDATES = ("sign", "int4", "lossless")  # all of them take minutes
folder, format = sys.argv[1:]
pair, start, clock = (f"{folder}/base", f"{folder}/aligned"), peak(), time.perf_counter()
if format == "convert":
    alignvec.convert(alignvec.extract(*pair, output=f"{folder}/dense"), f"{folder}/v", "int4")
elif format == "merge":
    vector = alignvec.extract(*pair, format="lossless", output=f"{folder}/v")
    alignvec.merge(pair[0], {"v": vector}, {"v": 1.0}, f"{folder}/m")
    for piece in (piece for name in vector for piece in vector.chunks(name)):
        pass
else:
    alignvec.extract(*pair, format=format, output=f"{folder}/v")
print(json.dumps((peak() - start, time.perf_counter() - clock)))
"""


def write(folder: Path, order: list[str], shard: str, shift: int, shapes: Shapes = SHAPES) -> None:
    """Each value from a repeated block; `shift` bits are flipped in some of them."""
    folder.mkdir()
    block = (torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    block.view(torch.int16)[::7] ^= shift
    infos = {name: TensorInfo(torch.bfloat16, shape) for name, shape in shapes.items()}
    with ShardWriter(folder, "model", infos, shard) as writer:
        for name in order:
            writer.begin(name, torch.bfloat16, shapes[name])
            for start in range(0, infos[name].numel, len(block)):
                writer.write(block[: infos[name].numel - start])
            writer.end()
        writer.close()
    write_json(folder / "config.json", {"model_type": "mistral"})


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_peak_memory_stays_under_three_times_the_largest_tensor(tmp_path: Path) -> None:
    write(tmp_path / "base", list(SHAPES), "500MB", 0)
    write(tmp_path / "aligned", list(reversed(SHAPES)), "900MB", 3)
    size = sum(file.stat().st_size for file in (tmp_path / "base").iterdir())
    assert size > 1.9e9
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    for verb, (peak, seconds) in json.loads(output.splitlines()[-1]).items():
        print(f"{verb}: peak {peak / 2**20:.0f} MiB, {2 * size / seconds / 1e9:.2f} GB/s read")
        assert 0 < peak < 3 * LARGEST, verb


SMALL: Shapes = {f"model.layers.{i}.w": (4096, 4096) for i in range(12)} | {"model.norm.weight": (4096,)}
FORMATS = ["int4", "lossless", "sparse:method=ties", "auto:0.25"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("what", [*FORMATS, "convert", "merge"])
def test_encoding_holds_a_few_times_the_largest_tensor(tmp_path: Path, what: str) -> None:
    """A few tensors of 34 MB, and what threads and pieces take; the differences are 800 MB, both sides 800 MB."""
    write(tmp_path / "base", list(SMALL), "500MB", 0, SMALL)
    write(tmp_path / "aligned", list(reversed(SMALL)), "200MB", 3, SMALL)
    command = [sys.executable, "-c", ENCODE, str(tmp_path), what]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    peak, seconds = json.loads(output.splitlines()[-1])
    print(f"{what}: peak {peak / 2**20:.0f} MiB in {seconds:.1f} s")
    assert 0 < peak < (320 << 20) + 10 * 2 * 4096 * 4096
