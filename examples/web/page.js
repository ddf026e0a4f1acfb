// The page: shows the conversation, sends messages, saves after each answer and every second of one.

import { Model, Session } from "./chat.js";

const SAVE_MS = 1000;
const PAINT_MS = 30;
const element = (id) => document.getElementById(id);
const [about, examples, form, reset, send, status, text, transcript] = [
  "about", "examples", "form", "reset", "send", "status", "text", "transcript",
].map(element);

let session;
let answering = null; // an AbortController while an answer is written

function say(message, isError = false) {
  status.textContent = message;
  status.classList.toggle("error", isError);
}

function show({ role, content }) {
  const message = document.createElement("div");
  message.className = `message ${role}`;
  message.textContent = content;
  transcript.append(message);
  message.scrollIntoView({ block: "end" });
  return message;
}

function sayMemory(before = "") {
  const { position } = session.memory;
  const kilobytes = Math.round(session.stateBytes / 1000).toLocaleString("en");
  say(`${before}${position.toLocaleString("en")} tokens read, remembered in ${kilobytes} kB`);
}

function update() {
  send.textContent = answering ? "Stop" : "Send";
  send.disabled = !session;
  reset.disabled = !session || Boolean(answering) || !session.memory.started;
  examples.hidden = !session || Boolean(answering);
  const said = new Set(session?.memory.transcript.map(({ content }) => content));
  for (const button of examples.children) button.hidden = said.has(button.textContent);
}

async function answer(message) {
  answering = new AbortController();
  update();
  const question = show({ role: "user", content: message });
  const shown = show({ role: "assistant", content: "" });
  const before = session.memory;
  const began = performance.now();
  let [tokens, first, painted, saved] = [0, 0, began, began];
  try {
    for await (const content of session.send(message, { signal: answering.signal })) {
      tokens += 1;
      shown.textContent = content;
      const now = performance.now();
      first ||= now;
      if (now - saved > SAVE_MS) {
        await session.save();
        saved = now;
      }
      if (now - painted > PAINT_MS || tokens === 1) {
        const speed = tokens > 1 ? `${((tokens - 1) / ((now - first) / 1000)).toFixed(1)} tokens/s · ` : "";
        sayMemory(speed);
        shown.scrollIntoView({ block: "end" });
        await new Promise((resolve) => setTimeout(resolve)); // lets the browser paint
        painted = performance.now();
      }
    }
    const seconds = (performance.now() - first) / 1000;
    await session.save();
    sayMemory(tokens ? `${(tokens / seconds).toFixed(1)} tokens/s · ` : "");
  } catch (error) {
    say(`Stopped: ${error.message}`, true);
  }
  if (session.memory === before) [question, shown].forEach((forgotten) => forgotten.remove());
  answering = null;
  update();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (answering) return answering.abort();
  const message = text.value.trim();
  if (!session || !message) return;
  text.value = "";
  answer(message);
});

text.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!answering) form.requestSubmit();
});

reset.addEventListener("click", async () => {
  if (!confirm("Forget this conversation?")) return;
  await session.reset();
  transcript.replaceChildren();
  sayMemory();
  update();
});

/** Resolves once no other tab has this conversation, and keeps it for this one. */
function alone(name) {
  if (!navigator.locks) return; // a page that is not from localhost and not over https
  say("This conversation is open in another tab. Close it to go on here.");
  return new Promise((resolve) => navigator.locks.request(name, () => (resolve(), new Promise(() => {}))));
}

try {
  const model = await Model.open("model");
  await alone(model.chat.fingerprint);
  session = await Session.load(model);
  about.textContent = model.chat.description;
  for (const prompt of model.chat.example_prompts) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = prompt;
    button.addEventListener("click", () => !answering && answer(prompt));
    examples.append(button);
  }
  session.memory.transcript.forEach(show);
  sayMemory(session.memory.started ? "Continued, nothing read again · " : "");
  text.focus();
} catch (error) {
  say(error.message, true);
}
update();
