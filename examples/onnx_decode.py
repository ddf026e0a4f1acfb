"""Decode with an exported model and onnxruntime alone: python onnx_decode.py DIR "My name is Ada. What is my name?"

The folder is made by: gdn2-edge export onnx tiny --out DIR. Needs: pip install onnxruntime tokenizers.
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

folder = Path(sys.argv[1])
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
model = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])

# Everything the model remembers, before the first token: zeros. It never grows.
states = {one.name: np.zeros([1, *one.shape[1:]], np.float32) for one in model.get_inputs() if "past" in one.name}
has_positions = any(one.name == "position_ids" for one in model.get_inputs())
# The words of the default model's chat_template.jinja. After an answer the next turn goes on from the same states.
ids = tokenizer.encode(f"<|user|>{sys.argv[2]}<|end|><|assistant|>").ids
position, end = 0, tokenizer.token_to_id("<|end|>")
for _ in range(64):
    feeds = {"input_ids": np.array([ids], np.int64), **states}
    if has_positions:
        feeds["position_ids"] = np.arange(position, position + len(ids), dtype=np.int64)[None]
    logits, *new = model.run(None, feeds)
    states, position = dict(zip(states, new, strict=True)), position + len(ids)
    ids = [int(logits[0, -1].argmax())]
    if ids[0] == end:
        break
    print(tokenizer.decode(ids), end="", flush=True)
print()
