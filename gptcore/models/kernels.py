"""Triton kernels for what a compiler makes slow: the same arithmetic as the plain code, with less memory traffic.

All need a CUDA GPU and Triton; tests/test_gpu.py holds each against the plain code.
`rotate_heads`: for attention in 16 bits with query-key norm and rotary positions; without it the gradients of queries, keys and values
are put together in four passes. `loss_and_gradient_fp8` and `transpose_bytes`: for a head in eight bits; the compiler takes a tanh that is
exact to the last digit, and loses more time writing the gradient transposed than all the rest takes (experiments/LOG.md, 2026-11-27).
`narrow_linear`: for decoding, which has to read every weight for a few tokens, so weights are widened on their way to the product.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptcore.models.fp8 import E5M2

EPSILON = 1e-7  # of the norm, in float32
ROWS = 32  # tokens of one program of rotate_heads
TILE = 128  # rows and columns of one program of transpose_bytes
# Rows and columns of weights that one program of narrow_linear has at a time: few rows have to go round a hundred multiprocessors.
FEW_WEIGHTS, MANY_WEIGHTS = (16, 256), (64, 128)
MANY_ROWS = 8192
LOSS_BLOCK = 4096  # logits of a row that one program of the loss has at a time


@triton.jit
def _rotate_kernel(qkv, cos, sin, q, k, N, T, H, HALF: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr):
    """Norm and rotation of one head of BLOCK tokens; heads 0 … H - 1 are queries, H … 2H - 1 keys."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1)
    half = tl.arange(0, HALF)
    is_row = (rows < N)[:, None]
    at = rows[:, None] * (3 * H * 2 * HALF) + head * 2 * HALF + half[None, :]
    a = tl.load(qkv + at, mask=is_row, other=0.0).to(tl.float32)
    b = tl.load(qkv + at + HALF, mask=is_row, other=0.0).to(tl.float32)
    r = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + EPS)[:, None]
    # Both halves of a head at once: rotation pairs channel i with channel i + hs / 2.
    a, b = a * r, b * r
    angle = (rows % T)[:, None] * HALF + half[None, :]
    c = tl.load(cos + angle, mask=is_row, other=0.0)
    s = tl.load(sin + angle, mask=is_row, other=0.0)
    is_key = head >= H
    out = rows[:, None] * (H * 2 * HALF) + (head - H * is_key.to(tl.int32)) * 2 * HALF + half[None, :]
    first, second = a * c - b * s, a * s + b * c
    tl.store(q + out, first, mask=is_row & (is_key == 0))
    tl.store(q + out + HALF, second, mask=is_row & (is_key == 0))
    tl.store(k + out, first, mask=is_row & is_key)
    tl.store(k + out + HALF, second, mask=is_row & is_key)


@triton.jit
def _rotate_back_kernel(qkv, cos, sin, dq, dk, dv, dqkv, N, T, H, HALF: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr):
    """The gradient of one head of BLOCK tokens, for queries and keys back through rotation and norm, for values as it is."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1)
    half = tl.arange(0, HALF)
    is_row = (rows < N)[:, None]
    at = rows[:, None] * (3 * H * 2 * HALF) + head * 2 * HALF + half[None, :]
    kind = head // H  # 0: query, 1: key, 2: value
    given = rows[:, None] * (H * 2 * HALF) + (head - kind * H) * 2 * HALF + half[None, :]
    if kind == 2:
        tl.store(dqkv + at, tl.load(dv + given, mask=is_row, other=0.0), mask=is_row)
        tl.store(dqkv + at + HALF, tl.load(dv + given + HALF, mask=is_row, other=0.0), mask=is_row)
    else:
        first = tl.load(dq + given, mask=is_row & (kind == 0), other=0.0).to(tl.float32)
        first += tl.load(dk + given, mask=is_row & (kind == 1), other=0.0).to(tl.float32)
        second = tl.load(dq + given + HALF, mask=is_row & (kind == 0), other=0.0).to(tl.float32)
        second += tl.load(dk + given + HALF, mask=is_row & (kind == 1), other=0.0).to(tl.float32)
        angle = (rows % T)[:, None] * HALF + half[None, :]
        c = tl.load(cos + angle, mask=is_row, other=0.0)
        s = tl.load(sin + angle, mask=is_row, other=0.0)
        # A rotation's gradient is the rotation back.
        da, db = first * c + second * s, second * c - first * s
        a = tl.load(qkv + at, mask=is_row, other=0.0).to(tl.float32)
        b = tl.load(qkv + at + HALF, mask=is_row, other=0.0).to(tl.float32)
        r = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + EPS)[:, None]
        a, b = a * r, b * r
        # The norm's gradient: what points along the vector is taken out, for its length does not matter.
        mean = ((tl.sum(da * a, 1) + tl.sum(db * b, 1)) / (2 * HALF))[:, None]
        tl.store(dqkv + at, r * (da - a * mean), mask=is_row)
        tl.store(dqkv + at + HALF, r * (db - b * mean), mask=is_row)


class _RotateHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
        B, T, width = qkv.shape
        half = width // (6 * n_head)
        q = torch.empty(B, T, n_head, 2 * half, device=qkv.device, dtype=qkv.dtype)
        k = torch.empty_like(q)
        grid = (triton.cdiv(B * T, ROWS), 2 * n_head)
        _rotate_kernel[grid](qkv, cos, sin, q, k, B * T, T, n_head, HALF=half, BLOCK=ROWS, EPS=EPSILON)
        # Not q and k: they are made again from qkv, which is there anyway. Memory is what a backward pass waits for.
        ctx.save_for_backward(qkv, cos, sin)
        v = qkv.view(B, T, 3, n_head, 2 * half)[:, :, 2].clone()
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, cos, sin = ctx.saved_tensors
        B, T, _ = qkv.shape
        dq, dk, dv = (grad.contiguous() for grad in grads)
        n_head, half = dq.size(2), dq.size(3) // 2
        dqkv = torch.empty_like(qkv)
        grid = (triton.cdiv(B * T, ROWS), 3 * n_head)
        _rotate_back_kernel[grid](qkv, cos, sin, dq, dk, dv, dqkv, B * T, T, n_head, HALF=half, BLOCK=ROWS, EPS=EPSILON)
        return dqkv, None, None, None


def rotate_heads(qkv: Tensor, cos: Tensor, sin: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, each head normalised and turned by its position's angle, and values: (B, nh, T, hs) each.

    qkv: (B, T, 3C), contiguous; cos, sin: (T, hs / 2), float32. hs / 2 is a power of two.
    """
    q, k, v = _RotateHeads.apply(qkv, cos, sin, n_head)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


@triton.jit
def _bend(x, CAP: tl.constexpr):
    """The capped logits, and by how much they move with x. tanh by one exponential, to about 1e-7 of the cap."""
    if CAP > 0:
        u = 1 / (tl.exp(x * (2 / CAP)) + 1)
        return CAP - (2 * CAP) * u, 4 * u * (1 - u)
    else:
        return x, tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def _loss_kernel(logits, targets, nats, grad, V: tl.constexpr, CAP: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    """One row: its nats, then the gradient of its logits."""
    IS_BOUNDED: tl.constexpr = CAP > 0 and CAP <= 30  # a larger cap would send all of a row below the smallest float
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    columns = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        is_column = start + columns < V
        y, _ = _bend(tl.load(logits + row * V + start + columns, mask=is_column, other=0.0).to(tl.float32), CAP)
        if IS_BOUNDED:  # never above the cap, so no largest logit has to be found
            total += tl.where(is_column, tl.exp(y - CAP), 0.0)
        else:
            y = tl.where(is_column, y, -float("inf"))
            higher = tl.maximum(top, y)
            # Sum and maximum in one pass: whenever the maximum rises, what was summed is rescaled (Milakov & Gimelshein 2018).
            total = tl.where(is_column, total * tl.exp(top - higher) + tl.exp(y - higher), total)
            top = tl.where(is_column, higher, top)
    if IS_BOUNDED:
        log_z = tl.log(tl.sum(total)) + CAP
    else:
        highest = tl.max(top)
        log_z = tl.log(tl.sum(tl.where(total > 0, total * tl.exp(top - highest), total))) + highest
    is_target = target >= 0
    hit, _ = _bend(tl.load(logits + row * V + tl.maximum(target, 0)).to(tl.float32), CAP)
    tl.store(nats + row, tl.where(is_target, log_z - hit, 0.0))
    for start in range(0, V, BLOCK):
        is_column = start + columns < V
        y, slope = _bend(tl.load(logits + row * V + start + columns, mask=is_column, other=0.0).to(tl.float32), CAP)
        g = tl.exp(y - log_z) - tl.where(start + columns == target, 1.0, 0.0)
        g = tl.where(is_target, g * slope * SCALE, 0.0)
        tl.store(grad + row * V + start + columns, g.to(tl.float8e5).to(tl.uint8, bitcast=True), mask=is_column)


def loss_and_gradient_fp8(logits: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Summed nats of (rows, V) logits before the cap, and their gradient times the largest e5m2 number, (rows, V) in e5m2.

    logits: contiguous; a target of -1 gives 0 for both. Its plain form is `losses.loss_and_gradient`.
    """
    rows, V = logits.shape
    nats = torch.empty(rows, device=logits.device, dtype=torch.float32)
    grad = torch.empty(rows, V, device=logits.device, dtype=E5M2)
    scale = torch.finfo(E5M2).max
    # As bytes: Triton moves them more surely than eight-bit floats (some of its layouts mix up the latter).
    _loss_kernel[(rows,)](logits, targets, nats, grad.view(torch.uint8), V, CAP=cap, SCALE=scale, BLOCK=LOSS_BLOCK, num_warps=8)
    return nats.sum(), grad


@triton.jit
def _transpose_kernel(x, out, M, N, TILE: tl.constexpr):
    rows = tl.program_id(1) * TILE + tl.arange(0, TILE)
    columns = tl.program_id(0) * TILE + tl.arange(0, TILE)
    is_row, is_column = rows < M, columns < N
    at = rows.to(tl.int64)[:, None] * N + columns[None, :]
    tile = tl.load(x + at, mask=is_row[:, None] & is_column[None, :], other=0)
    at = columns.to(tl.int64)[:, None] * M + rows[None, :]
    tl.store(out + at, tl.trans(tile), mask=is_column[:, None] & is_row[None, :])


def transpose_bytes(x: Tensor) -> Tensor:
    """`x.t().contiguous()` of a contiguous (M, N) tensor whose elements are a byte each."""
    M, N = x.shape
    out = torch.empty(N, M, device=x.device, dtype=x.dtype)
    grid = (triton.cdiv(N, TILE), triton.cdiv(M, TILE))
    _transpose_kernel[grid](x.view(torch.uint8), out.view(torch.uint8), M, N, TILE=TILE, num_warps=8)
    return out


@triton.jit
def _narrow_linear_kernel(x, weight, scale, y, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """All rows of x times BLOCK_N rows of the weight, summed in float32."""
    m, n = tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_m, is_n = m < M, n < N
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        is_k = k < K
        a = tl.load(x + m[:, None] * K + k[None, :], mask=is_m[:, None] & is_k[None, :], other=0.0)
        at = n.to(tl.int64)[None, :] * K + k[:, None]
        b = tl.load(weight + at, mask=is_n[None, :] & is_k[:, None])
        total = tl.dot(a, b.to(tl.bfloat16), total)
    total *= tl.load(scale + n, mask=is_n, other=0.0).to(tl.float32)[None, :]
    tl.store(y + m[:, None] * N + n[None, :], total.to(tl.bfloat16), mask=is_m[:, None] & is_n[None, :])


def narrow_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x (M, K) in bfloat16, M up to a few tens, times weights of 8 bits (N, K), int8 or e4m3, with a scale a row, (N,).

    Returns (M, N) in bfloat16. All contiguous; e4m3 on GPUs that multiply it themselves.
    """
    (M, K), N = x.shape, len(weight)
    y = torch.empty(M, N, device=x.device, dtype=x.dtype)
    block_m, (block_n, block_k) = max(16, triton.next_power_of_2(M)), MANY_WEIGHTS if N >= MANY_ROWS else FEW_WEIGHTS
    _narrow_linear_kernel[(triton.cdiv(N, block_n),)](
        x, weight, scale, y, M, N, K, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=2, num_stages=3
    )
    return y
