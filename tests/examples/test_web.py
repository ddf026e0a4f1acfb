"""examples/web in headless Chromium: the ids and answers of Python's Session, and conversations that outlive the page.

Needs playwright, a Chromium and `npm ci` in examples/web; skipped where one is missing.
"""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api", reason="the extra test-web is not installed")
pytest.importorskip("onnx", reason="the extra onnx is not installed")

import torch
from playwright import sync_api as playwright
from safetensors.torch import load_file

from gdn2_edge.convert import convert_checkpoint
from gdn2_edge.generate.session import Session
from gdn2_edge.generate.text import open_text
from gdn2_edge.loading import model_path
from gdn2_edge.model import Model, load_model
from gdn2_edge.onnx_names import state_names
from gdn2_edge.quantize import quantize_checkpoint
from gdn2_edge.quantize.recipe import make_recipe

EXAMPLE = Path(__file__).parents[2] / "examples" / "web"
GOLDEN = Path(__file__).parents[1] / "golden"
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
WAIT_MS = 60_000
# WebAssembly sums in another order than torch; in standard deviations.
LOGITS_TOLERANCE = 1e-4
STATE_TOLERANCE = 3e-4
# Rounded activations against torch's, which are not rounded.
KL_TOLERANCE = 1e-3
TEXTS = (
    "My locker code is 4821.",
    "",
    " ",
    "it's  two   spaces, WE'LL see\n\n\tand tabs ",
    "<|end|><|user|>not a turn<|assistant|>",
    "你好，世界 é ñ ½ 👩‍👩‍👧 🇫🇷",
    "Σ ſ ﬁ don’t … — “quoted”",
    "x\x00\x7f\u00a0\u2028\u3000y",
    "0x1F 3.14159 1,000,000",
    "def f(self): return [1, 2]",
)
CONVERSATIONS = (
    ["My locker code is 4821.", "Actually, my locker code is 7730.", "What is my locker code?"],
    ["Hello! Who are you?", "My sister is called Mara.", "Who is Mara?"],
    ["Write a short story about a boat."],
    ["<|end|> is a token, is it not?", "  Thank you.  "],
)

pytestmark = [
    pytest.mark.web,
    pytest.mark.skipif(not (EXAMPLE / "node_modules").is_dir(), reason="no npm packages in examples/web: npm ci"),
]


def prepared(folder: Path, format: str, source: str | Path = "tiny") -> Path:
    command = [sys.executable, str(EXAMPLE / "prepare.py"), str(source), "--format", format, "--out", str(folder)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    scratch = tmp_path_factory.mktemp("web")
    source = scratch / "hybrid-source"
    convert_checkpoint(GOLDEN / "hybrid-model-ckpt.pth", source, config=str(GOLDEN / "hybrid.json"))
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(model_path("tiny") / name, source)
    return {
        "model": prepared(scratch / "fp32", "fp32"),
        "int8": prepared(scratch / "int8", "int8"),
        "hybrid": prepared(scratch / "hybrid", "fp32", source),
    }


@pytest.fixture(scope="module")
def python() -> Model:
    return load_model(model_path("tiny"), "cpu", torch.float32)


class Handler(SimpleHTTPRequestHandler):
    """The example's folder, with the exports in it; /model is the one in fp32."""

    def __init__(self, *args: Any, folders: dict[str, Path], **kwargs: Any) -> None:
        self.folders = folders
        super().__init__(*args, directory=str(EXAMPLE), **kwargs)

    def translate_path(self, path: str) -> str:
        first, _, rest = path.strip("/").partition("/")
        return str(self.folders[first] / rest) if first in self.folders else super().translate_path(path)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(folders: dict[str, Path]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, folders=folders)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as p:
        try:
            found = p.chromium.launch(
                executable_path=next(filter(None, map(shutil.which, BROWSERS)), None), args=["--no-sandbox"]
            )
        except playwright.Error as error:
            pytest.skip(f"no Chromium that starts: {str(error).splitlines()[0]}")
        yield found
        found.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page in a browser without a past, with its model loaded. It asks no other server for anything."""
    context = browser.new_context(viewport={"width": 1000, "height": 700})
    asked: list[str] = []
    errors: list[str] = []
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("dialog", lambda dialog: dialog.accept())
    page.goto(address)
    ready(page)
    yield page
    assert [url for url in asked if not url.startswith((address, "data:"))] == []
    assert errors == []
    context.close()


def ready(page: Any) -> None:
    page.locator("#send:not([disabled])", has_text="Send").wait_for()


def say(page: Any, text: str) -> str:
    page.fill("#text", text)
    page.press("#text", "Enter")
    ready(page)
    return page.text_content("#transcript .message:last-child")


def test_ids_are_those_of_python(page: Any, python: Model) -> None:
    text = open_text(python.path)
    script = """async (texts) => {
        const { Model } = await import("/chat.js");
        const model = await Model.open("model");
        return texts.map((text) => { const ids = model.encode(text); return [ids, model.decode(ids)]; });
    }"""
    for message, (ids, decoded) in zip(TEXTS, page.evaluate(script, TEXTS), strict=True):
        assert ids == text.encode(message), message
        assert decoded == message


def test_turns_and_answers_are_those_of_python(page: Any, python: Model) -> None:
    script = """async (conversations) => {
        const { Model, Session } = await import("/chat.js");
        const model = await Model.open("model");
        const found = [];
        for (const messages of conversations) {
            const session = new Session(model);
            const turns = [];
            for (const message of messages) {
                const fed = session.prompt(message);
                let answer = "";
                for await (const content of session.send(message, { maxTokens: 40 })) answer = content;
                const { position, pending, recent } = session.memory;
                turns.push({ fed, answer, position, pending, recent });
            }
            const state = Object.entries(session.memory.state).map(([name, values]) => [name, Array.from(values)]);
            found.push({ turns, state: Object.fromEntries(state), bytes: session.stateBytes });
        }
        return found;
    }"""
    names = state_names(python.spec)
    for messages, found in zip(CONVERSATIONS, page.evaluate(script, CONVERSATIONS), strict=True):
        session = Session(python)
        for message, turn in zip(messages, found["turns"], strict=True):
            before = session._memory
            fed = session.tokenizer.continuation(message) if before.started else session.tokenizer.opening(message)
            assert turn["fed"] == ([] if before.pending is None else [before.pending]) + fed
            assert turn["answer"] == "".join(session.send(message, max_tokens=40))
            assert (turn["position"], turn["pending"]) == (session.position, session._memory.pending)
            recent = session._memory.recent[0]
            assert turn["recent"] == recent[recent >= 0].tolist()
        state = session._memory.state.named()
        for name, (into, _) in names.items():
            difference = (torch.tensor(found["state"][into]) - state[name].flatten()).abs().max()
            assert difference < STATE_TOLERANCE * state[name].std(), name
        assert found["bytes"] == session.state_bytes - state["position"].nbytes


def test_logits_are_close_to_those_of_torch(page: Any, python: Model, tmp_path: Path) -> None:
    quantize_checkpoint(python.path, tmp_path / "int8", make_recipe({"format": "int8"}, "test"))
    ids = open_text(python.path).opening("The sun rises in the east and sets in the west. Where does it rise?")
    script = """async ([folder, ids]) => {
        const { Model } = await import("/chat.js");
        const model = await Model.open(folder);
        return Array.from((await model.feed(ids, model.emptyState(), 0)).logits);
    }"""
    for folder, model in (("model", python), ("int8", load_model(tmp_path / "int8", "cpu", torch.float32))):
        found = torch.tensor(page.evaluate(script, [folder, ids]))
        expected, _ = model.prefill(torch.tensor([ids]), model.initial_state())
        if folder == "model":
            assert (found - expected[0]).abs().max() < LOGITS_TOLERANCE * expected.std()
        logs = torch.log_softmax(torch.stack([expected[0], found]).double(), -1)
        assert torch.sum(logs[0].exp() * (logs[0] - logs[1])) < KL_TOLERANCE, folder
        assert found.argmax() == expected.argmax()


def test_attention_layers_get_their_positions(page: Any) -> None:
    golden = load_file(GOLDEN / "hybrid-golden.safetensors")
    ids = golden["input_ids"][:1, :150]
    script = """async (ids) => {
        const { Model } = await import("/chat.js");
        const model = await Model.open("hybrid");
        let logits, state = model.emptyState();
        const cuts = [0, 5, 100, ...Array.from({ length: ids.length - 100 }, (_, i) => 101 + i)];
        for (let i = 0; i + 1 < cuts.length; i += 1)
            ({ logits, state } = await model.feed(ids.slice(cuts[i], cuts[i + 1]), state, cuts[i]));
        return Array.from(logits);
    }"""
    found = torch.tensor(page.evaluate(script, ids[0].tolist()))
    expected = golden["logits"][0, 149]
    assert (found - expected).abs().max() < LOGITS_TOLERANCE * expected.std()


def test_a_conversation_streams_and_goes_on_after_a_reload(page: Any, python: Model) -> None:
    session = Session(python)
    page.evaluate("""() => {
        window.seen = [];
        const look = () => window.seen.push(document.querySelector("#transcript").lastChild?.textContent ?? "");
        new MutationObserver(look).observe(document.querySelector("#transcript"), { childList: true, subtree: true });
    }""")
    message = "Write a short story about a boat."
    answer = "".join(session.send(message))
    assert say(page, message) == answer
    growing = [text for text in page.evaluate("window.seen") if text and text != message]
    assert len(set(growing)) > 5
    assert all(answer.startswith(text) for text in growing)
    status = page.text_content("#status")
    assert "tokens/s" in status
    assert f"{session.position} tokens read" in status
    assert "897 kB" in status

    shown = page.locator(".message").all_text_contents()
    page.reload()
    ready(page)
    assert page.locator(".message").all_text_contents() == shown
    assert "nothing read again" in page.text_content("#status")
    message = "My locker code is 4821."
    assert say(page, message) == "".join(session.send(message))
    page.reload()
    ready(page)
    message = "What is my locker code?"
    assert say(page, message) == "".join(session.send(message))
    assert f"{session.position} tokens read" in page.text_content("#status")

    page.click("#reset")
    page.reload()
    ready(page)
    assert page.locator(".message").count() == 0
    assert say(page, message) == "".join(Session(python).send(message))


def test_an_answer_that_is_cut_short_goes_on_after_a_reload(page: Any, python: Model) -> None:
    page.evaluate("""async () => {
        const { Model, Session } = await import("/chat.js");
        const session = new Session(await Model.open("model"));
        for await (const _ of session.send("Write a short story about a boat.", { maxTokens: 6 }));
        await session.save();
    }""")
    session = Session(python)
    cut = "".join(session.send("Write a short story about a boat.", max_tokens=6))
    assert session._memory.pending is not None
    page.reload()
    ready(page)
    assert page.text_content(".assistant") == cut
    assert say(page, "Who was on it?") == "".join(session.send("Who was on it?"))
    assert f"{session.position} tokens read" in page.text_content("#status")


def test_stop_keeps_what_was_shown(page: Any) -> None:
    page.fill("#text", "Write a long story about a boat, a storm and an island.")
    page.press("#text", "Enter")
    page.locator(".assistant:not(:empty)").wait_for()
    page.click("#send")
    ready(page)
    shown = page.text_content(".assistant")
    assert shown
    page.reload()
    ready(page)
    assert page.text_content(".assistant") == shown


def test_a_phone_is_wide_enough(page: Any) -> None:
    page.set_viewport_size({"width": 320, "height": 560})
    say(page, "A-word-without-a-place-to-break-it-" * 4)
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    assert page.locator("#send").is_visible()


def test_a_missing_model_says_what_to_do(browser: Any, address: str) -> None:
    page = browser.new_page()
    page.route("**/model/model.onnx", lambda route: route.fulfill(status=404))
    page.goto(address)
    page.locator("#status.error").wait_for(timeout=WAIT_MS)
    assert page.text_content("#status") == ("There is no model/model.onnx. Make the folder with: python prepare.py")
    assert page.locator("#send").is_disabled()
    page.close()


def test_prepare_refuses_templates_that_change_messages(python: Model, tmp_path: Path) -> None:
    source = shutil.copytree(python.path, tmp_path / "source")
    template = (source / "chat_template.jinja").read_text().replace("message.content", "message.content | trim")
    (source / "chat_template.jinja").write_text(template)
    command = [sys.executable, str(EXAMPLE / "prepare.py"), str(source), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr == (
        "error: This page needs a chat template that writes a message as it is, between control tokens.\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_packages_are_pinned() -> None:
    package = json.loads((EXAMPLE / "package.json").read_text())
    assert all(version[0].isdigit() for version in package["dependencies"].values())
