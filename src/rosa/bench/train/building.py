"""The pretrained model as a method trains it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rosa.bench.setup.methods import configure, find_method
from rosa.bench.setup.quantizing import quantization, quantize, quantized
from rosa.bench.setup.settings import RunSettings, in_bf16
from rosa.bench.setup.zero import parts_at_once
from rosa.bench.storage import models
from rosa.bench.storage.saving import keep_beginning
from rosa.bench.tasks.task import Task
from rosa.errors import UserError, blame

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Base:
    """The pretrained model, before a method is put into it.

    Attributes:
        model: with a head for the task.
        fresh: names of its modules that the checkpoint had no weights for.
        task_type: as PEFT calls it; None for one that it has no name for.
    """

    model: Any
    fresh: list[str]
    task_type: str | None


def by_trl(settings: RunSettings, task: Task) -> bool:
    """Whether TRL trains: chats, preferences, and texts that are packed into rows."""
    return task.is_chat or task.is_preference or settings.packing


def load_base(settings: RunSettings, task: Task, pad_token_id: int | None) -> Base:
    """The pretrained model for a task."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    # Weights that are trained need float32; a frozen half-precision base may stay as it is.
    as_stored = find_method(settings.method).config is not None and in_bf16(settings)
    how: dict[str, Any] = {"dtype": "auto" if as_stored else torch.float32}
    if task.kind == "regression":
        how.update(num_labels=1, problem_type="regression", ignore_mismatched_sizes=True)
    if task.kind == "classification":
        names = dict(enumerate(task.labels))
        how.update(id2label=names, label2id={n: i for i, n in names.items()})
        how["ignore_mismatched_sizes"] = True  # a head for other labels is replaced
    how.update(quantization(settings.load_in, in_bf16(settings)))
    classes = {
        "classification": (AutoModelForSequenceClassification, "SEQ_CLS"),
        "regression": (AutoModelForSequenceClassification, "SEQ_CLS"),
        "language": (AutoModelForCausalLM, "CAUSAL_LM"),
    }
    auto, task_type = classes[task.kind]
    # A new head is drawn whole, and what TRL computes is looked at on the whole model.
    parts: AbstractContextManager[None] = nullcontext()
    if settings.deepspeed is not None and task.kind == "language" and not by_trl(settings, task):
        stored = str(models.load_config(settings.model).dtype) if as_stored else "float32"
        parts = parts_at_once(settings, stored.removeprefix("torch."))
    with parts, blame(f"the model {settings.model} cannot be loaded for {task.kind}"):
        model, loading = auto.from_pretrained(settings.model, output_loading_info=True, **how)
    quantize(settings.load_in, model)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = pad_token_id
    return Base(model, _fresh_modules(loading), task_type)


def adapt(
    settings: RunSettings, base: Base, batches: Callable[[], Iterable[dict[str, Any]]]
) -> tuple[Any, Any]:
    """The model as the method trains it, and a `ChangeRecorder` if one is asked for.

    Args:
        settings: of the run.
        base: see `load_base`; is changed.
        batches: a few batches of the training data, for methods that begin with its gradient.
    """
    from rosa.bench.train.averaging import item_counter

    method, model = find_method(settings.method), base.model
    targets = find_targets(model, settings.target_modules)
    recorder = _recorder(settings, model, targets)
    if method.config is None:
        if settings.method == "head":
            _train_only(model, [], base.fresh)
        if settings.method == "targets" or method.optim is not None:
            weights = target_weights(settings, model, base.task_type)  # raises where there are none
            if settings.method == "targets":
                _train_only(model, weights, base.fresh)
        return model, recorder
    from peft import get_peft_model
    from peft.utils.error import NoMatchingPeftModuleError

    shared = {
        "target_modules": targets,
        "task_type": base.task_type,
        "modules_to_save": base.fresh or None,
    }
    shapes = _target_shapes(model, shared)
    if settings.target_parameters:
        shared["target_parameters"] = list(settings.target_parameters)
    try:
        config = configure(settings, shared, list(shapes.values()))
    except TypeError as error:
        if "target_parameters" not in str(error):
            raise
        raise UserError(
            f"{settings.method} adapts no single parameters: leave --target-parameters out, or use "
            "rosa or lora"
        ) from error
    if settings.method == "lora_ga":
        # PEFT looks for the gradients before it makes names of "all-linear".
        config.target_modules = set(shapes)  # type: ignore[attr-defined]
        kind = "language" if base.task_type == "CAUSAL_LM" else "classification"
        _find_gradients(model, config, batches(), item_counter(kind, model))
    with blame(
        f"{settings.method} cannot be put into {type(model).__name__}", ValueError, TypeError
    ):
        try:
            adapted = get_peft_model(model, config)
        except NoMatchingPeftModuleError as error:  # ROSA raises it too, as every method of PEFT
            names = " ".join(settings.target_modules)
            one = " (one name an option: --target-modules query --target-modules value)"
            hint = one if "," in names else ""
            raise UserError(f"--target-modules {names}{hint}: {error}") from error
    if settings.method == "lora_ga":
        keep_beginning(adapted)
    return adapted, recorder


def target_weights(settings: RunSettings, model: nn.Module, task_type: str | None) -> list[str]:
    """Names of the layers whose weights a method without an adapter means; UserError if none.

    Of a method with an optimizer that projects gradients those of torch.nn.Linear alone.
    """
    from torch import nn

    method = find_method(settings.method)
    targets = find_targets(model, settings.target_modules)
    found = _target_shapes(model, {"target_modules": targets, "task_type": task_type})
    names = [
        name
        for name in found
        if method.optim is None or isinstance(model.get_submodule(name), nn.Linear)
    ]
    if not names:
        raise UserError(
            f"method {settings.method} works on {'torch.nn.Linear' if method.optim else 'linear'} "
            f"layers, and --target-modules {' '.join(settings.target_modules)} names none of "
            f"{type(model).__name__}'s"
        )
    return names


def _target_shapes(model: nn.Module, shared: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(in, out) of the weights that PEFT takes the shared arguments to mean, by their names."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from rosa import RosaConfig
    from rosa.targeting.matching import is_target, resolve_all_linear

    config = RosaConfig(**shared)
    resolve_all_linear(config, model)
    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and is_target(config, name):
            if isinstance(module, Conv1D):
                shapes[name] = (module.nx, module.nf)
            else:
                shapes[name] = (module.in_features, module.out_features)
    return shapes


def _find_gradients(
    model: Any,
    config: Any,
    batches: Iterable[dict[str, Any]],
    count: Callable[[dict[str, Any]], int],
) -> None:
    """Leave the gradients of some batches where PEFT's LoRA-GA looks for them.

    It takes their directions alone, so their sum over the items is as good as the mean.
    """
    from peft.tuners.lora.loraga import preprocess_loraga

    def train_step() -> None:
        for batch in batches:
            if items := count(batch):
                (model(**batch).loss * items).backward()

    preprocess_loraga(model, config, train_step)


def _recorder(settings: RunSettings, model: Any, targets: list[str] | str) -> Any:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from rosa.bench.train.changes import ChangeRecorder

    method = find_method(settings.method)
    changes_weights = method.has_rank or method.in_full
    whole = settings.load_in == "full"  # of what was quantized no other method says its change
    if not settings.record_changes or not changes_weights or not whole:
        return None
    linear = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
    if targets == "all-linear":  # a tied head is no target
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        names = [n for n in linear if model.get_submodule(n) is not head]
    else:
        names = [n for n in linear if n in targets or n.split(".")[-1] in targets]
    return ChangeRecorder(model, names)


def _fresh_modules(loading: dict[str, Any]) -> list[str]:
    """Names of the modules, beside PEFT's heads, that the checkpoint had no weights for.

    They are random (the pooler of many encoders), so they must be trained and saved: an adapter
    without them would be another model each time that it is loaded.
    """
    from peft.utils.constants import SEQ_CLS_HEAD_NAMES

    missing = [*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])]
    owners = sorted({key.rpartition(".")[0] for key in missing})
    return [
        name
        for name in owners
        if name.split(".")[0] not in SEQ_CLS_HEAD_NAMES
        and not any(name.startswith(f"{other}.") for other in owners)
    ]


def find_targets(model: nn.Module, wanted: tuple[str, ...]) -> list[str] | str:
    """Target modules for PEFT; "attention" means every linear layer inside an attention module."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    by_hqq = quantized(model)
    if wanted == ("all-linear",):
        return by_hqq or "all-linear"
    if wanted != ("attention",):
        return list(wanted)
    found = [
        name
        for name, module in model.named_modules()
        if (isinstance(module, (nn.Linear, Conv1D)) or name in by_hqq)
        and any("att" in part.lower() for part in name.split(".")[:-1])
    ]
    if not found:
        raise UserError(
            f"no attention projections found in {type(model).__name__}: give --target-modules "
            "all-linear, or the names of the layers"
        )
    return found


def _train_only(model: nn.Module, weights: list[str], fresh: list[str]) -> None:
    """The weights of the named layers, and what an adapter trains in full: the head, the new."""
    from peft.utils.constants import SEQ_CLS_HEAD_NAMES

    heads = [getattr(model, name) for name in SEQ_CLS_HEAD_NAMES if hasattr(model, name)]
    if not heads and not weights:
        raise UserError(f"{type(model).__name__} has no classification head to train alone")
    model.requires_grad_(False)
    for module in (*heads[:1], *map(model.get_submodule, fresh)):
        module.requires_grad_(True)
    for name in weights:
        model.get_parameter(f"{name}.weight").requires_grad_(True)
