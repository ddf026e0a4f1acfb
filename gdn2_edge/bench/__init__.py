"""How fast a model runs here: correctness first, then decoding, prefill, bytes and memory.

Everything goes through the `Runtime` protocol, so whatever `load` gives is measured by the same words. Prints nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gdn2_edge.bench.correctness import CHECK_TOKENS, GREEDY, Check, check, random_ids
from gdn2_edge.bench.machine import datasheet_rate, device_name, memory_in_use, read_rate
from gdn2_edge.bench.traffic import Export, StoredWeights, Traffic, traffic
from gdn2_edge.checkpoint.gguf_file import open_gguf
from gdn2_edge.checkpoint.onnx_file import is_export, open_export
from gdn2_edge.checkpoint.reader import open_checkpoint
from gdn2_edge.generate.sampler import Sampler
from gdn2_edge.loading import load, model_path
from gdn2_edge.model import pick_device
from gdn2_edge.runtime import Runtime

DECODE_TOKENS = 200
PROMPT_TOKENS = (64, 512)
GPU_PROMPT_TOKENS = (64, 512, 4096, 16384)
WARM_UP_TOKENS = 8
PREFILL_SECONDS, PREFILL_ROUNDS = 2.0, (2, 10)

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Times:
    """Median, 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Decode:
    """Consecutive greedy tokens through `generate_step`, each seen by the host before the next is asked for.

    `tokens_per_second` is of all sequences together, over the whole run. `launches_per_token` and
    `graph_milliseconds` (a token's time on the device alone) are for runtimes that know them.
    """

    sequences: int
    tokens: int
    first_position: int
    milliseconds_per_token: Times
    tokens_per_second: float
    launches_per_token: int | None
    graph_milliseconds: float | None


@dataclass(frozen=True)
class Bandwidth:
    """`bytes_per_token` over the median time of a token, and what that is of the rates this machine can read at."""

    bytes_per_token: Traffic
    gigabytes_per_second: float
    read_gigabytes_per_second: float
    share_of_read_rate: float
    datasheet_gigabytes_per_second: float | None
    share_of_datasheet: float | None


@dataclass(frozen=True)
class Prefill:
    """A prompt of one sequence, until the host has its last logits."""

    tokens: int
    milliseconds: Times
    tokens_per_second: float


@dataclass(frozen=True)
class Report:
    """What `bench` measured. `first_token_seconds`: from the call of `load`, random weights being made with it."""

    model: str
    runtime: str
    device: str
    torch: str
    check: Check
    first_token_seconds: float
    decode: Decode
    bandwidth: Bandwidth
    batch: Decode | None
    prefill: tuple[Prefill, ...]
    memory_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def bench(
    source: str | Path | StoredWeights,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    runtime: str = "auto",
    *,
    tokens: int = DECODE_TOKENS,
    prompt_tokens: Sequence[int] | None = None,
    context: int = CHECK_TOKENS,
    batch: int = 1,
    progress: Progress = lambda stage: None,
) -> Report:
    """Load a model, check it, measure it.

    Args:
        source: a checkpoint folder, an ONNX export, a GGUF file, a model's name, or `random_weights`.
        device, dtype, runtime: as for `load`.
        tokens: how many to decode, at least 2.
        prompt_tokens: lengths of prompts to feed; None is 64 and 512, and on a GPU 4096 and 16384 too.
        context: tokens fed before those that are timed; from a model's window on, attention has all it ever reads.
        batch: sequences decoded together in a second run, if more than 1.
        progress: called with what begins.
    Raises:
        BackendError: the device is not there, or the model computes something else than its plain form.
    """
    stored = _opened(source) if isinstance(source, (str, Path)) else source
    # What an export runs on is not torch's to say.
    where = pick_device("auto" if isinstance(stored, Export) and device != "cpu" else device)
    if prompt_tokens is None:
        prompt_tokens = GPU_PROMPT_TOKENS if where.type == "cuda" else PROMPT_TOKENS

    progress("loading")
    _reset_memory(where)
    begun = time.perf_counter()
    model = load(source, device, dtype, runtime)
    _first_token(model)
    first_token_seconds = time.perf_counter() - begun
    memory = [memory_in_use(where)]

    progress("checking")
    checked = check(model, stored, where)

    _reset_memory(where)
    progress(f"decoding {tokens} tokens")
    decode = measure_decode(model, tokens, context)
    together = None
    if batch > 1:
        progress(f"decoding {tokens} tokens of {batch} sequences")
        together = measure_decode(model, tokens, context, batch)
    prefill = []
    for length in prompt_tokens:
        progress(f"feeding {length} tokens")
        prefill.append(measure_prefill(model, length))
    memory.append(memory_in_use(where))

    progress("reading memory")
    return Report(
        model=str(source if isinstance(source, (str, Path)) else source.path),
        runtime=model.name,
        device=device_name(where),
        torch=torch.__version__,
        check=checked,
        first_token_seconds=first_token_seconds,
        decode=decode,
        bandwidth=bandwidth(stored, decode, read_rate(where), datasheet_rate(where)),
        batch=together,
        prefill=tuple(prefill),
        memory_bytes=max((size for size in memory if size is not None), default=None),
    )


def measure_decode(runtime: Runtime, tokens: int, context: int = CHECK_TOKENS, batch: int = 1) -> Decode:
    """Decode `tokens` greedy tokens of each of `batch` sequences after a prompt of `context` tokens and a warm-up."""
    sampler, milliseconds = Sampler(GREEDY, batch), []
    prompt = random_ids(runtime.spec.vocab_size, batch, context)
    logits, state = runtime.prefill(prompt, runtime.initial_state(batch))
    token = sampler(logits, state.position)
    for _ in range(WARM_UP_TOKENS):
        token, state = runtime.generate_step(token, state, sampler)
    token.tolist()
    for _ in range(tokens):
        begun = time.perf_counter()
        token, state = runtime.generate_step(token, state, sampler)
        token.tolist()
        milliseconds.append(1e3 * (time.perf_counter() - begun))
    graph_milliseconds = getattr(runtime, "graph_milliseconds", None) if batch == 1 else None
    return Decode(
        sequences=batch,
        tokens=tokens,
        first_position=context + WARM_UP_TOKENS,
        milliseconds_per_token=_times(milliseconds),
        tokens_per_second=1e3 * batch * tokens / sum(milliseconds),
        launches_per_token=getattr(runtime, "launches_per_token", None) if batch == 1 else None,
        graph_milliseconds=None if graph_milliseconds is None else graph_milliseconds(tokens),
    )


def measure_prefill(runtime: Runtime, tokens: int) -> Prefill:
    """Feed a prompt of random ids a few times, after once for warmth."""
    ids = random_ids(runtime.spec.vocab_size, 1, tokens)

    def seconds() -> float:
        begun = time.perf_counter()
        logits, _ = runtime.prefill(ids, runtime.initial_state())
        logits.argmax(-1).tolist()
        return time.perf_counter() - begun

    fewest, most = PREFILL_ROUNDS
    rounds = min(most, max(fewest, int(PREFILL_SECONDS / seconds())))
    milliseconds = _times([1e3 * seconds() for _ in range(rounds)])
    return Prefill(tokens, milliseconds, 1e3 * tokens / milliseconds.median)


def bandwidth(source: StoredWeights | Export, decode: Decode, read_rate: float, datasheet: float | None) -> Bandwidth:
    """What a decoding run of one sequence moved, in the middle of it, against the rates in bytes a second."""
    moved = traffic(source, decode.first_position + decode.tokens // 2)
    rate = 1e3 * moved.total / decode.milliseconds_per_token.median
    return Bandwidth(
        bytes_per_token=moved,
        gigabytes_per_second=rate / 1e9,
        read_gigabytes_per_second=read_rate / 1e9,
        share_of_read_rate=rate / read_rate,
        datasheet_gigabytes_per_second=None if datasheet is None else datasheet / 1e9,
        share_of_datasheet=None if datasheet is None else rate / datasheet,
    )


def _opened(source: str | Path) -> StoredWeights | Export:
    path = model_path(source)
    if path.is_file():
        return open_gguf(path)
    return open_export(path) if is_export(path) else open_checkpoint(path)


def _first_token(runtime: Runtime) -> None:
    logits, state = runtime.prefill(random_ids(runtime.spec.vocab_size, 1, CHECK_TOKENS), runtime.initial_state())
    Sampler(GREEDY)(logits, state.position).tolist()


def _reset_memory(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats(device)


def _times(samples: Sequence[float]) -> Times:
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Times(statistics.median(samples), fifths[0], fifths[3])
