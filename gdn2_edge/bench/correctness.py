"""Whether a runtime computes the model: what must hold before its speed is worth a number."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gdn2_edge.bench.traffic import Export, StoredWeights
from gdn2_edge.errors import BackendError
from gdn2_edge.forward import block, head
from gdn2_edge.generate.sampler import Sampler
from gdn2_edge.model import Model, WeightReader, WeightSource
from gdn2_edge.ops import ModelWeights
from gdn2_edge.runtime import Runtime
from gdn2_edge.sampling import Sampling
from gdn2_edge.state import initial_state
from gdn2_edge.torch_ops import TorchOps
from gdn2_edge.weights import Dense, Weight

GREEDY = Sampling(temperature=0, repetition_window=0)
CHECK_TOKENS = 32
# Distance of the logits from the plain path's, over the spread of those. The worst seen over 18 layers of random
# weights, which pass errors on more than trained ones do: 1e-5 where activations are fp32 (the order of sums differs),
EXACT_TOLERANCE = 1e-3
# and 0.07 where they are rounded to bf16 at every product and in the residual stream. A wrong layer is at 0.2 or more.
ROUNDED_TOLERANCE = 0.15


@dataclass(frozen=True)
class Check:
    """Distances from the plain path by one prefill and by single steps, and the largest that passes.

    `plain` is False where there was no plain path: prefill was compared with the steps.
    """

    tokens: int
    plain: bool
    prefill_error: float
    step_error: float
    tolerance: float


def check(runtime: Runtime, source: StoredWeights | Export, device: torch.device) -> Check:
    """Compare a runtime with the plain path on the weights of `source`, and with itself.

    The logits of 32 random tokens, fed at once and one by one, must be those of `plain_logits`; and 32 greedy tokens
    must be the same ids twice. An export does not hold its weights in a form that the plain path reads: its
    logits at once must be those of its steps.

    Raises:
        BackendError: they are not, and by how much.
    """
    ids = random_ids(runtime.spec.vocab_size, 1, CHECK_TOKENS)
    last, _ = runtime.prefill(ids, runtime.initial_state())
    state, steps = runtime.initial_state(), []
    for i in range(CHECK_TOKENS):
        logits, state = runtime.step(ids[:, i], state)
        steps.append(logits[0].clone())
    plain = not isinstance(source, Export)
    expected = torch.stack(steps) if isinstance(source, Export) else plain_logits(source, ids, device)[0]
    found = Check(
        CHECK_TOKENS,
        plain,
        distance(last, expected[-1:]),
        distance(torch.stack(steps), expected),
        _tolerance(runtime, source),
    )
    for what, error in (("prefill", found.prefill_error), ("steps", found.step_error)):
        if not error <= found.tolerance:
            raise BackendError(
                f"{runtime.name}: logits by {what} are off by {error:.2g} of their spread, expected at most "
                f"{found.tolerance:g}. This runtime is wrong here, so nothing was timed."
            )
    if greedy_ids(runtime, ids) != greedy_ids(runtime, ids):
        raise BackendError(f"{runtime.name}: greedy decoding gave other ids the second time, so nothing was timed.")
    return found


@torch.inference_mode()
def plain_logits(source: WeightSource, ids: Tensor, device: torch.device) -> Tensor:
    """Logits of ids [B, T] by `TorchOps` in fp32 with the weights' exact values: [B, T, vocab_size] fp32.

    One layer is in memory at a time, expanded, so this needs little beside a model and shares none of its products.
    """
    spec, ops, ids = source.spec, TorchOps(torch.float32), ids.to(device)
    reader = WeightReader(source, device, _exact)
    state = initial_state(spec, ids.shape[0], device)
    weights = ModelWeights(
        reader.product("embed.weight"), (), reader.vector("ln_f.weight"), reader.product("lm_head.weight")
    )
    x = ops.embed(ids, weights.embed)
    for i, layer_state in enumerate(state.layers):
        x, _ = block(ops, spec, reader.layer(i), x, layer_state, state.position)
    return head(ops, spec, weights, x)


def distance(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected - its mean| over rows of logits [N, V]; NaN where `found` is not finite."""
    expected = expected.double()
    spread = (expected - expected.mean(-1, keepdim=True)).norm()
    return float((found.to(expected.device).double() - expected).norm() / spread)


def greedy_ids(runtime: Runtime, prompt: Tensor) -> list[int]:
    """The ids that follow a prompt [1, T]."""
    sampler, ids = Sampler(GREEDY), []
    logits, state = runtime.prefill(prompt, runtime.initial_state())
    token = sampler(logits, state.position)
    for _ in range(CHECK_TOKENS):
        ids.append(int(token))
        token, state = runtime.generate_step(token, state, sampler)
    return ids


def random_ids(vocab_size: int, batch: int, tokens: int) -> Tensor:
    """[batch, tokens] int64, the same at each call."""
    return torch.randint(0, vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(1))


def _exact(weight: Weight) -> Weight:
    return Dense(weight.name, weight.rows(slice(None)))


def _tolerance(runtime: Runtime, source: StoredWeights | Export) -> float:
    if isinstance(source, Export):
        return EXACT_TOLERANCE if source.format in ("fp32", "f32") else ROUNDED_TOLERANCE
    if not isinstance(runtime, Model) or runtime.ops.dtype != torch.float32:
        return ROUNDED_TOLERANCE
    infos = [info for name in source.spec.tensor_shapes() for info in source.stored(name).values()]
    integers = any(info.dtype in (torch.int8, torch.int32) for info in infos)
    # Products with integers may round activations to bf16 on a CPU.
    return ROUNDED_TOLERANCE if integers and runtime.device.type == "cpu" else EXACT_TOLERANCE
