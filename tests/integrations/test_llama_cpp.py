"""The patched llama.cpp against goldens of the published implementation and against torch (just test-llama)."""

from __future__ import annotations

import contextlib
import ctypes
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from gdn2_edge.bench.random_weights import random_tensor
from gdn2_edge.convert import convert_checkpoint
from gdn2_edge.integrations.build_llama_cpp import PATCHED_VERSION
from gdn2_edge.model import load_model
from gdn2_edge.spec import ModelSpec

pytestmark = pytest.mark.llama

GOLDEN = Path(__file__).parents[1] / "golden"
# Largest difference over the golden's standard deviation. fp32 sums in another order are at 2e-5.
GOLDEN_TOLERANCE = 1e-4
# Of torch, which itself is up to 8e-5 from its own single steps where gates and decays are extreme.
EXTREME_TOLERANCE = 3e-4
CUTS = {
    "whole": [0, 192],
    "in two": [0, 100, 192],
    "anywhere": [0, 1, 2, 7, 60, 61, 130, 192],
    "around the window": [0, 47, 48, 49, 96, 191, 192],
    "token by token": list(range(193)),
}
F32 = 0  # GGML_TYPE_F32

Array = NDArray[np.float32]
Part = tuple[int, int, Sequence[int]]  # sequence, position of its first token, tokens


@pytest.fixture(scope="module")
def api() -> Any:
    """llama_cpp's functions, quiet but for errors."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    assert llama_cpp.__version__ == PATCHED_VERSION
    said: list[str] = []

    @llama_cpp.llama_log_callback
    def log(level: int, text: bytes, _: Any) -> None:
        said.append(text.decode(errors="replace"))

    llama_cpp.llama_log_set(log, None)
    llama_cpp.llama_backend_init()
    llama_cpp.said = said
    llama_cpp.keep_log_callback = log
    return llama_cpp


class Llama:
    """A model and a context of two sequences; keys and values of attention layers in fp32, as torch has them."""

    def __init__(self, api: Any, path: Path, **options: Any) -> None:
        self.api = api
        self.model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
        if not self.model:
            raise ValueError("".join(api.said[-20:]))
        self.vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        settings = api.llama_context_default_params()
        wanted = {"n_ctx": 1024, "n_batch": 512, "n_seq_max": 2, "n_threads": 1, "n_threads_batch": 1}
        wanted |= {"type_k": F32, "type_v": F32, "flash_attn_type": 0, **options}
        for name, value in wanted.items():
            setattr(settings, name, value)
        self.context = api.llama_init_from_model(self.model, settings)
        self.batch = api.llama_batch_init(512, 0, 2)

    def close(self) -> None:
        self.api.llama_batch_free(self.batch)
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)

    def run(self, *parts: Part) -> list[Array]:
        """Logits [T, vocab_size] of each part, all fed in one batch."""
        n = 0
        for sequence, start, tokens in parts:
            for i, token in enumerate(tokens):
                self.batch.token[n], self.batch.pos[n], self.batch.logits[n] = int(token), start + i, 1
                self.batch.n_seq_id[n], self.batch.seq_id[n][0] = 1, sequence
                n += 1
        self.batch.n_tokens = n
        assert self.api.llama_decode(self.context, self.batch) == 0
        logits = np.ctypeslib.as_array(self.api.llama_get_logits(self.context), (n, self.vocab_size)).copy()
        return np.split(logits, np.cumsum([len(tokens) for _, _, tokens in parts])[:-1])

    def clear(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def save(self, sequence: int) -> bytes:
        size = self.api.llama_state_seq_get_size(self.context, sequence)
        data = (ctypes.c_uint8 * size)()
        assert self.api.llama_state_seq_get_data(self.context, data, size, sequence) == size
        return bytes(data)

    def load(self, data: bytes, sequence: int) -> None:
        raw = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        assert self.api.llama_state_seq_set_data(self.context, raw, len(data), sequence) == len(data)


@contextlib.contextmanager
def opened(api: Any, path: Path, **options: Any) -> Iterator[Llama]:
    llama = Llama(api, path, **options)
    try:
        yield llama
    finally:
        llama.close()


def to_gguf(folder: Path) -> Path:
    from gdn2_edge.export.gguf import export_gguf

    out = folder.with_suffix(".gguf")
    export_gguf(folder, out, "f32")
    return out


@pytest.fixture(scope="module", params=["recurrent", "hybrid"])
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("golden") / request.param
    config = str(GOLDEN / "hybrid.json") if request.param == "hybrid" else None
    convert_checkpoint(GOLDEN / f"{request.param}-model-ckpt.pth", folder, config=config)
    values = load_file(GOLDEN / f"{request.param}-golden.safetensors")
    return to_gguf(folder), values["input_ids"].tolist(), values["logits"].numpy()


# The window of the hybrid is 48: a ring of the window's size, and one of the context's; micro-batches cut anywhere.
@pytest.fixture(params=[{}, {"n_ubatch": 32}, {"n_ubatch": 64, "swa_full": False}], ids=["", "n_ubatch", "ring"])
def llama(request: pytest.FixtureRequest, api: Any, golden: Any) -> Iterator[Llama]:
    with opened(api, golden[0], **request.param) as llama:
        yield llama


def spread(found: Array, expected: Array) -> float:
    return float(np.abs(found - expected).max() / expected.std())


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
def test_logits_meet_the_golden(llama: Llama, golden: Any, cuts: list[int]) -> None:
    _, ids, expected = golden
    for row in (0, 1):
        pieces = [llama.run((row, start, ids[row][start:end]))[0] for start, end in pairwise(cuts)]
        assert spread(np.concatenate(pieces), expected[row]) < GOLDEN_TOLERANCE


def test_two_sequences_in_one_batch(llama: Llama, golden: Any) -> None:
    _, ids, expected = golden
    cuts = (0, 0), (100, 37), (101, 38), (150, 192), (192, 192)
    rows: tuple[list[Array], list[Array]] = ([], [])
    for start, end in pairwise(cuts):
        parts = [(row, start[row], ids[row][start[row] : end[row]]) for row in (0, 1) if end[row] > start[row]]
        for (row, _, _), logits in zip(parts, llama.run(*parts), strict=True):
            rows[row].append(logits)
    for row in (0, 1):
        assert spread(np.concatenate(rows[row]), expected[row]) < GOLDEN_TOLERANCE


def test_a_state_that_was_saved_goes_on(llama: Llama, golden: Any, api: Any) -> None:
    path, ids, expected = golden
    llama.run((0, 0, ids[0][:100]))
    saved = llama.save(0)
    llama.run((0, 100, ids[0][100:120]))
    llama.clear()
    llama.load(saved, 1)
    assert spread(llama.run((1, 100, ids[0][100:]))[0], expected[0, 100:]) < GOLDEN_TOLERANCE
    with opened(api, path) as another:
        another.load(saved, 0)
        assert spread(another.run((0, 100, ids[0][100:]))[0], expected[0, 100:]) < GOLDEN_TOLERANCE


SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "layer_types": ("gdn2", "gdn2"),
    "num_heads": 2,
    "num_v_heads": 2,
    "head_k_dim": 32,
    "head_v_dim": 32,
    "output_gate": "silu",
}
ATTENTION = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 20,
    "rope_theta": 5000.0,
}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "sigmoid": {"output_gate": "sigmoid"},
    "negative eigenvalues": {"allow_neg_eigval": True},
    "grouped": {"num_v_heads": 6},
    "wide values": {"head_v_dim": 64, "num_v_heads": 4, "conv_size": 3, "allow_neg_eigval": True},
    "128": {"head_k_dim": 128, "head_v_dim": 128},
    "no power of two": {"head_k_dim": 24, "head_v_dim": 48, "conv_size": 2},
    "attention first": {"layer_types": ("sliding_attention", "gdn2", "gdn2"), "num_v_heads": 4, **ATTENTION},
}
# Of the logits of the erase gate, and ends of A_log and dt_bias over the heads and channels. At "extreme" the erase
# gate goes from 1e-26 to 1 and a token decays by up to exp(-1000).
GATES = {"mild": (1, (-1, 1), (-4, 0)), "slow": (1, (-9, -7), (-6, -4)), "extreme": (200, (-3, 4), (-20, 8))}


def random_checkpoint(folder: Path, spec: ModelSpec, gates: str) -> Path:
    erase, A_log, dt_bias = GATES[gates]
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in spec.tensor_shapes().items():
        tensor = random_tensor(name, shape, generator)
        if name.endswith("A_log"):
            tensor = torch.linspace(*A_log, len(tensor))
        elif name.endswith("dt_bias"):
            tensor = torch.linspace(*dt_bias, len(tensor))
        elif name.endswith("b_proj.weight"):
            tensor *= erase
        elif len(shape) == 1:  # weights of norms, and the bias of the output gate
            tensor += 0.2 * torch.randn(shape, generator=generator)
        tensors[name] = tensor
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "gdn2", **spec.to_json()}))
    return folder


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_meets_torch(shape: str, gates: str, api: Any, tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "model", ModelSpec(**{**SMALL, **SHAPES[shape]}), gates)
    model = load_model(folder, "cpu", torch.float32)
    ids = torch.randint(97, (2, 70), generator=torch.Generator().manual_seed(1))
    expected = model.forward(ids)[0].numpy()
    tolerance = EXTREME_TOLERANCE if gates == "extreme" else GOLDEN_TOLERANCE
    with opened(api, to_gguf(folder), n_ubatch=64) as llama:
        for found, row in zip(llama.run((0, 0, ids[0].tolist()), (1, 0, ids[1].tolist())), expected, strict=True):
            assert spread(found, row) < tolerance
        llama.clear()
        steps = [llama.run((0, i, [token]))[0] for i, token in enumerate(ids[0].tolist())]
        assert spread(np.concatenate(steps), expected[0]) < tolerance


def set_u32(name: str, value: int) -> Callable[[bytes], bytes]:
    """A file with another value for a key: its name, the type (4: u32), the value."""

    def change(data: bytes) -> bytes:
        at = data.index(name.encode()) + len(name) + 4
        return data[:at] + value.to_bytes(4, "little") + data[at + 4 :]

    return change


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from gdn2_edge.export.gguf import export_gguf
    from gdn2_edge.loading import model_path

    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    export_gguf(model_path("tiny"), path, "q8_0")
    return path


QUESTION = [{"role": "user", "content": "My name is Ada. What is my name?"}]


def test_llama_of_the_package_chats(api: Any, tiny: Path) -> None:
    llama = api.Llama(str(tiny), n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)
    answer = llama.create_chat_completion(QUESTION, temperature=0, max_tokens=32)["choices"][0]
    assert "Ada" in answer["message"]["content"]
    assert answer["finish_reason"] == "stop"
    llama.close()


def test_its_server_answers(api: Any, tiny: Path) -> None:
    pytest.importorskip("uvicorn", reason="llama-cpp-python's extra server is not installed")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(tiny), "--n_threads", "1", "--port", str(port)]
    body = json.dumps({"messages": QUESTION, "temperature": 0, "max_tokens": 32}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", body, {"content-type": "application/json"}
    )
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(120):
                with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(request, timeout=60) as reply:
                    assert "Ada" in json.load(reply)["choices"][0]["message"]["content"]
                    return
                assert server.poll() is None
                time.sleep(0.5)
            pytest.fail("the server did not come up")
        finally:
            server.terminate()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        pytest.param(lambda data: data.replace(b"sigmoid", b"sigmund"), "unknown output gate: sigmund", id="gate"),
        pytest.param(set_u32("gdn2.ssm.state_size", 48), "not a multiple of the 48 key channels", id="K"),
        pytest.param(set_u32("gdn2.ssm.state_size", 0), "not a multiple of the 0 key channels", id="no K"),
        pytest.param(set_u32("gdn2.ssm.group_count", 0), "group_count 0", id="no heads"),
        pytest.param(set_u32("gdn2.ssm.time_step_rank", 3), "time_step_rank 3", id="heads"),
        pytest.param(set_u32("gdn2.ssm.conv_kernel", 1), "conv_kernel 1", id="taps"),
        pytest.param(lambda data: data[: len(data) // 2], "not within the file bounds", id="truncated"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    damage: Callable[[bytes], bytes], says: str, api: Any, tmp_path: Path
) -> None:
    spec = ModelSpec(**{**SMALL, "output_gate": "sigmoid"})
    path = to_gguf(random_checkpoint(tmp_path / "model", spec, "mild"))
    data = path.read_bytes()
    path.write_bytes(damage(data))
    assert path.read_bytes() != data
    with pytest.raises(ValueError, match=says):
        Llama(api, path)
