"""From ``--quant``, ``--profile`` and ``--set quantize.KEY=VALUE`` to the recipe of every component."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from intaglio.profiles.errors import UsageError
from intaglio.profiles.family import Contract
from intaglio.profiles.recipe import ComponentRecipe, Recipe, load_recipe
from intaglio.profiles.registry import pick, suggestion
from intaglio.profiles.sizes import parse_bytes
from intaglio.quantize.feeds import RECORDS, SEED, CalibrationSet, read_prompts
from intaglio.quantize.formats import FORMATS, Format
from intaglio.quantize.layers import Rules, nominal_format

PREFIX = "quantize"
KINDS = {"activations": str, "method": str, "range": str, "smoothquant": float, "rank": int}
# Setting to the formats that read it, in words and as a question.
USERS: dict[str, tuple[str, Callable[[Format], bool]]] = {
    "activations": ("every format", lambda row: row.codec is not None),
    "method": ("formats of 4 bits", lambda row: row.codec is not None and row.bits < FORMATS["int8"].bits),
    "range": ("static formats", lambda row: row.static),
    "smoothquant": ("w8a8", lambda row: row.activations == "INT8"),
    "rank": ("every format but int8", lambda row: row.codec is not None and row.low_rank),
}
CALIBRATION = ("prompts", "count", "steps", "records", "seed", "memory", "feeds")


def component_recipes(
    quant: Mapping[str, str],
    profile: str | Path | None,
    options: Mapping[str, str],
    components: tuple[str, ...],
    contracts: Mapping[str, Contract],
) -> dict[str, ComponentRecipe]:
    """The recipe of every component: the profile's, its format replaced by ``--quant``, its values by ``--set``.

    Raises:
        UsageError: an unknown component, format or key, or values that contradict each other.
    """
    recipe = load_recipe(profile) if profile else Recipe()
    for source, names in (("--quant", quant), (str(profile), recipe.component)):
        for name in names:
            if name != "*" and name not in components:
                near = suggestion(name, components)
                raise UsageError(f"{source} names the component {name!r}; allowed: {', '.join(components)}.{near}")
    values = settings(options, components)
    result = {}
    for component in components:
        base = recipe.component.get(component, recipe.component.get("*", ComponentRecipe()))
        name = quant.get(component, quant.get("*", base.format))
        pick(FORMATS, name, "format")
        layers = base.layers if name == base.format else {}  # exceptions from a format that is not asked for any more
        changed = {**values.get("*", {}), **values.get(component, {})}
        made = dataclasses.replace(base, format=name, layers=layers, **changed)  # type: ignore[arg-type]
        result[component] = completed(component, made, rules_of(contracts[component]))
    for component, given in values.items():
        asked = result if component == "*" else {component: result[component]}
        for key in given:
            check_used(component, key, asked, contracts)
    return result


def check_used(
    component: str, key: str, recipes: Mapping[str, ComponentRecipe], contracts: Mapping[str, Contract]
) -> None:
    """Refuse a setting that nothing reads.

    Raises:
        UsageError: no format of these components does.
    """
    words, uses = USERS[key]
    rows = [
        FORMATS[f] for n, r in recipes.items() for f in (nominal_format(r, rules_of(contracts[n])), *r.layers.values())
    ]
    if not any(uses(row) for row in rows):
        name = key if component == "*" else f"{component}.{key}"
        formats = ", ".join(sorted({r.format for r in recipes.values()}))
        raise UsageError(f"--set {PREFIX}.{name} is read by {words}, and {formats} was asked for; leave it out")


def settings(options: Mapping[str, str], components: tuple[str, ...]) -> dict[str, dict[str, object]]:
    """``quantize.KEY`` for all (``*``) and ``quantize.COMPONENT.KEY`` for one.

    Raises:
        UsageError: an unknown component or key, or a value of another kind.
    """
    found: dict[str, dict[str, object]] = {}
    for key, text in options.items():
        words = key.split(".")
        if words[0] != PREFIX:
            continue
        component, name = (words[1], words[2]) if len(words) == 3 else ("*", ".".join(words[1:]))
        if name not in KINDS or (component != "*" and component not in components):
            raise UsageError(
                f"--set {key} is unknown; allowed: {PREFIX}.[COMPONENT.]{{{','.join(KINDS)}}}, "
                f"components: {', '.join(components)}"
            )
        try:
            found.setdefault(component, {})[name] = KINDS[name](text)
        except ValueError:
            raise UsageError(f"--set {key}={text} is not a number") from None
    return found


def completed(component: str, recipe: ComponentRecipe, rules: Rules) -> ComponentRecipe:
    """The recipe with its activation arithmetic spelled out.

    Raises:
        UsageError: static activations of a weight-only format, or dynamic ones of a static format.
    """
    rows = [pick(FORMATS, name, "format") for name in (nominal_format(recipe, rules), *recipe.layers.values())]
    static = any(row.static for row in rows)
    wanted = recipe.activations or ("static" if static else "exact")
    if static != (wanted == "static") and is_quantized(recipe):
        allowed = "static" if static else "exact, dynamic-per-token"
        raise UsageError(
            f"{component}: activations {wanted!r} do not go with {nominal_format(recipe, rules)}; allowed: {allowed}"
        )
    return dataclasses.replace(recipe, activations=wanted)


def rules_of(contract: Contract) -> Rules:
    """What the contract says about quantization."""
    return Rules(keep=contract.keep, int8=contract.int8, static=contract.static_activations)


def remarks(recipes: Mapping[str, ComponentRecipe], contracts: Mapping[str, Contract]) -> list[str]:
    """What people should know that the recipe does not say."""
    notes = []
    for name, recipe in recipes.items():
        nominal = nominal_format(recipe, rules_of(contracts[name]))
        if nominal != recipe.format:
            notes.append(f"{name}: {recipe.format} means {nominal} here, its activations are not quantized statically")
    return notes


def formats_of(recipes: Mapping[str, ComponentRecipe]) -> set[str]:
    """Every format that is named."""
    return {f for r in recipes.values() for f in (r.format, *r.layers.values())}


def calibration_set(options: Mapping[str, str]) -> CalibrationSet:
    """``--set calibration.KEY=VALUE``.

    Raises:
        UsageError: a value is wrong, or the set is empty.
    """

    def number(key: str) -> int | None:
        text = options.get(f"calibration.{key}")
        if text is not None and not (text.isdecimal() and (int(text) > 0 or key == "seed")):
            raise UsageError(f"--set calibration.{key}={text} is not allowed: a whole number, 1 or more")
        return None if text is None else int(text)

    memory = options.get("calibration.memory")
    return CalibrationSet(
        prompts=read_prompts(options.get("calibration.prompts"), number("count")),
        steps=number("steps"),
        records=number("records") or RECORDS,
        seed=SEED if (seed := number("seed")) is None else seed,
        memory=None if memory is None else parse_bytes(memory, "--set calibration.memory"),
    )


def option_keys() -> Iterable[str]:
    """The ``--set`` keys of calibration."""
    return (f"calibration.{key}" for key in CALIBRATION)


def is_quantized(recipe: ComponentRecipe) -> bool:
    """Whether any layer may be quantized."""
    return recipe.format != "none" or any(f != "none" for f in recipe.layers.values())


def needs_feeds(recipe: ComponentRecipe, names: Sequence[str] = ()) -> bool:
    """Whether the recipe can only be carried out with recorded feeds; `names` are the formats its layers take."""
    formats = [FORMATS[f] for f in (recipe.format, *recipe.layers.values(), *names) if f != "none"]
    four = any(f.bits < FORMATS["int8"].bits for f in formats)
    weighted = (four and recipe.method == "awq") or (recipe.rank > 0 and any(f.low_rank for f in formats))
    return weighted or any(f.static for f in formats)
