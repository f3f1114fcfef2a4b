"""Two models in, one vector out: the same from paths and live models, and nothing left of what is refused."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import alignvec
from alignvec import extract, fingerprint, integrity, streaming, sums
from alignvec.compiled import cpu_lossless
from alignvec.difference import difference
from alignvec.errors import AlignvecError
from tests.storage.checkpoints import aligned, weights, write_checkpoint

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def same(one: alignvec.AlignmentVector, two: alignvec.AlignmentVector) -> bool:
    return set(one) == set(two) and all(torch.equal(one[n], two[n]) and one[n].dtype == two[n].dtype for n in one)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors come in several pieces."""
    monkeypatch.setattr(sums, "WORDS", 25)
    monkeypatch.setattr(cpu_lossless, "_live", lambda: False)  # its rows have 4096 words
    for module, name in ((sums, "ROW"), (fingerprint, "ROW"), (streaming, "CHUNK")):
        monkeypatch.setattr(module, name, 100)
    monkeypatch.setattr(integrity, "BLOCK", 40)
    monkeypatch.setattr(sys.modules["alignvec.difference"], "STEP", 32)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shards", [(1, 1), (3, 2), (2, 7)], ids=str)
def test_round_trip(tmp_path: Path, dtype: torch.dtype, shards: tuple[int, int]) -> None:
    base = weights(dtype=dtype)
    after = aligned(base)
    paths = write_checkpoint(tmp_path / "b", base, shards[0]), write_checkpoint(tmp_path / "a", after, shards[1])
    in_memory = extract(*paths)
    streamed = extract(*paths, output=tmp_path / "v", max_shard_size=1000)
    assert same(in_memory, streamed)
    assert in_memory.base == streamed.base
    assert len(list((tmp_path / "v").glob("*.safetensors"))) > 1
    assert set(streamed) == {n for n, t in base.items() if not torch.equal(t, after[n])}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, delta in streamed.items():
        assert delta.dtype == dtype
        assert torch.equal(delta, (after[name].to(wide) - base[name].to(wide)).to(dtype))
    assert streamed.base is not None
    assert streamed.base == fingerprint.identify(base, {"model_type": "mistral", "hidden_size": 24})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "v"]


@pytest.mark.usefixtures("small_pieces")
def test_a_change_at_the_end_of_a_tensor_alone(tmp_path: Path) -> None:
    base = weights()
    after = {name: tensor.clone() for name, tensor in base.items()}
    after["lm_head.weight"][-1, -1] += 1
    after["model.embed_tokens.weight"][20, 3] += 1
    paths = write_checkpoint(tmp_path / "b", base), write_checkpoint(tmp_path / "a", after)
    for vector in (extract(*paths), extract(*paths, output=tmp_path / "v")):
        assert set(vector) == {"lm_head.weight", "model.embed_tokens.weight"}
        for name, delta in vector.items():
            assert torch.equal(delta, after[name] - base[name])


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**32), st.sampled_from([1e-6, 1e-4, 1e-2, 1.0]), st.sampled_from(DTYPES), st.sampled_from(DTYPES)
)
def test_what_rounding_lost_is_counted(seed: int, size: float, dtype: torch.dtype, kept: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(101, generator=generator).to(dtype)
    after = (base.double() + size * torch.randn(101, generator=generator)).to(dtype)
    exact = after.double() - base.double()
    result = difference(base, after, kept)
    if result is None:
        assert not exact.to(kept).any()
        return
    delta, tally = result
    if dtype.itemsize == 2 and kept.itemsize == 2:
        assert tally.inexact == int((delta.double() != exact).sum())
        assert tally.error == pytest.approx(float((delta.double() - exact).square().sum()), rel=1e-5)
    assert torch.equal(delta.double(), exact) or dtype.itemsize > 2 or kept.itemsize == 2


def test_dtype_option_keeps_the_difference_exactly(pair: tuple[Path, Path]) -> None:
    rounded, exact = extract(*pair), extract(*pair, dtype="float32")
    assert rounded.source["inexact_values"] > 0
    assert 0 < rounded.source["rounding_error"] < 2**-8
    assert exact.source["inexact_values"] == 0
    base, after = weights(), aligned(weights())
    assert all(torch.equal(d, after[n].float() - base[n].float()) for n, d in exact.items())


class Tiny(nn.Module):
    """A model with the checkpoint's parameter names."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.config = {"model_type": "mistral", "hidden_size": 24}
        for name, tensor in tensors.items():
            *path, leaf = name.split(".")
            module: nn.Module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            if tensor.is_floating_point():
                setattr(module, leaf, nn.Parameter(tensor))
            else:
                module.register_buffer(leaf, tensor)


def test_live_models_and_mixtures_give_the_same(pair: tuple[Path, Path]) -> None:
    base, after = Tiny(weights()), Tiny(aligned(weights()))
    expected = extract(*pair)
    for mixture in ((base, after), (pair[0], after), (base, pair[1])):
        vector = extract(*mixture)
        assert same(vector, expected)
        assert vector.base is not None
        assert expected.base is not None
        assert vector.base.differences(expected.base) == []


def test_parameters_that_are_not_contiguous() -> None:
    base, after = nn.Linear(30, 20), nn.Linear(30, 20)
    turned = nn.Linear(30, 20)
    turned.weight = nn.Parameter(after.weight.detach().t().contiguous().t())
    turned.bias = after.bias
    assert same(extract(base, turned), extract(base, after))


Change = Callable[[dict[str, Tensor]], object]
HEAD, NORM = "lm_head.weight", "model.norm.weight"
BAD: dict[str, tuple[Change, str]] = {
    "missing": (lambda t: t.pop(NORM), "model.norm.weight is missing in aligned"),
    "extra": (lambda t: t.update(extra=torch.ones(2)), "extra is missing in base"),
    "shape": (
        lambda t: t.update({"model.norm.weight": torch.ones(25).bfloat16()}),
        "model.norm.weight is [24] in base",
    ),
    "vocabulary": (lambda t: t.update({HEAD: torch.ones(62, 24).bfloat16()}), "was the vocabulary resized"),
    "dtype": (lambda t: t.update({HEAD: t[HEAD].float()}), "lm_head.weight is bfloat16 in base and float32 in aligned"),
    "integers": (lambda t: t["model.position_ids"].add_(1), "integer tensors differ"),
    "nan": (lambda t: t[HEAD][60].fill_(torch.nan), "delta lm_head.weight holds NaN"),
    "infinity": (lambda t: t[HEAD][60, 23].fill_(torch.inf), "delta lm_head.weight holds NaN or infinity"),
    "own head": (lambda t: t.pop(HEAD), "lm_head.weight is stored in base with values of its own"),
    "nothing": (lambda t: t.update(weights()), "hold the same values"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=list(BAD))
@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "in memory"])
def test_bad_pairs_are_refused(tmp_path: Path, change: Change, message: str, streamed: bool) -> None:
    after = aligned(weights())
    change(after)
    paths = write_checkpoint(tmp_path / "base", weights(), 3), write_checkpoint(tmp_path / "aligned", after, 2)
    with pytest.raises(AlignvecError) as caught:
        extract(*paths, output=tmp_path / "new" / "v" if streamed else None)
    assert message in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aligned", "base"]


def test_other_bad_input(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    meta = nn.Linear(3, 3, device="meta")
    for call, message in (
        (lambda: extract(*pair, format="int5"), "format 'int5' is not known"),
        (lambda: extract(*pair, dtype="int8"), "dtype int8 cannot hold weights"),
        (lambda: extract(*pair, output=pair[0]), "not an empty folder"),
        (lambda: extract(*pair, output=tmp_path, overwrite=True), "holds no safetensors file"),
        (lambda: extract(*pair, output=tmp_path / "v", max_shard_size="much"), "max_shard_size 'much'"),
        (lambda: extract(pair[0], tmp_path / "none"), "does not exist"),
        (lambda: extract(pair[0], "someone/no-such-model"), "someone/no-such-model is neither a local checkpoint"),
        (lambda: extract(meta, meta), "weight is on the meta device"),
    ):
        with pytest.raises(AlignvecError, match=message):
            call()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aligned", "base"]


@pytest.mark.parametrize("stored", [(True, True), (True, False), (False, True)], ids=str)
def test_a_tied_head_is_one_tensor(tmp_path: Path, stored: tuple[bool, bool]) -> None:
    def tie(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
        tensors = {name: tensor for name, tensor in tensors.items() if name != HEAD}
        return tensors | ({HEAD: tensors["model.embed_tokens.weight"].clone()} if keep else {})

    base, after = tie(weights(), stored[0]), tie(aligned(weights()), stored[1])
    vector = extract(write_checkpoint(tmp_path / "b", base, 2), write_checkpoint(tmp_path / "a", after, 2))
    assert HEAD not in vector
    assert "model.embed_tokens.weight" in vector
    assert vector.base is not None
    assert HEAD not in vector.base.tensors


def test_a_head_that_only_starts_out_equal_is_its_own(tmp_path: Path) -> None:
    base = weights()
    base[HEAD] = base["model.embed_tokens.weight"].clone()
    vector = extract(write_checkpoint(tmp_path / "b", base), write_checkpoint(tmp_path / "a", aligned(weights())))
    assert HEAD in vector


def test_an_error_in_the_middle_leaves_nothing(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def interrupted(*arguments: Tensor) -> object:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return difference(*arguments)

    monkeypatch.setattr(streaming, "difference", interrupted)
    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        extract(*pair, output=tmp_path / "v")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aligned", "base"]
    assert torch.get_num_threads() == threads


SLOW = """
import signal, sys, time, alignvec
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background inherit that it is ignored
from alignvec import streaming as module
whole = module.difference
def slow(*arguments):
    time.sleep(0.3)
    return whole(*arguments)
module.difference = slow
print("ready", flush=True)
alignvec.extract(sys.argv[1], sys.argv[2], output=sys.argv[3])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["interrupt", "kill"])
def test_a_signal_gives_no_vector(pair: tuple[Path, Path], tmp_path: Path, number: signal.Signals) -> None:
    output = tmp_path / "v"
    command = [sys.executable, "-c", SLOW, *map(str, pair), str(output)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.readline()
        while not list(tmp_path.glob(".v.*")) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(60) != 0
    assert not output.exists()
    if number == signal.SIGINT:
        assert sorted(path.name for path in tmp_path.iterdir()) == ["aligned", "base"]
    assert len(extract(*pair, output=output)) > 0


def test_progress_is_shown(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    extract(*pair, progress=True)
    assert "extracting" in capsys.readouterr().out
