"""`Sampling`: the options of choosing the next token, for whoever chooses: the CPU, or a GPU inside its graph."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Sampling(BaseModel):
    """How to choose. Filters apply in the order of the fields; `temperature` 0 is greedy and needs no seed.

    Args:
        repetition_penalty: divides the positive logits of recently chosen tokens and multiplies negative ones.
            Above 1.1 a model no longer copies a number with a repeated digit.
        repetition_window: how many chosen tokens are recent.
        temperature: divides the logits.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the most likely tokens whose probabilities reach p together.
        min_p: drop tokens less likely than min_p times the most likely one.
        seed: with the position, all that the choice depends on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    repetition_penalty: Annotated[float, Field(ge=1, le=2)] = 1.0
    repetition_window: Annotated[int, Field(ge=0, le=4096)] = 64
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.7
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] = 40
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
