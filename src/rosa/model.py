"""`RosaModel`: finds the layers, puts ROSA into them, saves and loads. Registers ROSA with PEFT."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    register_peft_method,
)
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import get_pattern_key
from torch import nn

from rosa.config import RosaConfig, as_rosa_config
from rosa.errors import NothingToAdaptError, UserError
from rosa.files.beside import (
    check_beside,
    check_tensors,
    held_twice,
    own_tensors,
    tensors_beside,
)
from rosa.files.checkpoint import (
    check_adapter_file,
    fill_in,
    fingerprints_of,
    is_rosa_key,
    state_keys,
    warn_of_another_base,
)
from rosa.files.loading import guard
from rosa.files.restoring import or_without
from rosa.kinds.parameter import ParamWrapper
from rosa.kinds.registry import kind_of
from rosa.layers.arriving import check_of_one_time
from rosa.layers.base import RosaLayer
from rosa.layers.in_model import base_of, layers_of, plain_name, rosa_layers
from rosa.layers.parts import check_not_in_parts
from rosa.layers.statedict import give_pretrained, is_in_parts
from rosa.layers.undoing import or_else
from rosa.packing import keep_order
from rosa.pretrained.memory import Owners, make_private, owners_of, tenants, weight_owners
from rosa.pretrained.sharding import check_shards, is_dtensor, is_fully_sharded, reshard, whole
from rosa.pretrained.zero3 import at_hand
from rosa.switching import all_or_none, enable_all
from rosa.targeting.experts import check_experts
from rosa.targeting.held import check_not_held, give_own, held_outside
from rosa.targeting.in_full import (
    all_in_full,
    check_full_training,
    check_tokens,
    warn_of_statistics,
)
from rosa.targeting.matching import has_embeddings, is_target, resolve_all_linear
from rosa.targeting.names import COMPILED, check_adapter_name, check_modules_to_save
from rosa.targeting.nesting import check_nesting
from rosa.targeting.targets import (
    Target,
    check_adaptable,
    check_same_parameters,
    fingerprint_of_sound,
    near_names,
    targets_of,
)
from rosa.weighted import check_weighted, put_sum, weighted_config

_LONGEST = 1000
"""Characters of a message of PEFT's, which shows all of a regex."""


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
            NothingToAdaptError: no module has such a name; names that come near are listed.
            ValueError: a layer cannot be adapted, or the model has an adapter of that name; says
                which and why.
        """
        config = as_rosa_config(self.peft_config[adapter_name])
        check_adapter_name(adapter_name, model)
        check_modules_to_save(config, adapter_name)
        self._remove_adapter(model, adapter_name)  # an untouched one, as a failed load leaves
        wanted = config.target_modules
        try:
            with or_without(model, adapter_name):
                super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError as error:
            said = str(error)[:_LONGEST]
            hint = all_in_full(config, model) or f"{said}{near_names(config, model)}"
            config.target_modules = wanted
            raise NothingToAdaptError(hint) from None
        except Exception:
            if isinstance(wanted, str):  # "all-linear" has become the names of this model's layers
                config.target_modules = wanted
            raise
        warn_of_statistics(config, model)
        if isinstance(config.target_modules, set):  # the file is for models that are not compiled
            names = {n.replace(COMPILED, "") for n in config.target_modules}
            config.target_modules = names  # type: ignore[assignment]  # as PEFT has it
        if (source := self._copied_as(adapter_name)) is not None:
            for layer in layers_of(model, adapter_name).values():
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
        for name, layer in reversed(list(rosa_layers(model))):  # what lies inside first
            if adapter_name in layer.adapters:
                layer.delete_adapter(adapter_name)
            if not layer.adapters:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, layer.base_layer)

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Check every layer that will be adapted, before any is touched."""
        config, outside = as_rosa_config(peft_config), held_outside(model)
        _check_cut(config, model)
        if any(is_in_parts(layer) for _, layer in rosa_layers(model)):
            raise UserError(
                "the model is in parts over processes (ZeRO 3), and its optimizer knows no further "
                "factors: add or load all adapters before deepspeed.initialize"
            )
        self._fingerprints: dict[str, tuple[float, float]] = {}
        keep_order(model)
        owners, held = weight_owners(model), tenants(model)
        check_full_training(config, model)
        check_same_parameters(config, self.peft_config)
        resolve_all_linear(config, model)
        check_experts(config, model)
        check_tokens(config, model, self.peft_config)
        check_nesting(config, model)
        targets, capped = [], []
        for target in targets_of(config, model):
            targets.append(target)
            with at_hand([target.weight]):
                self._prepare_target(target, model, owners)
                r, most = _rank_and_alpha(config, target.name)[0], min(target.view.shape[-2:])
                if r > most:
                    capped.append(f"{target.name} ({r} to {most})")
        new = ((t.name, t.module) for t in targets if not isinstance(t.module, RosaLayer))
        check_not_held(model, new)
        owners.clear()  # a weight that it holds seems to be another's
        for target in targets:  # here, since PEFT's loops hold the parameters
            own = target.kind.is_quantized or is_dtensor(target.weight)  # memory of its own
            if not isinstance(target.module, RosaLayer) and not own:
                base = self._own_base(target, model, outside)
                make_private(base, target.parameter, held)
        if capped:
            warnings.warn(
                "the rank is larger than the smaller side of some weights and is capped there: "
                + ", ".join(capped[:5])
                + (f" and {len(capped) - 5} more" if len(capped) > 5 else ""),
                stacklevel=2,
            )

    @staticmethod
    def _own_base(target: Target, model: nn.Module, outside: set[str]) -> nn.Module:
        """The module that holds a weight: one of the model's own, where others hold it too."""
        name = target.module_name
        there = model.get_submodule(name)  # not the target's, if that was given for another weight
        shared = there is target.module and name in outside
        if shared and (own := give_own(model, name)) is not None:
            outside.update(f"{name}.{child}" for child in own._modules)  # now the copy's as well
            return own
        return base_of(there)

    def _prepare_target(self, target: Target, model: nn.Module, owners: Owners) -> None:
        name = target.name
        check_adaptable(target)
        if name in EMBEDDING_LAYER_NAMES and not has_embeddings(model):
            raise UserError(
                f"{name} of a {type(model).__name__} cannot be adapted: PEFT would save the "
                "model's embeddings with it, and there are none. Train it in full "
                f"(modules_to_save=[{name!r}]), or leave it out of target_modules"
            )
        names = (plain_name(n) for n in owners_of(target.weight, owners))
        if shared := [n.removesuffix(".weight") for n in names if n != target.place]:
            raise UserError(
                f"the weight of {name} is shared with {', '.join(shared)} (tied weights, or a "
                "buffer in the same memory): ROSA changes the weight in memory and would change "
                f"those too. Leave it out (exclude_modules=[{name!r}]) or untie it first (for tied "
                "embeddings load the model with tie_word_embeddings=False and clone the weight)"
            )
        if not target.weight.is_meta:
            self._fingerprints[name] = fingerprint_of_sound(target)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        """PEFT's choice of modules for the architecture; none where parameters are named."""
        config = as_rosa_config(peft_config)
        known = model_config.get("model_type") in self.target_module_mapping
        if config.target_modules is None and config.target_parameters and not known:
            return config
        return super()._prepare_adapter_config(config, model_config)

    @staticmethod
    def _check_target_module_exists(
        peft_config: PeftConfig, key: str
    ) -> bool | re.Match[str] | None:
        """PEFT's matching of names, less the modules that are trained in full anyway."""
        return is_target(as_rosa_config(peft_config), key)

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
        config = as_rosa_config(peft_config)
        adapted = isinstance(target, RosaLayer) and adapter_name in target.adapters
        if adapted and parameter_name is None:  # with the module that it lies in
            return
        how = adapter_name, config, *_rank_and_alpha(config, current_key)
        with at_hand(target.parameters(), written=True):
            layer = self._adapted(target, current_key, parameter_name, *how)
        if layer is target:
            return
        if isinstance(parent, nn.TransformerEncoderLayer):
            # Its fast path reads the weights instead of calling the layers, unless one has a hook.
            layer.register_forward_pre_hook(_no_fast_path)
        self._replace_module(parent, target_name, layer, target)

    def _adapted(
        self,
        target: nn.Module,
        key: str,
        parameter_name: str | None,
        adapter_name: str,
        config: RosaConfig,
        r: int,
        alpha: float | None,
    ) -> RosaLayer:
        """A module, or one parameter of it, with an adapter: a new layer, or the one there is."""
        base = base_of(target)
        kind = kind_of(base) if parameter_name is None else ParamWrapper
        assert kind is not None  # else `_prepare_model` has refused it
        how = adapter_name, config, r, alpha
        for child, module in kind.inner(base).items():
            setattr(base, child, self._adapted(module, f"{key}.{child}", None, *how))
        if isinstance(target, RosaLayer) and parameter_name in (None, target.parameter_name):
            target.update_layer(adapter_name, r, alpha, config)
            return target
        named = {} if parameter_name is None else {"parameter_name": parameter_name}
        name, fingerprint = key.replace(COMPILED, ""), self._fingerprints.get(key)
        layer = kind(target, adapter_name, config, r, alpha, name, fingerprint, **named)
        layer.take_config(self.model)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        return layer

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        """Put a module in another's place.

        A layer has put its factors on the weight's device, and what comes back when the model is
        unloaded is whole, and may be of any kind, such as a head of several layers: PEFT's own
        method would move the one, and give the other the replaced one's `weight`.
        """
        setattr(parent, child_name, new_module)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapter(s), in all layers or, on an error, in none."""
        reshard(self.model)
        with all_or_none(self):
            super().set_adapter(adapter_name, inference_mode=inference_mode)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        reshard(self.model)
        if enabled:
            enable_all(self)
            return
        with all_or_none(self, settled=False):
            super()._enable_adapter_layers(False)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Put adapters' whole change into the weights; see `RosaLayer.merge`."""
        reshard(self.model)
        with all_or_none(self):
            super().merge_adapter(adapter_names, safe_merge)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter from all layers; nothing of it stays."""
        reshard(self.model)
        configs = dict(self.peft_config)
        kept = [layer.keep_adapter(adapter_name) for _, layer in rosa_layers(self.model)]

        def undo() -> None:
            self.peft_config.update(configs)
            for put_back in kept:
                put_back()

        with all_or_none(self, settled=False), or_else(undo):
            super().delete_adapter(adapter_name)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        reshard(self.model)
        return super()._unload_and_optionally_merge(*args, **kwargs)

    def unmerge_adapter(self) -> None:
        """Take what is merged out of the weights."""
        reshard(self.model)
        with all_or_none(self):
            super().unmerge_adapter()

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
        **others: Any,
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
            others: what PEFT's other combinations take; may be None only.

        Raises:
            ValueError: an argument is none of these, or an adapter trains whole modules or tokens
                besides, which are not summed. Nothing has been changed then.
        """
        check_weighted(self, adapters, weights, adapter_name, combination_type)
        if asked := [name for name, value in others.items() if value is not None]:
            raise UserError(
                f"add_weighted_adapter has no {', '.join(asked)}: ROSA's sums are exact, and leave "
                "no numbers out"
            )
        layers = {
            name: layer
            for name, layer in rosa_layers(self.model)
            if any(adapter in layer.adapters for adapter in adapters)
        }
        self.peft_config[adapter_name] = weighted_config(self, adapters, layers)

        def undo() -> None:
            self._remove_adapter(self.model, adapter_name)
            self.peft_config.pop(adapter_name, None)

        with or_else(undo):
            self.inject_adapter(self.model, adapter_name)
            put_sum(layers, adapters, weights, adapter_name)

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
        for name, layer in layers_of(model, adapter_name).items():
            check_of_one_time(name, layer.adapters[adapter_name], state_dict, f"{name}.")
        found = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        for key in held_twice(model, found):
            del found[key]
        layers = layers_of(model, adapter_name)
        beside = tensors_beside(model, state_dict)
        fill_in(model, layers, adapter_name, beside, found, state_dict)
        found = {k: whole(v) for k, v in found.items() if not k.endswith(".in_weight")}
        for name, layer in layers.items():
            # PEFT saves the base weight of an adapted output embedding beside the adapter.
            give_pretrained(layer, state_dict, f"{name}.")
        for key in beside:  # which PEFT then takes from there
            state_dict[key] = whole(state_dict[key])
        absent = [k for name in layers for k in state_keys(name, adapter_name) if k not in found]
        if absent:
            raise UserError(
                f"the state dict to save lacks {len(absent)} tensors of adapter {adapter_name!r}, "
                f"such as {absent[0]}: factors without their offsets would load as another model. "
                "Give the whole model's state_dict(), or none"
            )
        as_rosa_config(config).base_fingerprint = fingerprints_of(layers)
        return found

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """A key as it stands in an adapter's file, whether or not the model is compiled."""
        return super()._remove_adapter_name_from_key(key.replace(COMPILED, ""), adapter_name)

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
            ValueError: it is not a ROSA adapter, is incomplete, was made for other shapes, or holds
                what is no adapter's.
        """
        remapped = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        layers = layers_of(model, adapter_name)
        for layer in layers.values():
            check_not_in_parts(layer)
        check_tensors(remapped)
        check_adapter_file(layers, adapter_name, remapped)
        beside = {key: value for key, value in remapped.items() if not is_rosa_key(key)}
        biases = cls._get_learnable_bias_state_dict(model, own_tensors(model), config)
        in_file = partial(cls._remove_adapter_name_from_key, adapter_name=adapter_name)
        remapped.update(check_beside(model, adapter_name, beside, biases, in_file))
        warn_of_another_base(as_rosa_config(config).base_fingerprint, layers)
        return remapped


def _check_cut(config: RosaConfig, model: nn.Module) -> None:
    """Raise UserError for what cannot be put into a model that FSDP has cut."""
    check_shards(model)
    if not is_fully_sharded(model):
        return
    reshard(model)
    factors = (
        f for _, layer in rosa_layers(model) for a in layer.adapters.values() for f in a.factors
    )
    if any(map(is_dtensor, factors)):
        raise UserError(
            "the model is sharded over processes (FSDP) with the adapters that it had then: call "
            "get_peft_model, add_adapter or load_adapter for all of them first, and fully_shard or "
            "accelerator.prepare then"
        )
    beside = [
        name for name in ("modules_to_save", "trainable_token_indices") if getattr(config, name)
    ]
    if config.bias != "none":
        beside.append("bias")
    if beside:
        raise UserError(
            f"the model is sharded over processes (FSDP), and what {', '.join(beside)} of the "
            "config trains would be each process's own: leave that out (a task_type with a head "
            "asks for it too), or attach ROSA to the whole model and call fully_shard then"
        )


def _rank_and_alpha(config: RosaConfig, name: str) -> tuple[int, float | None]:
    r_key = get_pattern_key(list(config.rank_pattern), name)
    alpha_key = get_pattern_key(list(config.alpha_pattern), name)
    return config.rank_pattern.get(r_key, config.r), config.alpha_pattern.get(
        alpha_key, config.alpha
    )


def _no_fast_path(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A hook that does nothing."""


register_peft_method(name="rosa", config_cls=RosaConfig, model_cls=RosaModel)
guard()
