"""How much faster GatedDeltaRule2 is with the compiled library than with its two function bodies, in ONNX Runtime.

The graph is the operator alone, once for each layer, with inputs and states of its own. The library, the body around
com.microsoft::LinearAttention (stock) and the portable one around Scan run in turn, so that they meet the same
disturbances. First all three are checked against the token loop in float64. Exits 1 when a result is wrong or the
library is too little faster than the stock body.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import time

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper
from record import append, machine, summary
from torch import Tensor
from torch.nn.functional import normalize, softplus

from gdn2_edge.export.onnx.build_op import build_op
from gdn2_edge.export.onnx.functions import INPUTS, OPERATOR, OUTPUTS, gated_delta_rule2
from gdn2_edge.export.onnx.graph import GDN2_DOMAIN, IR_VERSION, MICROSOFT, OPSET
from gdn2_edge.kernels.reference import recurrent_gated_delta_rule2
from gdn2_edge.spec import ModelSpec

NAME = "onnx_op"
# The stock body divides by sqrt(b), so that its errors are larger than those of a plain loop.
TOLERANCE = 2e-5
# By tokens in the call: how many layers, so that at decode the states do not all stay in the cache, as in a model,
# and the least ratio of the stock body's time to the library's.
LAYERS = {1: 18, 64: 4, 256: 2}
MINIMUM_RATIOS = {1: 1.5, 64: 1.0, 256: 1.0}
VARIANTS = ("library", "stock", "scan")


def make_inputs(T: int, H: int, HV: int, K: int, V: int) -> dict[str, Tensor]:
    """Arguments of the rule by name, float32, for one sequence: unit keys, half-open gates, mild decay."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "q": normalize(randn(1, T, H, K), dim=-1),
        "k": normalize(randn(1, T, H, K), dim=-1),
        "v": randn(1, T, HV, V),
        "g": -softplus(randn(1, T, H, K) - 3),
        "b": randn(1, T, H, K).sigmoid(),
        "w": randn(1, T, HV, V).sigmoid(),
        "S": randn(1, HV, K, V),
    }


class Variant:
    """A session of nothing but the operator, its inputs and outputs bound to memory."""

    def __init__(self, name: str, inputs: dict[str, Tensor], layers: int, threads: int) -> None:
        H, K, HV, V = *inputs["k"].shape[2:], *inputs["v"].shape[2:]
        T = inputs["k"].shape[1]
        shapes = {n: [1, T, x.shape[2] * x.shape[3]] for n, x in inputs.items() if n != "S"}
        shapes |= {"past_state": [1, HV, K, V], "o": [1, T, HV * V], "present_state": [1, HV, K, V]}

        def values(names: tuple[str, ...], layer: int) -> list[object]:
            return [helper.make_tensor_value_info(f"{n}.{layer}", TensorProto.FLOAT, shapes[n]) for n in names]

        nodes = [
            helper.make_node(
                OPERATOR,
                [f"{n}.{layer}" for n in INPUTS],
                [f"{n}.{layer}" for n in OUTPUTS],
                domain=GDN2_DOMAIN,
                num_heads=H,
                num_v_heads=HV,
            )
            for layer in range(layers)
        ]
        graph = helper.make_graph(
            nodes,
            NAME,
            [x for layer in range(layers) for x in values(INPUTS, layer)],
            [x for layer in range(layers) for x in values(OUTPUTS, layer)],
        )
        spec = ModelSpec(
            vocab_size=1,
            hidden_size=1,
            intermediate_size=1,
            layer_types=("gdn2",),
            num_heads=H,
            num_v_heads=HV,
            head_k_dim=K,
            head_v_dim=V,
            output_gate="silu",
        )
        model = helper.make_model(
            graph,
            functions=[gated_delta_rule2(spec, portable=name == "scan")],
            opset_imports=[helper.make_opsetid(*x) for x in (("", OPSET), (MICROSOFT, 1), (GDN2_DOMAIN, 1))],
            ir_version=IR_VERSION,
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        if name == "library":
            options.register_custom_ops_library(str(build_op()))
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.binding = self.session.io_binding()
        self.outputs = []
        for layer in range(layers):
            for n, x in inputs.items():
                array = x.reshape(shapes.get(n, x.shape)).numpy()
                value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
                self.binding.bind_ortvalue_input(f"{'past_state' if n == 'S' else n}.{layer}", value)
            for n in OUTPUTS:
                value = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shapes[n], np.float32))
                self.binding.bind_ortvalue_output(f"{n}.{layer}", value)
                self.outputs.append(value)
        self.layers = layers

    def microseconds(self) -> float:
        """Of one layer, in one run of them all."""
        start = time.perf_counter()
        self.session.run_with_iobinding(self.binding)
        return 1e6 * (time.perf_counter() - start) / self.layers

    def largest_error(self, inputs: dict[str, Tensor]) -> float:
        """Of an output or a state, against the token loop in float64."""
        expected = recurrent_gated_delta_rule2(**{n: x.double() for n, x in inputs.items()})
        self.session.run_with_iobinding(self.binding)
        return max(
            float(np.abs(value.numpy().reshape(x.shape) - x.numpy()).max())
            for value, x in zip(self.outputs[:2], expected, strict=True)
        )


def main() -> int:
    """0, or 1 after saying on stderr what fell short."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--v-heads", type=int, default=16)
    parser.add_argument("--head-k-dim", type=int, default=128)
    parser.add_argument("--head-v-dim", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=30, help="times each variant is run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--record", action="store_true", help=f"add lines to benchmarks/results/{NAME}.jsonl")
    args = parser.parse_args()

    failed = False
    print(f"float32, {args.threads} threads, {machine()['cpu']}, onnxruntime {onnxruntime.__version__}")
    for T in args.tokens:
        shape = {"T": T, "H": args.heads, "HV": args.v_heads, "K": args.head_k_dim, "V": args.head_v_dim}
        inputs = make_inputs(**shape)
        variants = {name: Variant(name, inputs, LAYERS[T], args.threads) for name in VARIANTS}
        errors = {name: variant.largest_error(inputs) for name, variant in variants.items()}
        for name, error in errors.items():
            if not error <= TOLERANCE:
                print(f"error: {name} is off by {error:.1e}, more than {TOLERANCE:.0e}", file=sys.stderr)
                return 1
        samples: dict[str, list[float]] = {name: [] for name in VARIANTS}
        for _ in range(args.pairs):
            for name, variant in variants.items():
                variant.microseconds()  # so that what is timed follows itself, as in a model
                samples[name].append(variant.microseconds())
        microseconds = {name: summary(values) for name, values in samples.items()}
        ratios = {
            name: summary([slow / fast for slow, fast in zip(samples[name], samples["library"], strict=True)])
            for name in VARIANTS[1:]
        }
        # Others' work only ever adds time, so the minima say what the code itself takes.
        ratios_of_minima = {name: min(samples[name]) / min(samples["library"]) for name in VARIANTS[1:]}

        print(" ".join(f"{name}={size}" for name, size in shape.items()), f"layers={LAYERS[T]}, a layer's time")
        for name, row in microseconds.items():
            times = "  ".join(f"{key} {row[key]:9.1f} µs" for key in ("median", "p20", "p80"))
            ratio = (
                f"  {ratios[name]['median']:5.2f} times the library's ({ratios[name]['p20']:.2f} to "
                f"{ratios[name]['p80']:.2f}; of minima {ratios_of_minima[name]:.2f})"
                if name in ratios
                else ""
            )
            print(f"  {name:8} {times}  error {errors[name]:.1e}{ratio}")
        if args.record:
            record = {"shape": shape, "dtype": "float32", "layers": LAYERS[T], "pairs": args.pairs}
            record |= {"ort_threads": args.threads, "microseconds": microseconds, "ratios": ratios}
            record |= {"ratios_of_minima": ratios_of_minima, "largest_errors": errors}
            append(NAME, record | {"onnxruntime": importlib.metadata.version("onnxruntime")})
        if ratios["stock"]["median"] < MINIMUM_RATIOS[T]:
            found = f"the stock body takes {ratios['stock']['median']:.2f} times as long"
            print(f"error: T={T}: {found}, expected {MINIMUM_RATIOS[T]:g}", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
