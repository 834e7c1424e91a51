"""Recipes: which number format each component and layer is stored in, and how; ``recipe.X.toml`` or ``--quant``."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from intaglio.profiles.errors import ProfileError
from intaglio.profiles.strict import from_dict

ACTIVATIONS = ("exact", "dynamic-per-token", "static")
METHODS = ("rtn", "mse", "awq")
RANGES = ("absmax", "percentile", "mse")


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentRecipe:
    """How one component is quantized.

    Attributes:
        format: a row of ``intaglio.quantize.formats.FORMATS`` for every layer that nothing else decides.
        activations: ``exact`` (float), ``dynamic-per-token`` (int8 per row, made by the engine) or ``static`` (int8 or
            fp8 as calibrated); empty: the format's own.
        method: how blocks of int4 and nf4 are scaled: ``rtn`` (largest value), ``mse`` (least error), ``awq`` (least
            output error, inputs scaled too).
        range: how static activation ranges are chosen from what was recorded; what clips least holds best on prompts
            that were not recorded.
        smoothquant: alpha in [0, 1]; -1 searches it per layer, which fits the recorded prompts, 0 leaves inputs as they
            are.
        rank: of a float16 low-rank branch beside each 4-bit or w8a8 weight; 0: none.
        layers: glob pattern of parameter names to a format; the last that matches decides, over the family's own rules.
    """

    format: str = "none"
    activations: str = ""
    method: str = "mse"
    range: str = "absmax"
    smoothquant: float = 0.5
    rank: int = 0
    layers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            ProfileError: with the value and what is allowed.
        """
        for name, value, allowed in (
            ("activations", self.activations or "exact", ACTIVATIONS),
            ("method", self.method, METHODS),
            ("range", self.range, RANGES),
        ):
            if value not in allowed:
                raise ProfileError(f"{name} {value!r} is not allowed: {', '.join(allowed)}")
        if not (0 <= self.smoothquant <= 1 or self.smoothquant == -1):
            raise ProfileError(f"smoothquant {self.smoothquant:g} is not allowed: 0 to 1, or -1 to search it per layer")
        if not 0 <= self.rank <= 1024:
            raise ProfileError(f"rank {self.rank} is not allowed: 0 to 1024")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Components to how they are quantized; ``*`` stands for those that are not named.

    `budget` says what a search was asked for and what it found; nothing reads it.
    """

    name: str = ""
    component: dict[str, ComponentRecipe] = field(default_factory=dict)
    budget: dict[str, str] = field(default_factory=dict)


def load_recipe(path: str | Path) -> Recipe:
    """Read a ``recipe.X.toml``.

    Raises:
        ProfileError: it cannot be read, or has unknown keys.
    """
    file = Path(path)
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProfileError(f"{file} cannot be read ({error.strerror}); --profile takes a recipe.X.toml") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ProfileError(f"{file} is not TOML: {error}") from error
    return from_dict(Recipe, data, str(file))


def to_toml(recipe: Recipe) -> str:
    """The text `load_recipe` reads, in one form for equal recipes."""
    import json

    def table(name: str, values: Mapping[str, object]) -> list[str]:
        return [f"[{name}]", *(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in values.items()), ""]

    lines = [f"name = {json.dumps(recipe.name)}", ""]
    if recipe.budget:
        lines += table("budget", recipe.budget)
    for component, rows in recipe.component.items():
        default, head = ComponentRecipe(), f"component.{json.dumps(component)}"
        plain = {k: getattr(rows, k) for k in ComponentRecipe.__slots__ if k not in ("format", "layers")}
        changed = {k: v for k, v in plain.items() if v != getattr(default, k)}
        lines += table(head, {"format": rows.format, **changed})
        if rows.layers:
            lines += table(f"{head}.layers", rows.layers)
    return "\n".join(lines)
