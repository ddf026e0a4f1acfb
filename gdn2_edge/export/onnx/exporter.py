"""From a checkpoint to the folder of an ONNX model: plan, graph, file."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from gdn2_edge.checkpoint.files import TensorInfo, card_field, check_apart, companions
from gdn2_edge.checkpoint.reader import Checkpoint, open_checkpoint
from gdn2_edge.checkpoint.writer import check_room, write_atomically
from gdn2_edge.errors import CheckpointError, FormatError
from gdn2_edge.export.onnx.functions import gated_delta_rule2
from gdn2_edge.export.onnx.genai import genai_files
from gdn2_edge.export.onnx.graph import GDN2_DOMAIN, IR_VERSION, MICROSOFT, OPSET, Graph, Initializer
from gdn2_edge.export.onnx.onnx_ops import OnnxOps, Value
from gdn2_edge.export.onnx.weights import DeferredReader, Source, stored_format
from gdn2_edge.export.onnx.writer import uses_data_file, write_model
from gdn2_edge.forward import forward, head
from gdn2_edge.onnx_names import (
    DATA_FILE,
    EXPORT_FORMATS,
    LOGITS,
    MODEL_FILE,
    POSITIONS,
    TOKENS,
    has_positions,
    state_names,
)
from gdn2_edge.quantize import quantize_checkpoint, stored_infos
from gdn2_edge.quantize.recipe import make_recipe, plan
from gdn2_edge.spec import MODEL_TYPE, ModelSpec
from gdn2_edge.state import state_from_named
from gdn2_edge.weights import Weight

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Report:
    """What an export made, or would make; a dry run that would quantize knows no fingerprint.

    `domains` are those of the operators in use, `inputs` and `outputs` name -> element type and shape.
    """

    source: str
    out: str
    format: str
    portable: bool
    fingerprint: str | None
    parameters: int
    bytes: int
    nodes: int
    domains: tuple[str, ...]
    files: tuple[str, ...]
    inputs: dict[str, str]
    outputs: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Plan:
    """A quantized checkpoint that is not there yet: layouts without values."""

    spec: ModelSpec
    path: Path
    layouts: dict[str, dict[str, TensorInfo]]
    fingerprint: str = ""
    config: dict[str, Any] = field(default_factory=dict)

    def stored(self, name: str) -> dict[str, TensorInfo]:
        return self.layouts[name]

    def weight(self, name: str) -> Weight:
        raise FormatError(f"{name} is planned only.")


def export_checkpoint(
    src: Path,
    out: Path,
    format: str | None = None,
    *,
    portable: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write the folder `out` with model.onnx, config.json and what else a program needs of the checkpoint `src`.

    Args:
        src: a folder that `gdn2-edge convert` or `quantize` made.
        out: the folder to make.
        format: of the matrices. None is as they are stored: quantized, or fp32. int8, int4 and fp8 quantize a
            checkpoint that is not, with the recipe of `gdn2-edge quantize`.
        portable: standard operators only; slower.
        dry_run: plan and build the graph, write nothing.
        progress: called with (bytes done, bytes in all, tensor name).
    Raises:
        CheckpointError: `src` is no such folder, or `out` exists or cannot be written.
        FormatError: the format is unknown, or not that of a checkpoint that is quantized.
    """
    check_apart(src, out)
    if out.exists() or out.is_symlink():
        raise CheckpointError(f"{out} exists. Choose another --out.")
    checkpoint = None if src.is_file() else open_checkpoint(src)
    if checkpoint is None or checkpoint.kind != "gdn2":
        raise CheckpointError(f"{src} is no folder of gdn2-edge. First make one: gdn2-edge convert {src} --out DIR.")
    chosen = _chosen_format(checkpoint, format)
    if chosen in ("fp32", "fp16") or chosen == stored_format(checkpoint):
        if dry_run:
            return _export(checkpoint, checkpoint, out, None, chosen, portable, progress)
        with _beside(out) as folder:
            return _export(checkpoint, checkpoint, out, folder, chosen, portable, progress)
    recipe = make_recipe({"format": chosen}, "export")
    if dry_run:
        quantize_checkpoint(src, out, recipe, dry_run=True)
        planned = {
            entry.name: {name.removeprefix(entry.name): info for name, info in stored_infos(entry).items()}
            for entry in plan(recipe, checkpoint.spec)
        }
        return _export(checkpoint, _Plan(checkpoint.spec, src, planned), out, None, chosen, portable, progress)
    with _beside(out) as folder:
        quantize_checkpoint(src, folder / "quantized", recipe, progress=progress)
        quantized = open_checkpoint(folder / "quantized")
        return _export(checkpoint, quantized, out, folder, chosen, portable, progress)


def _chosen_format(checkpoint: Checkpoint, format: str | None) -> str:
    stored = stored_format(checkpoint)
    if format is None:
        return stored
    if format not in EXPORT_FORMATS:
        raise FormatError(f"format {format!r} is unknown, expected one of {', '.join(EXPORT_FORMATS)}.")
    if stored not in ("fp32", format):
        raise FormatError(
            f"{checkpoint.path} is already quantized to {stored}, --format says {format}. "
            "Leave out --format, or export the original checkpoint."
        )
    return format


@contextlib.contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A folder to work in beside `out`, gone when the block ends; if it ends well, "model" in it becomes `out`."""
    made = [folder for folder in out.parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as work:
            (Path(work) / "model").mkdir()
            yield Path(work)
            if out.exists():
                raise CheckpointError(f"{out} exists now; something else made it. Choose another --out.")
            (Path(work) / "model").rename(out)
    except BaseException as error:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise CheckpointError(f"{out}: cannot be written ({error.strerror or error}).") from None
        raise


def _export(
    original: Checkpoint,
    source: Checkpoint | _Plan,
    out: Path,
    folder: Path | None,
    format: str,
    portable: bool,
    progress: Progress | None,
) -> Report:
    """The graph of `source` and, where there is a folder to work in, its files."""
    spec = source.spec
    model, initializers = build(source, TensorProto.FLOAT16 if format == "fp16" else TensorProto.FLOAT, portable)
    domains = tuple(entry.domain or "ai.onnx" for entry in model.opset_import)
    files = companions(original.path)
    files |= genai_files(spec, files)
    facts = {
        "gdn2.spec": json.dumps(spec.to_json()),
        "gdn2.fingerprint": source.fingerprint,
        "gdn2.format": format,
        "gdn2.portable": json.dumps(portable),
        "licence": card_field(files, "license"),
    }
    helper.set_model_props(model, {name: value for name, value in facts.items() if value})
    config = {
        "model_type": MODEL_TYPE,
        **spec.to_json(),
        **{k: v for k, v in source.config.items() if k == "quantization_config"},
        "onnx": {"format": format, "portable": portable, "opset": OPSET, "domains": domains},
        "fingerprint": source.fingerprint,
    }
    if folder is not None:
        check_room(folder, sum(one.nbytes for one in initializers), out)
        write_model(model, initializers, folder / "model", progress)
        files["config.json"] = (json.dumps(config, indent=1) + "\n").encode()
        for name, content in files.items():
            write_atomically(folder / "model" / name, content)
    written = [MODEL_FILE, *([DATA_FILE] if uses_data_file(initializers) else []), "config.json", *files]
    return Report(
        source=str(original.path),
        out=str(out),
        format=format,
        portable=portable,
        fingerprint=source.fingerprint or None,
        parameters=spec.num_parameters(),
        bytes=sum(one.nbytes for one in initializers),
        nodes=len(model.graph.node),
        domains=domains,
        files=tuple(dict.fromkeys(written)),
        inputs={value.name: _described(value) for value in model.graph.input},
        outputs={value.name: _described(value) for value in model.graph.output},
    )


def build(source: Source, type: int, portable: bool) -> tuple[onnx.ModelProto, list[Initializer]]:
    """The model without the values of its weights, and the promises of those. `type` is that of the activations."""
    spec, graph = source.spec, Graph()
    ops = OnnxOps(graph, spec, type, portable)
    names = state_names(spec)
    before = {name: Value(past) for name, (past, _) in names.items()}
    before["position"] = Value(POSITIONS, TensorProto.INT64)
    tokens = Value(TOKENS, TensorProto.INT64)
    weights = DeferredReader(source).model()
    x, state = forward(ops, spec, weights, tokens, state_from_named(spec, before))
    logits = ops.as_fp32(head(ops, spec, weights, x))
    after = state.named()
    graph.rename({logits.name: LOGITS, **{after[name].name: present for name, (_, present) in names.items()}})

    shapes = spec.state_shapes()
    inputs = [helper.make_tensor_value_info(TOKENS, TensorProto.INT64, ["batch", "sequence"])]
    if has_positions(spec):
        inputs.append(helper.make_tensor_value_info(POSITIONS, TensorProto.INT64, ["batch", "sequence"]))
    outputs = [helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, ["batch", "sequence", spec.vocab_size])]
    for name, (past, present) in names.items():
        shape: list[str | int | None] = ["batch", *shapes[name][1:]]
        inputs.append(helper.make_tensor_value_info(past, TensorProto.FLOAT, shape))
        outputs.append(helper.make_tensor_value_info(present, TensorProto.FLOAT, shape))
    onnx_graph = helper.make_graph(graph.nodes, MODEL_TYPE, inputs, outputs, list(graph.constants.values()))
    functions = [gated_delta_rule2(spec, portable)] if "gdn2" in spec.layer_types else []
    imports = [helper.make_opsetid("", OPSET)]
    imports += [helper.make_opsetid(MICROSOFT, 1)] if not portable else []
    imports += [helper.make_opsetid(GDN2_DOMAIN, 1)] if functions else []
    model = helper.make_model(
        onnx_graph,
        functions=functions,
        opset_imports=imports,
        ir_version=IR_VERSION,
        producer_name="gdn2-edge",
        producer_version=_version(),
        domain=GDN2_DOMAIN,
    )
    return model, list(graph.initializers.values())


def _described(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    shape = ", ".join(dim.dim_param or str(dim.dim_value) for dim in tensor.shape.dim)
    return f"{TensorProto.DataType.Name(tensor.elem_type).lower()} [{shape}]"


def _version() -> str:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version("gdn2-edge")
    return "unknown"
