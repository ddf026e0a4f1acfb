"""Converting a checkpoint that people hold into our folder: same values, canonical names, a config that says it all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdn2_edge.checkpoint.files import COMPANIONS, TensorInfo, check_apart, companions, identity, read_file, read_json
from gdn2_edge.checkpoint.reader import Checkpoint, open_checkpoint
from gdn2_edge.checkpoint.sentencepiece import tokenizer_from_sentencepiece
from gdn2_edge.checkpoint.writer import Job, Progress, write_checkpoint
from gdn2_edge.errors import CheckpointError, SpecError
from gdn2_edge.generate.text import open_text
from gdn2_edge.spec import NAMED_CONFIGS
from gdn2_edge.weights import Dense, check_finite

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Converted:
    """What a conversion made."""

    source: str
    kind: str
    out: str
    fingerprint: str
    parameters: int
    nbytes: int


def spec_overrides(config: str | None, output_gate: str | None = None) -> dict[str, Any]:
    """Spec fields from a published name or a JSON file, and the output gate.

    Raises:
        SpecError: neither a known name nor a file, or the two contradict each other.
    """
    fields: dict[str, Any] = {}
    if config in NAMED_CONFIGS:
        fields = dict(NAMED_CONFIGS[config])
    elif config is not None:
        if not Path(config).is_file():
            raise SpecError(f"--config {config}: neither a file nor one of {', '.join(NAMED_CONFIGS)}.")
        fields = {k: v for k, v in read_json(Path(config)).items() if k != "model_type"}
    if output_gate is not None and fields.setdefault("output_gate", output_gate) != output_gate:
        raise SpecError(f"--config says output_gate {fields['output_gate']}, --output-gate says {output_gate}.")
    return fields


def convert_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    config: str | None = None,
    output_gate: str | None = None,
    tokenizer: str | Path | None = None,
    chat_template: str | Path | None = None,
    dtype: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Convert `src` into the folder `dst`, tensor by tensor.

    Args:
        src: an NVlabs .pth, a state dict with fla's layer names, or our own folder.
        config: a published name (`NAMED_CONFIGS`) or a JSON file with spec fields that the source does not say.
        output_gate: "silu" or "sigmoid", where the source does not say.
        tokenizer: tokenizer.json, a sentencepiece model, or a folder with one.
        chat_template: a jinja file.
        dtype: "fp32", "bf16" or "fp16" for matrices; None keeps the source's. Vectors and filters become fp32.
    Raises:
        CheckpointError, SpecError: see `open_checkpoint` and `write_checkpoint`.
    """
    src, dst = Path(src), Path(dst)
    check_apart(src, dst)
    checkpoint = open_checkpoint(src, spec_overrides(config, output_gate))
    files = companions(src) | _text_files(tokenizer, chat_template)
    if "tokenizer.json" in files:
        size = open_text(files).vocab_size
        if size > checkpoint.spec.vocab_size:
            raise CheckpointError(
                f"The tokenizer has {size} tokens, the model {checkpoint.spec.vocab_size}. Does it belong to the model?"
            )
    if dtype is not None and dtype not in DTYPES:
        raise SpecError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}.")
    jobs = [_job(checkpoint, name, dtype) for name in checkpoint.spec.tensor_shapes()]
    fingerprint = write_checkpoint(
        dst,
        checkpoint.spec,
        jobs,
        identity={"source": identity(src), "dtype": dtype},
        config={},
        files=files,
        force=force,
        progress=progress,
    )
    parameters, nbytes = checkpoint.spec.num_parameters(), sum(job.nbytes for job in jobs)
    return Converted(str(src), checkpoint.kind, str(dst), fingerprint, parameters, nbytes)


def _job(checkpoint: Checkpoint, name: str, dtype: str | None) -> Job:
    stored = checkpoint.stored(name)
    if set(stored) != {""}:
        raise CheckpointError(f"{checkpoint.path}: {name} is quantized. Convert from the original checkpoint.")
    info = stored[""]
    wanted = DTYPES[dtype] if dtype else info.dtype
    if len(info.shape) != 2:
        wanted = torch.float32

    def make() -> dict[str, Tensor]:
        weight = checkpoint.weight(name)
        if not isinstance(weight, Dense):
            raise CheckpointError(f"{name} is quantized.")
        check_finite(name, weight.data)
        data = weight.data.to(wanted)
        if data is not weight.data:
            check_finite(name, data, f"It has larger ones than {dtype} can hold; give --dtype bf16 or fp32.")
        return {name: data}

    return Job(name, {name: TensorInfo(wanted, checkpoint.spec.tensor_shapes()[name])}, make)


def _text_files(tokenizer: str | Path | None, chat_template: str | Path | None) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    if tokenizer is not None:
        path = Path(tokenizer)
        if path.is_dir():
            files |= companions(path)
            files.pop("README.md", None)
            files.pop("LICENSE", None)
            if "chat_template.jinja" not in files and (path / "tokenizer_config.json").exists():
                template = read_json(path / "tokenizer_config.json").get("chat_template")
                if isinstance(template, str):
                    files["chat_template.jinja"] = template.encode(errors="surrogatepass")
            if "tokenizer.json" in files:
                path = path / "tokenizer.json"
            elif (path / "tokenizer.model").is_file():
                path = path / "tokenizer.model"
            else:
                raise CheckpointError(f"{path}: neither tokenizer.json nor tokenizer.model is in this folder.")
        if path.suffix == ".model":
            files["tokenizer.json"] = tokenizer_from_sentencepiece(path).encode()
        else:
            files["tokenizer.json"] = read_file(path, COMPANIONS["tokenizer.json"])
    if chat_template is not None:
        files["chat_template.jinja"] = read_file(Path(chat_template), COMPANIONS["chat_template.jinja"])
    return files
