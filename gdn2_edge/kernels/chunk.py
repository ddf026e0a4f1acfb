"""The gated delta rule of GDN-2, a chunk of tokens at a time, in plain torch.

Within a chunk that starts from the state S_0, write P(s, t) for the product of exp(g_j) over s < j <= t, per
key channel, and u_t for what token t really writes once the erased read has been taken off:

    A[t, s] = (b_t * k_t)^T (P(s, t) * k_s)    s < t
    Q[t, s] = scale * q_t^T (P(s, t) * k_s)    s <= t
    (I + A) u = w * v - (b * k * P(0, .)) S_0
    o         = scale * (q * P(0, .)) S_0 + Q u
    S_C       = P(0, C) * S_0 + (k * P(., C))^T u

A and Q are built by halving. Every pair s < t is parted by the middle of exactly one block of 2m tokens,
m = 1, 2, 4 .. C / 2, with s in its first half and t in its second. There P(s, t) = P(s, middle) P(middle, t),
so one matrix product of the rows b * k * P(middle, t) and q * P(middle, t) with the columns k * P(s, middle)
gives the whole square below the diagonal. Going from m to 2m multiplies half of the rows and half of the
columns by the decay of the other half, and at m = C they are the factors that the state needs.

Decays are only ever multiplied, never summed and then subtracted: nothing divides by a decay, no exponent is
positive when g <= 0, a decay that underflows becomes a clean zero, and no digits cancel after a token that
forgets nearly everything.

This module knows nothing of layers, and keeps no gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from gdn2_edge.kernels.reference import in_computing_precision

# Bounds the memory of a long prefill. On a CPU 512 tokens cost 3 % more a token than 1024, and 128 half as much again.
SEGMENT_TOKENS = 1024


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

    outputs = []
    segment = max(SEGMENT_TOKENS, chunk_size)  # both powers of two
    for start in range(0, T, segment):
        part = [x[:, start : start + segment] for x in (q, k, v, g, b, w)]
        o, S = _segment(S, *part, scale=scale, C=chunk_size)
        outputs.append(o)
    o = torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]
    S = S.view(B, H, K, group, V).transpose(2, 3).reshape(B, HV, K, V)
    return o.reshape(B, T, HV, V), S


def _segment(
    S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor, *, scale: float, C: int
) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, H, V] and the next state [B * H, K, V] of one segment, cut into N chunks of C tokens."""
    B, T, H, K = k.shape
    V = v.shape[-1]
    N = -(-T // C)

    def chunked(x: Tensor) -> Tensor:
        # Zeros are exact padding: nothing decays (exp 0 = 1), is erased or is written.
        if T % C:
            x = pad(x, (0, 0, 0, 0, 0, N * C - T))
        return x.reshape(B, N, C, H, x.shape[-1]).permute(1, 0, 3, 2, 4)  # [N, B, H, C, D]

    q, k, v, g, b, w = (chunked(x) for x in (q, k, v, g, b, w))
    # `out=` computes and lays out in one pass over memory, which is what these steps cost.
    columns = k.clone(memory_format=torch.contiguous_format)
    decay = torch.exp(g, out=torch.empty_like(columns))
    rows = columns.new_empty(N, B, H, C, 2, K)
    torch.mul(b, columns, out=rows[..., 0, :])
    torch.mul(q, scale, out=rows[..., 1, :])
    values = torch.mul(w, v, out=columns.new_empty(N, B, H, C, V)).view(N, B * H, C, V)
    erase, read, decay = _pair_products(rows.view(-1, C, 2, K), columns.view(-1, C, K), decay.view(-1, C, K))

    identity = torch.eye(C, dtype=erase.dtype, device=erase.device).expand_as(erase)
    inverse = torch.linalg.solve_triangular(erase, identity, upper=False, unitriangular=True)
    keys = rows.view(N, B * H, C, 2, K)[..., 0, :]
    queries = rows.view(N * B * H, C, 2, K)[..., 1, :]
    written = torch.empty_like(values)  # u
    states = values.new_empty(N + 1, B * H, K, V)
    states[0] = S
    inverse = inverse.view(N, B * H, C, C)
    columns = columns.view(N, B * H, C, K).mT
    decay = decay.view(N, B * H, K, 1)
    per_chunk = (x.unbind() for x in (values, keys, inverse, written, decay, columns, states[:N], states[1:]))
    for value, key, solve, u, chunk_decay, column, before, after in zip(*per_chunk, strict=True):
        value.baddbmm_(key, before, alpha=-1)
        torch.bmm(solve, value, out=u)
        torch.mul(chunk_decay, before, out=after).baddbmm_(column, u)

    o = torch.bmm(queries, states[:N].view(-1, K, V)).baddbmm_(read, written.view(-1, C, V))
    o = o.view(N, B, H, C, V).permute(1, 0, 3, 2, 4).reshape(B, N * C, H, V)[:, :T]
    return o, states[N].clone()  # a view would keep every chunk's state alive


def _pair_products(rows: Tensor, columns: Tensor, decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The matrices A and Q [X, C, C] of X chunks, and the decay of each whole chunk [X, K].

    Both factors are scaled in place and end as rows * P(0, t) and columns * P(s, C).

    Args:
        rows: b * k and scale * q, interleaved [X, C, 2, K].
        columns: k [X, C, K].
        decay: exp(g) [X, C, K].

    Source: the halving in this module's docstring.
    """
    X, C, _, K = rows.shape
    pairs = rows.new_zeros(2, X, C, C)
    # Pairs s = t: no decay. The solve takes the diagonal of A to be 1 and does not read it.
    own = torch.bmm(rows.view(X * C, 2, K), columns.view(X * C, K, 1))
    pairs.diagonal(dim1=2, dim2=3).copy_(own.view(X, C, 2).permute(2, 0, 1))
    rows *= decay[:, :, None, :]
    # Below this a product of two factors is denormal: as good as zero, and ten times slower on a CPU.
    negligible = torch.finfo(rows.dtype).tiny ** 0.5
    m = 1
    while m < C:
        blocks = C // (2 * m)
        second = rows.view(X * blocks, 2, 2 * m, K)[:, 1]  # the second half's tokens, two rows each
        first = columns.view(X * blocks, 2, m, K)[:, 0]
        square = torch.bmm(second, first.mT).view(X, blocks, m, 2, m)
        on_diagonal = pairs.view(2, X, blocks, 2 * m, blocks, 2 * m).diagonal(dim1=2, dim2=4)
        # [2, X, 2m, 2m, blocks], the lower left quarter of each block
        on_diagonal[:, :, m:, :m].copy_(square.permute(3, 0, 2, 4, 1))

        halves = decay.view(X * blocks, 2, K)
        for factor, half in ((second, halves[:, :1]), (first, halves[:, 1:])):
            factor *= half
            torch.hardshrink(factor, negligible, out=factor)
        decay = torch.hardshrink(halves[:, 0] * halves[:, 1], negligible)
        m *= 2
    return pairs[0], pairs[1], decay.view(X, K)
