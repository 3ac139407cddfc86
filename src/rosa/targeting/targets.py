"""Which modules of a model are adapted, and why some cannot be."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from rosa.algebra.fingerprints import fingerprint
from rosa.algebra.lowrank import are_finite
from rosa.config import RosaConfig
from rosa.errors import UserError
from rosa.kinds.parameter import ParamWrapper
from rosa.kinds.registry import KINDS, kind_of
from rosa.layers.base import RosaLayer
from rosa.layers.in_model import base_of, plain_name, rosa_layers
from rosa.pretrained.memory import check_in_memory
from rosa.pretrained.sharding import (
    cut_dim,
    is_cut,
    is_fully_sharded,
    is_sharded,
    own_part,
    whole,
)
from rosa.pretrained.views import MatrixView
from rosa.pretrained.weight import SUPPORTED_DTYPES
from rosa.pretrained.zero3 import is_in_part
from rosa.targeting.matching import is_target, is_trained_in_full, names_parameter


def check_same_parameters(config: RosaConfig, others: Mapping[str, PeftConfig]) -> None:
    """Raise ValueError if adapters of one model name different parameters.

    Their wrappers lie one around the other, and an adapter's file says which is whose by that.
    """
    for name, other in others.items():
        theirs = getattr(other, "target_parameters", None)
        if config.target_parameters and theirs and {*theirs} != {*config.target_parameters}:
            raise UserError(
                f"target_parameters must be the same for all adapters of a model: {name!r} has "
                f"{sorted(theirs)}, the new one {sorted(config.target_parameters)}"
            )


@dataclass(frozen=True)
class Target:
    """A weight that is to be adapted.

    Attributes:
        name: its layer's, for draws and messages: the module's, with the parameter's if that was
            named by itself.
        module: which holds it, adapted already or not.
        kind: the kind of layer.
        parameter: its name in the module.
        is_inner: whether it is adapted since the module around it is.
    """

    name: str
    module: nn.Module
    kind: type[RosaLayer]
    parameter: str
    is_inner: bool = False

    @property
    def base(self) -> nn.Module:
        """The module without what is around it."""
        return base_of(self.module)

    @property
    def view(self) -> MatrixView:
        """The weight as a matrix."""
        return self.kind.view_of(self.base, self.parameter)

    @property
    def weight(self) -> torch.Tensor:
        """The weight, as it lies in memory."""
        return self.view.parameter

    @property
    def module_name(self) -> str:
        """The module's name in the model."""
        return self.name.rpartition(".")[0] if self.kind is ParamWrapper else self.name

    @property
    def place(self) -> str:
        """The parameter's name in the model without what is around its modules."""
        named = self.kind is ParamWrapper
        return self.name if named else f"{self.name}.{self.view.name}"


def targets_of(config: RosaConfig, model: nn.Module) -> Iterator[Target]:
    """All weights that a config names, in the order in which PEFT puts adapters around them."""
    if config.target_modules != DUMMY_TARGET_MODULES:
        inside = tuple(f"{name}." for name, _ in rosa_layers(model))
        inner: set[str] = set()
        for name, module in model.named_modules():
            if not name or name in inner or name.startswith(inside) or not is_target(config, name):
                continue
            target = _of_module(name, module)
            yield target
            for child, part in target.kind.inner(target.base).items():
                inner.add(f"{name}.{child}")
                yield replace(_of_module(f"{name}.{child}", part), is_inner=True)
    yield from _parameters(config, model)


def _of_module(name: str, module: nn.Module) -> Target:
    """A module that is named as a target; ValueError says why it cannot be."""
    base = base_of(module)
    if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not isinstance(
        module, RosaLayer
    ):
        raise UserError(
            f"{name} already carries another PEFT method ({type(module).__name__}): merge or "
            "unload it before you add ROSA"
        )
    if type(module) is ParamWrapper:
        raise UserError(
            f"a parameter of {name} is adapted by itself (target_parameters): leave the module out "
            "of target_modules, or name its parameters for this adapter too"
        )
    kind = kind_of(base)
    if kind is None:
        raise UserError(
            f"Target module {name} is a {type(base).__name__}, which is not supported: ROSA adapts "
            f"{', '.join(each.adapts for each in reversed(KINDS))}, and parameters by their names "
            "(target_parameters). Name other target_modules, or leave it out with exclude_modules"
        )
    return Target(name, module, kind, kind.parameter_name)


def _parameters(config: RosaConfig, model: nn.Module) -> Iterator[Target]:
    """Those that `target_parameters` names, by PEFT's matching."""
    wanted = config.target_parameters
    if not wanted:
        return
    known = [plain_name(n) for n, _ in model.named_parameters()]
    for name in wanted:
        if not any(names_parameter([name], key) for key in known):
            ends = {".".join(key.split(".")[-1 - name.count(".") :]) for key in known}
            near = difflib.get_close_matches(name, sorted(ends))
            raise UserError(
                f"{type(model).__name__} has no parameter {name} (target_parameters)."
                + (f" Did you mean {', '.join(near)}?" if near else "")
            )
    for name, module in model.named_modules():
        bare = plain_name(name)
        around = model.get_submodule(bare)
        for parameter, _ in module.named_parameters(recurse=False):
            key = f"{bare}.{parameter}"
            if not names_parameter(wanted, key):
                continue
            wrapped = isinstance(around, BaseTunerLayer) and type(around) is not ParamWrapper
            if wrapped or (name and is_target(config, bare)):
                raise UserError(
                    f"{key} is named by target_parameters, and the module that holds it is adapted "
                    "as a whole: leave it out of target_modules (target_modules=[] names none)"
                )
            if not name:
                raise UserError(
                    f"{parameter} is a parameter of the model itself: PEFT can wrap only modules "
                    "inside a model, so put the model into another one"
                )
            if is_trained_in_full(config, bare):
                continue
            yield Target(key, module, ParamWrapper, parameter)


def check_adaptable(target: Target) -> None:
    """Raise ValueError if a weight cannot be adapted; says why."""
    name, base, kind = target.name, target.base, target.kind
    if kind.is_quantized:
        check_in_memory(name, base, target.weight)
        return
    if target.parameter not in base._parameters and kind.is_plain(base):
        raise UserError(
            f"the weight of {name} is computed from others at every call (weight_norm, "
            "spectral_norm, prune, a parametrization): a change of it in memory would be lost. "
            "Make it an ordinary weight first (remove_parametrizations, remove_weight_norm, "
            "prune.remove), or leave it out with exclude_modules"
        )
    if isinstance(base, NonDynamicallyQuantizableLinear) and not target.is_inner:
        raise UserError(
            f"Target module {name} is a {type(base).__name__}, a part of torch's attention, which "
            "reads its weight: name the attention instead, and both of its weights are adapted"
        )
    if not target.is_inner and not kind.is_plain(base):
        raise UserError(
            f"Target module {name} is a {type(base).__name__}, which is not supported: it computes "
            f"something else than {kind.adapts} do, or changes its weight. Leave it out with "
            "exclude_modules"
        )
    weight = target.weight
    if weight.layout is not torch.strided:
        raise UserError(
            f"the weight of {name} is sparse ({weight.layout}), and a change of it would not be: "
            "make it dense (to_dense), or leave it out with exclude_modules"
        )
    if weight.dtype not in SUPPORTED_DTYPES:
        raise UserError(
            f"the weight of {name} is stored as {weight.dtype} (quantized?): ROSA needs "
            "float32, float64, float16 or bfloat16 weights, which it changes in place, or linear "
            "layers that bitsandbytes, HQQ or torchao has quantized"
        )
    check_in_memory(name, base, weight)
    in_rows = cut_dim(weight) == 0 and is_fully_sharded(base)
    at_hand = is_in_part(weight) or (is_cut(weight) and (kind.runs_in_shards or in_rows))
    in_part = is_sharded(weight) and not at_hand
    in_part |= weight.numel() < (kind.numbers(base) or 0)
    if weight.numel() == 0 or in_part or (weight.ndim < 2 and kind is not ParamWrapper):
        raise UserError(
            f"the weight of {name} is empty or sharded over processes (shape "
            f"{tuple(weight.shape)}): attach ROSA to the whole model, and shard it then "
            "(fully_shard, DeepSpeed). Of a model that is sharded before, it adapts what "
            "fully_shard has cut along the first dimension, over all processes, and of tensor "
            "parallelism linear layers, cut once (colwise, rowwise): leave others out with "
            "exclude_modules"
        )
    if in_rows and own_part(weight).device.type != weight.device_mesh.device_type:  # type: ignore
        raise UserError(
            f"the weight of {name} is offloaded by FSDP (fsdp_cpu_offload, CPUOffloadPolicy), and "
            "the factors beside it would stay there while it is computed: leave that out"
        )
    if isinstance(base, (nn.Embedding, nn.EmbeddingBag)) and base.max_norm is not None:
        raise UserError(
            f"{name} is of an embedding with max_norm, which writes into its weight at every call: "
            "leave it out, or set max_norm to None"
        )
    if kind is ParamWrapper and weight.ndim not in (2, 3):
        raise UserError(
            f"{name} has {weight.ndim} dimensions: target_parameters are matrices (out, in), or "
            "stacks of them (experts, out, in). Leave it out"
        )


def fingerprint_of_sound(target: Target) -> tuple[float, float]:
    """Of the weight as it lies in memory; ValueError if it has NaN or infinity."""
    found = fingerprint(whole(target.view.matrix))
    # The norm has read the whole weight already; that of large numbers can overflow.
    if not math.isfinite(found[0]) and not are_finite([target.weight.detach()]):
        raise UserError(
            f"the weight of {target.name} has NaN or infinity: the checkpoint is broken or was "
            "converted to a precision that does not hold it"
        )
    return found


def near_names(config: PeftConfig, model: nn.Module) -> str:
    """A sentence with the names of the model that come near what was not found."""
    wanted = getattr(config, "target_modules", None) or ()
    known = [n for n, m in model.named_modules() if kind_of(m)]
    there = sorted({name.rpartition(".")[2] for name in known})
    if isinstance(wanted, str) and wanted in there:
        return f" A string is a regular expression for whole names: give a list, [{wanted!r}]."
    wanted = [wanted] if isinstance(wanted, str) else sorted(wanted)
    near = [n for w in wanted for n in difflib.get_close_matches(w.rpartition(".")[2], there)]
    if near:
        return f" Did you mean {', '.join(dict.fromkeys(near))}?"
    return f" Layers of this model: {', '.join(there[:20])}." if there else ""
