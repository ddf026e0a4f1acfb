// A model that gdn2-edge exported, its conversation, and where the browser keeps it. Knows nothing of the page.

import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";
import { Tokenizer } from "./node_modules/@huggingface/tokenizers/dist/tokenizers.min.mjs";

const PIECE_TOKENS = 64; // a long message is read in pieces, so that the page can answer between two of them
const MAX_TRANSCRIPT = 200; // messages; the state is the memory, these are for reading

/** The model in a folder that prepare.py made. */
export class Model {
  static async open(folder) {
    const get = async (name) => {
      const response = await fetch(`${folder}/${name}`);
      if (!response.ok) throw new Error(`There is no ${folder}/${name}. Make the folder with: python prepare.py`);
      return response;
    };
    const [chat, tokenizer] = await Promise.all(
      ["chat.json", "tokenizer.json"].map(async (name) => (await get(name)).json()),
    );
    const weights = new Uint8Array(await (await get("model.onnx")).arrayBuffer());
    const graph = await ort.InferenceSession.create(weights, { executionProviders: ["wasm"] });
    return new Model(chat, tokenizer, graph);
  }

  constructor(chat, tokenizer, graph) {
    this.chat = chat;
    this.graph = graph;
    // In a message "<|end|>" is seven characters; only the template's own is the token.
    const plain = tokenizer.added_tokens.filter((token) => !chat.control.includes(token.content));
    this.reader = new Tokenizer({ ...tokenizer, added_tokens: plain, post_processor: null }, {});
    this.writer = new Tokenizer(tokenizer, {});
  }

  /** Text -> ids. */
  encode(text) {
    return this.reader.encode(text.toWellFormed(), { add_special_tokens: false }).ids;
  }

  /** Ids -> text; control tokens have none. */
  decode(ids) {
    return ids.length
      ? this.writer.decode(ids, { skip_special_tokens: true, clean_up_tokenization_spaces: false })
      : "";
  }

  /** The state before the first token: zeros, by the name of the graph's input. */
  emptyState() {
    return Object.fromEntries(
      this.chat.states.map(({ input, shape }) => {
        const size = shape.reduce((product, length) => product * length, 1);
        return [input, new Float32Array(size)];
      }),
    );
  }

  /** Feeds ids behind `position` others -> the logits after the last one, and the new state. `state` is left as it is. */
  async feed(ids, state, position) {
    const int64 = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
    const inputs = { input_ids: int64(ids) };
    if (this.chat.has_positions) inputs.position_ids = int64(ids.map((_, i) => position + i));
    for (const { input, shape } of this.chat.states) inputs[input] = new ort.Tensor("float32", state[input], shape);
    const outputs = await this.graph.run(inputs);
    const vocabSize = outputs.logits.dims[2];
    return {
      logits: outputs.logits.data.slice(-vocabSize),
      state: Object.fromEntries(this.chat.states.map(({ input, output }) => [input, outputs[output].data])),
    };
  }

  /** The likeliest id; those chosen lately are less likely. */
  choose(logits, recent) {
    const penalty = this.chat.repetition_penalty;
    for (const id of new Set(recent)) logits[id] = logits[id] > 0 ? logits[id] / penalty : logits[id] * penalty;
    const best = logits.reduce((best, score, id) => (score > logits[best] ? id : best), 0);
    if (!Number.isFinite(logits[best])) throw new Error("The model's logits are not finite: its file is damaged.");
    return best;
  }
}

/**
 * A conversation. Its memory is the state, of constant size: a turn feeds only what is new, and nothing is read again.
 *
 * `memory` is all there is to save: the state holds everything up to the last token of the last answer but `pending`,
 * the newest token of an answer that was cut short. The token that ends an answer is fed with the next turn.
 */
export class Session {
  constructor(model, memory = null) {
    this.model = model;
    this.memory = memory ?? Session.beginning(model);
    this.tokensFed = 0; // since the page was opened
  }

  static beginning(model) {
    return { state: model.emptyState(), position: 0, pending: null, recent: [], started: false, transcript: [] };
  }

  get stateBytes() {
    return Object.values(this.memory.state).reduce((bytes, values) => bytes + values.byteLength, 0);
  }

  /** The ids that a message of the user feeds. */
  prompt(text) {
    const { chat } = this.model;
    const { started, pending } = this.memory;
    const [before, after] = started ? chat.continuation : chat.opening;
    return [...(pending === null ? [] : [pending]), ...before, ...this.model.encode(text), ...after];
  }

  /**
   * Feeds a message and yields the answer so far after each token. `signal` ends the answer: what was shown is
   * remembered. Before the first token, and after an error, the memory is as it was.
   */
  async *send(text, { maxTokens = 512, signal } = {}) {
    const { chat } = this.model;
    const { transcript } = this.memory;
    const answer = [];
    let { state, position, recent } = this.memory;
    let ids = this.prompt(text);
    while (answer.length < maxTokens && !signal?.aborted) {
      let logits;
      for (let start = 0; start < ids.length; start += PIECE_TOKENS) {
        const piece = ids.slice(start, start + PIECE_TOKENS);
        ({ logits, state } = await this.model.feed(piece, state, position));
        position += piece.length;
        this.tokensFed += piece.length;
        if (ids.length > PIECE_TOKENS) await new Promise((resolve) => setTimeout(resolve));
        if (signal?.aborted && !answer.length) return;
      }
      const id = this.model.choose(logits, recent);
      const stopped = chat.stop_ids.includes(id);
      recent = chat.repetition_window ? [...recent, id].slice(-chat.repetition_window) : [];
      if (!stopped) answer.push(id);
      const content = this.model.decode(answer);
      const said = [{ role: "user", content: text }, { role: "assistant", content }];
      this.memory = {
        state,
        position,
        pending: stopped ? null : id,
        recent,
        started: true,
        transcript: [...transcript, ...said].slice(-MAX_TRANSCRIPT),
      };
      if (stopped) return;
      yield content.replace(/\uFFFD+$/, ""); // a character whose last bytes are still to come
      ids = [id];
    }
  }

  /** Writes the memory to the browser's storage, under the model's fingerprint. */
  async save() {
    await store("readwrite", (sessions) => sessions.put(this.memory, this.model.chat.fingerprint));
  }

  /** The session that `save` wrote for this model, or a new one. */
  static async load(model) {
    const memory = await store("readonly", (sessions) => sessions.get(model.chat.fingerprint));
    return new Session(model, memory);
  }

  /** Forgets everything, in the storage too. */
  async reset() {
    this.memory = Session.beginning(this.model);
    await this.save();
  }
}

/** One request to the object store of sessions, in a transaction of its own. */
async function store(mode, request) {
  const database = await new Promise((resolve, reject) => {
    const opening = indexedDB.open("gdn2-edge", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore("sessions");
    opening.onsuccess = () => resolve(opening.result);
    opening.onerror = () => reject(opening.error);
  });
  try {
    return await new Promise((resolve, reject) => {
      const transaction = database.transaction("sessions", mode);
      const asked = request(transaction.objectStore("sessions"));
      transaction.oncomplete = () => resolve(asked.result);
      transaction.onabort = () => reject(transaction.error);
    });
  } finally {
    database.close();
  }
}
