"""What is learned: a task is its data, its labels and its metrics. One file per family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from rosa.bench.tasks.task import ANSWERS, DataSettings, Task, tested
from rosa.errors import UserError


def load(settings: DataSettings, decoder: bool) -> Task:
    """The task that the settings name; `decoder` says that the model is one.

    Raises:
        ValueError, FileNotFoundError: the data is missing or of no use; says what to do.
    """
    for name in ("limit_train", "limit_test"):
        limit = getattr(settings, name)
        if limit is not None and limit < 1:
            raise UserError(f"{name} must be at least 1, got {limit}")
    if settings.task is not None:
        if settings.train is not None:
            raise UserError("give a task by name or a training file of your own, not both")
        if settings.validation is not None:
            raise UserError(f"task {settings.task} has its own validation data: no --validation")
        if settings.task not in TASKS:
            raise UserError(f"unknown task {settings.task!r}; there are: {', '.join(TASKS)}")
        if decoder and settings.task not in LANGUAGE_TASKS:
            raise UserError(f"task {settings.task} is a classification: it needs an encoder")
        if not decoder and settings.task in LANGUAGE_TASKS:
            raise UserError(f"task {settings.task} writes text: it needs a decoder, such as gpt2")
        task = TASKS[settings.task](settings)
    elif settings.data is not None:
        raise UserError("--data is the folder of a task's files: name the task with --task")
    elif settings.train is None:
        raise UserError("no data: give --train <file>, or a --task by name")
    elif settings.preference and not decoder:
        raise UserError("--preference is for a model that writes text: it needs a decoder")
    elif decoder:
        from rosa.bench.tasks.language import load_language

        task = load_language(settings)
    else:
        from rosa.bench.tasks.text import load_text

        task = load_text(settings)
    if settings.hold_out and task.test is None and task.generation is None:
        from rosa.bench.tasks.text import split_off

        train, validation = split_off(task.train, stratify=task.kind == "classification")
        task = replace(task, train=train, validation=validation, test=task.validation)
    if settings.limit_train is not None and settings.limit_train < len(task.train):
        rows = task.train.shuffle(seed=settings.seed).select(range(settings.limit_train))
        task = replace(task, train=rows)
    if task.test is not None:
        task = replace(task, test=task.test.select(tested(len(task.test), settings.limit_test)))
    return task


def load_validation(settings: DataSettings, decoder: bool, labels: tuple[str, ...]) -> Task:
    """The task to evaluate a trained model on: by name, or a validation file with its labels.

    Raises:
        ValueError, FileNotFoundError: as `load`; also if the file's labels are not the model's.
    """
    if settings.task is not None:
        return load(settings, decoder)
    if settings.validation is None:
        raise UserError("no data: give --validation <file>, or a --task by name")
    if decoder:
        from rosa.bench.tasks.files import read_columns

        if {*ANSWERS} <= {*read_columns(settings.validation)}:
            raise UserError(
                f"{settings.validation} has preferences, which are held against the pretrained "
                "model while they are trained: give them as --validation of rosa train, and see "
                "the run's metrics.json"
            )
        return load(replace(settings, train=settings.validation), decoder)
    from rosa.bench.tasks.text import load_text

    return load_text(replace(settings, train=settings.validation), labels)


def _glue(name: str, settings: DataSettings) -> Task:
    from rosa.bench.tasks.glue import load_glue

    return load_glue(name, settings)


def _e2e(settings: DataSettings) -> Task:
    from rosa.bench.tasks.e2e import load_e2e

    return load_e2e(settings)


def _corpus(settings: DataSettings) -> Task:
    from rosa.bench.tasks.corpus import load_corpus

    return load_corpus(settings)


def _demo(settings: DataSettings) -> Task:
    from rosa.bench.tasks import demo
    from rosa.bench.tasks.metrics import accuracy_and_macro_f1

    data = demo.load()  # one split for every seed of a run, or evaluating would leak
    return Task(
        name="demo",
        kind="classification",
        train=data.train,
        validation=data.validation,
        test=data.test,
        text_columns=("text",),
        labels=data.labels,
        metric="accuracy",
        compute=accuracy_and_macro_f1,
    )


GLUE_TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")
LANGUAGE_TASKS = ("e2e", "corpus")
SUPER_GLUE_TASKS = ("boolq", "cb", "wic", "axb", "axg")
TASKS: dict[str, Callable[[DataSettings], Any]] = {
    **{name: partial(_glue, name) for name in (*GLUE_TASKS, *SUPER_GLUE_TASKS)},
    "e2e": _e2e,
    "corpus": _corpus,
    "demo": _demo,
}
