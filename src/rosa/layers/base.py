"""`RosaLayer`: PEFT's verbs for one adapted weight. Each ends in bringing it to what is wanted.

The weight in memory is ``W_0 + sum of offsets O`` of the adapters in use, and the forward pass adds
``s B A``; see `RosaLayer` for the invariant that every order of calls keeps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from rosa.algebra.lowrank import LowRank
from rosa.config import RosaConfig
from rosa.errors import UserError
from rosa.layers import arriving, parts, statedict
from rosa.layers.adapter import Adapter
from rosa.layers.drawing import Factors, draw, take, waits_for_file
from rosa.layers.dropped import take_out_with
from rosa.layers.effective import effective_weight
from rosa.layers.front import Front, check_seen, forget_stand_in, in_turn
from rosa.layers.kind import Kind
from rosa.layers.offset import OffsetDict
from rosa.layers.replicated import average_gradients
from rosa.layers.tracing import is_traced
from rosa.layers.undoing import ask_again, asked_of, or_as_before, or_else
from rosa.pretrained.sharding import check_kept, from_first, is_fully_sharded
from rosa.pretrained.weight import WRITING, BaseWeight
from rosa.pretrained.zero3 import is_in_part


class RosaLayer(Front, Kind):
    """The adapters of one weight. A kind of layer (`Kind`) is a subclass that computes with it.

    Invariant: what stands in the weight in memory (`BaseWeight`) is what the layer's state asks
    for, which `synchronize` brings about:

    - merged: the whole change O + s B A of the merged adapters, and nothing of the others;
    - disabled: nothing, so the weight is the pretrained one;
    - else: the offset O of each active adapter; the forward pass adds s B A.

    Args:
        base_layer: what is adapted; of a kind that `matches`.
        adapter_name: of its first adapter.
        config: that adapter's settings.
        r: its rank here.
        alpha: its alpha here.
        name: the module's name in the model, for the draws and for messages.
        fingerprint: of the pretrained weight, if it is known.

    Attributes:
        adapters: what each adapter is here, by name.
        is_in_shards: whether tensor parallelism had cut the weight, and so cuts the factors.
        is_in_rows: whether FSDP 2 had cut the weight, so that every process has all of the factors.
    """

    adapter_layer_names = ("rosa_A", "rosa_B")
    other_param_names = ("rosa_dropout", "rosa_offset")

    weight_class: type[BaseWeight] = BaseWeight
    arrived: statedict.Arrived | None = None  # by state dicts since the layer was last used
    cast_input_dtype_enabled = True  # which `peft.helpers.disable_input_dtype_casting` looks for
    is_behind = False  # something kept the weight from what is asked for, until the next use
    was_called = False
    was_read = False  # its weight's values were, which a model may do instead

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: RosaConfig,
        r: int,
        alpha: float | None,
        name: str,
        fingerprint: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.adapters: dict[str, Adapter] = {}
        self.rosa_dropout = nn.ModuleDict()
        self.rosa_A = nn.ParameterDict()
        self.rosa_B = nn.ParameterDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        base = self.get_base_layer()
        view = self.view_of(base, self.parameter_name)
        self._base_weight = self.weight_class(name, view, fingerprint)
        self.rosa_offset = OffsetDict(self.adapters, self._base_weight)
        is_cut = self._base_weight.shard is not None
        self.is_in_rows = is_cut and is_fully_sharded(base)
        self.is_in_shards = is_cut and not self.is_in_rows
        self.base_fingerprint()
        if is_cut:
            self._base_weight.refresh()
        self._active_adapter = adapter_name
        self.register_state_dict_post_hook(statedict.after_save)
        self.register_load_state_dict_pre_hook(parts.before_load)
        self.register_load_state_dict_post_hook(arriving.after_load)
        self.update_layer(adapter_name, r, alpha, config)
        take_out_with(self, self.base_weight, self.merged_adapters)
        self._made = True

    # -- the weight in memory ------------------------------------------------------------------

    @property
    def base_weight(self) -> BaseWeight:
        """The weight and what stands in it."""
        base = self.get_base_layer()
        if self._base_weight.view.module is not base:  # others have put it in its place
            self._base_weight.view.module = base
        return self._base_weight

    @property
    def out_features(self) -> int:
        """The rows of the weight as a matrix."""
        return self._base_weight.shape[-2]

    @property
    def in_features(self) -> int:
        """The columns of the weight as a matrix."""
        return self._base_weight.shape[-1]

    def base_fingerprint(self) -> tuple[float, float] | None:
        """See `fingerprints.fingerprint`, of the pretrained weight; None on the meta device."""
        self.settle()
        return self.base_weight.fingerprint()

    def pretrained_weight(self) -> Tensor:
        """W_0 (out, in) in float32 (float64 for a float64 layer): a copy, whatever is in use."""
        self.settle()
        return self.base_weight.pretrained()

    def pretrained_as_stored(self) -> Tensor:
        """W_0 in the base weight's own shape and precision: a copy, whatever is in use."""
        self.settle()
        return self.base_weight.pretrained_as_stored()

    def _wanted(self, adapter: Adapter) -> LowRank | None:
        """What of an adapter the layer's state asks for in the weight in memory."""
        if self.merged_adapters:
            if adapter.name not in self.merged_adapters:
                return None
            held = self._base_weight.held.get(adapter.name)
            as_merged = adapter.merged and held is not None and held is not adapter.terms
            return held if as_merged else adapter.change()
        if self._disable_adapters or adapter.name not in self.active_adapters:
            return None
        return adapter.terms

    @property
    def _takes_turns(self) -> bool:
        """Whether different changes take turns in the weight."""
        return len(self.adapters) > 1 or bool(self.merged_adapters)

    @torch.no_grad()
    def synchronize(self, leaving: str | None = None, accept: bool = False) -> None:
        """Bring the weight in memory to what the layer's state asks for.

        Args:
            leaving: an adapter that is being deleted: nothing of it is wanted.
            accept: what others have written into the weight as a part of W_0, with a warning.
        """
        with WRITING, self.base_weight.at_hand(written=True):
            forget_stand_in(self)
            self.is_behind = True
            self._take_account(leaving, accept)
            wanted = {
                name: change
                for name, adapter in self.adapters.items()
                if name != leaving and (change := self._wanted(adapter)) is not None
            }
            self.base_weight.put(wanted, self._takes_turns)
            for name, adapter in self.adapters.items():
                adapter.merged = name in self.merged_adapters and name != leaving
            self.is_behind = False

    def settle(self, looks: bool = True) -> None:
        """Take account of what state dicts brought and of what others wrote, before any use.

        Args:
            looks: at the weight's numbers too, for what autograd does not tell of.

        Raises:
            UserError: an adapter was loaded in part; or others have written into the weight while
                an offset stood in it, so that it is not known any more what it holds.
        """
        with WRITING:
            if looks:
                self.base_weight.look()
            if self.arrived is not None or self.is_behind or self.base_weight.is_changed():
                self.synchronize()

    def _take_account(self, leaving: str | None = None, accept: bool = False) -> None:
        if self.arrived is not None:
            arriving.take_all(self, self.arrived, leaving)
            self.arrived = None
        self.base_weight.look()
        if self.base_weight.is_changed():
            self.base_weight.account_for_writes(accept)
            self._forget_merges()

    def _forget_merges(self) -> None:
        for name, adapter in self.adapters.items():
            adapter.merged &= name in self._base_weight.held

    @torch.no_grad()
    def bare(self, overwritten: bool = False) -> None:
        """Take everything out of the weight in memory, until `synchronize`.

        Args:
            overwritten: the weight is about to be overwritten: only forget what stands in it.
        """
        with WRITING:
            if overwritten:
                self.base_weight.overwritten()
            else:
                with self.base_weight.at_hand(written=True):
                    if self.arrived is None:
                        self._take_account()
                    self.base_weight.put({}, several=False)
            self._forget_merges()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or cast the layer; a cast is of the pretrained weight, with nothing else in it."""
        parameter = self.base_weight.parameter
        moved = fn(torch.empty(0, dtype=parameter.dtype, device=parameter.device))
        check_kept(parameter, moved)
        dtype = moved.dtype
        if dtype == parameter.dtype or self.arrived is not None:
            self.base_weight.let_go()
            super()._apply(fn, recurse)
            self.base_weight.moved()
            return self
        merged = {name: adapter.merged for name, adapter in self.adapters.items()}
        standing = self.base_weight.held
        own = {n for n, change in standing.items() if change is self.adapters[n].terms}
        self.bare()
        self.base_weight.let_go()
        try:
            super()._apply(fn, recurse)
        finally:
            self.base_weight.expect_write()
            dtype = self.base_weight.work_dtype
            for name, adapter in self.adapters.items():
                adapter.terms = adapter.terms.to(dtype=dtype)
                adapter.merged = merged[name]
            back = {n: change.to(dtype=dtype) for n, change in standing.items()}
            back |= {n: self.adapters[n].terms for n in own}
            self.base_weight.put(back, self._takes_turns)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy (deepcopy, pickle): its weight is another tensor, with a count of its own."""
        super().__setstate__(state)
        self.base_weight.copied()
        take_out_with(self, self.base_weight, self.merged_adapters)

    def __repr__(self) -> str:
        return "rosa." + super().__repr__()

    # -- what it computes ----------------------------------------------------------------------

    @property
    def adapters_in_use(self) -> list[Adapter]:
        """The active adapters that this layer has."""
        return [self.adapters[name] for name in self.active_adapters if name in self.adapters]

    def _in_use(self, x: Tensor, traced: bool) -> list[Adapter]:
        """The adapters whose s B A the forward pass adds, after what has to be done before it."""
        with in_turn():
            return self._settled(x, traced)

    def _settled(self, x: Tensor, traced: bool) -> list[Adapter]:
        if self.arrived is not None and self.base_weight.is_lent:
            raise UserError(
                f"a state dict has come to layer {self.name}, and is not in its weight yet: call "
                "model.set_adapter(name) before the next forward pass of a sharded model"
            )
        if not traced:
            forget_stand_in(self)
        behind = self.arrived is not None or self.is_behind
        if behind or (not traced and self.base_weight.is_written()):
            self.synchronize()
        if not traced and not self.was_called:
            self.check_parts()
            self.was_called = True
        if self._disable_adapters and self.merged:
            self.unmerge()
        if self._disable_adapters or self.merged:
            return []
        active = self.adapters_in_use
        self._share_gradients(active)  # a file may have brought other parameters
        for adapter in active:
            if self.rosa_A[adapter.name].is_meta and not x.is_meta:
                raise UserError(
                    f"the factors of layer {self.name} are not in memory: load the adapter's file "
                    "first (low_cpu_mem_usage), or use the model without offloading (device_map)"
                )
        return active

    def _share_gradients(self, adapters: Iterable[Adapter]) -> None:
        if self.is_in_rows and (shard := self.base_weight.shard) is not None:
            for adapter in adapters:
                average_gradients(adapter.factors, shard.of)

    def check_parts(self) -> None:
        """Raise UserError for quantized weights whose codes lie in ZeRO 3's parts."""
        if is_in_part(self._base_weight.parameter) and self.is_quantized:
            base = type(self.get_base_layer()).__name__
            raise UserError(
                f"layer {self.name} is a {base}, which ROSA does not adapt in ZeRO 3: leave it out "
                "with exclude_modules, or train with ZeRO 2, where every process has it whole"
            )

    @property
    def weight(self) -> Tensor:
        """The weight that the layer computes with, for models that read it; see `changed_weight`.

        It is computed when a value of it is first needed.
        """
        return self.changed_weight(self._note_read)

    def changed_weight(self, note: Callable[[], None] | None = None) -> Tensor:
        """W_0 + O + s B A, in the base weight's own shape; gradients reach the factors."""
        with in_turn():
            if not is_traced():
                self.settle(looks=False)
            weight = self.base_weight.parameter
            if self._disable_adapters or self.merged:
                return weight
            if not is_traced():
                check_seen(self)
            for adapter in self.adapters_in_use:
                if not adapter.is_on_meta:
                    weight = effective_weight(weight, adapter, self.base_weight.view, note)
            return weight

    def _note_read(self) -> None:
        self.was_read = True

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's whole change of the weight, in the base weight's own shape."""
        if adapter not in self.adapters:
            raise UserError(f"layer {self.name} has no adapter {adapter!r}")
        base = self.base_weight
        delta = self.whole_change(adapter).to(base.parameter.device).dense()
        return base.view.as_stored(delta.to(self.rosa_A[adapter].dtype))

    def whole_change(self, adapter: str) -> LowRank:
        """All that the adapter changes about the pretrained weight: O + s B A, in main memory."""
        self.settle()
        return self.adapters[adapter].change()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's `convert_to_lora` makes the same of it, which it does of linear layers."""
        return self.is_linear

    # -- adapters ------------------------------------------------------------------------------

    def update_layer(
        self, adapter_name: str, r: int, alpha: float | None, config: RosaConfig
    ) -> None:
        """Add an adapter to this layer and draw its first subspace.

        Not drawn are factors on the meta device and those of an adapter that is loaded, or made for
        inference (``inference_mode``): they wait for a file, and leave the model as it is.
        """
        dropout, base = config.rosa_dropout, self.base_weight
        self.rosa_dropout[adapter_name] = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        how = base.shape, base.work_dtype, (self.rosa_A, self.rosa_B)
        adapter = Adapter(adapter_name, self.name, config, r, alpha, *how)
        self.adapters[adapter_name] = adapter
        frozen = {**self.frozen_peft_weight_names, adapter_name: adapter.stays}
        self.frozen_peft_weight_names = frozen  # of the instance: PEFT's own is the class's
        adapter.place(base.parameter, cast=True)
        if self.is_in_shards:
            adapter.cut_as(base.parameter)
        self._share_gradients([adapter])
        on_meta = adapter.is_on_meta or base.parameter.is_meta
        if not on_meta and not waits_for_file(config):
            drawn = draw(adapter, self.pretrained_weight(), base.norm)
            if base.shard is not None:  # for no two processes draw the same
                a, b = drawn
                drawn = from_first(a, base.parameter), from_first(b, base.parameter)
            adapter.terms = take(adapter, drawn).to("cpu")
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        """Of factors that a file has brought (low_cpu_mem_usage), which PEFT's own would round."""
        if adapter_name in self.adapters:
            self.adapters[adapter_name].place(self.base_weight.parameter, device)

    def copy_adapter(self, source: str, target: str) -> None:
        """Make one adapter what another one is: factors, offset and count of draws."""
        self.adapters[target].become(self.adapters[source])
        self.synchronize()

    def watch(self, adapter: str) -> None:
        """Begin to sum up where the loss gradient lies, in backward passes, until the next draw."""
        base = self.base_weight
        like = torch.empty((), dtype=base.work_dtype, device=base.parameter.device)
        self.adapters[adapter].watch(like)

    @torch.no_grad()
    def draw(self, adapter: str) -> Factors:
        """New factors, of the weight with what the adapter has learned; nothing is changed."""
        return draw(self.adapters[adapter], *self.whole(adapter))

    @torch.no_grad()
    def whole(self, adapter: str) -> tuple[Tensor, float, LowRank]:
        """The weight, its norm, what was learned: all processes must ask for a sharded layer's."""
        self.settle()
        base = self.base_weight
        base.refresh()
        return base.present(), base.norm, self.adapters[adapter].learned()

    @torch.no_grad()
    def resample(self, adapter: str, drawn: Factors) -> None:
        """Merge the adapter's product into its offset and go on with a new subspace.

        What the layer computes stays the same to rounding, and the factors stay the same
        Parameter objects. Use `rosa.resample`, which also clears the optimizer's state.
        """
        self.settle()
        base, one = self.base_weight, self.adapters[adapter]
        with WRITING, base.at_hand(written=True):
            asked, before = asked_of(self), one.state()

            def undo() -> None:
                one.restore(before)
                ask_again(self, asked)

            with or_else(undo):  # one, for between two an interrupt would undo the half
                learned = one.learned()
                change = (learned + take(one, drawn)).joined()
                one.terms = one.next_terms(change.to("cpu"), *base.bounds())
                # In one pass over the weight: cheaper than the old offset out and the new one in.
                if not base.add(adapter, change, one.terms):
                    self.synchronize()

    def keep_adapter(self, adapter_name: str) -> Callable[[], None]:
        """What puts an adapter back, should its deletion end early."""
        places: tuple[Any, ...] = (self.adapters, self.rosa_A, self.rosa_B, self.rosa_dropout)
        places += (self.frozen_peft_weight_names,)
        held = [(place, place[adapter_name]) for place in places if adapter_name in place]

        def put_back() -> None:
            for place, part in held:
                if adapter_name not in place:
                    place[adapter_name] = part

        return put_back

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; nothing of it stays in the weight."""
        with or_as_before(self):
            if adapter_name in self.merged_adapters:
                self.merged_adapters.remove(adapter_name)
            self.synchronize(leaving=adapter_name, accept=True)
            super().delete_adapter(adapter_name)
            self.synchronize()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapter(s); their offsets take the place of the others' in the weight."""
        with or_as_before(self):
            super().set_adapter(adapter_names, inference_mode=inference_mode)
            self.synchronize()

    def enable_adapters(self, enabled: bool) -> None:
        """Put the adapters' offsets into the weight, or take them (and what is merged) out."""
        if enabled:  # `disable_adapter()` ends with it: it is asked for whatever happens
            self._disable_adapters, self.is_behind = False, True
            super().enable_adapters(True)
            return
        with or_as_before(self):
            self.merged_adapters.clear()
            super().enable_adapters(False)
            self.synchronize(accept=True)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Scale an adapter, as other methods of PEFT can; diffusers asks for 1, which it has."""
        if scale != 1:
            raise UserError(
                f"layer {self.name}: an adapter of ROSA is a part of the weight, and has no scale "
                "to set. Of a PeftModel add_weighted_adapter([name], [scale], new_name) makes one "
                "of another strength"
            )

    def scale_layer(self, scale: float) -> None:
        """Scale all active adapters; see `set_scale`."""
        for name in self.active_adapters:
            self.set_scale(name, scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Take `scale_layer` back: nothing is to be done."""

    # -- merging -------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the adapters' whole change into the weight; the active ones if none are named.

        Args:
            safe_merge: check the merged weight first, and raise before anything is changed.
            adapter_names: adapters to merge.

        Raises:
            ValueError: with `safe_merge`, the merged weight has NaN or infinity.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.adapters]
        if not names:
            return
        if safe_merge:
            changes = [self.whole_change(name) for name in [*self.merged_adapters, *names]]
            merged = self.base_weight.with_changes(changes)
            if not merged.to(self.base_weight.stored_dtype).isfinite().all():
                raise UserError(
                    f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to "
                    f"be broken (layer {self.name}): load an earlier checkpoint"
                )
        with or_as_before(self):
            self.merged_adapters.extend(names)
            self.synchronize()

    def unmerge(self) -> None:
        """Take all merged adapters out of the weight; the layer is as before the merge."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        with or_as_before(self):
            self.merged_adapters.clear()
            self.synchronize()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer with the adapters merged, or with the pretrained weight (PEFT's hook)."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        with or_as_before(self):
            if not merge:
                self.merged_adapters.clear()
            if not self.merged:
                self._disable_adapters = True
                self.synchronize(accept=True)
        base, how = self.base_layer, (merge, safe_merge, adapter_names)
        for name, module in self.inner(base).items():
            setattr(base, name, cast(RosaLayer, module).unload_and_optionally_merge_module(*how))
        if isinstance(base, RosaLayer):
            base = base.unload_and_optionally_merge_module(*how)
        return base
