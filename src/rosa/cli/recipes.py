"""Options from a YAML file: a recipe, or a command's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from rosa.bench.setup.options import OPTIONS
from rosa.bench.setup.settings import DATA
from rosa.cli.helping import FILE
from rosa.errors import UserError

WITH_COMMAS = ("methods", "ranks", "seeds", "models", "lrs")
"""Options of several values in one text, which in a file may be a list."""
SHARED = (
    *("model", "output", "train", "validation", "task", "data", "text_column", "label_column"),
    *(
        "chat_template",
        "loss_on",
        "preference",
        "packing",
        "limit_train",
        "limit_test",
        "max_length",
    ),
    *("group_by_length", "resample_every", "beta"),
    *("target_modules", "target_parameters", "epochs", "steps", "batch_size", "eval_batch_size"),
    *(
        "gradient_accumulation",
        "gradient_checkpointing",
        "weight_decay",
        "warmup",
        "precision",
        "report_to",
    ),
)
"""What all cells of a comparison share; any other setting is given with its method's name."""


def _read_recipe(context: typer.Context, recipe: Path | None) -> Path | None:
    """Take a file's settings as the defaults of the command's options and arguments."""
    if recipe is None:
        return None
    import yaml  # comes with transformers

    if not recipe.is_file():
        raise FileNotFoundError(f"{recipe} is not there, or not a file: check the path")
    try:
        found = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{recipe} is not YAML: {reason}") from error
    if not isinstance(found, dict):
        raise UserError(f"{recipe} holds no options: write a line each, as batch_size: 16")
    names = [str(name).replace("-", "_") for name in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{recipe} has {twice} twice")
    found = {n: v for n, v in zip(names, found.values(), strict=True) if v is not None}
    known = {parameter.name: parameter for parameter in context.command.params}
    if "recipe" in known and "methods" in known:
        found = _as_comparison(found)
    unknown = [name for name in found if name not in known or name in ("recipe", "config")]
    if unknown:
        names = ", ".join(map(repr, unknown))
        raise UserError(f"{recipe}: not among the options of this command: {names}")
    found = {name: _as_given(recipe, known[name], value) for name, value in found.items()}
    context.default_map = {**(context.default_map or {}), **found}
    context.meta[FILE] = recipe
    return recipe


def _as_given(recipe: Path, option: Any, value: Any) -> Any:
    """A file's value as the command line would have it; UserError if it is of another kind."""
    if getattr(option, "multiple", False):
        return _as_list(value)
    if option.name in WITH_COMMAS and isinstance(value, list):
        return ",".join(map(str, value))
    is_switch = getattr(option, "is_flag", False)
    if isinstance(value, (list, dict)) or (isinstance(value, bool) and not is_switch):
        hint = ": quote a word such as yes, no or true" if isinstance(value, bool) else ""
        raise UserError(f"{recipe}: {option.name} takes one value, got {value!r}{hint}")
    return value


def _as_list(value: Any) -> list[Any]:
    """Of an option that may be repeated: one value, several, or names with values."""
    if isinstance(value, dict):
        return [f"{name}={json.dumps(each)}" for name, each in value.items()]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _as_comparison(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe as options of `rosa compare`: its method, with settings of its own, against LoRA."""
    own = {n: v for n, v in recipe.items() if n in OPTIONS and n not in SHARED}
    found = {n: v for n, v in recipe.items() if n not in own}
    method = own.pop("method", "rosa")
    for name, several in (("rank", "ranks"), ("seed", "seeds")):
        if name in own:
            found[several] = str(own.pop(name))
    if "lr" in own:
        found["lrs"] = [f"{method}={own.pop('lr')}"]
    given = [(OPTIONS[n].name, each) for n, v in own.items() for each in _as_list(v)]
    variant = "+".join([method, *(f"{name}={each}" for name, each in given)])
    if "," in variant:
        raise UserError(f"rosa compare takes no setting with a comma: {variant}")
    return {"methods": f"{variant},{'rosa' if method == 'lora' else 'lora'}", **found}


Recipe = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        "--config",
        help="YAML file of settings, see recipes/; options win.",
        rich_help_panel=DATA,
        is_eager=True,
        callback=_read_recipe,
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="YAML file of this command's options; those given win.",
        is_eager=True,
        callback=_read_recipe,
    ),
]
