"""The operator `ai.gdn2::GatedDeltaRule2` as a function of the model: what runs where no kernel is registered for it.

docs/gated_delta_rule2.md specifies the operator. Both bodies compute in fp32.
"""

from __future__ import annotations

from typing import Any

import onnx
from onnx import TensorProto, helper

from gdn2_edge.export.onnx.graph import GDN2_DOMAIN, MICROSOFT, OPSET, Graph
from gdn2_edge.spec import ModelSpec

OPERATOR = "GatedDeltaRule2"
INPUTS = ("q", "k", "v", "g", "b", "w", "past_state")
OUTPUTS = ("o", "present_state")
# Added to b before its logarithm: what is erased there is far below the rounding of anything else.
SMALLEST_ERASE = 1e-26


def gated_delta_rule2(spec: ModelSpec, portable: bool) -> onnx.FunctionProto:
    """The function for the head counts of `spec`.

    Args:
        portable: standard operators only: a Scan over the tokens. Otherwise a change of basis around
            com.microsoft::LinearAttention, which runs whole prompts in one call.
    """
    body = _Body(spec)
    o, state = _scanned(body) if portable else _changed_basis(body)
    body.rename({body.node("CastLike", o, "v"): "o", state: "present_state"})
    imports = [helper.make_opsetid("", OPSET)]
    if not portable:
        imports.append(helper.make_opsetid(MICROSOFT, 1))
    constants = [
        helper.make_node("Constant", [], [name], name, value=tensor) for name, tensor in body.constants.items()
    ]
    return helper.make_function(
        GDN2_DOMAIN,
        OPERATOR,
        INPUTS,
        OUTPUTS,
        constants + body.nodes,
        imports,
        attributes=["num_heads", "num_v_heads"],
        attribute_protos=[helper.make_attribute("scale", 0.0)],
        doc_string="S = (I - k (b*k)^T) Diag(exp g) S + k (w*v)^T; o = scale * S^T q. See arXiv 2605.22791.",
    )


class _Body(Graph):
    """The inside of the function, with what both bodies begin with."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.H, self.HV, self.K = spec.num_heads, spec.num_v_heads, spec.head_k_dim
        self.inputs = {name: self.node("Cast", name, to=TensorProto.FLOAT) for name in INPUTS[:-1]}

    def per_value_head(self, x: str) -> str:
        """[B, T, H * K] -> [B, T, HV * K]: key head h serves HV / H value heads in a row."""
        groups = self.HV // self.H
        if groups == 1:
            return x
        x = self.node("Reshape", x, self.constant([0, 0, self.H, 1, self.K]))
        x = self.node("Tile", x, self.constant([1, 1, 1, groups, 1]))
        return self.node("Reshape", x, self.constant([0, 0, self.HV * self.K]))

    def scaled(self, x: str) -> str:
        """x * scale, where scale 0 stands for 1 / sqrt(K)."""
        given = self.node("Constant")
        self._refer(given, "value_float", "scale", onnx.AttributeProto.FLOAT)
        zero, default = self.constant(0.0, TensorProto.FLOAT), self.constant(self.K**-0.5, TensorProto.FLOAT)
        return self.node("Mul", x, self.node("Where", self.node("Equal", given, zero), default, given))

    def _refer(self, output: str, name: str, attribute: str, type: Any) -> None:
        """Let an attribute of the node that makes `output` be an attribute of the function."""
        node = next(node for node in self.nodes if output in node.output)
        node.attribute.append(onnx.AttributeProto(name=name, ref_attr_name=attribute, type=type))


def _changed_basis(body: _Body) -> tuple[str, str]:
    """With c_t = sqrt(b_t): k' = c k, q' = q / c, S' = Diag(c) S, g' = g + log c_t - log c_(t-1) is a gated delta rule
    with beta = 1; at the end S = S' / c. The state that comes in is that of c = 1.
    """
    q, k, v, g, b, w = body.inputs.values()
    smallest, half = (body.constant(x, TensorProto.FLOAT) for x in (SMALLEST_ERASE, 0.5))
    log_c = body.node("Mul", body.node("Log", body.node("Max", b, smallest)), half)
    c = body.node("Exp", log_c)
    start, last, end, axis = (body.constant([x]) for x in (0, -1, 2**31 - 1, 1))
    before = body.node("Slice", log_c, start, last, axis)
    before = body.node("Pad", before, body.constant([0, 1, 0, 0, 0, 0]))
    g = body.node("Sub", body.node("Add", g, log_c), before)
    q, k, g = (body.per_value_head(x) for x in (body.node("Div", q, c), body.node("Mul", k, c), g))
    v = body.node("Mul", v, w)
    lengths = body.node("Concat", body.node("Shape", v, start=0, end=2), body.constant([body.HV]), axis=0)
    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    beta = body.node("ConstantOfShape", lengths, value=one)
    o, state = body.nodes_of(
        "LinearAttention",
        *(body.scaled(q), k, v, "past_state", g, beta),
        outputs=2,
        domain=MICROSOFT,
        update_rule="gated_delta",
        q_num_heads=body.HV,
        kv_num_heads=body.HV,
        scale=1.0,
    )
    c = body.per_value_head(body.node("Slice", c, last, end, axis))
    c = body.node("Reshape", c, body.constant([0, body.HV, body.K, 1]))
    return o, body.node("Div", state, c)


def _scanned(body: _Body) -> tuple[str, str]:
    """The recurrence as it is written, a token at a time."""
    q, k, v, g, b, w = body.inputs.values()
    erase = body.node("Mul", b, k)
    row, column = ([0, 0, body.HV, 1, -1], [0, 0, body.HV, -1, 1])

    def heads(x: str, shape: list[int]) -> str:
        return body.node("Reshape", x, body.constant(shape))

    scanned = [
        heads(body.per_value_head(body.scaled(q)), row),
        heads(body.per_value_head(k), column),
        heads(body.node("Mul", v, w), row),
        heads(body.per_value_head(body.node("Exp", g)), column),
        heads(body.per_value_head(erase), row),
    ]
    step = Graph("token/")
    S = step.node("Mul", "decay_t", "S")
    u = step.node("Sub", "v_t", step.node("MatMul", "erase_t", S))
    S = step.node("Add", S, step.node("MatMul", "k_t", u))
    o = step.node("MatMul", "q_t", S)
    step.rename({S: "S_next", o: "o_t"})
    # Types of what is scanned are left open: they follow from the outside.
    names = ("S", "q_t", "k_t", "v_t", "decay_t", "erase_t")
    graph = helper.make_graph(
        step.nodes,
        "token",
        [helper.make_empty_tensor_value_info(name) for name in names],
        [helper.make_empty_tensor_value_info(name) for name in ("S_next", "o_t")],
    )
    state, o = body.nodes_of(
        "Scan",
        *("past_state", *scanned),
        outputs=2,
        num_scan_inputs=5,
        scan_input_axes=[1] * 5,
        scan_output_axes=[1],
        body=graph,
    )
    return body.node("Reshape", o, body.constant([0, 0, -1])), state
