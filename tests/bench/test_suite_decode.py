"""The sections of the suite that decode, from end to end on the tiny model, and what they conclude from rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from rich.console import Console

import alignvec
from bench import plot, record, run
from bench.record import Row
from bench.suite import blend, breakeven, decode, loops, models, prompting
from bench.suite.case import Case, Setting, median_of
from bench.suite.decoders import decoder, joined, prompt, twin

TINY = Setting("tiny", "cpu", quick=True)


@pytest.fixture(autouse=True)
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call is made twice and takes a millisecond longer than the one before: times are not what is tested."""

    def taken(calls: dict[str, Any], device: str, repeats: int, *, graphs: bool = True) -> dict[str, list[float]]:
        for own in calls.values():
            own[-1]()
            own[-1]()
        return {name: [1e-3 * (i + 1)] * 2 for i, name in enumerate(calls)}

    for module in (decode, prompting):
        monkeypatch.setattr(module, "samples", taken)
    monkeypatch.setattr("bench.suite.decoders.samples", taken)


def _rows(section: str) -> list[Row]:
    rows = run.run(section, TINY, Console(quiet=True))
    assert json.loads(json.dumps(rows)) == rows
    figure = plot.SECTIONS[section]([row for row in rows if not row["missing"]], section)
    assert all(axis.lines for axis in figure.axes), "an empty picture"
    plot.plt.close(figure)
    return rows


def test_decode() -> None:
    rows = _rows("decode")
    measured = [row for row in rows if row["missing"] is None]
    for name in (*decode.FORMATS, decode.BASE):
        for batch, kind in decode.SCALES["tiny"].pairs:
            said = {"batch": batch, "mixes": kind, "k": decode.K, "loop": decode.DECODER}
            seconds, ratio = median_of(measured, name, **said), median_of(measured, decode.over_merged(name), **said)
            assert seconds is not None
            assert ratio is not None
            assert seconds / ratio in [pytest.approx(1e-3 * n) for n in (2, 3)], "of merged weights in the same call"
    loops_of = {row["parameters"]["loop"] for row in measured if row["name"] == decode.MERGED}
    assert loops_of == {decode.DECODER, decode.UNFUSED, decode.EAGER}
    for name in (decode.COPIES, decode.CONCATENATED, decode.PEFT, f"{breakeven.ONE_PASS}, sign"):
        assert any(row["name"] == name for row in measured), name
    reasons = {row["missing"] for row in rows if row["missing"]}
    assert "a CPU has no CUDA graphs" in reasons
    assert "PEFT gives a row of a mixed batch one adapter, not several" in reasons
    assert all(row["target"] is None for row in rows), "another device and model are not held to an H200's targets"


def test_targets_are_those_of_an_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu(Setting):
        kind = "cuda"

    monkeypatch.setattr(record, "device_name", lambda device: "NVIDIA H200")
    cases = decode.cases(OnGpu("mistral-7b", "cuda"))
    judged = {(c.name, c.parameters["batch"], c.parameters["mixes"]): c.target for c in cases if c.target is not None}
    assert judged == {
        ("merged", 1, "uniform"): 4.4e-3,
        ("int4", 1, "uniform"): 7.0e-3,
        ("sign", 1, "uniform"): 5.2e-3,
        ("int4, over merged", 1, "uniform"): 1.7,
        ("sign, over merged", 1, "uniform"): 1.25,
        ("int4, over merged", 16, "distinct"): 1.3,
        ("sign, over merged", 16, "distinct"): 1.3,
    }
    assert all(c.parameters["k"] in (0, 3) and c.parameters["loop"] == decode.DECODER for c in cases if c.target)
    monkeypatch.setattr(record, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert not any(case.target for case in decode.cases(OnGpu("mistral-7b", "cuda")))


@pytest.mark.parametrize("where", ["vectors", "timed"])
def test_a_block_that_does_not_fit_says_so_and_the_others_run(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    latest = ""

    def vectors(model: Any, text: str, k: int) -> Any:
        nonlocal latest
        latest = text
        return full(where == "vectors", made_vectors, model, text, k)

    def timed(*arguments: Any) -> Any:
        return full(where == "timed", made_timed, *arguments)

    def full(here: bool, call: Any, *arguments: Any) -> Any:
        if here and latest == "sign":
            raise torch.OutOfMemoryError("no memory")
        return call(*arguments)

    made_vectors, made_timed = models.vectors, decode.timed
    monkeypatch.setattr(models, "vectors", vectors)
    monkeypatch.setattr(decode, "timed", timed)
    names = ("sign", "sign, over merged", "low-rank:rank=64")
    wanted = [case for case in decode.cases(TINY) if case.name in names and not case.missing]
    with torch.no_grad():
        rows = list(decode.measure(TINY, wanted))
    missing = {row["name"]: row["missing"] for row in rows}
    assert missing["sign"] == missing["sign, over merged"] == "it does not fit in the device's memory"
    assert missing["low-rank:rank=64"] is None
    assert len(rows) == len(wanted)


def test_popularity() -> None:
    assert decode.popularity("uniform", 4) == [0, 0, 0, 0]
    assert decode.popularity("distinct", 4) == [0, 1, 2, 3]
    zipf = decode.popularity("zipf", 16)
    counts = [zipf.count(mix) for mix in range(16)]
    assert sum(counts) == 16
    assert counts[0] == max(counts) >= 4
    assert 4 < len(set(zipf)) < 16
    assert decode.popularity("zipf", 1) == [0]


def _step(name: str, batch: int, seconds: float, mixes: str = "distinct", k: int = 3) -> Row:
    mixes = "uniform" if batch == 1 else mixes
    said = {"k": k, "batch": batch, "mixes": mixes, "loop": decode.DECODER, "context": 8}
    return Case("decode", name, said).row([seconds])


def _conclusions(rows: Sequence[Row], planned: dict[str, breakeven.Figures] | None = None) -> dict[Any, Row]:
    cases = breakeven.cases(TINY, ["int4"], 3)
    made = breakeven.rows([case for case in cases if not case.missing], rows, planned or {}, decode.COPIES)
    return {(row["name"], row["parameters"]["by"]): row for row in made}


def test_where_one_overtakes_the_other() -> None:
    rows = [
        _step("merged", 1, 1.0, k=0),
        _step("int4", 1, 1.5),
        _step("int4", 4, 2.0),
        _step("int4", 4, 9.0, "uniform"),
    ]
    rows.append(Case("decode", f"{breakeven.ONE_PASS}, int4", {"k": 3}).row([4.0]))
    found = _conclusions(rows, {"int4": breakeven.Figures(None, 1.0, {1: 1.2, 2: 1.6})})
    assert found[breakeven.TOKENS, breakeven.MEASURED]["median"] == pytest.approx(8.0), "4 / (1.5 - 1)"
    # On the fly 1.5 + (m - 1) / 6 meets m at 1.6.
    assert found[breakeven.MIXES, breakeven.MEASURED]["median"] == pytest.approx(1.6)
    assert found[breakeven.MIXES, breakeven.PLANNED]["median"] == pytest.approx(1 + 0.2 / 0.6)
    faster = _conclusions([*rows[:1], _step("int4", 1, 0.9), *rows[2:]])
    assert faster[breakeven.TOKENS, breakeven.MEASURED]["missing"] == "on the fly is no slower than merged"
    assert faster[breakeven.MIXES, breakeven.MEASURED]["median"] == 1
    slower = _conclusions([*rows[:2], _step("int4", 4, 5.0)])
    assert slower[breakeven.MIXES, breakeven.MEASURED]["missing"] == "up to 4 mixes, merged copies are faster"
    assert slower[breakeven.TOKENS, breakeven.MEASURED]["missing"] == "what it follows from was not measured"


def test_the_cost_model_s_figures_are_of_the_attached_vectors() -> None:
    model = models.build(TINY)
    made = {}
    for k in (1, 3):
        alignment = alignvec.attach(model, models.vectors(model, "dense", k), max_rows=4)
        made[k] = breakeven.figures(alignment, 4)
        alignment.detach()
    assert set(made[3].fly) == {1, 2, 4}
    assert made[3].fly[1] > made[1].fly[1] > made[1].merged == pytest.approx(made[3].merged)
    assert made[1].merge is None, "on a CPU"


def test_opponents_decode_what_the_model_does(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        model = models.build(TINY)
        ids = prompt(TINY, model, 24)
        text = ids[None]
        for _ in range(3):
            text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], 1)
        # Compiling takes half a minute: a static cache, as it is.
        monkeypatch.setattr(type(model), "get_compiled_call", lambda self, config: self)
        for length in (None, 40):
            loop = loops.Loop(twin(model), ids, 2, 1, length)
            for token in text[0, 24:].tolist():
                loop()
                assert loop.token.tolist() == [[token]] * 2

        zero = loops.concatenate(twin(model), torch.zeros(3))
        assert sum(isinstance(m, loops.Concatenated) for m in zero.modules()) == 7 * model.config.num_hidden_layers
        torch.testing.assert_close(zero(ids[None]).logits, model(ids[None]).logits, rtol=1e-4, atol=1e-4)
        half = loops.concatenate(twin(model), torch.full((2,), 0.5))
        weight = half.model.layers[0].self_attn.q_proj
        x = torch.randn(1, 1, model.config.hidden_size)
        torch.testing.assert_close(weight(x), 2 * model.model.layers[0].self_attn.q_proj(x), rtol=1e-4, atol=1e-5)

        adapted = loops.peft(twin(model), 2)
        plain, mixed = model(ids[None]).logits, adapted(ids.expand(2, -1), adapter_names=["v1", "v2"]).logits
        assert not torch.allclose(mixed[0], mixed[1])
        assert not torch.allclose(mixed[0], plain[0])


def test_a_twin_shares_weights_and_not_vectors() -> None:
    model = models.build(TINY)
    other = twin(model)
    assert [p.data_ptr() for p in other.parameters()] == [p.data_ptr() for p in model.parameters()]
    alignment = alignvec.attach(model, models.vectors(model, "sign", 1))
    assert getattr(other, "alignment", None) is None
    alignment.detach()


def test_timed_rows_decode_their_own_mixes() -> None:
    """The rows' tokens are those that their mixes give, although all prompts are read under the first."""
    with torch.no_grad():
        model = models.build(TINY)
        alignment = alignvec.attach(model, models.vectors(model, "int4", 3), max_rows=2)
        room, ids = decoder(TINY, model, 2, 24), prompt(TINY, model, 24)
        with joined(room, ids, models.mixes(2, 3), 2) as call:
            call()
            assert [len(room.text(row)) for row in range(2)] == [26, 26]
            assert room.prefixes.hits == 2 * 23, "both prompts are copies of one that was read before"
        assert room.free == 2
        alignment.detach()


def test_prompting() -> None:
    rows = _rows("prompting")
    assert all(row["median"] is not None for row in rows if row["name"] != prompting.HALF)
    said = {"way": prompting.INSTRUCTION, "instruction": 64, "preferences": 2, "answer": 8, "turns": 2}
    assert median_of(rows, prompting.READ, **said, cached=False) == 2 * (128 + 64) + 64 + 8
    assert median_of(rows, prompting.READ, **said, cached=True) == 2 * 64
    merged = said | {"way": prompting.MERGED}
    assert median_of(rows, prompting.READ, **merged, cached=False) == 64 + 64 + 8 + 64
    kept = [median_of(rows, prompting.KEPT, **some, cached=True) for some in (said, merged)]
    config = models.config(TINY)
    token = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert kept == [token * (128 + 2 * 72), token * 2 * 72]


def test_half_the_cost_of_prompting() -> None:
    """Reading costs a second a token and a step 10: an instruction of 100 tokens is worth about 10 steps."""
    plain = prompting.Parts({0: 0.0, 1000: 1000.0}, {0: 10.0, 1000: 10.0})
    request = prompting.Request(100, 1, answer=11, turns=2, cached=False)
    instructed = plain.seconds(request, True)
    assert instructed == (100 + 64 + 10 * 10) + (100 + 64 + 11 + 64 + 10 * 10)
    assert plain.seconds(request, False) == instructed - 200
    said = {"instruction": 1000, "preferences": 1, "turns": 1, "cached": False}
    # 64 + 10 (n - 1) <= (1064 + 10 (n - 1)) / 2 up to n = 94.
    assert prompting.longest(plain, plain, said) == 64
    assert prompting.longest(plain, plain, said | {"instruction": 60}) == 0
    assert prompting.longest(plain, plain, said | {"cached": True}) == 0, "a kept instruction costs nothing to read"


def test_blend() -> None:
    rows = _rows("blend")
    assert all(row["median"] is not None for row in rows)
    for text in blend.FORMATS:
        said = {"format": text, "prompts": 2, "policies": 4}
        of = {name: median_of(rows, name, **said) for name in (blend.BLEND, blend.SEPARATE, blend.OVER_SEPARATE)}
        assert of[blend.OVER_SEPARATE] == pytest.approx(of[blend.BLEND] / of[blend.SEPARATE])
