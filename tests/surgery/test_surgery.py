"""Operations on vectors against small examples, PEFT's own TIES and dense linear algebra; storage, attach, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor

import alignvec
from alignvec import AlignmentVector, AlignvecError, surgery
from alignvec.fingerprint import identify
from tests.models import merged, random_vector, tiny

SHAPES = {
    "model.embed_tokens.weight": (11, 6),
    "model.layers.0.self_attn.q_proj.weight": (9, 6),
    "model.layers.1.mlp.up_proj.weight": (2, 4, 7),
    "model.norm.weight": (6,),
}
Q = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"
BASE = identify({name: torch.ones(shape) for name, shape in SHAPES.items()})


def vector(seed: int, skip: str = "", dtype: torch.dtype = torch.float32) -> AlignmentVector:
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    return AlignmentVector({name: value for name, value in drawn.items() if name != skip}, BASE)


@pytest.fixture
def three() -> dict[str, AlignmentVector]:
    return {"a": vector(0), "b": vector(1, skip=Q), "c": vector(2, dtype=torch.bfloat16)}


def dense(made: AlignmentVector, name: str) -> Tensor:
    return made[name].double() if name in made else torch.zeros(SHAPES[name], dtype=torch.float64)


def of(*values: float) -> AlignmentVector:
    return AlignmentVector({"w": torch.tensor(values)})


def test_ties_by_hand() -> None:
    given = {"a": of(3.0, -2.0, 0.1, 1.0), "b": of(1.0, 4.0, -5.0, -0.5)}  # half of each stays: 3 -2; 4 -5
    assert surgery.ties(given, 0.5)["w"].tolist() == [3.0, 4.0, -5.0, 0.0]
    parts = surgery.ties_parts(given, 0.5)
    assert {name: part["w"].tolist() for name, part in parts.items()} == {"a": [3.0, 0, 0, 0], "b": [0, 4.0, -5.0, 0]}
    both = {"a": of(3.0, 1.0), "b": of(1.0, -1.0)}
    assert surgery.ties(both, 1)["w"].tolist() == [2.0, 1.0]  # the mean of those that agree; a tie is positive
    assert surgery.ties(both, 1, disjoint="sum")["w"].tolist() == [4.0, 1.0]


@pytest.mark.parametrize("density", [0.1, 0.4, 0.9])
def test_ties_is_pefts(density: float) -> None:
    given = {name: of(*torch.randn(200).tolist()) for name in "abc"}
    expected = merge_utils.ties([v["w"] for v in given.values()], torch.ones(3), density)
    torch.testing.assert_close(surgery.ties(given, density)["w"], expected)


@pytest.mark.parametrize("disjoint", ["mean", "sum"])
def test_parts_add_up_to_ties(three: dict[str, AlignmentVector], disjoint: str) -> None:
    one, parts = (f(three, 0.3, disjoint=disjoint) for f in (surgery.ties, surgery.ties_parts))
    for name in SHAPES:
        torch.testing.assert_close(
            sum(dense(part, name) for part in parts.values()), dense(one, name), rtol=1e-6, atol=0
        )
    assert Q not in parts["b"]
    kept = sum(int(part[name].count_nonzero()) for part in parts.values() for name in part)
    trimmed = sum(round(0.3 * sum(v[name].numel() for name in v)) for v in three.values())
    assert 0.5 * trimmed < kept <= trimmed + 3  # ties of bf16 values aside


def test_dare_drops_rescales_and_repeats() -> None:
    model = AlignmentVector({"w": torch.ones(300, 100), "norm": torch.ones(4000)})
    made = surgery.dare(model, 0.25, seed=3)
    for name in model:
        assert set(made[name].unique().tolist()) == {0.0, 4.0}
        assert float(made[name].mean()) == pytest.approx(1, abs=0.1)
    assert made.format_of("w").name == "sparse"
    again, other = surgery.dare(model, 0.25, seed=3, format="dense"), surgery.dare(model, 0.25, seed=4)
    assert torch.equal(made["w"], again["w"]) and not torch.equal(made["w"], other["w"])  # noqa: PT018
    assert again.format_of("w").name == "dense"
    assert torch.equal(surgery.dare(model, 1.0)["norm"], model["norm"])


def test_truncate_is_the_best_of_its_rank(three: dict[str, AlignmentVector]) -> None:
    made = surgery.truncate(three["a"], 2)
    for name, shape in SHAPES.items():
        delta = three["a"][name].double()
        if len(shape) > 1:
            u, s, vh = torch.linalg.svd(delta.reshape(-1, shape[-1]), full_matrices=False)
            delta = ((u[:, :2] * s[:2]) @ vh[:2]).view(shape)
            assert str(made.format_of(name)) == "low-rank:rank=2,dtype=float32"
        torch.testing.assert_close(dense(made, name), delta, rtol=1e-4, atol=1e-5)
    whole = surgery.truncate(three["a"], 99)
    torch.testing.assert_close(whole[Q], three["a"][Q], rtol=1e-4, atol=1e-5)


def test_tsv_is_the_papers_and_its_parts_do_not_meet(three: dict[str, AlignmentVector]) -> None:
    made = surgery.tsv(three)
    name = "model.layers.1.mlp.up_proj.weight"  # [8, 7]: two singular values each
    u, s, vh = zip(*(torch.linalg.svd(v[name].double().view(8, 7), full_matrices=False) for v in three.values()))  # noqa: B905
    left, right = (
        torch.cat([x[:, :2] for x in u], 1),
        torch.cat([x[:2] for x in vh], 0),
    )
    (p, _, q), (p2, _, q2) = (torch.linalg.svd(x, full_matrices=False) for x in (left, right))
    expected = p @ q @ torch.diag(torch.cat([x[:2] for x in s])) @ p2 @ q2
    torch.testing.assert_close(sum(dense(v, name) for v in made.values()).view(8, 7), expected, rtol=1e-4, atol=1e-5)
    a, c = made["a"][name].view(8, 7), made["c"][name].view(8, 7)
    assert float((a.T @ c).abs().max()) < 1e-5
    assert float((a @ c.T).abs().max()) < 1e-5
    assert float((three["a"][name].view(8, 7).T @ three["c"][name].view(8, 7).float()).abs().max()) > 0.1
    assert torch.linalg.matrix_rank(a) == 2
    assert torch.equal(made["a"][NORM], three["a"][NORM])
    assert Q not in made["b"] and Q in made["a"]  # noqa: PT018
    assert surgery.tsv(three, 1)["a"].format_of(name).options["rank"] == 1


def test_tsv_takes_no_noise_for_directions() -> None:
    """A vector of low rank gives the directions that it has, no others in the space that is left to it."""
    one, two = torch.outer(torch.randn(12), torch.randn(9)), torch.randn(12, 9)
    made = surgery.tsv({"one": AlignmentVector({"w": one}), "two": AlignmentVector({"w": two})})
    assert [made[name].format_of("w").options["rank"] for name in made] == [1, 4]
    cosine = torch.nn.functional.cosine_similarity(made["one"]["w"].flatten(), one.flatten(), dim=0)
    assert float(cosine) > 0.5
    assert float(made["one"]["w"].norm()) == pytest.approx(float(one.norm()), rel=1e-4)


def test_isotropic_has_one_singular_value(three: dict[str, AlignmentVector]) -> None:
    made, whole = surgery.isotropic(three), three["a"] + three["b"] + three["c"]
    values, before = torch.linalg.svdvals(made[Q]), torch.linalg.svdvals(whole[Q])
    torch.testing.assert_close(values, before.mean().expand(6), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made[NORM], whole[NORM] / 3)
    assert float((made[Q] * whole[Q]).sum()) == pytest.approx(float(before.mean() * before.sum()), rel=1e-4)


def test_shared_mean_leaves_the_rest(three: dict[str, AlignmentVector]) -> None:
    made = surgery.remove_shared_mean(three)
    assert list(made) == ["a", "b", "c", "shared"]
    for name in SHAPES:
        mean = sum(dense(v, name) for v in three.values()) / 3
        torch.testing.assert_close(dense(made["shared"], name), mean, rtol=1e-5, atol=1e-6)
        for label in three:
            both = dense(made[label], name) + dense(made["shared"], name)
            torch.testing.assert_close(both, dense(three[label], name), rtol=1e-5, atol=1e-6)


def test_cosines_by_layer_and_kind(three: dict[str, AlignmentVector]) -> None:
    found = surgery.cosines(three)
    assert found.names == ("a", "b", "c")
    for i, one in enumerate(three.values()):
        for j, two in enumerate(three.values()):
            assert float(found.overall[i, j]) == pytest.approx(one.cosine(two), abs=1e-12)
    assert list(found.layers) == ["embedding", 0, 1, "norm"]
    assert list(found.kinds) == ["embed_tokens", "self_attn.q_proj", "mlp.up_proj", "norm"]
    a, c = three["a"][Q].double(), three["c"][Q].double()
    assert float(found.kinds["self_attn.q_proj"][0, 2]) == pytest.approx(float((a * c).sum() / (a.norm() * c.norm())))
    assert found.layers[0][0, 1].isnan()  # b has no q_proj


@pytest.mark.parametrize("format", [None, "int8", "dense"])
def test_folders_hold_what_memory_does(three: dict[str, AlignmentVector], tmp_path: Path, format: str | None) -> None:
    paths = {}
    for name, given in three.items():
        given.save(tmp_path / name)
        paths[name] = tmp_path / name
    written = surgery.tsv(paths, output=tmp_path / "out", format=format)
    for name, kept in surgery.tsv(three, format=format).items():
        loaded = alignvec.load(tmp_path / "out" / name)
        assert loaded.base == kept.base == BASE
        assert loaded.source == kept.source
        assert loaded.source["operation"] == "tsv"
        assert loaded.format == kept.format
        for parameter in kept:
            assert torch.equal(loaded[parameter], kept[parameter])
            assert torch.equal(written[name][parameter], kept[parameter])
    assert surgery.dare(paths["a"], 0.5, dtype="bfloat16").encoded(Q).parts["values"].dtype == torch.bfloat16
    one = surgery.ties(paths, 0.5, output=tmp_path / "one", dtype="bfloat16")
    assert one[Q].dtype == torch.bfloat16
    with pytest.raises(AlignvecError, match="exists"):
        surgery.ties(paths, 0.5, output=tmp_path / "one")
    with pytest.raises(AlignvecError, match="holds the input"):
        surgery.truncate(paths["a"], 1, output=tmp_path / "a", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "one", "out"]


def test_results_attach() -> None:
    model = tiny("Mistral")
    given = {"one": random_vector(model, 1), "two": random_vector(model, 2)}
    made = {"tsv " + name: v for name, v in surgery.tsv(given, 4).items()} | {"dare": surgery.dare(given["one"], 0.5)}
    mix = {"tsv one": 0.7, "tsv two": -0.4, "dare": 0.3}
    ids = torch.arange(12).view(2, 6) + 3
    expected = merged(model, made, mix)(ids).logits
    alignment = alignvec.attach(model, made)
    with torch.no_grad(), alignment.using(mix):
        torch.testing.assert_close(model(ids).logits.double(), expected, rtol=1e-3, atol=1e-3)


def test_refusals(three: dict[str, AlignmentVector], tmp_path: Path) -> None:
    stranger = AlignmentVector({NORM: torch.ones(6)}, identify({NORM: torch.zeros(6)}))
    misshapen = AlignmentVector({NORM: torch.ones(5)})
    for operation in (surgery.ties, surgery.tsv, surgery.isotropic, surgery.remove_shared_mean, surgery.cosines):
        for given, message in (
            ({}, "no vectors"),
            ({**three, "x": stranger}, "a and x"),
            ({**three, "x": misshapen}, "shape"),
        ):
            with pytest.raises(AlignvecError, match=message):
                operation(given)
    for density in (0, -0.1, 1.5):
        for operation in (surgery.ties, surgery.ties_parts):
            with pytest.raises(AlignvecError, match="density"):
                operation(three, density, output=tmp_path / "x")
        with pytest.raises(AlignvecError, match="density"):
            surgery.dare(three["a"], density)
    for refused, message in (
        (lambda: surgery.truncate(three["a"], 0), "rank=0"),
        (lambda: surgery.tsv(three, 0), "rank=0"),
        (lambda: surgery.ties(three, disjoint="all"), "disjoint"),
        (lambda: surgery.tsv({str(i): vector(i) for i in range(7)}, output=tmp_path / "x"), "too small"),
        (lambda: surgery.truncate(three["a"], 1, format="auto:0.25"), "convert"),
        (lambda: surgery.truncate(three["a"], 1, format="zip"), "not known"),
        (lambda: surgery.tsv({"a/b": three["a"]}, output=tmp_path / "x"), "another name"),
        (lambda: surgery.remove_shared_mean({"a": three["a"]}), "two at least"),
        (lambda: surgery.remove_shared_mean({**three, "shared": three["a"]}), "shared"),
    ):
        with pytest.raises(AlignvecError, match=message):
            refused()
    assert not list(tmp_path.iterdir())
