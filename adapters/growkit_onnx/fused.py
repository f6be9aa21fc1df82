"""Operators that ONNX Runtime's optimiser makes out of several standard ones, other than attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from growkit_onnx.operation import MICROSOFT, Operation, Table
from growkit_onnx.operators import PLAIN, gemm, rms_norm, standardised, widened

TABLE = Table()
operator = TABLE.add


# Written in either domain.
operator("SimplifiedLayerNormalization", domain=MICROSOFT)(rms_norm)


@operator("SkipLayerNormalization", domain=MICROSOFT)
def _skip_layer_norm(
    op: Operation, x: Tensor, skip: Tensor, scale: Tensor, shift: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = x + skip if bias is None else x + skip + bias
    y, mean, inverse = standardised(widened(total), [-1], op.get("epsilon", 1e-12))
    y = y.to(x.dtype) * scale
    return y if shift is None else y + shift, mean, inverse, total


@operator("SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def _skip_rms_norm(
    op: Operation, x: Tensor, skip: Tensor, scale: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, None, Tensor, Tensor]:
    total = x + skip if bias is None else x + skip + bias
    y, _, inverse = standardised(widened(total), [-1], op.get("epsilon", 1e-12), centred=False)
    return y.to(x.dtype) * scale, None, inverse, total


@operator("EmbedLayerNormalization", domain=MICROSOFT)
def _embed_layer_norm(
    op: Operation,
    tokens: Tensor,
    segments: Tensor | None,
    word: Tensor,
    position: Tensor,
    segment: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    if positions is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    total = F.embedding(tokens, word) + F.embedding(positions, position)
    if segment is not None and segments is not None:
        total = total + F.embedding(segments, segment)
    y, _, _ = standardised(widened(total), [-1], op.get("epsilon", 1e-12))
    lengths = torch.zeros_like(tokens[:, 0]) if mask is None else mask.sum(1)
    return y.to(total.dtype) * scale + shift, lengths.to(torch.int32), total


@operator("BiasGelu", domain=MICROSOFT)
def _bias_gelu(op: Operation, x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


@operator("FastGelu", domain=MICROSOFT)
def _fast_gelu(op: Operation, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@operator("Gelu", domain=MICROSOFT)
def _microsoft_gelu(op: Operation, x: Tensor) -> Tensor:
    return F.gelu(x)


@operator("QuickGelu", domain=MICROSOFT)
def _quick_gelu(op: Operation, x: Tensor) -> Tensor:
    return x * torch.sigmoid(op.get("alpha", 1.702) * x)


@operator("FusedMatMul", domain=MICROSOFT)
def _fused_matmul(op: Operation, a: Tensor, b: Tensor) -> Tensor:
    op.allow(transBatchA=0, transBatchB=0)
    a = a.mT if op.get("transA", 0) and a.ndim > 1 else a
    b = b.mT if op.get("transB", 0) and b.ndim > 1 else b
    return op.get("alpha", 1.0) * (a @ b)


# The functions that an activation without parameters may be, in an operator that has one built in.
ACTIVATIONS = {name: PLAIN[name] for name in ("Relu", "Sigmoid", "Tanh", "Softplus", "Softsign")}


@operator("FusedGemm", domain=MICROSOFT)
def _fused_gemm(op: Operation, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    return op.choice("activation", ACTIVATIONS)(gemm(op, a, b, c))
