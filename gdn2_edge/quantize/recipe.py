"""Which tensor is stored in which format: a default for each format, changed by rules of a TOML file."""

from __future__ import annotations

import fnmatch
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gdn2_edge.errors import FormatError
from gdn2_edge.spec import ModelSpec

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Format = Literal["fp32", "bf16", "fp8", "int8", "int4"]
GROUP_SIZES = (128, 64, 32)
# Rounding these to 4 bits costs more than they weigh: the low-rank gates, and the ends of the model.
INT4_EXCEPTIONS = ("embed.weight", "lm_head.weight", "*.f_proj.*", "*.g_proj.*")


class Rule(BaseModel):
    """`tensors` is a shell pattern over canonical names; the first rule that matches a matrix wins."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    tensors: str
    format: Format


class Recipe(BaseModel):
    """How to store a model.

    Args:
        format: of every matrix that no rule names. Vectors, norms and convolutions always stay fp32.
        group_size: weights that share a scale, for int4; where it does not divide, the next smaller is taken.
        rules: exceptions, in order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    format: Literal["fp8", "int8", "int4"]
    group_size: Literal[32, 64, 128] = 64
    rules: Annotated[tuple[Rule, ...], Field(strict=False)] = ()


@dataclass(frozen=True)
class Planned:
    """One tensor's format; `note` says why it is not the recipe's own."""

    name: str
    shape: tuple[int, ...]
    format: Format
    group_size: int = 0
    note: str = ""


def load_recipe(path: Path, format: str | None = None, group_size: int | None = None) -> Recipe:
    """Recipe from a TOML file; `format` and `group_size`, where given, replace the file's.

    Raises:
        FormatError: the file is missing, not TOML, or holds something a recipe does not have.
    """
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{path}: no such recipe file.") from None
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and TOMLDecodeError are ValueErrors
        raise FormatError(f"{path} is not valid TOML: {error}.") from None
    if format is not None:
        fields["format"] = format
    if group_size is not None:
        fields["group_size"] = group_size
    return make_recipe(fields, str(path))


def make_recipe(fields: dict[str, object], where: str) -> Recipe:
    """Recipe from plain fields; raises FormatError, which says `where` they came from."""
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        found = "missing" if first["type"] == "missing" else f"{str(first['input'])[:60]!r}: {first['msg'].lower()}"
        raise FormatError(f"{where}: {name} is {found}.") from None


def plan(recipe: Recipe, spec: ModelSpec) -> list[Planned]:
    """A format for every tensor of the model, in the spec's order.

    Raises:
        FormatError: a rule matches no matrix, so it would silently do nothing.
    """
    shapes = spec.tensor_shapes()
    for rule in recipe.rules:
        if not any(len(shape) == 2 and fnmatch.fnmatchcase(name, rule.tensors) for name, shape in shapes.items()):
            raise FormatError(
                f"The rule for {rule.tensors!r} matches no matrix (names are like layers.0.b_proj.weight)."
            )
    return [_planned(recipe, name, shape) for name, shape in shapes.items()]


def _planned(recipe: Recipe, name: str, shape: tuple[int, ...]) -> Planned:
    if len(shape) != 2:
        return Planned(name, shape, "fp32")
    rules = list(recipe.rules)
    if recipe.format == "int4":
        rules += [Rule(tensors=pattern, format="int8") for pattern in INT4_EXCEPTIONS]
    format = next((rule.format for rule in rules if fnmatch.fnmatchcase(name, rule.tensors)), recipe.format)
    note = "" if format == recipe.format else f"kept at {format}"
    if format != "int4":
        return Planned(name, shape, format, 0, note)
    group = next((g for g in GROUP_SIZES if g <= recipe.group_size and shape[1] % g == 0), 0)
    if not group:
        return Planned(name, shape, "int8", 0, f"int8: no group of 32 or more divides {shape[1]}")
    if group != recipe.group_size:
        note = f"group {group}: {recipe.group_size} does not divide {shape[1]}"
    return Planned(name, shape, "int4", group, note)
