"""Products with stored weights, and rows of them, in nodes: the values a weight stands for are exactly torch's.

=======  ================================  ==================================================
         product                           portable product
=======  ================================  ==================================================
fp32     MatMul                            the same
int8     MatMulNBits, 8 bits               DequantizeLinear (a scale a row), MatMul
int4     MatMulNBits, 4 bits               DequantizeLinear (a scale a group), MatMul
fp8      DequantizeLinear, MatMul          the same
=======  ================================  ==================================================
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from onnx import TensorProto
from torch import Tensor

from gdn2_edge.errors import FormatError
from gdn2_edge.export.onnx.graph import MICROSOFT, Graph
from gdn2_edge.export.onnx.weights import Deferred, Run
from gdn2_edge.weights import Dense, Fp8, Int4, Int8, Weight, check_finite, fp8_values

FLOAT, FLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16
TORCH_DTYPES: dict[int, torch.dtype] = {FLOAT: torch.float32, FLOAT16: torch.float16}
# Products with activations rounded to 8 bits, a scale a block: without it 8-bit products are 80 to 200 times slower.
ACCURACY_LEVEL = 4
# Values that share a scale in MatMulNBits, in the weights and in the rounded activations. Stored scales are repeated:
# larger blocks were no faster, and gave up to twice the divergence; smaller ones are up to four times slower.
BLOCK = 32
# The inputs of these are products with a gate, whose few large values leave their neighbours the fewest digits: most
# of what smaller blocks can gain is gained here. In 4 bits w3 is left out, a large matrix four times slower.
FINE_BLOCK, FINE = 16, {Int8: ("o_proj.weight", "w3.weight"), Int4: ("o_proj.weight",)}


def product(graph: Graph, x: str, run: Run, type: int, portable: bool) -> str:
    """x [B, T, I] of `type` with the rows of `run` [O, I] -> [B, T, O] of `type`."""
    if run.layout is Dense:
        return graph.node("MatMul", x, dense(graph, run.name, run.shape, run.load, type, transposed=True))
    if run.layout is Fp8 or portable:
        return graph.node("MatMul", x, _dequantized(graph, run))
    return _matmul_nbits(graph, x, run)


def dense(
    graph: Graph, name: str, shape: tuple[int, ...], load: Callable[[], Weight], type: int, transposed: bool = False
) -> str:
    """An initializer with a weight's values in fp32 or fp16."""
    make = partial(_values, load, TORCH_DTYPES[type], transposed)
    return graph.initializer(name, type, shape[::-1] if transposed else shape, make)


def _values(load: Callable[[], Weight], dtype: torch.dtype, transposed: bool) -> Tensor:
    weight = load()
    values = weight.rows(slice(None)).to(dtype)
    if dtype == torch.float16 and not torch.isfinite(values).all():
        check_finite(weight.name, weight.rows(slice(None)))
        raise FormatError(f"{weight.name} has values beyond fp16's 65504. Use --format fp32.")
    return values.t() if transposed else values


def _stored(load: Callable[[], Weight], change: Callable[[Weight], Tensor]) -> Tensor:
    return change(load())


def _matmul_nbits(graph: Graph, x: str, run: Run) -> str:
    rows, columns = run.shape
    bits = 4 if run.layout is Int4 else 8
    block = FINE_BLOCK if run.name.endswith(FINE[run.layout]) else BLOCK
    blocks = -(-columns // block)
    codes = int4_codes if run.layout is Int4 else partial(_int8_codes, columns=blocks * block)
    scales = partial(_block_scales, times=(run.group_size // block) if run.group_size else blocks)
    shape = (rows, blocks, block * bits // 8)
    inputs = (
        graph.initializer(run.name + "_codes", TensorProto.UINT8, shape, partial(_stored, run.load, codes)),
        graph.initializer(run.name + "_scale", FLOAT, (rows, blocks), partial(_stored, run.load, scales)),
    )
    return graph.node(
        "MatMulNBits",
        *(x, *inputs),
        domain=MICROSOFT,
        K=columns,
        N=rows,
        bits=bits,
        block_size=block,
        accuracy_level=ACCURACY_LEVEL,
    )


def int4_codes(weight: Weight) -> Tensor:
    """uint8 [O, I / 2], the first of two codes in the low bits; zero is 8."""
    return _as(Int4, weight).data.contiguous().view(torch.uint8)


def _int8_codes(weight: Weight, columns: int) -> Tensor:
    """uint8 [O, columns]; zero is 128, and so is what is beyond the row's end."""
    codes = _as(Int8, weight).data.view(torch.uint8) ^ 128
    return torch.nn.functional.pad(codes, (0, columns - codes.shape[1]), value=128)


def _scales(weight: Weight) -> Tensor:
    return weight.tensors()["_scale"].float()


def _block_scales(weight: Weight, times: int) -> Tensor:
    return _scales(weight).repeat_interleave(times, 1)


def _dequantized(graph: Graph, run: Run) -> str:
    """[I, O] fp32 from DequantizeLinear."""
    rows, columns = run.shape
    if run.layout is Int4:
        codes = graph.initializer(
            *(run.name + "_codes", TensorProto.INT4, (columns, rows), partial(_stored, run.load, _int4_signed)),
        )
        # Blocks as in MatMulNBits, which ONNX Runtime makes of this.
        make = partial(_stored, run.load, partial(_block_scales_transposed, times=run.group_size // BLOCK))
        scale = graph.initializer(run.name + "_scale", FLOAT, (columns // BLOCK, rows), make)
        return graph.node("DequantizeLinear", codes, scale, axis=0, block_size=BLOCK)
    type = TensorProto.INT8 if run.layout is Int8 else TensorProto.FLOAT8E4M3FN
    codes = graph.initializer(run.name + "_codes", type, (columns, rows), partial(_stored, run.load, _bytes_transposed))
    scale = graph.initializer(run.name + "_scale", FLOAT, (rows,), partial(_stored, run.load, _scales))
    return graph.node("DequantizeLinear", codes, scale, axis=1)


def _bytes_transposed(weight: Weight) -> Tensor:
    return weight.tensors()[""].view(torch.uint8).t()


def _block_scales_transposed(weight: Weight, times: int) -> Tensor:
    return _block_scales(weight, times).t()


def _int4_signed(weight: Weight) -> Tensor:
    """uint8 [I, O / 2]: codes -8..7 of the transposed matrix, the first of two in the low bits."""
    codes = int4_codes(weight)
    codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).t() ^ 8  # code - 8 in two's complement
    pairs = codes.reshape(-1)
    if pairs.numel() % 2:
        pairs = torch.nn.functional.pad(pairs, (0, 1))
    return pairs[0::2] | (pairs[1::2] << 4)


def _as(layout: type[Int4] | type[Int8], weight: Weight) -> Int4 | Int8:
    if not isinstance(weight, layout):
        raise TypeError(f"{weight.name} is a {type(weight).__name__}, planned was {layout.__name__}")
    return weight


def embedding(graph: Graph, tokens: str, weight: Deferred, type: int) -> tuple[str, int]:
    """Rows of `weight` [vocab, I] by ids [B, T] -> [B, T, I], and its element type. Codes are gathered, then scaled."""
    (run,) = weight.runs()
    if run.layout is Dense:
        return graph.node("Gather", dense(graph, run.name, run.shape, run.load, type), tokens), type
    rows, columns = run.shape
    make = partial(_stored, run.load, _scales)
    groups = columns // run.group_size if run.group_size else 1
    scale = graph.node("Gather", graph.initializer(run.name + "_scale", FLOAT, (rows, groups), make), tokens)
    if run.layout is Int4:
        make = partial(_stored, run.load, int4_codes)
        pairs = graph.node(
            "Gather", graph.initializer(run.name + "_codes", TensorProto.UINT8, (rows, columns // 2), make), tokens
        )
        low = graph.node("BitwiseAnd", pairs, graph.constant(15, TensorProto.UINT8))
        high = graph.node("BitShift", pairs, graph.constant(4, TensorProto.UINT8), direction="RIGHT")
        last = graph.constant([-1])
        codes = graph.node("Concat", graph.node("Unsqueeze", low, last), graph.node("Unsqueeze", high, last), axis=-1)
        codes = graph.node("Reshape", codes, graph.constant([0, 0, groups, run.group_size]))
        values = graph.node("Sub", graph.node("Cast", codes, to=FLOAT), graph.constant(8.0, FLOAT))
        values = graph.node("Mul", values, graph.node("Unsqueeze", scale, last))
        return graph.node("Reshape", values, graph.constant([0, 0, columns])), FLOAT
    make = partial(_stored, run.load, _bytes)
    type = TensorProto.INT8 if run.layout is Int8 else TensorProto.UINT8
    codes = graph.node("Gather", graph.initializer(run.name + "_codes", type, run.shape, make), tokens)
    if run.layout is Int8:
        values = graph.node("Cast", codes, to=FLOAT)
    else:  # Gather knows no fp8: the value of each byte is looked up
        table = graph.initializer("fp8.values", FLOAT, (256,), _fp8_table)
        values = graph.node("Gather", table, graph.node("Cast", codes, to=TensorProto.INT32))
    return graph.node("Mul", values, scale), FLOAT


def _fp8_table() -> Tensor:
    return fp8_values(torch.arange(256, dtype=torch.uint8))


def _bytes(weight: Weight) -> Tensor:
    return weight.tensors()[""].view(torch.uint8)
