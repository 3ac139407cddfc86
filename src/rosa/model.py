"""`RosaModel`: finds the layers, puts ROSA into them, saves and loads. Registers ROSA with PEFT."""

from __future__ import annotations

import contextlib
import copy
import difflib
import math
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
)
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    register_peft_method,
)
from peft.utils.constants import DUMMY_TARGET_MODULES, EMBEDDING_LAYER_NAMES
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import get_pattern_key
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rosa.config import RosaConfig
from rosa.errors import UserError, UserTypeError
from rosa.layer import SUPPORTED_DTYPES, RosaLayer, RosaLinear, check_in_memory
from rosa.lowrank import LowRank, are_finite
from rosa.memory import make_private, place, tenants, weight_owners
from rosa.sharding import check_unsharded, is_sharded
from rosa.subspace import fingerprint, same_fingerprint

# The heads that PEFT's classes for a task train in full; some add them to the config only once the
# layers have been replaced.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

# Names that adapters' files and layers use, and where a model's own modules are to be found in one.
_FILE_PARTS = {
    *("A", "B", "draws", "in_weight", "rosa", "rosa_A", "rosa_B", "rosa_offset", "rosa_dropout"),
    *("base_layer", "base_model", "model", "modules_to_save", "original_module", "weight", "bias"),
}
_OWN_MODULES = ("rosa_A", "rosa_B", "rosa_offset", "rosa_dropout", "base_layer")
_COMPILED = "_orig_mod."
"""What torch.compile puts before the names of what a model is made of."""


def rosa_layers(model: nn.Module) -> Iterator[tuple[str, RosaLinear]]:
    """The adapted layers of a model with their names in it."""
    for name, module in model.named_modules():
        if isinstance(module, RosaLinear):
            yield name, module


class RosaModel(BaseTuner):
    """A model with ROSA in its linear layers: `peft.get_peft_model(model, RosaConfig(...))`.

    Everything that PEFT's users know works: several adapters, `set_adapter`, `disable_adapter`,
    `merge_and_unload`, `save_pretrained`. The base weights in memory are changed while an adapter
    is in use, and are the pretrained ones again whenever it is disabled, unloaded or deleted.
    """

    prefix = "rosa_"
    tuner_layer_cls = RosaLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    # -- attaching -----------------------------------------------------------------------------

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Put an adapter into the model; on an error the model is left as it was.

        Raises:
            NoMatchingPeftModuleError: no module has such a name; names that come near are listed.
            ValueError: a layer cannot be adapted, or the model has an adapter of that name; says
                which and why.
        """
        config = _rosa_config(self.peft_config[adapter_name])
        _check_adapter_name(adapter_name, model)
        _check_modules_to_save(config, adapter_name)
        self._remove_adapter(model, adapter_name)  # an untouched one, as a failed load leaves
        wanted = config.target_modules
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError as error:
            self._remove_adapter(model, adapter_name)
            hint = _all_in_full(config, model) or f"{error}{_near_names(config, model)}"
            config.target_modules = wanted
            raise NoMatchingPeftModuleError(hint) from None
        except Exception:
            self._remove_adapter(model, adapter_name)
            if isinstance(wanted, str):  # "all-linear" has become the names of this model's layers
                config.target_modules = wanted
            raise
        if isinstance(config.target_modules, set):  # the file is for models that are not compiled
            names = {n.replace(_COMPILED, "") for n in config.target_modules}
            config.target_modules = names  # type: ignore[assignment]  # as PEFT has it
        if (source := self._copied_as(adapter_name)) is not None:
            for layer in _layers_of(model, adapter_name).values():
                layer.copy_adapter(source, adapter_name)

    def _copied_as(self, adapter_name: str) -> str | None:
        """The trained adapter that a new one is a copy of, or None if it begins anew.

        TRL's trainers make the reference of a trained adapter by adding one called "ref" with the
        very same config, and then copy the parameters that have LoRA's names.
        """
        config = self.peft_config[adapter_name]
        same = [name for name, c in self.peft_config.items() if c is config]
        others = [name for name in same if name != adapter_name]
        return others[0] if adapter_name == "ref" and others else None

    def _remove_adapter(self, model: nn.Module, adapter_name: str) -> None:
        for name, layer in list(rosa_layers(model)):
            if adapter_name in layer.rosa_offset:
                layer.delete_adapter(adapter_name)
            if not layer.rosa_offset.keys():
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, layer.get_base_layer())

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Check every layer that will be adapted, before any is touched."""
        config = _rosa_config(peft_config)
        check_unsharded(model)
        self._fingerprints: dict[str, tuple[float, float]] = {}
        capped = []
        owners, self._tenants = weight_owners(model), tenants(model)
        _check_full_training(config, model)
        _resolve_all_linear(config, model)
        wrapped = tuple(
            f"{name}."
            for name, m in model.named_modules()
            if isinstance(m, AuxiliaryTrainingWrapper)
        )
        for name, module in self._targets(config, model):
            if name.startswith(wrapped):
                raise UserError(
                    f"{name} lies in a module that another adapter trains in full, which this one "
                    "would adapt: give both the same modules_to_save, or leave it out with "
                    "exclude_modules"
                )
            weight = _adaptable_weight(name, module)
            if name in EMBEDDING_LAYER_NAMES and not _has_embeddings(model):
                raise UserError(
                    f"{name} of a {type(model).__name__} cannot be adapted: PEFT would save the "
                    "model's embeddings with it, and there are none. Train it in full "
                    f"(modules_to_save=[{name!r}]), or leave it out of target_modules"
                )
            shared = [n for n in owners[place(weight)] if n.removesuffix(".base_layer") != name]
            if shared:
                raise UserError(
                    f"the weight of {name} is shared with {', '.join(shared)} (tied weights): "
                    "ROSA changes the weight in memory and would change those too. Leave it out "
                    f"(exclude_modules=[{name!r}]) or untie it first (for tied embeddings load the "
                    "model with tie_word_embeddings=False and clone the weight)"
                )
            if not weight.is_meta:
                self._fingerprints[name] = _fingerprint_of_sound(name, module, weight.detach())
            r, _ = _rank_and_alpha(config, name)
            if r > min(weight.shape):
                capped.append(f"{name} ({r} to {min(weight.shape)})")
        if capped:
            warnings.warn(
                "the rank is larger than the smaller side of some weights and is capped there: "
                + ", ".join(capped[:5])
                + (f" and {len(capped) - 5} more" if len(capped) > 5 else ""),
                stacklevel=2,
            )

    def _targets(self, config: RosaConfig, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The modules that PEFT's matching will hand to `_create_and_replace`, with their names."""
        if config.target_modules == DUMMY_TARGET_MODULES:
            return
        inside = tuple(f"{name}." for name, _ in rosa_layers(model))
        for name, module in model.named_modules():
            adapted = name.startswith(inside)
            if name and not adapted and self._check_target_module_exists(config, name):
                yield name, module

    @staticmethod
    def _check_target_module_exists(
        peft_config: PeftConfig, key: str
    ) -> bool | re.Match[str] | None:
        """PEFT's matching of names, less the modules that are trained in full anyway."""
        if is_trained_in_full(_rosa_config(peft_config), key):
            return _ExcludedModule()  # type: ignore[return-value]
        return BaseTuner._check_target_module_exists(peft_config, key)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = _rosa_config(peft_config)
        r, alpha = _rank_and_alpha(config, current_key)
        if isinstance(target, RosaLayer):
            target.update_layer(adapter_name, r, alpha, config)
            return
        fingerprint = self._fingerprints.get(current_key)
        make_private(target, self._tenants)
        name = current_key.replace(_COMPILED, "")
        layer = RosaLinear(target, adapter_name, config, r, alpha, name, fingerprint)
        if isinstance(parent, nn.TransformerEncoderLayer):
            # Its fast path reads the weights instead of calling the layers, unless one has a hook.
            layer.register_forward_pre_hook(_no_fast_path)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        """Put a module in another's place.

        What comes back when the model is unloaded is whole, on its device, and may be of any kind,
        such as a head of several layers: PEFT's own method gives it the replaced one's `weight`.
        """
        if isinstance(new_module, RosaLayer):
            super()._replace_module(parent, child_name, new_module, child)
        else:
            setattr(parent, child_name, new_module)

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's hook for adapters that differ within a batch: refused."""
        if kwargs.get("adapter_names") is not None:
            raise UserError(
                "adapter_names: ROSA cannot mix adapters in a batch, since the weight in memory "
                "belongs to one; call set_adapter and run the batch of each by itself"
            )
        yield

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
    ) -> None:
        """Make a new adapter whose change of the weights is a weighted sum of others' changes.

        That is ``sum of w_i (O_i + s_i B_i A_i)``, exactly: the new adapter draws factors of its
        own, and its offset holds the sum less what was drawn. It can be trained, saved and switched
        to like any other; it is not active, and its factors are frozen until it is.

        Args:
            adapters: adapters of this model; their ranks, layers and settings may differ.
            weights: one for each; may be negative.
            adapter_name: of the new one, whose config is the first one's, with the largest rank.
            combination_type: "linear" or "cat", which are the same here.

        Raises:
            ValueError: an argument is none of these, or an adapter trains whole modules besides
                (`modules_to_save`), which are not summed. Nothing has been changed then.
        """
        _check_weighted(self, adapters, weights, adapter_name, combination_type)
        layers = {
            name: layer
            for name, layer in rosa_layers(self.model)
            if any(adapter in layer.rosa_offset for adapter in adapters)
        }
        self.peft_config[adapter_name] = _weighted_config(self, adapters, layers)
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        for layer in layers.values():
            layer.rosa_A[adapter_name].requires_grad_(False)
            layer.rosa_B[adapter_name].requires_grad_(False)
            entry = layer.rosa_offset[adapter_name]
            total = LowRank.zero(layer.out_features, layer.in_features, entry.terms.B.dtype)
            for adapter, weight in zip(adapters, weights, strict=True):
                if adapter in layer.rosa_offset:
                    change = layer.whole_change(adapter)
                    total = total + LowRank(change.B * weight, change.A)
            if total.rank > min(layer.out_features, layer.in_features):
                total = total.compressed()
            entry.terms = (total + entry.terms).joined()

    # -- saving and loading --------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        """The adapter, complete: A, B, the offset and the count of draws of every layer.

        Also writes the fingerprint of the base weights into the config, which is saved next.
        """
        found = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        found = {key: value for key, value in found.items() if not key.endswith(".in_weight")}
        layers = _layers_of(model, adapter_name)
        for name, layer in layers.items():
            # PEFT saves the base weight of an adapted output embedding beside the adapter.
            layer.give_pretrained_weight(state_dict, f"{name}.")
        absent = [k for name in layers for k in _state_keys(name, adapter_name) if k not in found]
        if absent:
            raise UserError(
                f"the state dict to save lacks {len(absent)} tensors of adapter {adapter_name!r}, "
                f"such as {absent[0]}: factors without their offsets would load as another model. "
                "Give the whole model's state_dict(), or none"
            )
        _rosa_config(config).base_fingerprint = _fingerprint_of(layers)
        return found

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """A key as it stands in an adapter's file, whether or not the model is compiled."""
        return super()._remove_adapter_name_from_key(key.replace(_COMPILED, ""), adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Check that an adapter file is whole and fits the model, before anything is changed.

        Raises:
            ValueError: it is not a ROSA adapter, is incomplete, or was made for other shapes.
        """
        remapped = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        layers = _layers_of(model, adapter_name)
        _check_adapter_file(layers, adapter_name, remapped)
        _warn_of_another_base(_rosa_config(config).base_fingerprint, layers)
        return remapped


def is_rosa_key(key: str) -> bool:
    """Whether a key of a state dict is of a factor or an offset (not of a head called rosa_...)."""
    return re.search(r"\.rosa_(A|B|offset)(\.|$)", key) is not None


def _resolve_all_linear(config: RosaConfig, model: nn.Module) -> None:
    """Let `target_modules="all-linear"` be the names of the layers that can be adapted."""
    if not isinstance(config.target_modules, str) or config.target_modules.lower() != "all-linear":
        return
    model = getattr(model, _COMPILED.rstrip("."), model)
    found = _rosa_config(_maybe_include_all_linear_layers(copy.copy(config), model)).target_modules
    names = {n for n in found or () if not is_trained_in_full(config, n)}
    if not names:
        return
    others = {n for n in names if not _is_plain(model.get_submodule(n))}
    # PEFT looks at names alone: with such a head it saves the embeddings too, and fails there.
    others |= {n for n in names if n in EMBEDDING_LAYER_NAMES and not _has_embeddings(model)}
    config.target_modules = list(names - others)
    if others:
        warnings.warn(
            f"all-linear leaves out {', '.join(sorted(others)[:5])}: of a class that computes or "
            "is read otherwise than a linear layer, or a head that PEFT cannot save as one",
            stacklevel=2,
        )


def _is_plain(module: nn.Module) -> bool:
    """Whether a linear layer computes what one does; a subclass may do something else."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    forward = type(base).forward
    if isinstance(base, NonDynamicallyQuantizableLinear):
        return False
    if not isinstance(base, nn.Linear) or forward is nn.Linear.forward or base.weight.is_meta:
        return True
    if base.weight.dtype not in SUPPORTED_DTYPES or not base.weight.numel():
        return True  # refused for that, by name
    probe = torch.linspace(-1, 1, base.in_features, device=base.weight.device)[None]
    probe = probe.to(base.weight.dtype)
    try:
        with torch.no_grad():
            found, expected = forward(base, probe), nn.Linear.forward(base, probe)
    except Exception:  # it wants other arguments
        return False
    if not isinstance(found, torch.Tensor) or found.shape != expected.shape:
        return False
    eps = torch.finfo(expected.dtype).eps
    close = float((found - expected).norm()) <= 32 * eps * float(expected.norm())
    return close or not bool(expected.isfinite().all())  # a broken weight is refused by name


def _has_embeddings(model: nn.Module) -> bool:
    if not isinstance(model, PreTrainedModel):
        return True
    try:
        model.get_input_embeddings()
    except NotImplementedError:
        return False
    return True


def is_trained_in_full(config: RosaConfig, name: str) -> bool:
    """Whether PEFT trains this module, or one that it lies in, in full: then it is not adapted.

    By the endings that PEFT goes by: `classifier` is `pre_classifier` too.
    """
    heads = (*(config.modules_to_save or ()), *_HEADS.get(config.task_type or "", ()))
    parts = name.split(".")
    return any(".".join(parts[: i + 1]).endswith(heads) for i in range(len(parts)))


def _check_full_training(config: RosaConfig, model: nn.Module) -> None:
    """Raise ValueError if an adapter is to train modules in full that another one adapts."""
    found = [name for name, _ in rosa_layers(model) if is_trained_in_full(config, name)]
    if found:
        raise UserError(
            f"{', '.join(found[:5])} would be trained in full (modules_to_save, or the head of "
            f"task_type={config.task_type}), but another adapter adapts that layer: delete_adapter "
            "the other first, or leave the module out of modules_to_save"
        )


def _all_in_full(config: RosaConfig, model: nn.Module) -> str:
    """Says so if all that was named to be adapted is trained in full; else empty."""
    bare = copy.copy(config)
    bare.modules_to_save = bare.task_type = None
    wanted = RosaModel._check_target_module_exists
    names = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
    full = [n for n in names if wanted(bare, n) and is_trained_in_full(config, n)]
    if not full:
        return ""
    return (
        f"nothing is left to adapt: all that target_modules names ({', '.join(full[:5])}) is "
        f"trained in full already, by modules_to_save or as the head of task_type="
        f"{config.task_type}. Name layers inside the model, such as "
        "target_modules='all-linear', or take those names out of modules_to_save"
    )


def _rosa_config(config: PeftConfig) -> RosaConfig:
    if not isinstance(config, RosaConfig):
        raise UserTypeError(f"RosaModel needs a RosaConfig, got {type(config).__name__}")
    return config


def _check_weighted(
    model: RosaModel, adapters: list[str], weights: list[float], name: str, kind: str
) -> None:
    there = list(model.peft_config)
    if kind not in ("linear", "cat"):
        raise UserError(
            f"combination_type must be 'linear' or 'cat', got {kind!r}: ROSA's sums are exact, and "
            "their rank is what it is"
        )
    if isinstance(adapters, str) or not adapters:
        raise UserError(
            f"adapters must be a list of names, of {', '.join(there)}; got {adapters!r}"
        )
    if len(adapters) != len(weights):
        raise UserError(f"{len(adapters)} adapters need as many weights, got {len(weights)}")
    if not all(math.isfinite(weight) for weight in weights):
        raise UserError(f"weights must be finite numbers, got {weights}")
    if name in there:
        raise UserError(f"the model already has an adapter {name!r}: choose another adapter_name")
    if unknown := [adapter for adapter in adapters if adapter not in there]:
        raise UserError(f"the model has no adapter {unknown[0]!r}; it has {', '.join(there)}")
    for adapter in adapters:
        config = model.peft_config[adapter]
        if not isinstance(config, RosaConfig):
            raise UserError(f"{adapter!r} is not a ROSA adapter: it cannot be a part of the sum")
        for layer in _layers_of(model.model, adapter).values():
            factors = [layer.rosa_A[adapter].detach(), layer.rosa_B[adapter].detach()]
            if factors[0].is_meta or not are_finite(factors):
                raise UserError(
                    f"the factors of {adapter!r} in layer {layer.name} are not in memory, or not "
                    "finite: load its file first"
                )
        wrappers = [m for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
        if config.modules_to_save or any(
            adapter in getattr(wrapper, "modules_to_save", ()) for wrapper in wrappers
        ):
            raise UserError(
                f"{adapter!r} trains modules in full (modules_to_save), which are not summed: "
                "give adapters without them"
            )


def _weighted_config(
    model: RosaModel, adapters: list[str], layers: dict[str, RosaLinear]
) -> RosaConfig:
    """The first one's, for all of the layers, each with its largest rank."""
    configs = [_rosa_config(model.peft_config[adapter]) for adapter in adapters]
    config = copy.deepcopy(configs[0])
    config.r = max(each.r for each in configs)
    config.inference_mode, config.init_weights = False, True
    ranks = {n: max(la.r[a] for a in adapters if a in la.rosa_offset) for n, la in layers.items()}
    config.rank_pattern = {
        f"^{re.escape(name)}": rank
        for name, rank in ranks.items()
        if rank != min(config.r, layers[name].in_features, layers[name].out_features)
    }
    if layers.keys() != _layers_of(model.model, adapters[0]).keys():
        config.target_modules = "|".join(map(re.escape, layers))
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    return config


def _rank_and_alpha(config: RosaConfig, name: str) -> tuple[int, float | None]:
    r_key = get_pattern_key(list(config.rank_pattern), name)
    alpha_key = get_pattern_key(list(config.alpha_pattern), name)
    return config.rank_pattern.get(r_key, config.r), config.alpha_pattern.get(
        alpha_key, config.alpha
    )


def _check_adapter_name(name: str, model: nn.Module) -> None:
    layers = _layers_of(model, name).values()
    if not all(layer.is_untouched(name) for layer in layers):
        raise UserError(
            f"the model already has a trained ROSA adapter {name!r}: choose another adapter_name, "
            "or delete_adapter it first (of a PeftModel; unload() takes all of them out)"
        )
    tensors = (*model.named_parameters(), *model.named_buffers())
    taken = {part for each, _ in (*model.named_modules(), *tensors) for part in each.split(".")}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):  # of whatever method
            taken -= module._get_available_adapters()
    taken |= _FILE_PARTS
    if name in taken or not name or "." in name:
        raise UserError(
            f"an adapter cannot be named {name!r}: a part of the model has that name"
            if name in taken
            else f"an adapter's name must not be empty or have a dot, got {name!r}"
        ) from None


def _check_modules_to_save(config: RosaConfig, adapter_name: str) -> None:
    """Raise ValueError if PEFT, which goes by endings, would take a part of our layers for one."""
    for wanted in config.modules_to_save or ():
        for own in (*_OWN_MODULES, adapter_name):
            if own.endswith(wanted):
                raise UserError(
                    f"modules_to_save={[wanted]}: PEFT takes every module whose name ends so, and "
                    f"{own!r}, a part of each adapted layer, does. Give more of the name of the "
                    f"module that is meant, such as 'head.{wanted}'"
                )


def _no_fast_path(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A hook that does nothing."""


def _adaptable_weight(name: str, module: nn.Module) -> torch.Tensor:
    """The weight that ROSA would adapt in a module; ValueError says why it cannot."""
    base = module.get_base_layer() if isinstance(module, RosaLayer) else module
    if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not isinstance(
        module, RosaLayer
    ):
        raise UserError(
            f"{name} already carries another PEFT method ({type(module).__name__}): merge or "
            "unload it before you add ROSA"
        )
    if not isinstance(base, (nn.Linear, Conv1D)) or isinstance(
        base, NonDynamicallyQuantizableLinear
    ):
        raise UserError(
            f"Target module {name} is a {type(base).__name__}, which is not supported: ROSA adapts "
            "torch.nn.Linear and transformers' Conv1D. Name other target_modules, or leave it out "
            "with exclude_modules"
        )
    if "weight" not in base._parameters:
        raise UserError(
            f"the weight of {name} is computed from others at every call (weight_norm, "
            "spectral_norm, prune, a parametrization): a change of it in memory would be lost. "
            "Make it an ordinary weight first (remove_parametrizations, remove_weight_norm, "
            "prune.remove), or leave it out with exclude_modules"
        )
    if not _is_plain(base):
        raise UserError(
            f"Target module {name} is a {type(base).__name__}, which is not supported: it computes "
            "something else than a linear layer does. Leave it out with exclude_modules"
        )
    if base.weight.dtype not in SUPPORTED_DTYPES:
        raise UserError(
            f"the weight of {name} is stored as {base.weight.dtype} (quantized?): ROSA needs "
            "float32, float64, float16 or bfloat16 weights, since it changes them in place"
        )
    check_in_memory(name, base)
    in_part = is_sharded(base.weight) or (
        isinstance(base, nn.Linear) and base.weight.numel() < base.in_features * base.out_features
    )
    if base.weight.ndim != 2 or base.weight.numel() == 0 or in_part:
        raise UserError(
            f"the weight of {name} is empty or sharded over processes (shape "
            f"{tuple(base.weight.shape)}): attach ROSA to the whole model, and train it "
            "data-parallel without sharding of the weights"
        )
    return base.weight


def _fingerprint_of_sound(
    name: str, module: nn.Module, weight: torch.Tensor
) -> tuple[float, float]:
    """Of the weight as it lies in memory; ValueError if it has NaN or infinity."""
    found = fingerprint(weight.T if isinstance(module, Conv1D) else weight)
    # The norm has read the whole weight already; that of large numbers can overflow.
    if not math.isfinite(found[0]) and not are_finite([weight]):
        raise UserError(
            f"the weight of {name} has NaN or infinity: the checkpoint is broken or was converted "
            "to a precision that does not hold it"
        )
    return found


def _near_names(config: PeftConfig, model: nn.Module) -> str:
    wanted = getattr(config, "target_modules", None) or ()
    wanted = [wanted] if isinstance(wanted, str) else sorted(wanted)
    linear = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
    there = sorted({name.rpartition(".")[2] for name in linear})
    near = [n for w in wanted for n in difflib.get_close_matches(w.rpartition(".")[2], there)]
    if near:
        return f" Did you mean {', '.join(dict.fromkeys(near))}?"
    return f" Linear layers of this model: {', '.join(there[:20])}." if there else ""


def _layers_of(model: nn.Module, adapter_name: str) -> dict[str, RosaLinear]:
    # The keys of a state dict do not have the prefix of an FSDP wrapper, the modules' names do.
    return {
        name.removeprefix("_fsdp_wrapped_module."): layer
        for name, layer in rosa_layers(model)
        if adapter_name in layer.rosa_offset
    }


def _state_keys(layer_name: str, adapter_name: str) -> list[str]:
    prefix = f"{layer_name}." if layer_name else ""
    offset = [f"{prefix}rosa_offset.{adapter_name}.{part}" for part in ("A", "B", "draws")]
    return [f"{prefix}rosa_A.{adapter_name}", f"{prefix}rosa_B.{adapter_name}", *offset]


def _check_adapter_file(
    layers: dict[str, RosaLinear], adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> None:
    """Raise ValueError unless a state dict holds exactly these layers' adapter."""
    expected = {key for name in layers for key in _state_keys(name, adapter_name)}
    found = {key for key in state_dict if is_rosa_key(key)}
    if not found:
        example = next(iter(state_dict), "nothing")
        raise UserError(
            f"this is not a ROSA adapter: its file holds no rosa_ weights (but {example}). "
            "Check the folder, or load it with the config of the method that wrote it"
        )
    missing, foreign = sorted(expected - found), sorted(found - expected)
    if missing or foreign:
        raise UserError(
            "the adapter file does not fit this model: "
            + (f"it lacks {len(missing)} tensors, such as {missing[0]}; " if missing else "")
            + (
                f"{len(foreign)} of its tensors have no place, such as {foreign[0]}; "
                if foreign
                else ""
            )
            + "it is incomplete, or belongs to another base model or other target_modules"
        )
    wrong = []
    for name, layer in layers.items():
        a, b, offset_a, offset_b, draws = (state_dict[k] for k in _state_keys(name, adapter_name))
        r, out_features, in_features = layer.r[adapter_name], layer.out_features, layer.in_features
        if layer.rosa_config[adapter_name].allocate:
            r = len(a)  # it may have been given another rank since, and the layer follows
        if tuple(a.shape) != (r, in_features) or tuple(b.shape) != (out_features, r):
            wrong.append(
                f"{name}: file A {tuple(a.shape)}, B {tuple(b.shape)}, "
                f"model A {(r, in_features)}, B {(out_features, r)}"
            )
        elif offset_a.shape != (offset_b.shape[1], in_features) or len(offset_b) != out_features:
            wrong.append(f"{name}: the offset's shapes do not fit each other or the weight")
        elif not are_finite([a, b, offset_a, offset_b]):
            wrong.append(f"{name}: NaN or infinity")
        elif draws.numel() != 1 or draws.is_floating_point() or int(draws) < 0:
            wrong.append(f"{name}: the count of draws is not a number")
    if wrong:
        raise UserError(
            f"the adapter does not fit the model in {len(wrong)} of {len(layers)} layers: "
            + "; ".join(wrong[:3])
            + ". Load it on the base model and with the config that it was trained with"
        )


def _fingerprint_of(layers: dict[str, RosaLinear]) -> dict[str, Any]:
    found = {layer.name: layer.base_fingerprint() for layer in layers.values()}
    dtypes = {str(layer.get_base_layer().weight.dtype) for layer in layers.values()}
    return {
        "dtypes": sorted(dtype.removeprefix("torch.") for dtype in dtypes),
        "layers": {name: list(value) for name, value in found.items() if value is not None},
    }


def _warn_of_another_base(saved: dict[str, Any] | None, layers: dict[str, RosaLinear]) -> None:
    if not saved:
        return
    here = _fingerprint_of(layers)
    eps = 0.0
    if saved["dtypes"] != here["dtypes"]:  # one of them was rounded
        dtypes = [getattr(torch, name) for name in {*saved["dtypes"], *here["dtypes"]}]
        eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    differ = [
        name
        for name, value in here["layers"].items()
        if name in saved["layers"]
        and not same_fingerprint(tuple(value), tuple(saved["layers"][name]), eps)
    ]
    if differ:
        warnings.warn(
            f"this adapter was trained on other base weights: {len(differ)} of {len(layers)} "
            f"layers differ ({', '.join(differ[:5])}{', ...' if len(differ) > 5 else ''}). It will "
            "not give the model that was trained: load the base model that it was made from",
            stacklevel=2,
        )


register_peft_method(name="rosa", config_cls=RosaConfig, model_cls=RosaModel)
