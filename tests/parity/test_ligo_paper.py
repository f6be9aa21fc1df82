"""`ligo-paper` against the paper's own equation, every Kronecker product written out, before and after learning.

``vec(W'_t) = sum_j w_tj (A (x) B) vec(W_j)``, ``vec`` by columns; one matrix for each space that is written and read.
(Wang et al., LiGO, ICLR 2023, equations 7 and 8, and the table of its appendix that says which matrix stands where.)
"""

from functools import cache
from typing import Any

import numpy as np
import pytest

import growkit
from growkit.operator import GrowthOperator
from tests.adapters.fitting import ready
from tests.adapters.test_fit import EXACT, batches, fitted, source_of

PUBLISHED = {**EXACT, "learn": ("depth", "width")}  # the source's weights and the norms have nothing of their own
SIZES = {"hidden": 36, "ffn": 60, "layers": 3}
NAMES = {
    "emb": "hidden",
    "Q": "(heads head_dim)[q]",
    "K": "(heads head_dim)[k]",
    "V": "(heads head_dim)[v]",
    "fc1": "ffn",
    "transform": "transform",
}
"""The paper's matrices, and the spaces that they are called after here; its heads' matrices mix all heads."""

LAYER = "bert.encoder.layer.{}"
INSIDE: dict[str, tuple[str, tuple[str, ...]]] = {
    "attention.self.query.weight": ("attention/q_proj.weight", ("Q", "emb")),
    "attention.self.query.bias": ("attention/q_proj.bias", ("Q",)),
    "attention.self.key.weight": ("attention/k_proj.weight", ("K", "emb")),
    "attention.self.key.bias": ("attention/k_proj.bias", ("K",)),
    "attention.self.value.weight": ("attention/v_proj.weight", ("V", "emb")),
    "attention.self.value.bias": ("attention/v_proj.bias", ("V",)),
    "attention.output.dense.weight": ("attention/o_proj.weight", ("emb", "V")),
    "attention.output.dense.bias": ("attention/o_proj.bias", ("emb",)),
    "attention.output.LayerNorm.weight": ("attention_norm/scale", ("emb",)),
    "attention.output.LayerNorm.bias": ("attention_norm/shift", ("emb",)),
    "intermediate.dense.weight": ("mlp/up_proj.weight", ("fc1", "emb")),
    "intermediate.dense.bias": ("mlp/up_proj.bias", ("fc1",)),
    "output.dense.weight": ("mlp/down_proj.weight", ("emb", "fc1")),
    "output.dense.bias": ("mlp/down_proj.bias", ("emb",)),
    "output.LayerNorm.weight": ("mlp_norm/scale", ("emb",)),
    "output.LayerNorm.bias": ("mlp_norm/shift", ("emb",)),
}
"""Tensors of a block: the slot that has their blend, and the matrices of their axes."""

OUTSIDE: dict[str, tuple[str | None, ...]] = {
    "bert.embeddings.word_embeddings.weight": (None, "emb"),
    "bert.embeddings.position_embeddings.weight": (None, "emb"),
    "bert.embeddings.token_type_embeddings.weight": (None, "emb"),
    "bert.embeddings.LayerNorm.weight": ("emb",),
    "bert.embeddings.LayerNorm.bias": ("emb",),
    "cls.predictions.transform.dense.weight": ("transform", "emb"),
    "cls.predictions.transform.dense.bias": ("transform",),
    "cls.predictions.transform.LayerNorm.weight": ("transform",),
    "cls.predictions.transform.LayerNorm.bias": ("transform",),
    "cls.predictions.decoder.weight": (None, "transform"),
    "cls.predictions.decoder.bias": (None,),
    "cls.predictions.bias": (None,),
}


@cache
def source() -> growkit.Model:
    """A tiny post-norm encoder."""
    return source_of("bert")


def plan() -> growkit.Plan:
    return growkit.plan(source(), method="ligo-paper", **SIZES)


def learned() -> GrowthOperator:
    """The operator after some steps that move every entry."""
    operator, _ = fitted(batches(3, model=source()), model=source(), plan=plan(), steps=5, lr=0.05, **PUBLISHED)
    return operator


def moved(**settings: Any) -> GrowthOperator:
    """The operator with every entry moved at random."""
    fit = ready(source(), plan(), seed=3, **{**PUBLISHED, **settings})
    return fit.learned.operator(entries=fit.learned.values())


OPERATORS = {"before": lambda: plan().operator, "learned": learned, "moved": moved}


def matrix(operator: GrowthOperator, name: str | None, size: int) -> np.ndarray:
    """One of the paper's matrices; the identity for axes of tokens."""
    return np.eye(size) if name is None else operator.expansions[NAMES[name]].write.as_matrix()


def vec(W: np.ndarray) -> np.ndarray:
    return W.reshape(-1, order="F")


def widened(operator: GrowthOperator, W: np.ndarray, names: tuple[str | None, ...]) -> np.ndarray:
    """``(A (x) B) vec(W)`` for a matrix, ``B b`` for a vector."""
    matrices = [matrix(operator, name, size) for name, size in zip(names, W.shape, strict=True)]
    if len(matrices) == 1:
        return matrices[0] @ W
    B, A = matrices
    return (np.kron(A, B) @ vec(W)).reshape((len(B), len(A)), order="F")


@pytest.mark.parametrize("when", OPERATORS)
def test_every_tensor_is_the_papers(when: str) -> None:
    operator = OPERATORS[when]()
    large = growkit.grow(source(), operator, dtype="float64")
    wide = {name: np.asarray(array, dtype=np.float64) for name, array in source().weights.items()}
    tied = {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias"}  # fmt: skip
    expected = {name: widened(operator, wide[tied.get(name, name)], names) for name, names in OUTSIDE.items()}
    for suffix, (slot, names) in INSIDE.items():
        w = np.asarray(operator.blend[f"layers/{slot}"])
        assert w.shape == (3, 2)
        widths = [widened(operator, wide[f"{LAYER.format(j)}.{suffix}"], names) for j in range(2)]
        for t in range(3):
            expected[f"{LAYER.format(t)}.{suffix}"] = sum(w[t, j] * widths[j] for j in range(2))
    assert set(expected) == set(large.weights)
    for name, array in expected.items():
        found = np.asarray(large.weights[name])
        np.testing.assert_allclose(found, array, rtol=0, atol=1e-10 * np.abs(array).max(), err_msg=name)


@pytest.mark.parametrize("when", OPERATORS)
def test_one_matrix_writes_and_reads_each_space(when: str) -> None:
    operator = OPERATORS[when]()
    for space in NAMES.values():
        expansion = operator.expansions[space]
        D, d = expansion.write.shape
        B, A, C = (m.as_matrix() for m in (expansion.write, expansion.read, expansion.seen))
        assert np.array_equal(A, B)  # nothing is divided by how often it was copied
        assert np.array_equal(C, B)
        assert np.array_equal(B[:d], np.eye(d))  # [I; E]
        if when == "before":
            np.testing.assert_allclose(B[d:].sum(axis=1), 1)
            assert (B[d:] > 0).all()
        assert d < D


def test_the_matrices_of_queries_keys_and_values_are_their_own() -> None:
    matrices = [matrix(learned(), name, 0) for name in ("emb", "Q", "K", "V", "transform")]
    for i, one in enumerate(matrices):
        assert not any(np.allclose(one, other) for other in matrices[i + 1 :])


def test_learning_moves_every_matrix_and_every_blend() -> None:
    before, after = plan().operator, learned()
    for space in NAMES.values():
        new = [o.expansions[space].write.as_matrix()[-1] for o in (before, after)]
        assert (new[0] != new[1]).all()
    for slot, _ in INSIDE.values():
        w = [np.asarray(o.blend[f"layers/{slot}"]) for o in (before, after)]
        np.testing.assert_allclose(w[0].sum(axis=1), 1)
        assert (w[0] != w[1]).all()


def test_matrices_of_each_layer_serve_that_layer() -> None:
    operator = moved(per_layer=True)
    large = growkit.grow(source(), operator, dtype="float64")
    emb = operator.expansions["hidden"].write.as_matrix()
    for t in range(3):
        Q, K, V, fc1 = (operator.expansions[f"{NAMES[n]}@layers/{t}"].write.as_matrix() for n in ("Q", "K", "V", "fc1"))
        sides = {"attention.self.query": (Q, emb), "attention.self.key": (K, emb), "attention.self.value": (V, emb),
                 "attention.output.dense": (emb, V), "intermediate.dense": (fc1, emb),
                 "output.dense": (emb, fc1)}  # fmt: skip
        for suffix, (B, A) in sides.items():
            w = np.asarray(operator.blend[f"layers/{INSIDE[f'{suffix}.weight'][0]}"])[t]
            layers = [np.asarray(source().weights[f"{LAYER.format(j)}.{suffix}.weight"], np.float64) for j in range(2)]
            expected = sum(w[j] * np.kron(A, B) @ vec(W) for j, W in enumerate(layers))
            found = vec(np.asarray(large.weights[f"{LAYER.format(t)}.{suffix}.weight"]))
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10 * np.abs(expected).max(), err_msg=suffix)
