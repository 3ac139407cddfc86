"""What can be trained and compared: one table, each row a name and how PEFT builds it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rosa.bench.setup.settings import RunSettings
from rosa.errors import UserError, blame

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch.optim import Optimizer


TOKENS = 20
"""Trained tokens before every text, of the methods that have such."""

Shapes = Sequence[tuple[int, int]]
"""(in, out) of every weight that a method is to change."""

Config = Callable[[RunSettings, int, dict[str, Any], Shapes], "PeftConfig"]
Optim = Callable[[RunSettings, int], dict[str, str]]
Build = Callable[[RunSettings, int, Any], "Optimizer"]


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        about: what it is, in a line.
        lr: the default learning rate; a starting point, tune it for your data.
        config: the PEFT config from a run's settings, the rank, the arguments that all methods
            share (`target_modules`, `task_type`) and the weights' shapes; None if the method needs
            no adapter.
        has_rank: whether `--rank` means anything to it. Where a method counts otherwise than LoRA,
            rank r stands for its setting that trains nearest to LoRA's r (in + out) numbers a
            weight, over all weights.
        in_full: whether it trains the target weights as they are, by AdamW.
        virtual_tokens: places of the model's input that it takes for itself.
        optim: the optimizer that makes it what it is, as keywords of `TrainingArguments` from a
            run's settings and the rank; it is given the target weights, and knows no weight decay.
        optimizer: makes the adapter's own optimizer from a run's settings, the rank and the model.
        needs: packages of the extra `optimizers`, by the names that they are imported by.
    """

    about: str
    lr: float
    config: Config | None = None
    has_rank: bool = False
    in_full: bool = False
    virtual_tokens: int = 0
    optim: Optim | None = None
    optimizer: Build | None = None
    needs: tuple[str, ...] = ()


def _rosa(settings: RunSettings, rank: int, shared: dict[str, Any], shapes: Shapes) -> PeftConfig:
    from rosa import RosaConfig

    return RosaConfig(
        r=rank,
        alpha=settings.alpha,
        directions=settings.directions,
        trained=settings.trained,
        seed=settings.seed,
        **shared,
    )


def _alpha(settings: RunSettings, usual: int) -> Any:
    """The run's alpha, or what is usual; PEFT's annotations ask for an int, a float works too."""
    return usual if settings.alpha is None else settings.alpha


def _relora(settings: RunSettings, rank: int, shared: dict[str, Any], shapes: Shapes) -> PeftConfig:
    from rosa import RosaConfig

    alpha = _alpha(settings, 2 * rank)
    return RosaConfig(r=rank, alpha=alpha, directions="zero", seed=settings.seed, **shared)


def _lora(**options: Any) -> Config:
    """PEFT's LoRA with options that make it one of its variants."""

    def config(
        settings: RunSettings, rank: int, shared: dict[str, Any], shapes: Shapes
    ) -> PeftConfig:
        from peft import LoraConfig

        # The common choice of alpha: a scale of 2. PiSSA and OLoRA start from the weight itself,
        # at a scale of 1, as in their papers.
        usual = rank if "init_lora_weights" in options else 2 * rank
        return LoraConfig(
            r=rank,
            lora_alpha=_alpha(settings, usual),
            lora_dropout=0.0,
            **options,
            **shared,
        )

    return config


def _lora_fa(settings: RunSettings, rank: int, model: Any) -> Optimizer:
    from peft.optimizers import create_lorafa_optimizer

    return create_lorafa_optimizer(
        model,
        r=rank,
        lora_alpha=_alpha(settings, 2 * rank),
        lr=settings.lr,  # type: ignore[arg-type]  # `check` has chosen one
        weight_decay=settings.weight_decay,
    )


def _lora_ga(
    settings: RunSettings, rank: int, shared: dict[str, Any], shapes: Shapes
) -> PeftConfig:
    from peft import LoraConfig, LoraGAConfig

    return LoraConfig(
        r=rank,
        lora_alpha=_alpha(settings, 2 * rank),
        init_lora_weights="lora_ga",  # type: ignore[arg-type]  # its annotation lacks it
        lora_ga_config=LoraGAConfig(),
        **shared,
    )


def _adalora(
    settings: RunSettings, rank: int, shared: dict[str, Any], shapes: Shapes
) -> PeftConfig:
    from peft import AdaLoraConfig

    return AdaLoraConfig(
        target_r=rank,
        init_r=math.ceil(1.5 * rank),
        lora_alpha=_alpha(settings, 2 * rank),
        total_step=1,  # set when the number of steps is known; see trainer.py
        **shared,
    )


def _ia3(settings: RunSettings, rank: int, shared: dict[str, Any], shapes: Shapes) -> PeftConfig:
    from peft import IA3Config

    # It scales activations of modules of its own choice, by architecture.
    return IA3Config(**{**shared, "target_modules": None})


def _prompt(kind: str) -> Config:
    def config(
        settings: RunSettings, rank: int, shared: dict[str, Any], shapes: Shapes
    ) -> PeftConfig:
        import peft

        if shared.get("modules_to_save"):
            raise UserError(
                f"method {settings.method} cannot train and save the modules that the checkpoint "
                f"lacks ({', '.join(shared['modules_to_save'])}): choose another method or model"
            )
        return getattr(peft, kind)(num_virtual_tokens=TOKENS, task_type=shared.get("task_type"))

    return config


def _numbers(rank: int, shapes: Shapes) -> int:
    """What LoRA trains."""
    return rank * sum(map(sum, shapes))


def _randlora(
    settings: RunSettings, rank: int, shared: dict[str, Any], shapes: Shapes
) -> PeftConfig:
    from peft import RandLoraConfig

    # Its own r is the rank of each of so many random bases that they fill the weight: the larger,
    # the fewer numbers, and never fewer than the smaller side's and r.
    sides = Counter(min(shape) for shape in shapes)

    def count(r: int) -> int:
        return sum(times * -(-side // r) * (r + side) for side, times in sides.items())

    wanted = _numbers(rank, shapes)
    r = min(range(1, max(sides, default=1) + 1), key=lambda r: abs(count(r) - wanted))
    scale = _alpha(settings, 20 * rank) / rank  # the paper's
    return RandLoraConfig(
        r=r,
        randlora_alpha=scale * r,  # type: ignore[arg-type]  # a float works too
        projection_prng_key=settings.seed,
        # PEFT would save the bases with every layer: as much as the weights. They are drawn anew.
        save_projection=False,
        **shared,
    )


def _hira(settings: RunSettings, rank: int, shared: dict[str, Any], shapes: Shapes) -> PeftConfig:
    from peft import HiraConfig

    return HiraConfig(r=rank, **shared)  # LoRA's numbers; it has no scale


def _miss(settings: RunSettings, rank: int, shared: dict[str, Any], shapes: Shapes) -> PeftConfig:
    from peft import MissConfig

    # Its own r trains r * out numbers a weight.
    outputs = sum(out for _, out in shapes)
    r = round(_numbers(rank, shapes) / outputs) if shapes else rank
    return MissConfig(r=min([r, *(inner for inner, _ in shapes)]), **shared)


def _oft(settings: RunSettings, rank: int, shared: dict[str, Any], shapes: Shapes) -> PeftConfig:
    from peft import OFTConfig

    # Blocks of size b train in * (b - 1) / 2 numbers a weight. PEFT takes for each weight the
    # divisor of its inputs that is nearest to b, so the count is met only roughly: 4 rank for
    # square weights, a power of 2 as most sizes have it, rather than 4 rank + 1.
    inputs = sum(inner for inner, _ in shapes)
    size = round(2 * _numbers(rank, shapes) / inputs) if shapes else 4 * rank
    return OFTConfig(oft_block_size=max(size, 2), **shared)


def _lokr(settings: RunSettings, rank: int, shared: dict[str, Any], shapes: Shapes) -> PeftConfig:
    from peft import LoKrConfig

    # The weight's change is the Kronecker product of a matrix (f, f) with one of rank r: its rank
    # is f r, from f^2 + r (in + out) / f numbers. f is the largest at which r, for the numbers
    # wanted, does not exceed what the second matrix can have.
    sides = {side for shape in shapes for side in shape}
    most = math.isqrt(min((max(shape) // (2 * rank) for shape in shapes), default=1)) or 1
    factor = next(f for f in range(most, 0, -1) if all(side % f == 0 for side in sides))
    left = _numbers(rank, shapes) - len(shapes) * factor**2
    r = max(round(left * factor / sum(map(sum, shapes))), 1) if shapes else rank
    scale = _alpha(settings, rank) / rank
    return LoKrConfig(
        r=r,
        decompose_factor=factor,
        alpha=scale * r,  # type: ignore[arg-type]  # a float works too
        **shared,
    )


def _shira(settings: RunSettings, rank: int, shared: dict[str, Any], shapes: Shapes) -> PeftConfig:
    from peft import ShiraConfig

    # LoRA's numbers, at places that are the same in all weights of a shape. It has no scale.
    return ShiraConfig(r=rank, random_seed=settings.seed, **shared)


def _galore(settings: RunSettings, rank: int) -> dict[str, str]:
    import torch
    from galore_torch.galore_projector import GaLoreProjector  # type: ignore[import-not-found]

    torch.serialization.add_safe_globals([GaLoreProjector])  # is in the optimizer's checkpoint
    # The paper's on GLUE: 4 at rank 4, 2 at rank 8; and 0.25 at 64, as where it pretrains.
    scale = _alpha(settings, 16) / rank
    return {"optim": "galore_adamw", "optim_args": f"rank={rank},scale={scale}"}


def _apollo(settings: RunSettings, rank: int) -> dict[str, str]:
    import torch
    from apollo_torch.random_projector import GradientProjector  # type: ignore[import-not-found]

    torch.serialization.add_safe_globals([GradientProjector])  # is in the optimizer's checkpoint
    # The paper's: 128 at rank 1, and 1 (transformers' default) at 128.
    scale = _alpha(settings, 128) / rank
    return {"optim": "apollo_adamw", "optim_args": f"rank={rank},scale={scale}"}


METHODS: dict[str, Method] = {
    "rosa": Method("random subspaces of the weights, drawn anew as it trains", 1e-3, _rosa, True),
    "lora": Method("one low-rank product beside each weight (alpha 2r)", 1e-3, _lora(), True),
    "lora_fa": Method("LoRA with A left as drawn", 1e-3, _lora(), True, optimizer=_lora_fa),
    "rslora": Method("LoRA scaled by alpha / sqrt(r)", 1e-3, _lora(use_rslora=True), True),
    "dora": Method("LoRA with a magnitude of its own a row", 1e-3, _lora(use_dora=True), True),
    "pissa": Method(
        "LoRA started at the top singular triplets", 1e-3, _lora(init_lora_weights="pissa"), True
    ),
    "olora": Method(
        "LoRA started at a QR of the weight", 1e-3, _lora(init_lora_weights="olora"), True
    ),
    "lora_ga": Method("LoRA started at the loss gradient's triplets", 1e-3, _lora_ga, True),
    "adalora": Method("LoRA with ranks that move between layers", 1e-3, _adalora, True),
    "relora": Method("LoRA merged and started again at zero as it trains", 1e-3, _relora, True),
    "randlora": Method("learned sums of random bases that fill the weight", 1e-3, _randlora, True),
    "hira": Method("the weight times a low-rank product, entry by entry", 1e-2, _hira, True),
    "miss": Method("one trained row of blocks, repeated along the inputs", 3e-4, _miss, True),
    "oft": Method("rotations of the inputs in blocks", 1e-3, _oft, True),
    "lokr": Method("a Kronecker product beside each weight", 3e-3, _lokr, True),
    "shira": Method("a random few of the weight's entries", 3e-3, _shira, True),
    "ia3": Method("a scale on keys, values and hidden activations", 1e-2, _ia3),
    "prompt": Method(
        f"{TOKENS} trained tokens before the text",
        1e-2,
        _prompt("PromptTuningConfig"),
        virtual_tokens=TOKENS,
    ),
    "ptuning": Method(
        f"{TOKENS} tokens from a small network",
        1e-3,
        _prompt("PromptEncoderConfig"),
        virtual_tokens=TOKENS,
    ),
    "prefix": Method(
        f"{TOKENS} trained keys and values a layer",
        1e-2,
        _prompt("PrefixTuningConfig"),
        virtual_tokens=TOKENS,
    ),
    "full": Method("every weight of the model", 5e-5, in_full=True),
    "targets": Method("the target weights in full, and nothing beside them", 5e-5, in_full=True),
    "galore": Method(
        "every weight, with Adam's moments in the gradient's top directions",
        5e-5,
        has_rank=True,
        optim=_galore,
        needs=("galore_torch", "bitsandbytes"),
    ),
    "apollo": Method(
        "every weight, with Adam's step sizes from a random projection of the gradient",
        5e-5,
        has_rank=True,
        optim=_apollo,
        needs=("apollo_torch", "bitsandbytes"),
    ),
    "head": Method("the new head only, on the frozen pretrained model", 1e-3),
}


OWN = ("r", "target_modules", "target_parameters", "modules_to_save", "base_fingerprint", "loading")
"""Fields of a method's config that have options of their own, or that saving writes.

Nor are those a user's that all of PEFT's methods have, or that are configs themselves.
"""
BY_LAYER = ("layers_to_transform", "layers_pattern")


def configure(settings: RunSettings, shared: dict[str, Any], shapes: Shapes) -> PeftConfig:
    """The PEFT config of a run's method, with what `--set` says.

    Args:
        settings: of the run.
        shared: arguments that all methods share.
        shapes: of the weights; see `Method.config`.

    Raises:
        UserError: the method has no config, or not such a field; or its value is of no use.
    """
    import yaml  # comes with transformers
    from peft import PeftConfig

    method = METHODS[settings.method]
    if method.config is None:
        raise UserError(f"--set is for an adapter's settings: method {settings.method} has none")
    config = method.config(settings, settings.rank or 0, shared, shapes)
    not_the_users = {*OWN, *(f.name for f in fields(PeftConfig))}
    known = {f.name: f for f in fields(config) if f.init and f.name not in not_the_users}
    known = {name: f for name, f in known.items() if not name.endswith("_config")}
    given = {}
    for text in settings.set:
        name, equals, value = text.partition("=")
        if not equals or name not in known:
            raise UserError(
                f"--set {text}: not name=value with a setting of {type(config).__name__}; there "
                f"are: {', '.join(known)}"
            )
        try:
            given[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"--set {text}: {value!r} is not YAML ({reason})") from error
        if isinstance(known[name].default, bool) and not isinstance(given[name], bool):
            raise UserError(f"--set {text}: {name} is true or false")
        if name in BY_LAYER and {*settings.target_modules} & {"attention", "all-linear"}:
            raise UserError(
                f"--set {text}: {name} is for layers that are named by the last part of their "
                "names, as --target-modules query --target-modules value"
            )
    with blame(f"--set {' '.join(settings.set)}", ValueError, TypeError):
        return replace(config, **given) if given else config


def find_method(name: str) -> Method:
    """The row of that name; ValueError lists what there is."""
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}; there are: {', '.join(METHODS)}")
    return METHODS[name]


def own_optimizer(settings: RunSettings, model: Any) -> Optimizer | None:
    """The optimizer that the run's method brings, None for the usual one.

    It may freeze what it leaves as it is, as LoRA-FA's does A.
    """
    make = find_method(settings.method).optimizer
    return None if make is None else make(settings, settings.rank or 0, model)


def check_packages(name: str) -> None:
    """Raise UserError if a method needs packages that are not installed."""
    missing = [package for package in METHODS[name].needs if find_spec(package) is None]
    if missing:
        raise UserError(
            f"method {name} needs {' and '.join(missing)}: pip install 'rosa-finetune[optimizers]'"
        )
