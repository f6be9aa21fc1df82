"""The growth operator against its equation written out densely, in numpy and in torch, saved and loaded."""

import json
from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

import growkit
from growkit.matrices import Dense, Matrix, MeanFill, Selection, pad
from growkit.methods import methods
from growkit.operator import Expansion, Fresh, GrowthOperator, unchanged
from growkit.testing import axes, layer_graphs, memory_model, targets, transformer
from growkit.weights import Grower, dtype_of
from growkit_specs import (
    Axis,
    Concatenation,
    Fixed,
    GrowkitError,
    InvalidTarget,
    Layer,
    LayerGraph,
    Layout,
    Leaf,
    Parameter,
    Product,
    Tensor,
)

SOURCE_LAYERS, TARGET_LAYERS = 2, 3
SMALL = {"hidden": 3, "ffn": 2, "heads": 2, "head_dim": 2}
LARGE = {"hidden": 4, "ffn": 3, "heads": 3, "head_dim": 3}


def tensor_of(layout: Layout | str, slot: str = "proj.weight", layer: int | None = 0) -> Tensor:
    """A tensor of the larger model."""
    parameter = Parameter(name="w{layer}", slot=slot, layout=str(layout))
    owner = Layer(name="layer", kind="linear", parameters=(parameter,))
    return Tensor(f"w{layer}", parameter.parsed.shape(LARGE), parameter, owner, "stack", layer)


def random_operator(seed: int = 0, spaces: tuple[str, ...] = tuple(SMALL), **other: Any) -> GrowthOperator:
    """A dense operator: write and read matrices of their own for each space (and basis), and a blend."""
    rng = np.random.default_rng(seed)

    def dense(space: str) -> Dense:
        name = space.partition("[")[0]
        return Dense(rng.standard_normal((LARGE[name], SMALL[name])))

    blend = {"stack": rng.standard_normal((TARGET_LAYERS, SOURCE_LAYERS))}
    expansions = {s: Expansion(write=dense(s), read=dense(s), seen=dense(s)) for s in spaces}
    return GrowthOperator(expansions, blend, **other)


def random_sources(target: Tensor, seed: int = 1) -> np.ndarray:
    """The source's tensors of a slot, ``(L1, ...)``."""
    shape = (SOURCE_LAYERS, *target.parameter.parsed.shape(SMALL))
    return np.random.default_rng(seed).standard_normal(shape)


def written_out(axis: Axis, expansions: Mapping[str, Expansion], side: str, bases: tuple[str, ...] = ()) -> np.ndarray:
    """The matrix of an axis, densely: np.kron for products, block diagonals for concatenations."""
    if len(bases) == 1 and f"{axis}[{bases[0]}]" in expansions:
        return getattr(expansions[f"{axis}[{bases[0]}]"], side).as_matrix()
    match axis:
        case Leaf(space):
            return getattr(expansions[space], side).as_matrix()
        case Fixed(size):
            return np.eye(size)
        case Product((Fixed(3), *rest)) if len(bases) == 3:
            segments = tuple(Product(tuple(rest)) for _ in bases)
            return written_out(Concatenation(segments), expansions, side, bases)
        case Product(factors):
            return reduce(np.kron, [written_out(factor, expansions, side, bases) for factor in factors])
        case Concatenation(segments):
            own = [(b,) for b in bases] if len(bases) == len(segments) else [bases] * len(segments)
            blocks = [written_out(s, expansions, side, b) for s, b in zip(segments, own, strict=True)]
            return block_diagonal(blocks)


def block_diagonal(blocks: list[np.ndarray]) -> np.ndarray:
    whole = np.zeros(np.sum([block.shape for block in blocks], axis=0))
    row = column = 0
    for block in blocks:
        whole[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return whole


# --- the equation --------------------------------------------------------------------------------------------

LAYOUTS = [
    ("(heads head_dim) <- hidden", "q_proj.weight"),
    ("hidden -> (heads head_dim)", "v_proj.weight"),
    ("hidden -> (3 heads head_dim)", "qkv_proj.weight"),
    ("(3 heads head_dim) <- hidden", "qkv_proj.weight"),
    ("(heads 3 head_dim) <- hidden", "qkv_proj.weight"),
    ("((heads head_dim) + head_dim + head_dim) <- hidden", "qkv_proj.weight"),
    ("hidden -> (heads (2 + 1 + 1) head_dim)", "qkv_proj.weight"),
    ("hidden <- (heads head_dim)", "o_proj.weight"),
    ("(2 ffn) <- hidden", "gate_up_proj.weight"),
    ("hidden <- 2 ffn", "proj.weight"),
    ("ffn <- (hidden + hidden)", "proj.weight"),
    ("-> (3 heads head_dim)", "qkv_proj.bias"),
    ("+ hidden", "shift"),
]
BASES = ("head_dim[q]", "head_dim[k]", "heads[v]")


@pytest.mark.parametrize("layer", range(TARGET_LAYERS))
@pytest.mark.parametrize(("layout", "slot"), LAYOUTS)
def test_growth_is_one_matrix_on_the_stacked_sources(layout: str, slot: str, layer: int) -> None:
    """``vec(W'[t]) = (w[t] (x) B (x) A) vec([W_1; ...; W_L1])``, row-major, each axis in storage order."""
    is_interleaved = "heads 3" in layout or "heads (" in layout  # one basis for all segments only
    operator = random_operator(spaces=(*SMALL, *(() if is_interleaved else BASES)))
    target = tensor_of(layout, slot, layer)
    sides = {"read": "read", "write": "write", "shift": "seen"}
    parsed, bases = target.parameter.parsed, target.parameter.bases
    matrices = [
        written_out(axis, operator.expansions, sides[role], bases)
        for axis, role in zip(parsed.axes, parsed.roles, strict=True)
    ]
    whole = reduce(np.kron, [operator.blend["stack"][[layer]], *matrices])
    sources = random_sources(target)
    grown = operator.grow(target, lambda key, j: sources[j])
    np.testing.assert_allclose(grown.reshape(-1), whole @ sources.reshape(-1), atol=1e-12)


@st.composite
def small_layouts(draw: st.DrawFn) -> Layout:
    axis = axes(tuple(SMALL), max_leaves=3)
    sides = draw(st.lists(axis, min_size=1, max_size=2)), draw(st.lists(axis, min_size=1, max_size=2))
    return Layout(tuple(sides[0]), draw(st.sampled_from(("<-", "->"))), tuple(sides[1]))


@given(small_layouts(), st.integers(0, 9))
def test_growth_is_the_equation_on_drawn_layouts(layout: Layout, seed: int) -> None:
    operator, target = random_operator(seed), tensor_of(layout, layer=2)
    sources = random_sources(target)
    expected = np.tensordot(operator.blend["stack"][2], sources, axes=1)
    for index, (axis, role) in enumerate(zip(layout.axes, layout.roles, strict=True)):
        matrix = written_out(axis, operator.expansions, role)
        expected = np.moveaxis(np.tensordot(matrix, expected, axes=(1, index)), 0, index)
    np.testing.assert_allclose(operator.grow(target, lambda key, j: sources[j]), expected, atol=1e-12)


@given(small_layouts(), st.integers(0, 9))
def test_blending_then_mapping_is_mapping_then_blending(layout: Layout, seed: int) -> None:
    operator, target = random_operator(seed), tensor_of(layout, layer=1)
    sources = random_sources(target)
    mapped = [operator.widened(target, W, lambda key, j: sources[j]) for W in sources]
    expected = np.tensordot(operator.blend["stack"][1], np.stack(mapped), axes=1)
    np.testing.assert_allclose(operator.grow(target, lambda key, j: sources[j]), expected, atol=1e-12)


@given(small_layouts(), st.integers(0, 9))
def test_growth_is_linear_in_the_source(layout: Layout, seed: int) -> None:
    operator, target = random_operator(seed), tensor_of(layout, layer=1)
    first, second = random_sources(target, 1), random_sources(target, 2)
    grown = [operator.grow(target, lambda key, j, W=W: W[j]) for W in (first, second, 2 * first - second)]
    np.testing.assert_allclose(grown[2], 2 * grown[0] - grown[1], atol=1e-12)


def test_a_slot_may_have_a_blend_of_its_own() -> None:
    target = tensor_of("hidden <- ffn", layer=1)
    operator = random_operator()
    silent = GrowthOperator(
        operator.expansions, {**operator.blend, target.key: np.zeros((TARGET_LAYERS, SOURCE_LAYERS))}
    )
    sources = random_sources(target)
    assert not silent.grow(target, lambda key, j: sources[j]).any()
    assert operator.grow(target, lambda key, j: sources[j]).any()


def test_a_whole_axis_may_have_a_matrix_of_its_own() -> None:
    rng = np.random.default_rng(0)
    mixing = Dense(rng.standard_normal((9, 4)))
    operator = random_operator()
    expansions = {**operator.expansions, "(heads head_dim)[q]": Expansion(mixing, mixing, mixing)}
    operator = GrowthOperator(expansions, operator.blend)
    for layout in ("(heads head_dim) <- hidden", "hidden -> (3 heads head_dim)"):
        target = tensor_of(layout, "q_proj.weight" if "3" not in layout else "qkv_proj.weight")
        axis = target.parameter.parsed.axes.index(target.parameter.parsed.writes[0])
        rows = operator.axis_matrix(target, axis).as_matrix()
        np.testing.assert_allclose(rows[:9, :4], mixing.array, atol=1e-12)


def test_bases_that_are_interleaved_grow_apart() -> None:
    """Every head's query, key and value are mapped by the matrices of their own bases, one after the other."""
    operator = random_operator(spaces=(*SMALL, "head_dim[q]"))
    target = tensor_of("(heads 3 head_dim) <- hidden", "qkv_proj.weight")
    heads = operator.expansions["heads"].write.as_matrix()
    of_basis = [operator.expansion("head_dim", (basis,)).write.as_matrix() for basis in "qkv"]
    (H, h), (D, d) = heads.shape, of_basis[0].shape
    expected = np.zeros((H, 3, D, h, 3, d))
    for b, head_dim in enumerate(of_basis):
        expected[:, b, :, :, b, :] = np.einsum("Hh,Dd->HDhd", heads, head_dim)
    matrix = operator.axis_matrix(target, 0)
    np.testing.assert_allclose(matrix.as_matrix(), expected.reshape(H * 3 * D, h * 3 * d))
    np.testing.assert_allclose(matrix.mT.as_matrix(), matrix.as_matrix().T)


# --- fresh entries -------------------------------------------------------------------------------------------

COPY = np.array([0, 1, 2, 1])
COPIES = {
    "hidden": Expansion(
        write=Selection(COPY, 3),
        read=Selection(COPY, 3, np.array([1, 0.5, 1, 0.5])),
        seen=Selection(COPY, 3),
        fresh="read",
    ),
    "ffn": Expansion(pad(3, 2), pad(3, 2), pad(3, 2), fresh="write"),
    "heads": unchanged(3),
    "head_dim": Expansion(MeanFill(3, 2), pad(3, 2), pad(3, 2), fresh="read"),
}


@pytest.mark.parametrize(
    "layout",
    [
        "ffn <- hidden",
        "hidden -> ffn",
        "3 <- (hidden + hidden)",
        "3 <- (2 hidden)",
        "(hidden 2 head_dim) -> 3",
        "3 <- hidden head_dim",
    ],
)
def test_fresh_entries_of_readers_are_not_seen(layout: str) -> None:
    """``Z C = 0`` along every axis that is read."""
    operator = GrowthOperator(COPIES, {"stack": np.eye(1)}, fresh=Fresh(scale=3.0))
    target = tensor_of(layout)
    Z = operator.residual_of(target, np.random.default_rng(0).standard_normal((5, 7)))
    assert Z is not None
    read = np.ones(target.shape, dtype=bool)  # the entries whose rows are the source's
    for axis, role in enumerate(target.parameter.parsed.roles):
        if role == "write":
            support = operator.axis_matrix(target, axis).support
            read &= support.reshape(-1, *(1,) * (len(target.shape) - axis - 1))
    for axis, role in enumerate(target.parameter.parsed.roles):
        if role == "read":
            seen = operator.axis_matrix(target, axis, "seen")
            np.testing.assert_allclose(seen.mT.apply(np.where(read, Z, 0), axis), 0, atol=1e-12)
    assert np.abs(np.where(read, Z, 0)).max() > 0.1, "there is nothing fresh"


def test_readers_are_silent_where_writers_are_fresh() -> None:
    """New heads write fresh values into entries that copies are read from too: nothing fresh may read them."""
    expansions = {**COPIES, "heads": Expansion(pad(3, 2), pad(3, 2), pad(3, 2), fresh="write"), "hidden": unchanged(4)}
    operator = GrowthOperator(expansions, {"stack": np.eye(1)})
    W = np.random.default_rng(0).standard_normal((4, 4))
    assert operator.residual_of(tensor_of("hidden <- (heads head_dim)", "o_proj.weight"), W) is None
    fresh = operator.residual_of(tensor_of("(heads head_dim) <- hidden", "v_proj.weight"), W)
    assert fresh is not None
    assert (np.abs(fresh).max(axis=1) > 0).tolist() == [False] * 6 + [True] * 3  # the new head's rows


def test_fresh_entries_have_the_standard_deviation_of_the_trained_ones() -> None:
    target, trained = tensor_of("ffn <- hidden"), np.random.default_rng(0).normal(0, 0.1, (2, 3))
    drawn = [
        GrowthOperator(COPIES, {"stack": np.eye(1)}, fresh=Fresh(seed)).residual_of(target, trained)[2]
        for seed in range(500)
    ]
    assert np.std(drawn) == pytest.approx(trained.std(), rel=0.1)


def test_fresh_entries_depend_on_the_seed_and_the_tensor_only() -> None:
    W = np.random.default_rng(0).standard_normal((2, 3))

    def drawn(seed: int, layer: int) -> np.ndarray:
        operator = GrowthOperator(COPIES, {"stack": np.eye(1)}, fresh=Fresh(seed))
        return operator.residual_of(tensor_of("ffn <- hidden", layer=layer), W)

    assert np.array_equal(drawn(0, 0), drawn(0, 0))
    assert not np.allclose(drawn(0, 0), drawn(1, 0))
    assert not np.allclose(drawn(0, 0), drawn(0, 1))


def padded(space: str) -> Expansion:
    """A space whose new entries come behind the source's, as fresh as those of copies."""
    behind = pad(LARGE[space], SMALL[space])
    return Expansion(behind, behind, behind, fresh=COPIES[space].fresh)


PADDED = {space: padded(space) for space in ("hidden", "ffn")}


@pytest.mark.parametrize("expansions", [COPIES, PADDED], ids=["copies", "padded"])
def test_a_grown_tensor_is_what_is_widened_plus_the_residual(expansions: Mapping[str, Expansion]) -> None:
    """However the fresh entries get there; torch goes the one way, numpy the other."""
    operator, target = GrowthOperator(expansions, {"stack": np.eye(1)}), tensor_of("ffn <- hidden")
    W = np.random.default_rng(0).standard_normal((2, 3))
    Z = operator.residual_of(target, W)
    assert Z is not None
    grown = operator.grow(target, lambda key, layer: W)
    np.testing.assert_allclose(grown, operator.widened(target, W, lambda key, layer: W) + Z, rtol=1e-12)
    in_torch = operator.grow(target, lambda key, layer: torch.from_numpy(W))
    np.testing.assert_allclose(grown, in_torch, rtol=1e-12)


def test_how_many_entries_are_drawn_at_once_changes_none_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    trained, where = np.random.default_rng(0).normal(3, 0.1, (40, 7)), np.arange(60) % 3 > 0
    wide = Fresh().draw("w", trained, (60, 9), where[:, None])
    monkeypatch.setattr("growkit.operator.BLOCK", 20)
    np.testing.assert_allclose(Fresh().draw("w", trained, (60, 9), where[:, None]), wide, rtol=1e-12)
    assert ((wide != 0).all(axis=1) == where).all()


def test_drawing_onto_what_does_not_grow_leaves_the_source_alone() -> None:
    """The widened tensor is then the source's own array."""
    operator = GrowthOperator({s: unchanged(n) for s, n in LARGE.items()}, {"stack": np.eye(1)}, fresh=Fresh(anew=True))
    W = np.ones((3, 4))
    W[0] = 2
    source = W.copy()
    assert not np.array_equal(operator.grow(tensor_of("ffn <- hidden"), lambda key, layer: W), W)
    assert np.array_equal(W, source)


# --- numpy and torch, files, identity ------------------------------------------------------------------------


def every_tensor(source: growkit.Model, operator: GrowthOperator, to: Callable[[Any], Any]) -> dict[str, Any]:
    """Every tensor that an operator grows, from the source's arrays brought into a namespace by ``to``."""
    names = Grower(source, operator).names
    large = growkit.grow(source, operator).graph
    return {
        tensor.name: operator.grow(tensor, lambda key, layer: to(source.weights[names[key, layer]]))
        for tensor in large.tensors()
    }


@st.composite
def growths(draw: st.DrawFn) -> tuple[growkit.Model, GrowthOperator]:
    """A model and an operator that a method made for it."""
    graph = draw(layer_graphs(qkv=st.sampled_from(("separate", "product", "concatenation"))))
    method = draw(st.sampled_from(("lossless", "random", "width=net2net,depth=stack")))
    source = memory_model(graph)
    return source, growkit.plan(source, draw(targets(graph)), method=method).operator


@given(growths())
def test_numpy_and_torch_grow_the_same(growth: tuple[growkit.Model, GrowthOperator]) -> None:
    source, operator = growth
    expected = every_tensor(source, operator, np.asarray)
    grown = every_tensor(source, operator, torch.from_numpy)
    for name, array in expected.items():
        assert grown[name].dtype == torch.float64
        np.testing.assert_allclose(grown[name].numpy(), array, atol=1e-12, err_msg=name)


@given(growths())
def test_a_saved_operator_grows_the_same_bits(tmp_path_factory, growth: tuple[growkit.Model, GrowthOperator]) -> None:
    source, operator = growth
    path = tmp_path_factory.getbasetemp() / "operator.safetensors"
    operator.save(path)
    loaded = GrowthOperator.load(path)
    large, again = growkit.grow(source, operator), growkit.grow(source, loaded)
    assert again.graph == large.graph
    for name, array in large.weights.items():
        assert np.array_equal(again.weights[name], array), name


def test_a_learned_operator_is_saved_whole(tmp_path: Path) -> None:
    operator = random_operator(
        spaces=(*SMALL, *BASES),
        norm_factors={"norm": 0.5},
        untied=("w",),
        residual={"w0": np.ones((3, 4)), "w1": pad(3, 2)},
    )
    operator.save(tmp_path / "operator")
    loaded = GrowthOperator.load(tmp_path / "operator")
    assert (loaded.norm_factors, loaded.untied, loaded.fresh) == ({"norm": 0.5}, ("w",), operator.fresh)
    assert np.array_equal(loaded.residual["w0"], operator.residual["w0"])
    assert np.array_equal(loaded.residual["w1"].as_matrix(), pad(3, 2).as_matrix())
    for key, expansion in operator.expansions.items():
        for side in ("write", "read", "seen"):
            assert np.array_equal(
                getattr(loaded.expansions[key], side).as_matrix(), getattr(expansion, side).as_matrix()
            )


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_file_that_is_no_operator_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "operator"
    path.write_bytes(content)
    with pytest.raises(GrowkitError, match="not a growth operator that growkit saved"):
        GrowthOperator.load(path)
    with pytest.raises(GrowkitError, match="not a growth operator that growkit saved"):
        GrowthOperator.load(tmp_path / "missing")


def narrowed(structure: dict[str, Any]) -> None:
    structure["expansions"]["hidden"]["read"]["columns"] = 2


def widened(structure: dict[str, Any]) -> None:
    structure["expansions"]["hidden"]["seen"] = {"kind": "identity", "size": 3}


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda structure: structure.update(format=2), "format 2, expected 1"),
        (lambda structure: structure.update(expansions=[]), "no attribute 'items'"),
        (lambda structure: structure.pop("fresh"), "'fresh'"),
        (lambda structure: structure["expansions"]["hidden"]["read"].update(kind="odd"), "unknown matrix kind 'odd'"),
        (narrowed, "a selection names entries outside 0 to 1"),
        (widened, r"the matrices of hidden differ in shape: \(3, 3\), \(4, 3\)"),
        (lambda structure: structure["blend"].append("ghost"), "'blend.ghost'"),
        (lambda structure: structure["fresh"].update(reference="odd"), "fresh entries refer to 'odd'"),
        (lambda structure: structure["expansions"]["hidden"].update(gain="x"), "could not convert string to float"),
    ],
)
def test_a_damaged_operator_is_refused_with_the_reason(
    tmp_path: Path, damage: Callable[[dict[str, Any]], object], problem: str
) -> None:
    path = tmp_path / "operator.safetensors"
    GrowthOperator({"hidden": COPIES["hidden"]}, {"stack": np.eye(2)}).save(path)
    with safe_open(path, framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        structure = json.loads(file.metadata()["growkit_operator"])
    damage(structure)
    save_file(arrays, path, metadata={"growkit_operator": json.dumps(structure)})
    with pytest.raises(GrowkitError, match=f"operator.safetensors: not a growth operator .*{problem}"):
        GrowthOperator.load(path)


def test_a_file_of_weights_is_no_operator(tmp_path: Path) -> None:
    save_file({"w": np.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(GrowkitError, match="its metadata has no growkit_operator"):
        GrowthOperator.load(tmp_path / "model.safetensors")


def test_a_blend_that_is_none_is_refused(tmp_path: Path) -> None:
    GrowthOperator({}, {"stack": np.ones(3)}).save(tmp_path / "operator")
    with pytest.raises(GrowkitError, match=r"the blend stack is of shape \(3,\); expected"):
        GrowthOperator.load(tmp_path / "operator")


@given(
    layer_graphs(dtype=st.sampled_from(("float64", "float32", "float16", "bfloat16"))),
    st.sampled_from([method.name for method in methods() if method.reference != "init"]),
)
def test_growth_to_the_same_size_is_the_identity_bit_for_bit(graph: LayerGraph, method: str) -> None:
    source = memory_model(graph)
    plan = growkit.plan(source, hidden="1x", layers="1x", method=method)
    target = growkit.grow(source, plan)
    assert plan.preserving
    assert target.graph == source.graph
    assert list(target.weights) == list(source.weights)
    for name, array in source.weights.items():
        assert target.weights[name].dtype == array.dtype
        assert np.array_equal(target.weights[name], array), name


@pytest.mark.parametrize(
    ("to", "dtype"),
    [
        (np.asarray, "float32"),
        (np.asarray, "float64"),
        (torch.from_numpy, "float32"),
        (torch.from_numpy, "float64"),
    ],
)
def test_the_namespace_and_element_type_are_the_sources(to: Callable[[Any], Any], dtype: str) -> None:
    target = tensor_of("(3 heads head_dim) <- hidden", "qkv_proj.weight")
    sources = random_sources(target).astype(dtype)
    grown = random_operator().grow(target, lambda key, j: to(sources[j]))
    assert type(grown) is type(to(sources))
    assert grown.dtype == to(sources).dtype


def test_gradients_flow_into_every_learned_part() -> None:
    target = tensor_of("(heads head_dim) <- hidden", "q_proj.weight", 2)
    sources = torch.from_numpy(random_sources(target))
    operator = random_operator()

    def learned(array: Any) -> torch.Tensor:
        return torch.tensor(np.asarray(array), requires_grad=True)

    B = {space: learned(e.write.array) for space, e in operator.expansions.items()}
    A = {space: learned(e.read.array) for space, e in operator.expansions.items()}
    w = learned(operator.blend["stack"])
    expansions = {s: Expansion(write=Dense(B[s]), read=Dense(A[s]), seen=Dense(B[s])) for s in SMALL}
    grown = GrowthOperator(expansions, {"stack": w}).grow(target, lambda key, j: sources[j])
    grown.square().sum().backward()
    for used in (B["heads"], B["head_dim"], A["hidden"], w):
        assert used.grad is not None
        assert used.grad.abs().sum() > 0
    assert B["hidden"].grad is None
    expected = operator.grow(target, lambda key, j: sources[j].numpy())
    np.testing.assert_allclose(grown.detach().numpy(), expected, atol=1e-12)


# --- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "problem"),
    [
        ({"heads": 3, "hidden": 4}, "does not grow a model whose hidden is 12|does not grow a model whose heads is 2"),
        ({"ffn": 7}, "the operator does not grow a model whose ffn is 6"),
        ({"depths": (3,)}, "the operator does not grow a model with 2 layers in stack0"),
        ({"group": 1}, "the operator does not grow a model whose heads is 2"),
    ],
)
def test_an_operator_for_another_model_is_refused(features: dict[str, Any], problem: str) -> None:
    other = memory_model(transformer(**features))
    operator = growkit.plan(other, vocab="2x").operator
    with pytest.raises(InvalidTarget, match=problem):
        growkit.grow(memory_model(transformer(hidden=4)), operator)


def test_weights_that_are_not_finite_are_named() -> None:
    source = memory_model(transformer(dtype="float32"))
    source.weights["table.weight"][3, 1] = np.nan  # type: ignore[index]
    target = growkit.grow(source, hidden="2x")
    with pytest.raises(GrowkitError, match=r"table\.weight: the entry \[3, 1\] is nan; expected finite weights"):
        target.weights["table.weight"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_grown_weights_may_have_another_element_type(dtype: str) -> None:
    source = memory_model(transformer(dtype="float32"))
    target = growkit.grow(source, growkit.plan(source, hidden="2x"), dtype=dtype)
    assert {array.dtype for array in target.weights.values()} == {dtype_of(dtype)}
    assert {t.parameter.dtype for t in target.graph.tensors()} == {dtype}


@given(layer_graphs(), st.data())
def test_an_axis_matrix_is_what_its_spaces_make_it(graph: LayerGraph, data: st.DataObject) -> None:
    """Every tensor of every drawn model: the matrices fit its shapes on both sides."""
    source = memory_model(graph)
    plan = growkit.plan(source, data.draw(targets(graph)), method="random")
    shapes = {tensor.key: tensor.shape for tensor in graph.tensors(tied=True)}
    for tensor in plan.target.tensors(tied=True):
        for axis in range(len(tensor.shape)):
            matrix: Matrix = plan.operator.axis_matrix(tensor, axis)
            assert matrix.shape == (tensor.shape[axis], shapes[tensor.key][axis])
