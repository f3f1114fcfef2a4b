"""Runs that were cut short, in the middle of a checkpoint, too: they go on from the latest one that is whole."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignvec import AlignmentVector
from alignvec.errors import AlignvecError
from alignvec.recipes.models import model_path
from tests.models import tiny
from tests.storage.children import context

pytest.importorskip("trl")

from transformers import AutoTokenizer, TrainerCallback

from alignvec.train import train_dpo
from alignvec.train.resume import checkpoint, claim, saving

STEPS = 4
OPTIONS: dict[str, Any] = dict(
    steps=STEPS,
    batch_size=2,
    learning_rate=1e-2,
    device="cpu",
    max_length=48,
    dpo={"gradient_checkpointing": False, "save_total_limit": 2, "save_steps": 1},
)


class _Stop(TrainerCallback):
    """Ends a run when it begins the step after its third checkpoint."""

    def on_step_begin(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
        if state.global_step == 3:
            raise KeyboardInterrupt


def train(folder: Path, work: Path | None, **options: Any) -> AlignmentVector:
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    return train_dpo(folder / "base", tokenizer, folder / "pairs.jsonl", work_folder=work, **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, pairs, and the work folder of a run that was stopped with two checkpoints in it."""
    place = tmp_path_factory.mktemp("training")
    tokenizer = AutoTokenizer.from_pretrained(model_path("base"))
    tiny("Mistral", vocab_size=len(tokenizer), tie_word_embeddings=True).save_pretrained(place / "base")
    tokenizer.save_pretrained(place / "base")
    words = ("metformin", "aspirin", "lithium", "codeine", "insulin", "morphine", "heparin", "digoxin")
    pairs = [{"prompt": f"What is {word}?", "chosen": f" {word} is a drug.", "rejected": " Ask."} for word in words]
    (place / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    with pytest.raises(KeyboardInterrupt):
        train(place, place / "work", callbacks=[_Stop()])
    assert sorted(path.name for path in (place / "work").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    return place


@pytest.fixture(scope="module")
def whole(folder: Path) -> AlignmentVector:
    """What a run gives that nobody stops."""
    return train(folder, None)


def cut(name: str, keep: float = 0.5) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[: int(keep * len(content))])

    return damage


def without(*names: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        for name in names:
            (path / name).unlink()

    return damage


def _empty(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()


DAMAGE: dict[str, Callable[[Path], None]] = {
    "nothing in it": _empty,
    "weights cut": cut("model.safetensors"),
    "weights, and no more": without("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"),
    "optimiser cut": cut("optimizer.pt", 0.9),
    "optimiser empty": cut("optimizer.pt", 0),
    "random state cut": cut("rng_state.pth"),
    "no state": without("trainer_state.json"),
    "state cut": cut("trainer_state.json"),
    "state of another kind": lambda path: (path / "trainer_state.json").write_text("[]"),
    "state without a step": lambda path: (path / "trainer_state.json").write_text("{}"),
    "no weights": without("model.safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=list(DAMAGE))
def test_a_half_written_checkpoint_is_passed_over(damage: Callable[[Path], None], folder: Path, tmp_path: Path) -> None:
    work = shutil.copytree(folder / "work", tmp_path / "work")
    assert checkpoint(work) == str(work / "checkpoint-3")
    damage(work / "checkpoint-3")
    with pytest.warns(
        UserWarning, match=r"checkpoint-3 \(.*\) cannot be gone on from; training goes on from checkpoint-2"
    ):
        assert checkpoint(work) == str(work / "checkpoint-2")
    damage(work / "checkpoint-2")
    with pytest.warns(UserWarning, match="training goes on from the beginning"):
        assert checkpoint(work) is None


@pytest.mark.parametrize("damage", ["weights cut", "no state"])
def test_the_run_that_goes_on_gives_what_a_whole_one_gives(
    damage: str, folder: Path, whole: AlignmentVector, tmp_path: Path
) -> None:
    work = shutil.copytree(folder / "work", tmp_path / "work")
    DAMAGE[damage](work / "checkpoint-3")
    with pytest.warns(UserWarning, match="goes on from checkpoint-2"):
        resumed = train(folder, work)
    assert (resumed - whole).norm() < 1e-3 * whole.norm()


def test_no_room_for_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    work = shutil.copytree(folder / "work", tmp_path / "work")
    cut("optimizer.pt")(work / "checkpoint-3")
    for error in (
        OSError(errno.ENOSPC, "No space left on device", str(work / "checkpoint-3" / "tokenizer.json")),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
    ):
        with pytest.raises(AlignvecError, match="work cannot be written: "), saving(work):
            raise error
    assert [path.name for path in work.glob("checkpoint-*")] == ["checkpoint-2"]
    with pytest.raises(RuntimeError, match="out of memory"), saving(work):
        raise RuntimeError("CUDA out of memory")


def test_a_run_killed_before_it_had_claimed_its_folder(tmp_path: Path) -> None:
    (tmp_path / "work" / ".alignvec_run.json.01234567.partial").mkdir(parents=True)
    claim(tmp_path / "work", [{"prompt": "a"}], {"beta": 1})  # type: ignore[arg-type]
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["alignvec_run.json"]
    for content in ("{", "[]", "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")):
        (tmp_path / "work" / "alignvec_run.json").write_text(content, encoding="latin-1")
        with pytest.raises(AlignvecError, match="is damaged"):
            claim(tmp_path / "work", [{"prompt": "a"}], {"beta": 1})  # type: ignore[arg-type]


def _child(folder: Path, work: Path) -> None:
    train(folder, work)


@pytest.mark.slow
def test_killed_while_it_trains(folder: Path, whole: AlignmentVector, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng, resumed = random.Random(seed), 0
    for number in range(5):
        work = tmp_path / f"work{number}"
        process = context.Process(target=_child, args=(folder, work))
        process.start()
        while not any(work.glob("checkpoint-*")) and process.is_alive():
            time.sleep(0.002)
        time.sleep(rng.random() * 0.8)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        resumed += len(list(work.glob("checkpoint-*")))
        vector = train(folder, work)
        assert (vector - whole).norm() < 1e-3 * whole.norm(), f"kill {number} of seed {seed}"
    assert resumed
