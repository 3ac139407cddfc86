"""What a training will take, before it is begun: memory by kind, and time, from the model's config.

The model is made without memory (torch's fake tensors) and a training step is run on it: what
autograd keeps and the operations it does are counted, not estimated. Time is those operations at a
rate that is given, or measured here.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rosa.bench.setup.checking import check, parse_period, schedule
from rosa.bench.setup.methods import find_method, own_optimizer
from rosa.bench.setup.quantizing import HEADS
from rosa.bench.setup.settings import RunSettings, in_bf16
from rosa.bench.storage import models
from rosa.bench.train.building import Base, adapt
from rosa.errors import UserError, blame

if TYPE_CHECKING:
    from torch import nn

PLANNED = ("rosa", "lora", "rslora", "lora_fa", "full", "targets", "head")
GIB = 2**30
USABLE = 0.9
"""Of a device's memory: the rest is the libraries' own, and lost between pieces."""
MOMENTS, OFFSET = 2 * 4, 4
"""Bytes of Adam's moments of a trained number, and of a number of the offset."""
BITS = {"8bit": 8 + 32 / 4096, "4bit": 4 + 32 / 64, "hqq": 4 + 32 / 64}
"""A number of a frozen weight, with its share of a group's scale."""
MEASURED_SIDE, REPEATS = 1024, 5


@dataclass(frozen=True)
class Plan:
    """What a training takes, in each of its processes.

    Attributes:
        device: bytes on the accelerator, by kind.
        main: bytes of main memory beside it, by kind.
        trained: numbers that are trained.
        layers: weights that are adapted.
        operations: floating-point operations of a step of one process.
        tokens: that a step shows, in all processes.
        draws: of subspaces, in all the steps, the first one among them.
        step_seconds: of a step.
        draw_seconds: of a draw of all subspaces, measured here; None where nothing is drawn.
    """

    device: dict[str, int]
    main: dict[str, int]
    trained: int
    layers: int
    operations: int
    tokens: int
    draws: int
    step_seconds: float
    draw_seconds: float | None

    @property
    def total(self) -> int:
        """Bytes on the accelerator."""
        return sum(self.device.values())

    def rows(self, memory: int) -> dict[str, str]:
        """What it tells, in words, for a device of so many bytes."""
        fits = self.total <= USABLE * memory
        found = {
            "adapted weights": f"{self.layers:,}",
            "trained numbers": f"{self.trained:,}",
            **{name: _size(size) for name, size in self.device.items()},
            "together": f"{_size(self.total)}: {'fits' if fits else 'does NOT fit'} into "
            f"{USABLE:.0%} of {_size(memory)}",
            **{f"main memory: {name}": _size(size) for name, size in self.main.items()},
            "operations of a step": f"{self.operations:.3g}",
            "seconds a step": f"{self.step_seconds:.3g}",
            "tokens a second": f"{self.tokens / self.step_seconds:,.0f}",
        }
        if self.draw_seconds is not None:
            each = f"{self.draw_seconds:.3g} s each on this machine"
            found["draws"] = f"{self.draws} with the first, {each}"
        return found


def _size(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= 0.01 * GIB else f"{size / 2**20:.2f} MiB"


def parse_memory(text: str) -> int:
    """Bytes, from "80GB" or "80GiB", which both are what makers of accelerators call 80 GB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(G|T)i?B?", text.strip(), re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise UserError(f"--memory is a size such as 80GB, got {text!r}")
    return int(float(found[1]) * GIB * (1024 if found[2].upper() == "T" else 1))


def plan(
    settings: RunSettings,
    steps: int,
    gpus: int = 1,
    tflops: float | None = None,
    sharded: bool = False,
) -> Plan:
    """Count what a run will take.

    Args:
        settings: of the run; its data is not looked at, every text is of the longest length.
        steps: optimizer steps.
        gpus: data-parallel processes.
        tflops: 10^12 operations a second that a device does; None measures this machine's.
        sharded: the weights lie in parts over the processes (FSDP 2), a block of layers a time
            whole.

    Raises:
        UserError: the model's config, a setting or a number is of no use.
    """
    settings = check(settings)
    models.check_model(settings.model)
    for name, value in (
        ("steps", steps),
        ("gpus", gpus),
        ("tflops", 1 if tflops is None else tflops),
    ):
        if not 0 < value < math.inf:
            raise UserError(f"--{name} must be positive, got {value}")
    if settings.method not in PLANNED:
        raise UserError(f"there is a plan for {', '.join(PLANNED)}, not for {settings.method}")
    if sharded and settings.load_in != "full":
        raise UserError("--sharded is for weights in full: not for --load-in")
    base = _without_memory(settings)
    weights = _weights(base.model, settings.load_in)
    gathered = _gathered(base.model) if sharded else 0
    model, _ = adapt(settings, base, list)
    own_optimizer(settings, model)
    shapes, per_draw = _adapted(model)
    with _fake(model):
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        own = {n for n, _ in model.named_parameters() if ".rosa_" in n or ".lora_" in n}
        factors = sum(p.nbytes for n, p in model.named_parameters() if n in own or n in trained)
        adapter = find_method(settings.method).config is not None
        gradients = sum(p.nbytes for p in trained.values())
        numbers = sum(p.numel() for p in trained.values())
        kept, operations = _step(model, settings)
    operations *= settings.gradient_accumulation
    texts = settings.batch_size * settings.gradient_accumulation * gpus
    tokens = texts * _length(settings)
    items = tokens if models.is_decoder(model.config) else texts  # as "auto" counts them
    draws = _draws(settings, model, steps, items) if settings.method == "rosa" else 0
    rank = settings.rank or 0
    offset = sum(
        int(min((1 + per_draw * (draws - 1)) * rank, 1.5 * min(shape))) * sum(shape)
        for shape in shapes
    )
    device = {
        "frozen weights" if adapter else "weights": weights,
        "trained factors and heads": factors if adapter else 0,
        "gradients": gradients * (2 if gpus > 1 and not sharded else 1),
        "Adam's moments": MOMENTS * numbers,
    }
    if sharded:
        device = {name: -(-size // gpus) for name, size in device.items()}
        device["weights that are whole at a time"] = gathered
    device["kept for the backward pass"] = kept
    offset_bytes = OFFSET * offset if settings.method == "rosa" else 0
    main: dict[str, int] = {}
    if settings.load_in != "full":
        device[f"offset after {draws} draws"] = offset_bytes
    elif offset_bytes:
        main[f"offset after {draws} draws"] = offset_bytes
    rate = 1e12 * tflops if tflops is not None else measured_rate(in_bf16(settings))
    return Plan(
        {name: size for name, size in device.items() if size},
        main,
        numbers,
        len(shapes),
        operations,
        tokens,
        draws,
        operations / rate,
        _seconds_a_draw(settings, shapes) if settings.method == "rosa" else None,
    )


def _without_memory(settings: RunSettings) -> Base:
    """The pretrained model by its config, on the meta device."""
    import torch

    config = models.load_config(settings.model)
    decoder = models.is_decoder(config)
    half = in_bf16(settings) and find_method(settings.method).config is not None
    dtype = (config.dtype or torch.bfloat16) if half else torch.float32
    what = f"no model can be made of the config of {settings.model}"
    with blame(what), torch.device("meta"):
        model = models.auto_class(decoder).from_config(config, dtype=dtype).train()
    if model.config.pad_token_id is None:
        model.config.pad_token_id = 0
    return Base(model, [], "CAUSAL_LM" if decoder else "SEQ_CLS")


def _weights(model: nn.Module, load_in: str) -> int:
    """Bytes of a model's weights, each once; its linear layers as they are loaded."""
    from torch import nn

    size = sum(p.nbytes for p in model.parameters())
    if load_in != "full":
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name.split(".")[-1] not in HEADS:
                size -= module.weight.nbytes - int(module.weight.numel() * BITS[load_in] / 8)
    return size


def _gathered(model: Any) -> int:
    """Bytes of the weights that are whole at a time where each block is sharded by itself.

    Of two blocks, the next one is fetched ahead; and of what is in none, as the embeddings.
    """
    blocks = set(model._no_split_modules or ())
    found = [m for m in model.modules() if type(m).__name__ in blocks]
    sizes = [sum(p.nbytes for p in block.parameters()) for block in found]
    rest = sum(p.nbytes for p in model.parameters()) - sum(sizes)
    return rest + sum(sorted(sizes)[-2:])


def _adapted(model: nn.Module) -> tuple[list[tuple[int, int]], int]:
    """(out, in) of each weight with ROSA, and the terms of rank r that a draw adds to an offset."""
    from rosa import RosaLayer

    layers = [m for m in model.modules() if isinstance(m, RosaLayer)]
    both = any(a.config.trained == "both" for layer in layers for a in layer.adapters.values())
    return [(layer.out_features, layer.in_features) for layer in layers], 2 if both else 1


@contextmanager
def _fake(model: nn.Module) -> Iterator[None]:
    """Give a model on the meta device tensors that are said to be on the CPU, and no memory."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    made: dict[int, Any] = {}  # tied weights stay one

    def like(tensor: Any) -> Any:
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            made[id(tensor)] = (
                torch.nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
            )
        return made[id(tensor)]

    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                held.update({n: like(t) for n, t in held.items() if t is not None})
        yield


def _step(model: Any, settings: RunSettings) -> tuple[int, int]:
    """Bytes that autograd keeps of a batch, and the operations of its two passes."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    ids = torch.zeros(settings.batch_size, _length(settings), dtype=torch.long)
    labels = ids if models.is_decoder(model.config) else ids[:, 0]
    with (
        FlopCounterMode(display=False) as counter,
        torch.autocast("cpu", torch.bfloat16, enabled=in_bf16(settings)),
        blame(f"a step of {settings.model} cannot be counted"),
    ):
        kept, loss = kept_bytes(model, lambda: model(input_ids=ids, labels=labels).loss)
        loss.backward()
    return kept, counter.get_total_flops()


def _length(settings: RunSettings) -> int:
    return settings.max_length or 0  # `check` has chosen one


def kept_bytes(model: nn.Module, compute: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes that autograd keeps for the backward pass, each storage once, without parameters.

    Args:
        model: whose parameters are not counted.
        compute: runs the forward pass; what it returns is returned too.
    """
    import torch

    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    found: dict[int, torch.UntypedStorage] = {}  # held, so that no address is given out again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            found[storage._cdata] = storage
        return tensor.detach()  # itself, an operation's own output would hold that for ever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = compute()
    return sum(storage.nbytes() for storage in found.values()), result


def _draws(settings: RunSettings, model: Any, steps: int, items: int) -> int:
    """How many draws a training has, the one at its beginning among them."""
    if (
        isinstance(parse_period(settings.resample_every), float)
        or settings.resample_every == "epoch"
    ):
        raise UserError("a plan knows no epochs: give --resample-every auto, never, or steps")
    return 1 + len(schedule(settings).forecast(model, steps, 1, items))


def _device() -> Any:
    """The accelerator of this machine, or its CPU."""
    import torch

    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"


def measured_rate(half: bool) -> float:
    """Operations a second of a product of matrices, on this machine's accelerator or CPU."""
    import torch

    dtype = torch.bfloat16 if half else torch.float32
    x = torch.randn(MEASURED_SIDE, MEASURED_SIDE, device=_device(), dtype=dtype)
    return 2 * MEASURED_SIDE**3 / _median_seconds(lambda: x @ x)


def _seconds_a_draw(settings: RunSettings, shapes: list[tuple[int, int]]) -> float:
    """Seconds of a draw of all weights, from one that is drawn here."""
    from peft import get_peft_model
    from torch import nn

    from rosa import RosaConfig, resample

    side = min(MEASURED_SIDE, *(min(shape) for shape in shapes))
    directions = "orthonormal" if settings.directions == "gradient" else settings.directions
    config = RosaConfig(
        r=settings.rank or 1, directions=directions, trained=settings.trained, target_modules=["0"]
    )
    model = get_peft_model(nn.Sequential(nn.Linear(side, side, bias=False)).to(_device()), config)
    seconds = _median_seconds(lambda: resample(model))

    def cost(out_features: int, in_features: int) -> int:
        return (
            out_features
            * in_features
            * (min(out_features, in_features) if directions == "svd" else 1)
        )

    return seconds * sum(cost(*shape) for shape in shapes) / cost(side, side)


def _median_seconds(work: Callable[[], Any]) -> float:
    import torch

    def wait() -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    found = []
    work()
    for _ in range(REPEATS):
        wait()
        started = time.perf_counter()
        work()
        wait()
        found.append(time.perf_counter() - started)
    return statistics.median(found)
