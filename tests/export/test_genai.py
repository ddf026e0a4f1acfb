"""onnxruntime-genai and an exported folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

pytest.importorskip("onnx")

from gdn2_edge.export.onnx import export_onnx
from gdn2_edge.export.onnx.genai import genai_files
from gdn2_edge.generate.text import open_text
from gdn2_edge.loading import load, model_path

TINY = model_path("tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("genai") / "x"
    export_onnx(TINY, out)
    return out


def test_what_is_beside_the_model(folder: Path) -> None:
    config = json.loads((folder / "genai_config.json").read_text())
    assert config["model"]["eos_token_id"] == [4, 0]
    assert config["search"]["repetition_penalty"] == 1.05
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["eos_token"] == "<|end|>"
    assert tokenizer["chat_template"] == (TINY / "chat_template.jinja").read_text()


def test_a_model_without_a_tokenizer_has_nothing_to_say() -> None:
    spec = load("tiny", "cpu").spec
    files = {name: (TINY / name).read_bytes() for name in ("tokenizer.json", "generation_config.json")}
    assert genai_files(spec, files)
    assert not genai_files(spec, {})
    assert not genai_files(spec, {"tokenizer.json": files["tokenizer.json"]})


def test_its_answers_are_torchs(folder: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    text, model = open_text(TINY), load("tiny", "cpu")
    ids = text.opening("My locker code is 4821.")
    logits, state = model.prefill(torch.tensor([ids]), model.initial_state())
    expected = []
    while not expected or expected[-1] not in text.stop_ids:
        expected.append(int(logits.argmax()))
        logits, state = model.step(torch.tensor(expected[-1:]), state)

    options = genai.GeneratorParams(opened := genai.Model(str(folder)))
    options.set_search_options(max_length=200, do_sample=False, repetition_penalty=1.0)
    generator, found = genai.Generator(opened, options), []
    generator.append_tokens(np.array(ids, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    assert found == expected
    words = "My locker code is 4821."
    exact = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(words).ids
    assert genai.Tokenizer(opened).encode(words).tolist() == exact
