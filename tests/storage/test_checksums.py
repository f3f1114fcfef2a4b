"""Checksums of stored deltas: what they are, bit by bit, that every writer makes them, and what no reader lets pass."""

from __future__ import annotations

import copy
import json
import pickle
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

import alignvec
from alignvec import AlignmentVector, integrity, surgery
from alignvec.checkpoint import Checkpoint
from alignvec.errors import AlignvecError
from alignvec.peft import from_peft
from tests.attach.transferred import new, tuned
from tests.storage import adapters
from tests.storage.descriptions import change_and_seal

FORMATS = {
    "dense": ("dense", "5GB"),
    "dense, sharded": ("dense", 1000),
    "lossless": ("lossless", "5GB"),
    "lossless, few bits": ("lossless:width=2", "5GB"),
    "int8": ("int8", "5GB"),
    "int4, sharded": ("int4", 700),
    "sign": ("sign", "5GB"),
    "low-rank": ("low-rank:rank=3", "5GB"),
    "sparse": ("sparse:density=0.2", "5GB"),
    "auto": ("auto:0.5", "5GB"),
}
FILE, NAME = "alignment_vector.safetensors", "lm_head.weight"
DAMAGED = r"in .*\.safetensors is damaged: .*copy or extract the vector again"


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts come in many blocks, as those of large tensors do."""
    monkeypatch.setattr(integrity, "BLOCK", 64)


def begin(file: Path) -> int:
    """The byte at which a safetensors file's values begin."""
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def flip(file: Path, bit: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    file.write_bytes(raw)


def content(vector: AlignmentVector) -> list[object]:
    """All that a vector is, bit for bit."""
    parts = [
        (name, vector.format_of(name), part, value.dtype, value.shape, value.view(-1).view(torch.uint8).tolist())
        for name in vector
        for part, value in vector.encoded(name).parts.items()
    ]
    return [parts, vector.base, vector.format, vector.source, vector.errors]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("format", "shard"), FORMATS.values(), ids=list(FORMATS))
def test_a_flipped_bit_is_noticed_or_says_nothing(
    pair: tuple[Path, Path], tmp_path: Path, format: str, shard: int | str
) -> None:
    alignvec.extract(*pair, format=format, output=tmp_path / "v", max_shard_size=shard)
    whole, pick = content(alignvec.load(tmp_path / "v")), random.Random(0)
    files = sorted((tmp_path / "v").iterdir())
    for trial in range(60):
        file = pick.choice(files)
        values = begin(file) if file.suffix == ".safetensors" else 0
        first = values if trial % 2 else 0  # half of them anywhere, half in the values or the description
        size = 8 * file.stat().st_size
        bit = pick.randrange(min(8 * first, size - 1), size)
        flip(file, bit)
        try:
            vector = alignvec.load(tmp_path / "v")
        except AlignvecError:
            pass
        else:
            if file.suffix == ".safetensors" and bit >= 8 * values:
                with pytest.raises(AlignvecError, match=DAMAGED):
                    content(vector)
            else:  # metadata that nobody reads
                assert content(vector) == whole, (file.name, bit)
        flip(file, bit)
    assert content(alignvec.load(tmp_path / "v")) == whole


def test_the_checksum_on_disk(tmp_path: Path) -> None:
    """xxh3 of every MiB of the bytes in the file, seeded by what they mean."""
    delta = torch.arange(700_000, dtype=torch.float32).view(700, 1000)
    AlignmentVector({"w": delta, "b": torch.ones(3)}).save(tmp_path / "v")
    said = '["w", "dense", {}, [700, 1000], "", "float32", [700, 1000]]'
    seed, raw = xxhash.xxh3_64_intdigest(said.encode()), delta.numpy().tobytes()
    blocks = [raw[start : start + 2**20] for start in range(0, 2_800_000, 2**20)]
    data = json.loads((tmp_path / "v" / "alignment_vector.json").read_text())
    assert len(blocks) == 3
    assert data["tensors"]["w"]["checksum"] == {"": "".join(xxhash.xxh3_64_hexdigest(b, seed=seed) for b in blocks)}
    found = data.pop("checksum")
    assert found == "xxh3-64/1MiB:" + xxhash.xxh3_64_hexdigest(json.dumps(data, sort_keys=True).encode())
    assert torch.equal(alignvec.load(tmp_path / "v")["w"], delta)


def writers(pair: tuple[Path, Path], folder: Path) -> dict[str, Callable[[Path], object]]:
    dense = alignvec.extract(*pair, output=folder / "dense")
    adapter = adapters.saved(adapters.adapted(new("Llama"), target_modules=adapters.ATTENTION), folder / "adapter")
    return {
        "extract": lambda out: alignvec.extract(*pair, output=out, exclude="*embed*"),
        "extract, in shards": lambda out: alignvec.extract(*pair, output=out, max_shard_size=500),
        "extract, encoded": lambda out: alignvec.extract(*pair, output=out, format="int4"),
        "save from memory": alignvec.extract(*pair, format="sparse:density=0.2").save,
        "save from disk": alignvec.load(folder / "dense").save,
        "save of a part": dense.select("lm_head.*").save,
        "save of a sum": (dense + dense * 0.5).save,
        "convert": lambda out: alignvec.convert(folder / "dense", out, "sign"),
        "convert, as it is": lambda out: alignvec.convert(folder / "dense", out),
        "surgery": lambda out: surgery.truncate(folder / "dense", 2, output=out),
        "an adapter": lambda out: from_peft(adapter).save(out),
        "an adapter, converted": lambda out: alignvec.convert(adapter, out),
    }


@pytest.mark.usefixtures("small_blocks")
def test_every_writer_makes_them(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for what, write in writers(pair, tmp_path).items():
        write(tmp_path / what)
        vector = alignvec.load(tmp_path / what)
        assert vector.verified, what
        vector = vector.with_base(pair[0]) if vector.needs_base else vector
        assert vector.norm() > 0, what
        unverified = alignvec.load(tmp_path / what, verify=False)
        assert not unverified.verified
        assert content(unverified) == content(alignvec.load(tmp_path / what))


def test_what_a_file_means_is_part_of_it(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Values that are whole, under another name, as another dtype, or with another format's options."""
    one, two = "model.layers.0.self_attn.q_proj.bias", "model.layers.1.mlp.bias"
    deltas = {one: torch.ones(24, dtype=torch.float16), two: torch.zeros(24, dtype=torch.float16)}
    AlignmentVector(deltas).save(tmp_path / "v")
    file = tmp_path / "v" / FILE
    kept = file.read_bytes()
    for changed in ({one: deltas[two], two: deltas[one]}, {n: d.view(torch.bfloat16) for n, d in deltas.items()}):
        save_file(changed, file, metadata={"format": "pt"})
        for name in deltas:
            with pytest.raises(AlignvecError, match=f"{name} {DAMAGED}"):
                alignvec.load(tmp_path / "v")[name]
    file.write_bytes(kept)

    def swap(data: dict) -> None:  # type: ignore[type-arg]
        data["tensors"][one]["checksum"], data["tensors"][two]["checksum"] = (
            data["tensors"][two]["checksum"],
            data["tensors"][one]["checksum"],
        )

    with pytest.raises(AlignvecError, match=f"{one} {DAMAGED}"):
        alignvec.load(change_and_seal(tmp_path / "v", swap))[one]
    alignvec.extract(*pair, format="sparse:density=0.2", output=tmp_path / "s")
    change_and_seal(tmp_path / "s", lambda data: data["tensors"][NAME]["options"].update(density=0.1))
    with pytest.raises(AlignvecError, match=f"{NAME}/.* {DAMAGED}"):
        alignvec.load(tmp_path / "s")[NAME]


def test_no_use_of_a_damaged_delta_passes(tmp_path: Path) -> None:
    model = new("Llama")
    model.save_pretrained(tmp_path / "base")
    alignvec.extract(model, tuned(model), output=tmp_path / "v")
    values = load_file(tmp_path / "v" / FILE)
    values[NAME].view(torch.int32)[-1, -1] ^= 1  # the last bit of a float32
    save_file(values, tmp_path / "v" / FILE)
    folder, out = tmp_path / "v", tmp_path / "out"
    vector, numel = alignvec.load(folder), values[NAME].numel()
    before = copy.deepcopy(model)
    for use in (
        lambda: vector[NAME],
        lambda: vector.read(NAME, 0, 1),
        lambda: vector.read(NAME, numel - 1, numel),
        lambda: vector.encoded(NAME),
        vector.norm,
        lambda: vector.dot(vector),
        vector.statistics,
        lambda: (vector * 2 + vector)[NAME],
        lambda: vector.select(NAME)[NAME],
        lambda: pickle.loads(pickle.dumps(copy.deepcopy(vector)))[NAME],
        lambda: vector.save(out),
        lambda: alignvec.convert(folder, out),
        lambda: alignvec.convert(folder, out, "int8"),
        lambda: alignvec.merge(tmp_path / "base", {"v": folder}, {"v": 0.5}, out),
        lambda: surgery.truncate(folder, 2, output=out),
        lambda: alignvec.attach(model, {"v": folder}),
    ):
        with pytest.raises(AlignvecError, match=f"{NAME} {DAMAGED}"):
            use()
        assert not out.exists()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert torch.equal(vector["model.norm.weight"], values["model.norm.weight"])  # others are whole
    assert torch.equal(alignvec.load(folder, verify=False)[NAME], values[NAME])


@pytest.mark.parametrize("format", ["dense", "int8", "int4", "sign", "lossless:width=2"])
def test_a_part_is_compared_as_far_as_it_is_read_and_once(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    flat = alignvec.extract(*pair, format=format, output=tmp_path / "v", dtype="float32")[NAME].reshape(-1)
    monkeypatch.setattr(integrity, "BLOCK", 32)
    alignvec.load(tmp_path / "v", verify=False).save(tmp_path / "w")
    vector = alignvec.load(tmp_path / "w").with_base(pair[0])
    info, hashed, compare = vector._deltas.layout(NAME), [], integrity.VerifiedCheckpoint._compare  # type: ignore[union-attr]

    def counted(self: integrity.VerifiedCheckpoint, name: str, *rest: object) -> None:
        hashed.append(name)
        compare(self, name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(integrity.VerifiedCheckpoint, "_compare", counted)
    assert torch.equal(vector.read(NAME, 30 * 24, 31 * 24), flat[30 * 24 : 31 * 24])
    few = len(hashed)
    assert 0 < few < sum(part.nbytes for part in info.values()) / 32 / 3
    vector.read(NAME, 30 * 24, 31 * 24)
    assert len(hashed) == few
    for start, stop in ((0, 24), (5, 400), (0, 61 * 24), (61 * 24 - 1, 61 * 24), (7, 7)):
        assert torch.equal(vector.read(NAME, start, stop), flat[start:stop])
    vector.encoded(NAME)
    assert len(hashed) == sum(-(-part.nbytes // 32) for part in info.values())


def test_many_threads_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "BLOCK", 4096)
    delta = torch.randn(64, 4096, dtype=torch.bfloat16)
    AlignmentVector({"w": delta}).save(tmp_path / "v")
    for _ in range(5):
        vector = alignvec.load(tmp_path / "v")
        starts = random.Random(0).sample(range(64 * 4096 - 9000), 200)
        with ThreadPoolExecutor(8) as pool:
            pieces = list(pool.map(lambda start: vector.read("w", start, start + 9000), starts))  # noqa: B023
        assert all(torch.equal(p, delta.view(-1)[s : s + 9000]) for p, s in zip(pieces, starts, strict=True))


def test_reading_a_whole_vector_reads_every_byte_once(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vector = alignvec.extract(*pair, output=tmp_path / "v")
    count, read = [], Checkpoint.read

    def counted(self: Checkpoint, name: str, *rest: int) -> torch.Tensor:
        values = read(self, name, *rest)
        count.append(values.nbytes)
        return values

    monkeypatch.setattr(Checkpoint, "read", counted)
    vector.norm()
    assert sum(count) == vector.nbytes
