"""Milliseconds of prompts of a model with random weights on a GPU.

    python benchmarks/gpu_prompt.py [--formats int8 bf16] [--tokens 64 512 4096 16384] [--few-rows 128 256]
        [--piece-tokens 4096 8192] [--profile]

Correctness first: the logits after a prompt against torch in fp32 from the same weights, beside torch in bf16. Then
`prefill` of one sequence as a caller sees it, from tokens on the host to logits in memory, whose last kernel is waited
for. --few-rows tries other places for `triton_prompts.FEW_ROWS`, --piece-tokens
other `triton_model.PIECE_TOKENS`. --profile says which kernels the time went to.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time

import torch
from record import append, summary
from torch import Tensor

from gdn2_edge import triton_model, triton_prompts
from gdn2_edge.bench.random_weights import random_weights
from gdn2_edge.model import Model, load_model
from gdn2_edge.triton_model import TritonModel

CHECKED_TOKENS = 300
REPEATS = 10
# Of the error of torch in bf16, which rounds in more places.
ERROR_SHARE = 1.5


def main() -> int:
    """Parse, check, time, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default="gdn2_1.3B")
    parser.add_argument("--formats", nargs="+", default=["int8", "bf16"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[64, 512, 4096, 16384])
    parser.add_argument("--few-rows", nargs="+", type=int, default=[triton_prompts.FEW_ROWS])
    parser.add_argument("--piece-tokens", nargs="+", type=int, default=[triton_model.PIECE_TOKENS])
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no GPU here.")
        return 1
    print(torch.cuda.get_device_name())
    for format in args.formats:
        plain = load_model(random_weights(args.config, format, device="cuda"), "cuda")
        ours, theirs = errors(plain)
        print(f"{format}: off by {ours:.2g} of the size of the logits, torch in bf16 by {theirs:.2g}")
        if not ours < ERROR_SHARE * theirs:
            return 1
        for few_rows, piece_tokens in itertools.product(args.few_rows, args.piece_tokens):
            triton_prompts.FEW_ROWS, triton_model.PIECE_TOKENS = few_rows, piece_tokens
            model = fused(plain)  # with graphs of its own
            for tokens in args.tokens:
                samples = milliseconds(model, prompt(model, tokens))
                figures = summary(samples)
                rate = tokens / figures["median"] * 1e3
                print(f"{format}, stored weights up to {few_rows} rows, pieces of {piece_tokens}, {tokens:6} tokens: "
                      f"{figures['median']:8.2f} ms ({figures['p20']:.2f} to {figures['p80']:.2f}), "
                      f"{rate:.0f} tokens/s", flush=True)  # fmt: skip
                if args.profile:
                    profile(model, prompt(model, tokens))
                if args.record:
                    sizes = {"tokens": tokens, "few_rows": few_rows, "piece_tokens": piece_tokens}
                    append("gpu_prompt", {"config": args.config, "format": format, **sizes, "milliseconds": figures})
    return 0


def fused(plain: Model) -> TritonModel:
    """The same weights under the other runtime."""
    return TritonModel(plain.spec, plain.weights, plain.device, torch.bfloat16)


def prompt(model: Model, tokens: int) -> Tensor:
    """Random ids [1, T] on the CPU."""
    return torch.randint(0, model.spec.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(tokens))


def errors(plain: Model) -> tuple[float, float]:
    """Of the last logits of a prompt: ours, captured and in one piece, and torch's in bf16."""
    ids = prompt(plain, CHECKED_TOKENS)
    exact_model = Model(plain.spec, plain.weights, plain.device, torch.float32)
    exact, _ = exact_model.prefill(ids, exact_model.initial_state())
    model = fused(plain)
    found = [model.prefill(ids, model.initial_state())[0] for _ in range(2)]  # the second replays a graph
    found.append(model.forward(ids)[0][:, -1])
    theirs, _ = plain.prefill(ids, plain.initial_state())
    return max(distance(one, exact) for one in found), distance(theirs, exact)


def distance(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of the expected values."""
    return float((found - expected).norm() / expected.norm())


def milliseconds(model: Model, ids: Tensor) -> list[float]:
    """Of each of some calls, after two that compile and capture."""
    samples = []
    for i in range(2 + REPEATS):
        state = model.initial_state()
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.prefill(ids, state)
        torch.cuda.synchronize()
        if i >= 2:
            samples.append((time.perf_counter() - start) * 1e3)
    return samples


def profile(model: Model, ids: Tensor) -> None:
    """Print the kernels that take longest."""
    state = model.initial_state()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        model.prefill(ids, state)
        torch.cuda.synchronize()
    print(found.key_averages().table(sort_by="cuda_time_total", row_limit=14, max_name_column_width=60))


if __name__ == "__main__":
    sys.exit(main())
