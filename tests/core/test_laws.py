"""The laws of `growkit.testing`: each passes what is right, and names what is broken."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import growkit
from growkit.matrices import Dense, Matrix, Selection, pad
from growkit.operator import Expansion, GrowthOperator
from growkit.testing import (
    MemoryAdapter,
    architecture_graphs,
    assert_adapter_conforms,
    assert_operator_laws,
    assert_preserves_function,
    layer_graphs,
    memory_model,
    operator_laws,
    reference_forward,
    targets,
    transformer,
)
from growkit.verdict import Reason, Verdict
from growkit_specs import GrowkitError, LayerGraph, UnsupportedModel

LAYERS = "stack0.0"


def broken(law: str, where: str = "", expected: str = "", got: str = "") -> Any:
    """The one message of a broken law."""
    what = (
        rf"the law '{re.escape(law)}' is broken by .*{re.escape(where)}.*: expected .*{re.escape(expected)}.*, got .*"
    )
    return pytest.raises(AssertionError, match=what + re.escape(got))


# --- operators -----------------------------------------------------------------------------------------------


def operator_of(graph: LayerGraph, **sizes: Any) -> GrowthOperator:
    return growkit.plan(memory_model(graph), **sizes).operator


@given(layer_graphs() | architecture_graphs(), st.sampled_from(("lossless", "net2net", "random")), st.data())
def test_our_own_operators_obey_the_laws(graph: LayerGraph, method: str, data: st.DataObject) -> None:
    method = method if method == "random" else f"width={method},depth=lossless"
    plan = growkit.plan(memory_model(graph), data.draw(targets(graph)), method=method)
    skipped = assert_operator_laws(plan.operator, graph)
    assert ("untouched: the operator draws every entry anew" in skipped) == (method == "random")


def test_laws_that_cannot_be_tried_say_why() -> None:
    image = architecture_graph_of_images()
    (reason,) = assert_operator_laws(operator_of(image, hidden="2x"), image)
    assert reason == "verdict: the reference does not understand the input 'pixel_values': it is an image"
    normed = transformer(hidden=4, qk_norm=True, scaled_scores=False)
    (reason,) = assert_operator_laws(operator_of(normed, hidden=8, heads=4, head_dim=4), normed)
    assert reason == "verdict: it says no to 'head_dim: attention scores' out of caution, and the outputs agree"


def architecture_graph_of_images() -> LayerGraph:
    from growkit_specs import architectures

    vit = architectures()["vit"]
    return vit.graph(vit.tiny, None)


def test_an_operator_of_another_model() -> None:
    operator = operator_of(transformer(ffn=5), ffn=8)
    with broken("shapes", "the operator", "an operator of this graph", "does not grow a model whose ffn is 6"):
        assert_operator_laws(operator, transformer(ffn=6))


def test_an_operator_whose_sides_are_of_two_sizes() -> None:
    operator = operator_of(transformer(ffn=6), ffn=8)
    one = operator.expansions["ffn"]
    operator = with_expansion(operator, "ffn", replace(one, read=pad(9, 6)))
    with broken("shapes", "down_proj.weight, axis 1 'ffn'", "a matrix of shape (8, 6)", "(9, 6)"):
        assert_operator_laws(operator, transformer(ffn=6))


def with_expansion(operator: GrowthOperator, space: str, expansion: Expansion) -> GrowthOperator:
    return replace(operator, expansions={**operator.expansions, space: expansion})


@dataclass(frozen=True)
class Crooked(Matrix):
    """A pad whose facts can each be wrong."""

    kind = "crooked"
    rows: int
    columns: int
    crooked: str

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    def apply(self, x: Any, axis: int = 0) -> Any:
        axis = 1 if self.crooked == "axis" and axis == 2 and x.shape[1] == self.columns else axis
        grown = pad(self.rows, self.columns).apply(x, axis)
        return np.abs(grown) if self.crooked == "linear" else grown

    @property
    def mT(self) -> Matrix:
        right = pad(self.rows, self.columns).mT
        return Dense(2 * right.as_matrix()) if self.crooked == "transpose" else right

    @property
    def support(self) -> np.ndarray:
        right = pad(self.rows, self.columns).support
        return ~right if self.crooked == "support" else right


@pytest.mark.parametrize(
    ("crooked", "where"),
    [
        ("linear", "applied along axis 0"),
        ("axis", "applied along axis 2"),
        ("transpose", "the transpose of the write matrix of ffn"),
        ("support", "the support of the write matrix of ffn"),
    ],
)
def test_a_matrix_that_is_not_its_dense_form(crooked: str, where: str) -> None:
    graph = transformer(ffn=3)
    operator = operator_of(graph, ffn=5)
    matrix = Crooked(5, 3, crooked)
    with broken("dense form", where):
        assert_operator_laws(with_expansion(operator, "ffn", Expansion(matrix, pad(5, 3), matrix)), graph)
    fine = Crooked(5, 3, "")
    assert assert_operator_laws(with_expansion(operator, "ffn", Expansion(fine, pad(5, 3), fine)), graph) == ()


def test_heads_that_are_swapped_although_they_do_not_grow() -> None:
    graph = transformer(heads=2)
    swap = Selection(np.array([1, 0]), 2)
    operator = with_expansion(operator_of(graph, ffn=8), "heads", Expansion(swap, swap, swap))
    with broken("untouched", "q_proj.weight, axis 0 '(heads head_dim)', which keeps its size", "1.0", "0.0"):
        assert_operator_laws(operator, graph)


class Altering(GrowthOperator):
    """An operator that does something else to what ``grow`` gives."""

    name: str = ""
    factor: float = 1.0

    def grow(self, target: Any, source: Any, **more: Any) -> Any:
        grown = super().grow(target, source, **more)
        return grown * self.factor if target.name == self.name else grown


def altering(operator: GrowthOperator, name: str, factor: float) -> GrowthOperator:
    class Altered(Altering):
        pass

    Altered.name, Altered.factor = name, factor
    return Altered(**vars(operator))


def test_a_tensor_that_does_not_grow_and_is_scaled() -> None:
    graph = transformer()
    with broken("untouched", "table.weight, entry [0, 0]", got="(28 of 28 entries differ)"):
        assert_operator_laws(altering(operator_of(graph, ffn=8), "table.weight", 1.5), graph)


def test_a_wrong_scale_that_the_verdict_cannot_see() -> None:
    graph = transformer()
    operator = altering(operator_of(graph, ffn=8), f"{LAYERS}.down_proj.weight", 1.5)
    with broken("verdict", "output ", "the same, as every condition holds, to 1e-10", "a relative difference of"):
        assert_operator_laws(operator, graph)


def test_a_verdict_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = transformer(norm="layer", hidden=6)
    exact, inexact = operator_of(graph, hidden=12), operator_of(graph, hidden=9, heads=3, method="net2net")
    assert assert_operator_laws(exact, graph) == assert_operator_laws(inexact, graph) == ()
    monkeypatch.setattr(operator_laws, "verdict", lambda *_: Verdict((Reason("the weather", False, "rain"),)))
    with broken("verdict", expected="a difference, as not kept is the weather", got="a relative difference of"):
        assert_operator_laws(exact, graph)
    monkeypatch.setattr(operator_laws, "verdict", lambda *_: Verdict(()))
    with broken("verdict", expected="the same, as every condition holds"):
        assert_operator_laws(inexact, graph)


class Drifting(GrowthOperator):
    """An operator that draws from one stream, whatever the tensor: the order of growing matters."""

    def grow(self, target: Any, source: Any, **more: Any) -> Any:
        return super().grow(target, source, **more) + 1e-9 * GENERATOR.standard_normal()


GENERATOR = np.random.default_rng(0)


def test_an_operator_that_grows_otherwise_the_second_time() -> None:
    graph = transformer()
    with broken("repeatable", "table.weight, entry [0, 0]"):
        assert_operator_laws(Drifting(**vars(operator_of(graph, ffn=8))), graph)


class Forgetful(GrowthOperator):
    """An operator that leaves its seed out of what it saves."""

    @classmethod
    def load(cls, path: Any) -> GrowthOperator:
        loaded = GrowthOperator.load(path)
        return replace(loaded, fresh=replace(loaded.fresh, seed=0))


def test_an_operator_that_forgets_what_it_saved() -> None:
    graph = transformer()
    operator = operator_of(graph, ffn=8, seed=7)
    assert assert_operator_laws(operator, graph) == ()
    with broken("saved and loaded", "up_proj.weight, entry [6, 0]"):
        assert_operator_laws(Forgetful(**vars(operator)), graph)


class Misshapen(GrowthOperator):
    """An operator that forgets the biases' new entries."""

    def grow(self, target: Any, source: Any, **more: Any) -> Any:
        return (
            super().grow(target, source, **more)[:6]
            if target.name.endswith("up_proj.bias")
            else super().grow(target, source)
        )


def test_a_tensor_of_another_shape() -> None:
    graph = transformer()
    with broken("shapes", f"{LAYERS}.up_proj.bias", "shape [8]", "grown to (6,), expected (8,)"):
        assert_operator_laws(Misshapen(**vars(operator_of(graph, ffn=8))), graph)


# --- adapters ------------------------------------------------------------------------------------------------


class FolderAdapter(MemoryAdapter):
    """An adapter somebody else might write: a folder with a graph as JSON and the weights as arrays."""

    name = "folder"

    def matches(self, source: Any) -> bool:
        return isinstance(source, Path) and (source / "graph.json").is_file()

    def read(self, source: Any) -> growkit.Model:
        graph = LayerGraph.model_validate_json((source / "graph.json").read_text())
        weights = {path.stem: np.load(path) for path in sorted(source.glob("*.npy"))}
        return growkit.Model(graph, weights, self, source)

    def write(self, model: Any, like: Any, destination: Path, progress: Any, check: Any) -> None:
        staged = self.staged(destination)
        self.fill(staged, model)
        try:
            check(self.read(staged))
        except BaseException:
            for path in [*staged.iterdir(), staged]:
                path.unlink() if path.is_file() else path.rmdir()
            raise
        if staged != destination:
            staged.rename(destination)

    def staged(self, destination: Path) -> Path:
        return destination.with_name(f".{destination.name}")

    def fill(self, folder: Path, model: growkit.Model) -> None:
        folder.mkdir()
        (folder / "graph.json").write_text(model.graph.model_dump_json())
        for name, array in self.arrays(model).items():
            np.save(folder / f"{name}.npy", array)

    def arrays(self, model: growkit.Model) -> Mapping[str, Any]:
        return dict(model.weights)


FEATURES: dict[str, Any] = {"heads": 3, "head_dim": 4, "hidden": 12, "head": "tied", "depths": (2,)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    FolderAdapter().fill(tmp_path / "source", memory_model(transformer(**FEATURES)))
    return tmp_path / "source"


@pytest.fixture
def conforms(source: Path) -> Callable[[Any], tuple[str, ...]]:
    return lambda adapter: assert_adapter_conforms(adapter, source, source.parent)


def test_a_right_adapter_conforms(source: Path, conforms: Any) -> None:
    assert conforms(FolderAdapter()) == ()
    assert [path.name for path in source.parent.iterdir()] == ["source"]


@given(graph=layer_graphs(layer_scale=st.just(False)))
def test_models_in_memory_conform_but_for_writing(graph: LayerGraph) -> None:
    skipped = assert_adapter_conforms(MemoryAdapter(), memory_model(graph), ".")
    assert skipped[0] == "writing: a model in memory has no form on disk"
    assert all(reason.startswith("growth of ") for reason in skipped[1:])


def test_an_adapter_that_denies_its_source(conforms: Any) -> None:
    class Denying(FolderAdapter):
        def matches(self, source: Any) -> bool:
            return False

    with broken("matches", "adapter 'folder'", "True for the source", "False"):
        conforms(Denying())


def reading(change: Callable[[growkit.Model], growkit.Model]) -> FolderAdapter:
    """An adapter that changes what it read."""

    class Reading(FolderAdapter):
        def read(self, source: Any) -> growkit.Model:
            return change(super().read(source))

    return Reading()


def with_array(model: growkit.Model, name: str, change: Callable[[Any], Any]) -> growkit.Model:
    return replace(model, weights={**model.weights, name: change(model.weights[name])})


def without(model: growkit.Model, name: str) -> growkit.Model:
    return replace(model, weights={key: array for key, array in model.weights.items() if key != name})


Q = f"{LAYERS}.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "where", "got"),
    [
        (lambda model: without(model, Q), Q, "it in the graph, not in weights"),
        (lambda model: replace(model, weights={**model.weights, "more": np.ones(2)}), "more", "not in graph"),
        (
            lambda model: with_array(model, Q, lambda array: array.reshape(-1, 6)),
            "(heads head_dim) <- hidden",
            "[24, 6]",
        ),
        (lambda model: with_array(model, Q, lambda array: array.astype(np.float32)), Q, "float32"),
        (lambda model: with_array(model, Q, lambda array: array * np.inf), Q, "NaN or infinity"),
    ],
)
def test_a_parameter_that_is_not_there_once(conforms: Any, change: Any, where: str, got: str) -> None:
    with broken("every parameter once", where, got=got):
        conforms(reading(change))


def relabelled(model: growkit.Model, **replaced: str) -> growkit.Model:
    """The model with text of its graph replaced."""
    text = model.graph.model_dump_json()
    for before, after in replaced.items():
        text = text.replace(before, after)
    return replace(model, graph=LayerGraph.model_validate_json(text))


def test_a_tie_that_is_missed(conforms: Any) -> None:
    def untied(model: growkit.Model) -> growkit.Model:
        graph = model.graph.resized({}, {}, untied=["lm_head.weight"])
        return replace(model, graph=graph, weights={**model.weights, "lm_head.weight": model.weights["table.weight"]})

    with broken("ties", "lm_head.weight", "a tie in the graph, as they are one tensor", "no tie"):
        conforms(reading(untied))


class Running(FolderAdapter):
    """An adapter whose forward changes what the reference computes."""

    def __init__(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.change = change

    def forward(self, model: growkit.Model, device: str = "auto") -> Any:
        weights = dict(model.weights)
        return lambda inputs: self.change(reference_forward(model.graph, weights, inputs))


@pytest.mark.parametrize(
    ("law", "change", "where"),
    [
        ("forward", lambda outputs: {f"my_{name}": value for name, value in outputs.items()}, "output states"),
        ("forward", lambda outputs: {name: value[..., :-1] for name, value in outputs.items()}, "output states"),
        ("forward", lambda outputs: {}, "output states"),
        ("forward", lambda outputs: {**outputs, "logits": outputs["logits"] * np.nan}, "output logits"),
        (
            "identity",
            lambda outputs: {n: v * GENERATOR.uniform(size=v.shape) for n, v in outputs.items()},
            "output states",
        ),
    ],
)
def test_a_forward_that_cannot_be_compared(conforms: Any, law: str, change: Any, where: str) -> None:
    with broken(law, where):
        conforms(Running(change))


def test_an_axis_with_its_factors_in_the_wrong_order(source: Path, conforms: Any) -> None:
    """Names and shapes are right; that heads are interleaved shows only where they grow."""
    right = LayerGraph.model_validate_json((source / "graph.json").read_text())

    class Interleaving(FolderAdapter):
        def read(self, source: Any) -> growkit.Model:
            return relabelled(super().read(source), **{"(heads head_dim)": "(head_dim heads)"})

        def forward(self, model: growkit.Model, device: str = "auto") -> Any:
            graph = right.resized(model.graph.sizes, model.graph.depths)
            return lambda inputs: reference_forward(graph, dict(model.weights), inputs)

    with broken("growth of hidden", "output states", "a relative difference of at most 1e-10"):
        conforms(Interleaving())


class Writing(FolderAdapter):
    """An adapter that changes what it writes."""

    def __init__(self, change: Callable[[growkit.Model], growkit.Model]) -> None:
        self.change = change

    def fill(self, folder: Path, model: growkit.Model) -> None:
        super().fill(folder, self.change(model))


def heads_swapped(array: np.ndarray) -> np.ndarray:
    swapped: np.ndarray = array.reshape(3, 4, -1)[[1, 0, 2]].reshape(array.shape)
    return swapped


@pytest.mark.parametrize(
    ("change", "where", "got"),
    [
        (lambda model: without(model, Q), Q, "none"),
        (lambda model: with_array(model, Q, lambda array: 2 * array), Q, "(144 of 144 entries differ)"),
        (lambda model: with_array(model, Q, heads_swapped), Q, "(96 of 144 entries differ)"),
        (lambda model: with_array(model, Q, lambda array: array.astype(np.float16)), Q, "float16"),
        (lambda model: relabelled(model, **{'"gelu"': '"relu"'}), "layer stack0/mlp", "relu"),
        (lambda model: relabelled(model, **{'"table.weight"}': "null}"}), "lm_head.weight", "not tied"),
    ],
)  # fmt: skip
def test_what_is_written_and_is_something_else(conforms: Any, change: Any, where: str, got: str) -> None:
    with broken("written and read back", where, got=got):
        conforms(Writing(change))


def test_a_destination_that_is_not_left_alone_until_all_is_right(conforms: Any) -> None:
    class Hasty(FolderAdapter):
        def staged(self, destination: Path) -> Path:
            return destination

    with broken("written and read back", "same", "nothing there until the check is done", "something"):
        conforms(Hasty())

    class Untidy(FolderAdapter):
        def write(self, model: Any, like: Any, destination: Path, progress: Any, check: Any) -> None:
            self.fill(destination, model)
            check(self.read(destination))

    with broken("written and read back", "same", "nothing there after the check refused", "something"):
        conforms(Untidy())


@pytest.mark.parametrize("calls", ["never", "in vain"])
def test_a_check_that_has_no_say(conforms: Any, calls: str) -> None:
    class Deaf(FolderAdapter):
        def write(self, model: Any, like: Any, destination: Path, progress: Any, check: Any) -> None:
            try:
                if calls == "in vain":
                    check(model)
            except Exception:
                pass
            self.fill(destination, model)

    with broken("written and read back", "the check", "its exception to be raised on", "none"):
        conforms(Deaf())


@pytest.mark.parametrize("refuses", ["forward", "write"])
def test_an_adapter_that_refuses_what_it_has_read(conforms: Any, refuses: str) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise GrowkitError("this model is not to my taste")

    adapter = FolderAdapter()
    setattr(adapter, refuses, refused)
    law = {"forward": "forward", "write": "written and read back"}[refuses]
    with broken(law, "adapter 'folder'", "no refusal", "this model is not to my taste"):
        conforms(adapter)


def test_a_tensor_that_is_lost_only_where_the_model_is_deeper(conforms: Any) -> None:
    last = "stack0.3.q_proj.weight"
    with broken("growth of layers, written and read back", last, got="none"):
        conforms(Writing(lambda model: without(model, last)))


def test_a_source_that_is_changed_on_disk(source: Path, conforms: Any) -> None:
    class Stamping(FolderAdapter):
        def read(self, source: Any) -> growkit.Model:
            (source / "last_read.txt").write_text("now")
            return super().read(source)

    with broken("source unmodified", "last_read.txt", "what it was before", "new after 'every parameter once'"):
        conforms(Stamping())

    class Moving(FolderAdapter):
        def forward(self, model: growkit.Model, device: str = "auto") -> Any:
            (source / f"{Q}.npy").unlink(missing_ok=True)
            return super().forward(model)

    with broken("source unmodified", f"{Q}.npy", "what it was before", "gone after 'forward'"):
        conforms(Moving())


@pytest.mark.parametrize("container", ["model", "mapping", "state dict", "message"])
def test_a_source_that_is_changed_in_memory(container: str) -> None:
    """Whatever holds the weights: growing scales them where they lie."""
    model = memory_model(transformer())
    held = wrapped(container, dict(model.weights))

    class InPlace(MemoryAdapter):
        def matches(self, source: Any) -> bool:
            return True

        def read(self, source: Any) -> growkit.Model:
            return replace(model, adapter=self)

        def forward(self, model: growkit.Model, device: str = "auto") -> Any:
            next(iter(model.weights.values()))[:] *= 2
            return super().forward(model)

    with broken("source unmodified", "" if container == "message" else "table.weight", "what it was before"):
        assert_adapter_conforms(InPlace(), replace(model, weights=held) if container == "model" else held, ".")


def wrapped(container: str, weights: dict[str, Any]) -> Any:
    class Tensor:
        def __init__(self, array: Any) -> None:
            self.array = array

        detach = cpu = double = lambda self: self.array if self is None else self

        def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
            return self.array

    class Module:
        def state_dict(self) -> dict[str, Any]:
            return {name: Tensor(array) for name, array in weights.items()}

    class Message:
        def SerializeToString(self, deterministic: bool) -> bytes:
            return json.dumps({name: array.tolist() for name, array in weights.items()}).encode()

    return {"state dict": Module(), "message": Message()}.get(container, weights)


# --- functions -----------------------------------------------------------------------------------------------


def grown(**features: Any) -> tuple[growkit.Model, growkit.Model]:
    source = memory_model(transformer(**features))
    return source, growkit.grow(source, hidden="2x", layers="2x")


def test_a_grown_model_preserves_the_function() -> None:
    assert_preserves_function(*grown())
    assert_preserves_function(*grown(head="bare"))  # through the read matrix


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("lm_head.weight", lambda array: 1.001 * array),  # a wrong scale
        (f"{LAYERS}.v_proj.weight", lambda array: array.reshape(4, 2, -1)[[1, 0, 2, 3]].reshape(array.shape)),  # heads
        ("lm_head.weight", lambda array: np.roll(array, 1, axis=0)),  # a permuted vocabulary
    ],
)
def test_a_model_that_computes_something_else(name: str, change: Any) -> None:
    source, target = grown()
    with broken("function preserved", "output ", "a relative difference of at most 1e-10"):
        assert_preserves_function(source, with_array(target, name, change))


def test_a_tolerance_is_the_callers() -> None:
    source, target = grown()
    nearly = with_array(target, "lm_head.weight", lambda array: 1.001 * array)
    assert_preserves_function(source, nearly, rtol=0.01)
    with broken("function preserved", "output logits, 2 x 5 x 7", "at most 1e-05", "0.00"):
        assert_preserves_function(source, nearly, rtol=1e-5)


def test_an_operator_that_does_not_stand_beside_the_target() -> None:
    source, target = grown(head="bare")
    alone = replace(target, growth=None)
    assert_preserves_function(source, alone, operator=target.growth.operator if target.growth else None)
    with broken("function preserved", "the outputs' shapes", "ones that can be compared", "no growth operator stands"):
        assert_preserves_function(source, alone)


NUMBERS = st.lists(st.integers(-9, 9), min_size=1).map(np.array)


def test_functions_are_compared_on_drawn_inputs() -> None:
    assert_preserves_function(lambda x: x + x, lambda x: 2 * x, inputs=NUMBERS)
    with broken("function preserved", "output output, 1", "at most 1e-10", "2"):
        assert_preserves_function(lambda x: x, lambda x: np.abs(x), inputs=NUMBERS)


def test_functions_are_compared_on_given_inputs() -> None:
    halves = [np.arange(4, dtype=np.float32)]
    assert_preserves_function(lambda x: (x, x / 3), lambda x: (x, x * np.float32(1 / 3)), inputs=halves)
    with broken("function preserved", "output 1, 4", "at most 1e-05"):
        assert_preserves_function(lambda x: (x, x / 3), lambda x: (x, x / 4), inputs=iter(halves))
    with broken("function preserved", "output b", "an output of both", "none of the target"):
        assert_preserves_function(lambda x: {"a": x, "b": x}, lambda x: {"a": x}, inputs=halves)
    with broken("function preserved", "the outputs' shapes", got="[4] in the source, [2] in the target"):
        assert_preserves_function(lambda x: x, lambda x: x[:2], inputs=halves)
    with broken("function preserved", "the inputs", "at least one", "none"):
        assert_preserves_function(np.sin, np.sin, inputs=[])
    with broken("function preserved", "output output", got="inf"):
        assert_preserves_function(np.sin, lambda x: x * np.nan, inputs=halves)


def test_a_function_is_compared_with_a_model() -> None:
    source, target = grown(head="pooler")
    operator = target.growth.operator if target.growth else None
    run = target.adapter.forward(target)
    assert_preserves_function(source, run, operator=operator)
    assert_preserves_function(source.adapter.forward(source), target)
    with broken("function preserved", "output pooled"):
        assert_preserves_function(
            source, lambda inputs: {**run(inputs), "pooled": 1 + run(inputs)["pooled"]}, operator=operator
        )


def test_what_is_neither_a_model_nor_a_function_is_refused() -> None:
    with pytest.raises(TypeError, match="expected inputs=, a strategy or an iterable"):
        assert_preserves_function(np.sin, np.sin)
    with pytest.raises(UnsupportedModel, match="type int is no model"):
        assert_preserves_function(1, np.sin)
