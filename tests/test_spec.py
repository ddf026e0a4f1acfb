"""ModelSpec: the published sizes, what it refuses, and its way through config.json."""

from __future__ import annotations

import json
from math import prod
from typing import Any

import pytest
from pydantic import ValidationError

from gdn2_edge.errors import SpecError
from gdn2_edge.spec import NAMED_CONFIGS, ModelSpec, spec_from_fields

SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 48,
    "layer_types": ["gdn2", "sliding_attention"],
    "num_heads": 2,
    "num_v_heads": 4,
    "head_k_dim": 8,
    "head_v_dim": 6,
    "output_gate": "silu",
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "sliding_window": 5,
    "rope_theta": 10_000.0,
}
PURE = {name: value for name, value in SMALL.items() if name not in list(SMALL)[-5:]} | {"layer_types": ["gdn2"]}


def small(**changes: Any) -> ModelSpec:
    return spec_from_fields({**SMALL, **changes}, "here")


def test_the_published_1_3b() -> None:
    spec = spec_from_fields(NAMED_CONFIGS["gdn2_1.3B"], "gdn2_1.3B")
    assert spec.num_parameters() == 1_450_096_416
    shapes = spec.state_shapes()
    recurrent = [shape for name, shape in shapes.items() if name.endswith(".S")]
    conv = [shape for name, shape in shapes.items() if name.endswith(".conv")]
    assert recurrent == [(1, 16, 128, 128)] * 18
    assert conv == [(1, 3 * 2048, 3)] * 18
    assert shapes["position"] == (1,)
    assert len(shapes) == 18 + 18 + 1


def test_the_published_hybrid() -> None:
    spec = spec_from_fields(NAMED_CONFIGS["swa_gdn2_1.3B"], "swa_gdn2_1.3B")
    shapes = spec.tensor_shapes()
    assert spec.layer_types[::2] == ("gdn2",) * 9
    assert spec.layer_types[1::2] == ("sliding_attention",) * 9
    assert shapes["layers.0.w1.weight"] == shapes["layers.1.w2.weight"] == (6784, 2304)
    assert shapes["layers.1.q_proj.weight"] == shapes["layers.1.k_proj.weight"] == (18 * 128, 2304)
    assert spec.state_shapes(3)["layers.1.ring_k"] == (3, 2048, 18, 128)


@pytest.mark.parametrize("name", NAMED_CONFIGS)
def test_named_configs_hold_fields_of_the_spec_that_json_can_carry(name: str) -> None:
    fields = NAMED_CONFIGS[name]
    assert fields.keys() <= ModelSpec.model_fields.keys()
    assert json.loads(json.dumps(fields)) == fields


def test_shapes_of_both_kinds_of_layer() -> None:
    shapes = small().tensor_shapes()
    key, value, hidden, mlp = 2 * 8, 4 * 6, 24, 48
    assert {name.removeprefix("layers.0."): s for name, s in shapes.items() if name.startswith("layers.0.")} == {
        "norm_1.weight": (hidden,),
        "q_proj.weight": (key, hidden),
        "k_proj.weight": (key, hidden),
        "v_proj.weight": (value, hidden),
        "b_proj.weight": (key, hidden),
        "w_proj.weight": (value, hidden),
        "f_proj.0.weight": (6, hidden),
        "f_proj.1.weight": (key, 6),
        "g_proj.0.weight": (6, hidden),
        "g_proj.1.weight": (value, 6),
        "g_proj.1.bias": (value,),
        "q_conv1d.weight": (key, 1, 4),
        "k_conv1d.weight": (key, 1, 4),
        "v_conv1d.weight": (value, 1, 4),
        "A_log": (2,),
        "dt_bias": (key,),
        "o_norm.weight": (6,),
        "o_proj.weight": (hidden, value),
        "norm_2.weight": (hidden,),
        "w1.weight": (mlp, hidden),
        "w2.weight": (mlp, hidden),
        "w3.weight": (hidden, mlp),
    }
    assert {name: s for name, s in shapes.items() if name.startswith("layers.1.") and "_proj" in name} == {
        "layers.1.q_proj.weight": (24, hidden),
        "layers.1.k_proj.weight": (12, hidden),
        "layers.1.v_proj.weight": (12, hidden),
        "layers.1.o_proj.weight": (hidden, 24),
    }
    assert next(iter(shapes)) == "embed.weight"
    assert list(shapes)[-2:] == ["ln_f.weight", "lm_head.weight"]
    assert small().num_parameters() == sum(map(prod, shapes.values()))


def test_erase_gate_is_doubled_for_negative_eigenvalues() -> None:
    assert small().erase_scale == 1.0
    assert small(allow_neg_eigval=True).erase_scale == 2.0


@pytest.mark.parametrize("fields", [SMALL, PURE], ids=["hybrid", "pure"])
def test_json_round_trip(fields: dict[str, Any]) -> None:
    spec = spec_from_fields(fields, "here")
    text = json.dumps(spec.to_json())
    assert spec_from_fields(json.loads(text), "there") == spec
    assert "null" not in text
    assert fields.items() <= json.loads(text).items()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_v_heads": 3}, r"here: num_v_heads is 3, expected a multiple of num_heads = 2\."),
        ({"hidden_size": 0}, "hidden_size is '0', expected greater than or equal to 1"),
        ({"hidden_size": 2**40}, "hidden_size is '1099511627776', expected less"),
        ({"hidden_size": "24"}, "hidden_size is '24', expected a valid integer"),
        ({"hidden_size": 24.0}, "hidden_size"),
        ({"num_heads": True}, "num_heads is 'True'"),
        ({"norm_eps": float("nan")}, "norm_eps is 'nan'"),
        ({"output_gate": "tanh"}, "output_gate is 'tanh', expected 'silu' or 'sigmoid'"),
        ({"output_gate": None}, "output_gate"),
        ({"layer_types": []}, "layer_types"),
        ({"layer_types": ["gdn2", "mamba"]}, r"layer_types\.1 is 'mamba', expected 'gdn2' or 'sliding_attention'"),
        ({"layer_types": ["gdn2"]}, "num_attention_heads, .* given, but no layer in layer_types is sliding_attention"),
        ({"sliding_window": None, "head_dim": None}, "sliding_attention layers also need head_dim, sliding_window"),
        ({"num_key_value_heads": 4}, "num_attention_heads is 6, expected a multiple of num_key_value_heads = 4"),
        ({"head_dim": 5}, "head_dim is '5', expected a multiple of 2"),
        ({"rope_theta": 1.0}, "rope_theta is '1.0', expected greater than 1"),
        ({"colour": "blue"}, r"colour is not a known field \(known: vocab_size, "),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        small(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [n for n, field in ModelSpec.model_fields.items() if field.is_required()])
def test_a_missing_field_is_named(name: str) -> None:
    with pytest.raises(SpecError, match=rf"here: {name} is missing"):
        spec_from_fields({key: value for key, value in SMALL.items() if key != name}, "here")


def test_a_spec_does_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        small().hidden_size = 25
