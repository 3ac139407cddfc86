"""`rosa export`: a trained adapter's folder as a plain model, or as a LoRA adapter."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from rosa.bench.storage import models, runs
from rosa.errors import ExportError, UserError
from rosa.export.compact import write_rosa
from rosa.export.lazily import mapped_lazily
from rosa.export.lora import write_lora
from rosa.export.merged import MAX_SHARD_SIZE, write_merged, write_plain
from rosa.export.ranks import ALL, Budget
from rosa.export.staging import contents, rosa_adapter, staged

FORMS = ("merged", "lora", "rosa")


def export_folder(
    folder: Path,
    form: str,
    output: Path,
    model: str | None = None,
    budget: Budget = ALL,
    *,
    low_memory: bool = False,
    max_shard_size: str | None = None,
) -> tuple[float | None, dict[str, float]]:
    """Export a trained adapter from its folder, with its tokenizer.

    Args:
        folder: a run's folder, a checkpoint's, or an adapter's.
        form: `merged`, a plain model of the base's class; `lora`, a LoRA adapter; or `rosa`, the
            adapter itself in a smaller file.
        output: where it goes; must not exist or be empty.
        model: the base model; None takes the one that the adapter names.
        budget: how much of the changes an adapter keeps.
        low_memory: merge weight by weight, from the base's files into new ones.
        max_shard_size: of a plain model's file; None for the default.

    Returns:
        The largest difference between the logits of the trained model and of what was written, as
        loaded back, on random tokens, or None with `low_memory`; and by layer the relative error of
        its change.

    Raises:
        ValueError, FileNotFoundError: nothing to export there, or `output` is in use.
        ExportError: what is loaded from it computes something else; nothing is left in `output`.
    """
    if form not in FORMS:
        raise UserError(f"--to must be one of {', '.join(FORMS)}; got {form!r}")
    if form == "merged" and budget != ALL:
        raise UserError(
            "a plain model has the whole change, in its own precision: --rank, --energy, "
            "--uniform-rank and --dtype are for --to lora and --to rosa"
        )
    if form != "merged" and (low_memory or max_shard_size is not None):
        raise UserError("--low-memory and --max-shard-size are for --to merged")
    max_shard_size = max_shard_size or MAX_SHARD_SIZE
    if not re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]?B", max_shard_size, re.IGNORECASE):
        raise UserError(f"--max-shard-size is a size as 500MB or 5GB, got {max_shard_size!r}")
    if output.exists() and (not output.is_dir() or contents(output)):
        raise UserError(f"{output} is not empty: name a new folder")
    if low_memory:
        _merge_files(folder, output, model, max_shard_size)
        return None, {}
    trained, tokenizer = models.load_trained(folder, model, whole=True)
    if not isinstance(trained, PeftModel):
        raise _no_adapter(folder)
    if trained.active_peft_config.is_prompt_learning:
        raise UserError(
            f"{folder} holds a trained prompt, which changes no weight: there is nothing to merge "
            "or to export. Use it by PEFT, as it is"
        )
    errors: dict[str, float] = {}
    expected, half = _logits(trained), trained.dtype in (torch.float16, torch.bfloat16)
    with staged(output) as place:
        if form != "merged":
            write = {"lora": write_lora, "rosa": write_rosa}[form]
            errors = write(trained, rosa_adapter(trained, None)[1], place, budget)
            models.save_config(trained.config, place)
            written = PeftModel.from_pretrained(trained.unload(), str(place)).eval()
        else:  # merging is the same for every method of PEFT
            written = write_merged(trained, trained.active_adapters[0], place, max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(place))
        difference = float((_logits(written) - expected).abs().max())
        tolerance = (1e-3 * float(expected.abs().max()) + 1e-4) * (100 if half else 1)
        if budget.is_all and not difference <= tolerance:
            raise ExportError(
                f"the export to {form} differs from the trained model by {difference:.1e} in its "
                "logits, though its weights do not. Nothing was written; please report this"
            )
    return difference, errors


def _merge_files(folder: Path, output: Path, model: str | None, max_shard_size: str) -> None:
    """Merge a ROSA adapter into a base model whose weights are read as they are written."""
    there = runs.trained_place(folder)
    if not (there / "adapter_config.json").is_file():
        raise _no_adapter(folder)
    if (method := runs.read_json(there / "adapter_config.json").get("peft_type")) != "ROSA":
        raise UserError(f"--low-memory merges ROSA adapters; {folder} holds one of {method}'s")
    base = models.load_base(there, model, whole=True)
    tokenizer = models.own_tokenizer(there)
    with staged(output) as place:
        with models.fitting(there, base):
            plain, weights = mapped_lazily(base, there)
        write_plain(plain, weights, place, max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(place))


def _no_adapter(folder: Path) -> UserError:
    return UserError(f"{folder} holds a plain model already: there is no adapter to export")


def _logits(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (4, 16), generator=generator)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
