"""The gated delta rule of GDN-2, a chunk of tokens at a time, in plain torch.

Within a chunk that starts from the state S_0, write P(s, t) for the product of exp(g_j) over s < j <= t, per
key channel, and u_t for what token t really writes once the erased read has been taken off:

    A[t, s] = (b_t * k_t)^T (P(s, t) * k_s)    s < t
    Q[t, s] = q_t^T (P(s, t) * k_s)            s <= t
    (I + A) u = r = w * v - (b * k * P(0, .)) S_0
    o         = scale * ((q * P(0, .)) S_0 + Q u)
    S_C       = P(0, C) * S_0 + (k * P(., C))^T u

Q (I + A)^-1 and (k * P(., C))^T (I + A)^-1 need no state and are made for all chunks at once. What is left to do
chunk after chunk is r, the queries' read of S_0 and S_C; u itself is never made.

A and Q are built by halving. Every pair s < t is parted by the middle of exactly one block of 2m tokens,
m = 1, 2, 4 .. C / 2, with s in its first half and t in its second. There P(s, t) = P(s, middle) P(middle, t),
so one matrix product of the rows b * k * P(middle, t) and q * P(middle, t) with the columns k * P(s, middle)
gives the whole square below the diagonal. (I + A)^-1 grows with it: below the diagonal of a block it is minus
the inverse of the second half, times the square of A, times the inverse of the first half. Going from m to 2m
multiplies half of the rows and half of the columns by the decay of the other half, and at m = C they are the
factors that the state needs.

Decays are only ever multiplied, never summed and then subtracted: nothing divides by a decay, no exponent is
positive when g <= 0, a decay that underflows becomes a clean zero, and no digits cancel after a token that
forgets nearly everything.

This module knows nothing of layers, and keeps no gradients.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad

from gdn2_edge.kernels.reference import in_computing_precision

# Bounds the working memory of a long prefill. On a CPU 8 MiB are a tenth slower: more launches. Above 32 MiB glibc
# gives a block back to the system whenever it is freed, and new pages cost a good part of the time.
SEGMENT_BYTES = 16 << 20


@torch.no_grad()
def chunk_gated_delta_rule2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    S: Tensor,
    scale: float | None = None,
    chunk_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """Outputs of T tokens and the state after them; the same contract as `recurrent_gated_delta_rule2`.

    Args:
        q: Queries [B, T, H, K], L2-normalised.
        k: Keys [B, T, H, K], L2-normalised.
        v: Values [B, T, HV, V]; HV is a multiple of H.
        g: Log decay per key channel [B, T, H, K], at most 0.
        b: Erase gate on the key axis [B, T, H, K].
        w: Write gate on the value axis [B, T, HV, V].
        S: State before the first token [B, HV, K, V]; it is left as it was.
        scale: Factor on the outputs; K ** -0.5 by default.
        chunk_size: Tokens solved together, a power of two. On a CPU 32 is a tenth faster than 64.

    Returns:
        o [B, T, HV, V] and the new state [B, HV, K, V], both in the computing precision: float64 if any
        argument is float64, float32 otherwise.

    Raises:
        ValueError: chunk_size is not a power of two.

    Source: Gated DeltaNet-2, arXiv 2605.22791, equations 18 to 25, with halving in place of its sub-blocks.
    """
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size is {chunk_size}, expected a power of two such as 32 or 64.")
    q, k, v, g, b, w, S = in_computing_precision(q, k, v, g, b, w, S)
    B, T, H, K = k.shape
    HV, V = v.shape[2:]
    group = HV // H
    if scale is None:
        scale = K**-0.5
    chunk_size = min(chunk_size, 1 << (T - 1).bit_length())

    # Value heads that share a key head are one head with more value columns.
    v, w = (x.reshape(B, T, H, group * V) for x in (v, w))
    S = S.reshape(B, H, group, K, V).transpose(2, 3).reshape(B * H, K, group * V)

    o = v.new_empty(B, -(-T // chunk_size) * chunk_size, H, group * V)  # whole chunks
    token_bytes = B * H * (5 * K + 3 * group * V + 3 * chunk_size) * k.element_size()  # of _segment's working memory
    segment = chunk_size * max(1, SEGMENT_BYTES // (token_bytes * chunk_size))
    for start in range(0, T, segment):
        tokens = slice(start, start + segment)
        S = _segment(o[:, tokens], S, *(x[:, tokens] for x in (q, k, v, g, b, w)), C=chunk_size)
    o = o[:, :T].mul_(scale)
    S = S.view(B, H, K, group, V).transpose(2, 3).reshape(B, HV, K, V)
    return o.reshape(B, T, HV, V), S


def _segment(
    o: Tensor, S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor, *, C: int
) -> Tensor:
    """Fills o [B, N * C, H, V], not scaled yet, for N chunks of C tokens; returns the next state [B * H, K, V]."""
    B, T, H, K = k.shape
    V = v.shape[-1]
    N = -(-T // C)
    X = N * B * H

    def chunked(x: Tensor) -> Tensor:
        # Zeros are exact padding: nothing decays (exp 0 = 1), is erased or is written.
        if T % C:
            x = pad(x, (0, 0, 0, 0, 0, N * C - T))
        return x.reshape(B, N, C, H, x.shape[-1]).permute(1, 0, 3, 2, 4)  # [N, B, H, C, D]

    q, k, v, g, b, w = (chunked(x) for x in (q, k, v, g, b, w))
    heads = (N, B, H)
    rows, columns, decay, reads, inside, pairs, solved_pairs, solved_columns = _uninitialised(
        k,
        (*heads, C, 2, K),
        (*heads, C, K),
        (*heads, C, K),
        (*heads, C, 2, V),
        (*heads, C, V),
        (2, X, C + 1, C),
        (X, C, C),
        (X, K, C),
    )
    # `copy_` and `out=` lay out by chunk in the pass over memory that these steps cost anyway.
    columns.copy_(k)
    decay.copy_(g).exp_()  # laid out first: exp is twice as fast on contiguous memory
    torch.mul(columns, decay, out=rows[..., 0, :]).mul_(b)
    torch.mul(q, decay, out=rows[..., 1, :])
    pairs.zero_()
    inverse, read = pairs[:, :, :C]
    inverse.diagonal(dim1=1, dim2=2).fill_(1)
    read.diagonal(dim1=1, dim2=2).copy_(torch.linalg.vecdot(q, columns).reshape(X, C))  # pairs s = t: no decay
    decay = _pair_products(pairs, rows.view(X, C, 2, K), columns.view(X, C, K), decay.view(X, C, K))

    torch.bmm(read, inverse, out=solved_pairs)
    torch.bmm(columns.view(X, C, K).mT, inverse, out=solved_columns)

    # reads[..., 0, :] becomes r and reads[..., 1, :] minus the queries' read of S_0: one product for both uses
    # several threads well, and takes little longer than half of it.
    torch.mul(w, v, out=reads[..., 0, :])
    reads[..., 1, :].zero_()
    residual = reads.view(X, C, 2, V)[:, :, 0]
    S = S.clone(memory_format=torch.contiguous_format)
    per_chunk = (
        x.unbind()
        for x in (
            rows.view(N, B * H, 2 * C, K),
            reads.view(N, B * H, 2 * C, V),
            residual.view(N, B * H, C, V),
            decay.view(N, B * H, K, 1),
            solved_columns.view(N, B * H, K, C),
        )
    )
    for row, chunk_reads, r, chunk_decay, column in zip(*per_chunk, strict=True):
        chunk_reads.baddbmm_(row, S, alpha=-1)
        S.mul_(chunk_decay).baddbmm_(column, r)

    torch.bmm(solved_pairs, residual, out=inside.view(X, C, V))
    torch.sub(inside, reads[..., 1, :], out=o.view(B, N, C, H, V).permute(1, 0, 3, 2, 4))
    return S


def _uninitialised(like: Tensor, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Tensors of these shapes, parts of a single allocation.

    One large block that is freed makes glibc keep memory of that size for the next call; of many smaller ones it
    gives part back every time, and new pages cost a few milliseconds a call.
    """
    sizes = [prod(shape) for shape in shapes]
    parts = like.new_empty(sum(sizes)).split(sizes)
    return [x.view(shape) for x, shape in zip(parts, shapes, strict=True)]


def _pair_products(pairs: Tensor, rows: Tensor, columns: Tensor, decay: Tensor) -> Tensor:
    """Fills (I + A)^-1 and Q below the diagonal for X chunks; returns the decay of each whole chunk [X, K].

    Both factors are scaled in place and end as rows * P(0, t) and columns * P(s, C).

    Args:
        pairs: (I + A)^-1 and Q, with a spare row at the end of each chunk [2, X, C + 1, C]. Filled on the diagonal
            and zero above it.
        rows: b * k * exp(g) and q * exp(g), interleaved [X, C, 2, K].
        columns: k [X, C, K].
        decay: exp(g) [X, C, K].

    Source: the halving in this module's docstring.
    """
    X, C, _, K = rows.shape
    # Below this a product of two factors is denormal: as good as zero, and ten times slower on a CPU.
    negligible = torch.finfo(rows.dtype).tiny ** 0.5
    m = 1
    while m < C:
        blocks = C // (2 * m)
        second = rows.view(X * blocks, 2, 2 * m, K)[:, 1]  # the second half's tokens, two rows each
        first = columns.view(X * blocks, 2, m, K)[:, 0]
        square = torch.bmm(second, first.mT).view(X * blocks, m, 2, m)
        # Thanks to the spare row, the blocks on the diagonals of all chunks lie at even distances.
        spaced = pairs.view(2, X * blocks, 2 * m * (C + 1))
        upper_left, lower_left, lower_right = (
            spaced[..., start : start + m * C].unflatten(2, (m, C))[..., :m] for start in (0, m * C, m * (C + 1))
        )
        erase, read = square.unbind(2)
        lower_left[1].copy_(read)
        if m > 1:  # at m = 1 both inverses are 1
            erase = torch.bmm(torch.bmm(lower_right[0], erase), upper_left[0])
        torch.neg(erase, out=lower_left[0])

        halves = decay.view(X * blocks, 2, K)
        for factor, half in ((second, halves[:, :1]), (first, halves[:, 1:])):
            factor *= half
            torch.hardshrink(factor, negligible, out=factor)
        decay = torch.hardshrink(halves[:, 0] * halves[:, 1], negligible)
        m *= 2
    return decay.view(X, K)
