"""`generation_config.json`: what a model's makers say about its use. Everything else in the file is left alone."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gdn2_edge.errors import CheckpointError
from gdn2_edge.sampling import Sampling

GENERATION_CONFIG_NAME = "generation_config.json"
TokenId = Annotated[int, Field(ge=0, strict=True)]


class GenerationConfig(BaseModel):
    """The fields of transformers, and two of ours.

    Args:
        eos_token_id: ids after which generation stops.
        do_sample: false means greedy.
        description: in honest words, what the model can and cannot do.
        example_prompts: a few prompts that work.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    eos_token_id: TokenId | list[TokenId] | None = None
    bos_token_id: TokenId | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    description: Annotated[str, Field(max_length=1000)] = ""
    example_prompts: Annotated[tuple[Annotated[str, Field(max_length=200)], ...], Field(max_length=8)] = ()

    @property
    def eos_ids(self) -> list[int]:
        ids = self.eos_token_id
        return ids if isinstance(ids, list) else [] if ids is None else [ids]

    def sampling(self) -> Sampling:
        """The suggested options, ours where it suggests none."""
        given = {name: value for name in Sampling.model_fields if (value := getattr(self, name, None)) is not None}
        if self.do_sample is False:
            given["temperature"] = 0.0
        return Sampling(**given)


def read_generation_config(text: str) -> GenerationConfig:
    """Parse and check; raises CheckpointError with the first thing that is wrong."""
    try:
        config = GenerationConfig.model_validate_json(text)
        config.sampling()
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "it"
        raise CheckpointError(f"{GENERATION_CONFIG_NAME}: {name} is not valid: {first['msg'][:100]}.") from None
    return config
