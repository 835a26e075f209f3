"""Triton kernels for what a compiler makes slow: the same arithmetic as the plain code beside them, with less memory traffic.

Used while training on a CUDA GPU where Triton is: `rotate_heads` by the attention of a model with query-key norm and rotary
positions, `loss_and_gradient_fp8` by a head in eight bits, `cast_and_transpose` by every linear layer in eight bits: the
hardware wants both factors of such a product in rows, so gradients are needed as they are and transposed. tests/test_gpu.py holds both against the plain code.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

E5M2 = torch.float8_e5m2
EPSILON = 1e-7  # of the norm, in float32
ROWS = 32  # tokens of one program of rotate_heads


@triton.jit
def _loss_kernel(logits, targets, nats, log_z, V: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """One row's log Z and nats, in one pass over its logits."""
    row = tl.program_id(0).to(tl.int64)
    highest = -float("inf")
    total = 0.0
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        is_inside = columns < V
        x = tl.load(logits + row * V + columns, mask=is_inside, other=0.0).to(tl.float32)
        if CAP > 0:
            x = CAP * (2 * tl.sigmoid(x * (2 / CAP)) - 1)  # CAP · tanh(x / CAP)
        x = tl.where(is_inside, x, -float("inf"))
        new_highest = tl.maximum(highest, tl.max(x, 0))
        total = total * tl.exp(highest - new_highest) + tl.sum(tl.exp(x - new_highest), 0)
        highest = new_highest
    z = highest + tl.log(total)
    target = tl.load(targets + row)
    hit = tl.load(logits + row * V + tl.maximum(target, 0)).to(tl.float32)
    if CAP > 0:
        hit = CAP * (2 * tl.sigmoid(hit * (2 / CAP)) - 1)
    tl.store(log_z + row, z)
    tl.store(nats + row, tl.where(target >= 0, z - hit, 0.0))


@triton.jit
def _gradient_kernel(
    logits,
    targets,
    log_z,
    grad,
    grad_t,
    R,
    V: tl.constexpr,
    CAP: tl.constexpr,
    SCALE: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile of the logits' gradient in eight bits, 4 * QUADS rows of BLOCK columns, written as it is and transposed.

    Four rows at a time are packed into one word, which is what lies side by side in the transposed form.
    """
    quads = tl.program_id(1) * QUADS + tl.arange(0, QUADS)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    packed = tl.zeros((QUADS, BLOCK), tl.int32)
    for part in tl.static_range(4):
        rows = 4 * quads + part
        is_row = rows < R
        is_inside = is_row[:, None] & (columns < V)[None, :]
        at = rows.to(tl.int64)[:, None] * V + columns[None, :]
        x = tl.load(logits + at, mask=is_inside, other=0.0).to(tl.float32)
        z = tl.load(log_z + rows, mask=is_row, other=0.0)
        target = tl.load(targets + rows, mask=is_row, other=-1)
        slope = 1.0
        if CAP > 0:
            bent = 2 * tl.sigmoid(x * (2 / CAP)) - 1
            x = CAP * bent
            slope = 1 - bent * bent
        g = tl.exp(x - z[:, None]) - tl.where(columns[None, :] == target[:, None], 1.0, 0.0)
        g = tl.where((target >= 0)[:, None], g * slope * SCALE, 0.0)
        bits = g.to(tl.float8e5).to(tl.uint8, bitcast=True)
        tl.store(grad + at, bits, mask=is_inside)
        packed = packed | (bits.to(tl.int32) << (8 * part))
    at_t = columns.to(tl.int64)[None, :] * (R // 4) + quads[:, None]
    tl.store(grad_t + at_t, packed, mask=(4 * quads < R)[:, None] & (columns < V)[None, :])


def loss_and_gradient_fp8(logits: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor, Tensor]:
    """Summed nats of (rows, V) logits before the cap; their gradient times the largest e5m2 number, (rows, V) and (V, rows).

    logits: contiguous, bfloat16 or float32; rows: a multiple of 4. A target of -1 gives 0 for all.
    """
    rows, V = logits.shape
    nats = torch.empty(rows, device=logits.device, dtype=torch.float32)
    log_z = torch.empty_like(nats)
    grad = torch.empty(rows, V, device=logits.device, dtype=E5M2)
    grad_t = torch.empty(V, rows, device=logits.device, dtype=E5M2)
    _loss_kernel[(rows,)](logits, targets, nats, log_z, V=V, CAP=cap, BLOCK=4096, num_warps=8)
    quads, block = 32, 64
    grid = (triton.cdiv(V, block), triton.cdiv(rows, 4 * quads))
    bits, words_t = grad.view(torch.uint8), grad_t.view(torch.int32)
    _gradient_kernel[grid](
        logits,
        targets,
        log_z,
        bits,
        words_t,
        rows,
        V=V,
        CAP=cap,
        SCALE=torch.finfo(E5M2).max,
        QUADS=quads,
        BLOCK=block,
        num_warps=8,
    )
    return nats.sum(), grad, grad_t


@triton.jit
def _cast_kernel(x, scale, out, out_t, M, N: tl.constexpr, QUADS: tl.constexpr, BLOCK: tl.constexpr):
    """One tile divided by `scale`, in eight bits, as it is and transposed; packed as in `_gradient_kernel`."""
    quads = tl.program_id(1) * QUADS + tl.arange(0, QUADS)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    factor = 1 / tl.load(scale)
    packed = tl.zeros((QUADS, BLOCK), tl.int32)
    for part in tl.static_range(4):
        rows = 4 * quads + part
        is_inside = (rows < M)[:, None] & (columns < N)[None, :]
        at = rows.to(tl.int64)[:, None] * N + columns[None, :]
        value = tl.load(x + at, mask=is_inside, other=0.0).to(tl.float32) * factor
        bits = value.to(tl.float8e5).to(tl.uint8, bitcast=True)
        tl.store(out + at, bits, mask=is_inside)
        packed = packed | (bits.to(tl.int32) << (8 * part))
    at_t = columns.to(tl.int64)[None, :] * (M // 4) + quads[:, None]
    tl.store(out_t + at_t, packed, mask=(4 * quads < M)[:, None] & (columns < N)[None, :])


def cast_and_transpose(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`x / scale` in e5m2, (M, N) and (N, M). x: contiguous, M a multiple of 4, nothing beyond the range; scale: one float32."""
    M, N = x.shape
    out = torch.empty(M, N, device=x.device, dtype=E5M2)
    out_t = torch.empty(N, M, device=x.device, dtype=E5M2)
    quads, block = 32, 64
    grid = (triton.cdiv(N, block), triton.cdiv(M, 4 * quads))
    bits, words_t = out.view(torch.uint8), out_t.view(torch.int32)
    _cast_kernel[grid](x, scale, bits, words_t, M, N=N, QUADS=quads, BLOCK=block, num_warps=8)
    return out, out_t


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
def _rotate_back_kernel(
    qkv, cos, sin, dq, dk, dv, dqkv, N, T, H, HALF: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr
):
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
        da, db = first * c + second * s, second * c - first * s
        a = tl.load(qkv + at, mask=is_row, other=0.0).to(tl.float32)
        b = tl.load(qkv + at + HALF, mask=is_row, other=0.0).to(tl.float32)
        r = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + EPS)[:, None]
        a, b = a * r, b * r
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
