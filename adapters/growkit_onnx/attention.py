"""Attention and rotary positions, of the standard set and of ONNX Runtime's own.

Inside, queries, keys and values are [batch, heads, positions, head_dim].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from growkit_onnx.operation import MICROSOFT, Numbers, Operation, Table, torch_dtype
from growkit_onnx.operators import widened

TABLE = Table()
operator = TABLE.add


# Rotary positions


def rotated(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Each pair of leading entries turned by its angle: [..., positions, head_dim], angles [..., positions, pairs]."""
    pairs = cos.shape[-1]
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :pairs], turned[..., pairs:]
    real, imaginary = first * cos - second * sin, first * sin + second * cos
    if interleaved:
        return torch.cat([torch.stack([real, imaginary], -1).flatten(-2), rest], -1)
    return torch.cat([real, imaginary, rest], -1)


def _heads(x: Tensor, count: int) -> Tensor:
    """[batch, positions, heads x head_dim] with the heads as an axis of their own; four axes stay as they are."""
    return x if x.ndim == 4 else x.unflatten(-1, (count, -1)).transpose(1, 2)


def _merged(x: Tensor) -> Tensor:
    """The other way."""
    return x.transpose(1, 2).flatten(-2)


def _rotary(op: Operation, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> Tensor:
    """Rotary positions; the caches are [positions, pairs], or [batch, positions, pairs] without ``positions``."""
    count, dim = op.get("num_heads", 0), op.get("rotary_embedding_dim", 0)
    split = _heads(x, count or x.shape[-1] // (dim or 2 * cos.shape[-1]))
    if positions is not None:
        cos, sin = F.embedding(positions, cos), F.embedding(positions, sin)
    turned = rotated(split, cos.unsqueeze(1), sin.unsqueeze(1), interleaved=bool(op.get("interleaved", 0)))
    return turned if x.ndim == 4 else _merged(turned)


@operator("RotaryEmbedding")
def _rotary_embedding(op: Operation, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> Tensor:
    return _rotary(op, x, cos, sin, positions)


@operator("RotaryEmbedding", domain=MICROSOFT)
def _microsoft_rotary_embedding(op: Operation, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    op.allow(is_packed_batching=0, scale=1.0)
    if positions.numel() == 1:  # where the first token is
        length = x.shape[-2]
        positions = positions.reshape(1, 1) + torch.arange(length, device=positions.device).expand(x.shape[0], length)
    return _rotary(op, x, cos, sin, positions)


# Attention


def _softmax(scores: Tensor) -> Tensor:
    """A softmax over keys; a query that may see none gets zeros."""
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)


def _scores(op: Operation, q: Tensor, k: Tensor) -> Tensor:
    """Scaled products of queries and keys; a group of query heads shares a key head."""
    scale = op.get("scale") or 1 / math.sqrt(q.shape[-1])
    return scale * (q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT)


def _mixed(shares: Tensor, v: Tensor) -> Tensor:
    """Values, each head's by its shares."""
    return shares @ v.repeat_interleave(shares.shape[1] // v.shape[1], 1)


def _capped(op: Operation, scores: Tensor) -> Tensor:
    cap = op.get("softcap", 0.0)
    return cap * torch.tanh(scores / cap) if cap else scores


def _ahead(scores: Tensor, before: int | Tensor) -> Tensor:
    """How far each key lies after its query, where ``before`` keys precede the first query."""
    queries, keys = (torch.arange(size, device=scores.device) for size in scores.shape[-2:])
    return keys - queries[:, None] - before


def _lengthened(past: Tensor | None, new: Tensor) -> Tensor:
    return new if past is None else torch.cat([past, new], 2)


@operator("Attention")
def _attention(
    op: Operation,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    past_k: Tensor | None = None,
    past_v: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op.allow(left_window_size=-1, right_window_size=-1)
    flat, kv_heads = q.ndim == 3, op.get("kv_num_heads", 0)
    q, k, v = _heads(q, op.get("q_num_heads", 0)), _heads(k, kv_heads), _heads(v, kv_heads)
    k, v = _lengthened(past_k, k), _lengthened(past_v, v)
    raw = _scores(op, q, k)
    capped = masked = _capped(op, raw)
    if mask is not None:
        short = k.shape[2] - mask.shape[-1]
        if mask.dtype == torch.bool:
            masked = masked.masked_fill(~F.pad(mask, (0, short)), -torch.inf)
        else:
            masked = masked + F.pad(mask, (0, short), value=-torch.inf)
    before: int | Tensor = 0 if past_k is None else past_k.shape[2]
    if lengths is not None:
        filled = lengths.reshape(-1, 1, 1, 1)
        masked = masked.masked_fill(torch.arange(k.shape[2], device=filled.device) >= filled, -torch.inf)
        before = filled - q.shape[2]
    if op.get("is_causal", 0):
        masked = masked.masked_fill(_ahead(masked, before) > 0, -torch.inf)
    precision = op.get("softmax_precision")
    wide = masked if precision is None else masked.to(op.floating(torch_dtype(precision, "softmax_precision")))
    shares = _softmax(wide).to(q.dtype)
    y = _mixed(shares, v)
    product = (raw, capped, masked, shares)[op.get("qk_matmul_output_mode", 0)]
    return _merged(y) if flat else y, k, v, product


def _key_mask(op: Operation, mask: Tensor, scores: Tensor) -> Tensor:
    """Where scores are filled, [batch, 1, queries or 1, keys], out of any of the forms ONNX Runtime takes masks in."""
    batch, _, queries, keys = scores.shape
    if mask.ndim == 1:
        if mask.shape[0] not in (batch, 2 * batch):
            raise op.refuse(f"a mask of shape {list(mask.shape)}")
        position = torch.arange(keys, device=mask.device)
        hidden = position >= mask[:batch, None]
        if mask.shape[0] == 2 * batch:  # the ends of the sequences, then their starts
            hidden = hidden | (position < mask[batch:, None])
        return hidden[:, None, None, :]
    if mask.ndim == 4:  # [batch, 1, positions, positions], of which these queries are the last
        return mask[:, :, keys - queries : keys, :keys] == 0
    return (mask[:, None, None, :] if mask.ndim == 2 else mask[:, None]) == 0


def _microsoft_attend(
    op: Operation, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What the Attention and MultiHeadAttention of ONNX Runtime share; the outputs and the shares."""
    scores = _scores(op, q, k)
    if mask is not None:
        scores = scores + _key_mask(op, mask, scores) * op.get("mask_filter_value", -10000.0)
    if op.get("unidirectional", 0):
        scores = scores.masked_fill(_ahead(scores, k.shape[2] - q.shape[2]) > 0, -torch.inf)
    if bias is not None:
        scores = scores + bias
    shares = _softmax(widened(scores)).to(q.dtype)
    return _merged(_mixed(shares, v)), shares


@operator("Attention", domain=MICROSOFT)
def _microsoft_attention(
    op: Operation,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    past: Tensor | None = None,
    attention_bias: Tensor | None = None,
    past_length: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    op.allow(do_rotary=0, past_present_share_buffer=0)
    qkv = x @ weight if bias is None else x @ weight + bias
    sizes = op.get("qkv_hidden_sizes") or [qkv.shape[-1] // 3] * 3
    q, k, v = (_heads(part, op.get("num_heads")) for part in qkv.split(list(sizes), -1))
    if past is not None:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    y, _ = _microsoft_attend(op, q, k, v, mask, attention_bias)
    return y, torch.stack([k, v]) if k.shape == v.shape else None


@operator("MultiHeadAttention", domain=MICROSOFT)
def _multi_head_attention(
    op: Operation,
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    attention_bias: Tensor | None = None,
    past_k: Tensor | None = None,
    past_v: Tensor | None = None,
    *more: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if any(value is not None for value in more):
        raise op.refuse("a shared cache")
    if q.ndim == 5:  # [batch, positions, heads, 3, head_dim]
        q, k, v = (part.flatten(2) for part in q.unbind(3))
    elif k is not None and k.ndim == 5:
        k, v = (part.flatten(2) for part in k.unbind(3))
    if k is None or v is None:
        raise op.refuse("a query without key and value")
    if bias is not None:
        width = q.shape[-1]
        biases = bias.split([width, width, bias.shape[0] - 2 * width])
        q, k, v = (part + b if part.ndim == 3 else part for part, b in zip((q, k, v), biases, strict=True))
    q, k, v = (_heads(part, op.get("num_heads")) for part in (q, k, v))
    k, v = _lengthened(past_k, k), _lengthened(past_v, v)
    y, shares = _microsoft_attend(op, q, k, v, mask, attention_bias)
    return y, k, v, shares


def _cached(past: Tensor | None, new: Tensor, starts: Tensor, total: int) -> Tensor:
    """[batch, heads, total, head_dim]: the first ``starts`` entries of the past, the new ones, zeros.

    Args:
        past: [batch, heads, past, head_dim].
        new: [batch, heads, new, head_dim].
        starts: [batch, 1], where the new entries begin.
        total: The length of the result.
    """
    held = 0 if past is None else past.shape[2]
    pool = _lengthened(past, F.pad(new, (0, 0, 0, 1)))  # the last entry is a zero
    place = torch.arange(total, device=starts.device)
    since = place - starts
    source = torch.where(since < 0, place, torch.where(since < new.shape[2], held + since, held + new.shape[2]))
    return pool.gather(2, source[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3]))


@operator("GroupQueryAttention", domain=MICROSOFT, reads=[6])
def _group_query_attention(
    op: Operation,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    past_k: Tensor | None,
    past_v: Tensor | None,
    seqlens: Tensor,
    total_length: Numbers,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    position_ids: Tensor | None = None,
    bias: Tensor | None = None,
    *more: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    op.allow(qk_output=0, causal=1, sliding_window_cache=0, k_quant_type="NONE", v_quant_type="NONE")
    if any(value is not None for value in more) or op.get("smooth_softmax", -1) > 0:
        raise op.refuse("a head sink, a smooth softmax, a quantised cache, or a norm of queries and keys")
    heads, kv_heads = op.get("num_heads"), op.get("kv_num_heads")
    if k is None or v is None:
        width = q.shape[-1] // (heads + 2 * kv_heads)
        q, k, v = q.split([heads * width, kv_heads * width, kv_heads * width], -1)
    q, k, v = _heads(q, heads), _heads(k, kv_heads), _heads(v, kv_heads)
    starts = (seqlens.reshape(-1, 1).to(torch.int64) + 1 - q.shape[2]).clamp(min=0)
    if cos is not None and sin is not None and op.get("do_rotary", 0):
        positions = starts + torch.arange(q.shape[2], device=starts.device) if position_ids is None else position_ids
        angles = F.embedding(positions, cos).unsqueeze(1), F.embedding(positions, sin).unsqueeze(1)
        q, k = (rotated(part, *angles, interleaved=bool(op.get("rotary_interleaved", 0))) for part in (q, k))
    total = max(int(total_length[0]), 0 if past_k is None else past_k.shape[2])
    k, v = _cached(past_k, k, starts, total), _cached(past_v, v, starts, total)
    scores = _capped(op, _scores(op, q, k))
    if bias is not None:
        scores = scores + bias
    ahead, window = _ahead(scores, starts[..., None, None]), op.get("local_window_size", -1)
    hidden = ahead > 0 if window < 0 else (ahead > 0) | (ahead <= -window)
    shares = _softmax(widened(scores.masked_fill(hidden, -torch.inf))).to(q.dtype)
    return _merged(_mixed(shares, v)), k, v
