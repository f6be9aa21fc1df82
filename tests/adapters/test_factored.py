"""Grown weights that stand for their matrix: whatever is done with one gives what it gives with the matrix."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from growkit import matrices as m
from growkit_torch.factored import Factors, Fresh, GrownWeight
from tests.adapters.fitting import dense

T = 5
Use = Callable[[Any, Any], torch.Tensor]
"""Uses a weight ``W``, ``(O, I)``, and a function that makes tensors of a shape, the same in both runs."""


def _index(W: Any) -> torch.Tensor:
    return torch.tensor([[0, W.shape[0] - 1], [1, 0]])


USES: dict[str, Use] = {
    "linear": lambda W, x: F.linear(x(T, W.shape[1]), W),
    "linear, bias": lambda W, x: F.linear(x(2, T, W.shape[1]), W, x(W.shape[0])),
    "linear, named bias": lambda W, x: F.linear(x(T, W.shape[1]), W, bias=x(W.shape[0])),
    "linear, all named": lambda W, x: F.linear(input=x(T, W.shape[1]), weight=W),
    "linear, one vector": lambda W, x: F.linear(x(W.shape[1]), W, x(W.shape[0])),
    "linear, no rows": lambda W, x: F.linear(x(0, W.shape[1]), W),
    "linear, in the weight's place": lambda W, x: F.linear(W, x(3, W.shape[1])),
    "linear, twice what is read": lambda W, x: (lambda y: F.linear(y, W) + F.linear(2 * y, W) + F.linear(y, W))(
        x(T, W.shape[1])
    ),
    "x W^T": lambda W, x: x(T, W.shape[1]) @ W.T,
    "x W^T, mT": lambda W, x: x(2, T, W.shape[1]) @ W.mT,
    "x W": lambda W, x: x(T, W.shape[0]) @ W,
    "matmul": lambda W, x: torch.matmul(x(2, T, W.shape[0]), W),
    "matmul, named": lambda W, x: torch.matmul(x(T, W.shape[0]), other=W),
    "matmul, method": lambda W, x: x(T, W.shape[1]).matmul(W.t()),
    "matmul, a vector": lambda W, x: x(W.shape[0]) @ W,
    "mm": lambda W, x: torch.mm(x(T, W.shape[1]), W.transpose(0, 1)),
    "mm, method": lambda W, x: x(T, W.shape[1]).mm(torch.t(W)),
    "W x": lambda W, x: W @ x(W.shape[1]),
    "W X": lambda W, x: W @ x(W.shape[1], T),
    "W^T X": lambda W, x: torch.transpose(W, -1, -2) @ x(W.shape[0], T),
    "W W^T": lambda W, x: W @ W.T,
    "addmm": lambda W, x: torch.addmm(x(W.shape[1]), x(T, W.shape[0]), W),
    "addmm, turned": lambda W, x: torch.addmm(x(T, W.shape[0]), x(T, W.shape[1]), W.t()),
    "addmm, scaled": lambda W, x: torch.addmm(x(W.shape[1]), x(T, W.shape[0]), W, beta=0.5, alpha=2),
    "addmm, method": lambda W, x: x(W.shape[1]).addmm(x(T, W.shape[0]), W),
    "baddbmm": lambda W, x: torch.baddbmm(x(2, T, W.shape[1]), x(2, T, W.shape[0]), W.expand(2, -1, -1)),
    "einsum": lambda W, x: torch.einsum("toi,oi->to", x(T, *W.shape), W),
    "embedding": lambda W, x: F.embedding(_index(W), W),
    "embedding, named": lambda W, x: F.embedding(input=_index(W), weight=W),
    "embedding, turned": lambda W, x: F.embedding(torch.tensor([0]), W.T),
    "embedding, torch's own": lambda W, x: torch.embedding(W, _index(W)),
    "embedding, by frequency": lambda W, x: F.embedding(_index(W), W, scale_grad_by_freq=True),
    "index_select, rows": lambda W, x: torch.index_select(W, 0, torch.tensor([1, 0, 0])),
    "index_select, columns": lambda W, x: W.index_select(1, torch.tensor([0])),
    "index_select, from behind": lambda W, x: W.index_select(-2, torch.tensor([0])),
    "index_select, named": lambda W, x: torch.index_select(input=W, dim=0, index=torch.tensor([0])),
    "indexed": lambda W, x: W[_index(W)],
    "sliced": lambda W, x: W[1:, :2],
    "one row": lambda W, x: W[-1],
    "turned back": lambda W, x: F.linear(x(T, W.shape[1]), W.T.T),
    "turned, named": lambda W, x: W.transpose(dim0=0, dim1=1),
    "turned not at all": lambda W, x: W.transpose(1, 1),
    "permuted": lambda W, x: W.permute(1, 0),
    "times a number": lambda W, x: 2 * W,
    "plus a matrix": lambda W, x: x(*W.shape) + W,
    "a function": lambda W, x: torch.tanh(W),
    "norm": lambda W, x: W.square().sum(),
    "reshaped": lambda W, x: W.reshape(-1),
    "viewed": lambda W, x: W.view(1, *W.shape),
    "joined": lambda W, x: torch.cat([W, x(1, W.shape[1]), W]),
    "split": lambda W, x: torch.split(W, 1)[0],
    "convolution": lambda W, x: F.conv1d(x(2, W.shape[1], T), W.unsqueeze(-1)),
    "moved": lambda W, x: F.linear(x(T, W.shape[1]), W.to(torch.float64)),
    "moved to another type": lambda W, x: W.to(torch.float32).double(),
    "copied": lambda W, x: W.contiguous().clone(),
}  # fmt: skip


def tensor(*shape: int, seed: int = 0, learned: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(learned)


@st.composite
def matrices(draw: st.DrawFn, leaves: list[torch.Tensor]) -> m.Matrix:
    """Matrices as fits have them; what of them is learned is added to the leaves."""
    d = draw(st.integers(2, 3))
    D = d + draw(st.integers(0, 3))

    def entries(rows: int, columns: int) -> m.Dense:
        leaves.append(tensor(rows, columns, seed=len(leaves), learned=draw(st.booleans())))
        return m.Dense(leaves[-1])

    kind = draw(st.sampled_from(["identity", "selection", "dense", "ligo", "ordered", "kronecker", "scaled", "fused"]))
    index = np.array([draw(st.integers(-1, d - 1)) for _ in range(D)])
    order = np.array(draw(st.permutations(range(D))))
    ligo = m.RowBlocks((m.Identity(d), entries(max(D - d, 1), d)))
    if kind == "identity":
        return m.Identity(d)
    if kind == "selection":
        return m.Selection(index, d)
    if kind == "dense":
        return entries(D, d)
    if kind == "ligo":
        return ligo
    if kind == "ordered":
        return m.Composition(m.Selection(order % ligo.shape[0], ligo.shape[0]), ligo)
    if kind == "kronecker":
        return m.Kronecker((ligo, m.Identity(2)))
    if kind == "scaled":
        return m.Scaled(entries(D, d), 0.5)
    return m.Concatenation((ligo, m.Identity(1)))


@st.composite
def factors(draw: st.DrawFn) -> tuple[Factors, list[torch.Tensor], torch.Tensor]:
    """A grown weight's factors, what of them has gradients, and the matrix by its definition."""
    leaves: list[torch.Tensor] = []
    B, A = draw(matrices(leaves)), draw(matrices(leaves))
    M = tensor(B.shape[1], A.shape[1], seed=100, learned=draw(st.booleans()))
    leaves.append(M)
    shape = B.shape[0], A.shape[0]
    Z, entries = None, torch.zeros(shape, dtype=torch.float64)
    match draw(st.sampled_from(["none", "learned", "beside", "below", "all"])):
        case "learned":
            entries = tensor(*shape, seed=101)
            leaves.append(entries)
            Z = Fresh.whole(entries)
        case "beside":
            entries[: M.shape[0], M.shape[1] :] = 1.5
            Z = Fresh.of(entries, (M.shape[0], M.shape[1]))
        case "below":
            entries[M.shape[0] :] = tensor(*shape, learned=False)[M.shape[0] :]
            Z = Fresh.of(entries, (M.shape[0], M.shape[1]))
        case "all":
            entries = tensor(*shape, seed=102, learned=False)
            Z = Fresh.of(entries, (M.shape[0], M.shape[1]))
    strategy = draw(st.sampled_from(["factored", "materialised", "auto"]))
    whole = dense(B) @ M @ dense(A).T + entries
    learned = [leaf for leaf in leaves if leaf.requires_grad]
    return Factors(B, M, A, Z if Z is None or Z.parts else None, strategy=strategy), learned, whole


def used(use: Use, W: Any, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """What comes out, and the gradients of all leaves and of what was made on the way."""
    made: list[torch.Tensor] = []

    def x(*shape: int) -> torch.Tensor:
        made.append(tensor(*shape, seed=1000 + len(made)))
        return made[-1]

    y = use(W, x)
    leaves = [*leaves, *made]
    total = (y * tensor(*y.shape, seed=2000, learned=False)).sum() + sum(0 * leaf.sum() for leaf in leaves)
    found = torch.autograd.grad(total, leaves, retain_graph=True) if leaves else ()
    return [y.detach(), *found]


@pytest.mark.parametrize("name", USES)
@settings(max_examples=settings().max_examples // 5)
@given(factors())
def test_uses_of_a_weight_are_uses_of_its_matrix(
    name: str, drawn: tuple[Factors, list[torch.Tensor], torch.Tensor]
) -> None:
    grown, leaves, whole = drawn
    W = GrownWeight(grown)
    found, expected = used(USES[name], W, leaves), used(USES[name], whole, leaves)
    again = used(USES[name], W, leaves)
    for ours, twice, theirs in zip(found, again, expected, strict=True):
        assert not isinstance(ours, GrownWeight) or ours.shape == theirs.shape
        torch.testing.assert_close(ours + 0, theirs, rtol=1e-6 if "another type" in name else 1e-10, atol=1e-10)
        torch.testing.assert_close(twice + 0, theirs, rtol=1e-6 if "another type" in name else 1e-10, atol=1e-10)


@given(factors())
def test_facts_are_those_of_the_matrix(drawn: tuple[Factors, list[torch.Tensor], torch.Tensor]) -> None:
    grown, _, whole = drawn
    for W, matrix in ((GrownWeight(grown), whole), (GrownWeight(grown).T, whole.T)):
        assert (W.shape, W.ndim, W.dtype, W.device) == (matrix.shape, 2, torch.float64, matrix.device)
        assert (W.size(-1), W.dim(), W.numel(), len(W)) == (matrix.size(-1), 2, matrix.numel(), len(matrix))
        assert W.is_floating_point()
    assert "matrix" not in vars(grown)  # nothing of this has made it


def test_padding_has_the_gradient_that_the_loss_has() -> None:
    """torch leaves out the gradient of the padding's row of a table; here it is one of the source, which stays."""
    leaf = tensor(2, 2)
    W = GrownWeight(Factors(m.Identity(3), tensor(3, 2, learned=False), m.RowBlocks((m.Identity(2), m.Dense(leaf)))))
    (found,) = torch.autograd.grad(F.embedding(torch.tensor([0, 1]), W, padding_idx=0).sum(), leaf)
    (expected,) = torch.autograd.grad(W.matrix[[0, 1]].sum(), leaf)
    torch.testing.assert_close(found, expected)


def test_factors_make_no_matrix_for_products() -> None:
    grown = Factors(
        m.Identity(3), tensor(3, 2), m.RowBlocks((m.Identity(2), m.Dense(tensor(2, 2)))), strategy="factored"
    )
    F.linear(tensor(5, 4), GrownWeight(grown))
    F.embedding(torch.tensor([0, 1]), GrownWeight(grown))
    assert "matrix" not in vars(grown)
    F.linear(tensor(5, 4), GrownWeight(Factors(grown.B, grown.M, grown.A, strategy="materialised")))
