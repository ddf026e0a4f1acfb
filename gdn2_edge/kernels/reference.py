"""The gated delta rule of GDN-2, one token at a time.

    S_t = (I - k_t (b_t * k_t)^T) Diag(exp g_t) S_{t-1} + k_t (w_t * v_t)^T        S: [K, V] per head
    o_t = scale * S_t^T q_t

In words: the state decays, what it holds at k_t is read through the erase gate b_t and taken out, and the
gated value is written at k_t. Every other implementation is tested against this one. It knows nothing of
chunks, convolutions or normalisation, and it is meant to be read, not to be fast.
"""

from __future__ import annotations

import torch
from torch import Tensor


def recurrent_gated_delta_rule2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    S: Tensor,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs of T tokens and the state after them.

    For each token, with the erased read and the new value joined in u:

        S <- Diag(exp g) S
        u  = w * v - S^T (b * k)
        S <- S + k u^T
        o  = scale * S^T q

    Args:
        q: Queries [B, T, H, K], L2-normalised.
        k: Keys [B, T, H, K], L2-normalised.
        v: Values [B, T, HV, V]; HV is a multiple of H, and key head h serves HV / H value heads in a row.
        g: Log decay per key channel [B, T, H, K], at most 0.
        b: Erase gate on the key axis [B, T, H, K], after the sigmoid.
        w: Write gate on the value axis [B, T, HV, V], after the sigmoid.
        S: State before the first token [B, HV, K, V]; it is left as it was.
        scale: Factor on the outputs; K ** -0.5 by default.

    Returns:
        o [B, T, HV, V] and the new state [B, HV, K, V], both in the computing precision: float64 if any
        argument is float64, float32 otherwise.

    Source: Gated DeltaNet-2, arXiv 2605.22791.
    """
    q, k, v, g, b, w, S = in_computing_precision(q, k, v, g, b, w, S)
    heads_per_key = v.shape[2] // k.shape[2]
    q, k, g, b = (x.repeat_interleave(heads_per_key, dim=2) for x in (q, k, g, b))  # [B, T, HV, K]
    if scale is None:
        scale = k.shape[-1] ** -0.5

    outputs = []
    for t in range(k.shape[1]):
        q_t, k_t, g_t, b_t = (x[:, t, :, :, None] for x in (q, k, g, b))  # [B, HV, K, 1]
        S = g_t.exp() * S  # [B, HV, K, V]
        u_t = w[:, t] * v[:, t] - (b_t * k_t * S).sum(dim=-2)  # [B, HV, V]
        S = S + k_t * u_t[:, :, None, :]
        outputs.append(scale * (q_t * S).sum(dim=-2))
    return torch.stack(outputs, dim=1), S


def in_computing_precision(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as float64 if any of them is float64, else as float32."""
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    return tuple(x.to(dtype) for x in tensors)
