"""The adapted layer: a linear layer whose weight is trained in a random subspace.

The weight in memory is ``W_0 + sum of offsets O`` of the adapters in use, and the forward pass adds
``s B A``; see `RosaLayer` for the invariant that every order of calls keeps.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from rosa import drawing, subspace
from rosa.config import RosaConfig
from rosa.errors import UserError
from rosa.fused import adapted_linear, can_fuse
from rosa.lowrank import LowRank, full_precision
from rosa.offset import Offset, OffsetDict
from rosa.sketch import Sketch, Watch
from rosa.versions import Versions, same_state

_HALF = (torch.float16, torch.bfloat16)
# An offset is compressed when it has this many times the terms that any matrix of its shape needs:
# not at every resample once it is of full rank, since that costs about as much as a full SVD.
_MOST_TERMS = 1.5
SUPPORTED_DTYPES = (*_HALF, torch.float32, torch.float64)


class RosaLayer(BaseTunerLayer):
    """The state of one adapted weight, and every change of it.

    Invariant: the weight in memory is W_0 plus `in_weight` of every adapter, where W_0 is the
    pretrained weight. `_sync` brings `in_weight` to what the layer's state asks for:

    - merged: the whole change O + s B A of the merged adapters, and nothing of the others;
    - disabled: nothing, so the weight is the pretrained one;
    - else: the offset O of each active adapter; the forward pass adds s B A.

    One adapter's offset goes in and out of a float32 weight without drift: what was added is taken
    out again, and ((w + o) - o) is reached after the first round and stays (Knuth, The Art of
    Computer Programming 2, 4.2.2, theorem D). That does not hold for several changes that take
    turns, nor for the coarse rounding of half precision: there an exact copy of the pretrained
    weight is kept in main memory while anything stands in the weight, and the weight in memory is
    always that copy plus what is wanted, rounded once.
    """

    adapter_layer_names = ("rosa_A", "rosa_B")
    other_param_names = ("r", "alpha", "scaling", "rosa_dropout", "rosa_config", "rosa_offset")

    base_layer: nn.Module
    rosa_A: nn.ParameterDict
    rosa_B: nn.ParameterDict

    def __init__(
        self, base_layer: nn.Module, name: str, fingerprint: tuple[float, float] | None = None
    ) -> None:
        self.base_layer = base_layer
        self.name = name  # the module's name in the model: for the draws and for messages
        self.r: dict[str, int] = {}
        self.alpha: dict[str, float | None] = {}
        self.scaling: dict[str, float] = {}
        self.rosa_config: dict[str, RosaConfig] = {}
        self.rosa_dropout = nn.ModuleDict()
        self.rosa_A = nn.ParameterDict()
        self.rosa_B = nn.ParameterDict()
        self.rosa_offset = OffsetDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

        base = self.get_base_layer()
        self.fan_in_fan_out = isinstance(base, Conv1D)  # its weight is stored (in, out)
        self.out_features, self.in_features = self._weight().shape
        self._pretrained: Tensor | None = None  # the exact copy of W_0 (out, in), where one is kept
        self._versions = Versions()
        self._fingerprint = fingerprint
        self.base_fingerprint()
        self._loaded_marks: dict[str, int] | None = None
        self._sketches: dict[str, Sketch] = {}  # of the adapters that are watched

    # -- the weight in memory ------------------------------------------------------------------

    def _weight(self) -> Tensor:
        """The base layer's weight in memory as (out, in): a view, without gradient history."""
        weight: Tensor = self.get_base_layer().weight.detach()  # type: ignore[assignment]
        return weight.T if self.fan_in_fan_out else weight

    def _work_dtype(self) -> torch.dtype:
        stored = self.get_base_layer().weight.dtype
        return torch.float64 if stored == torch.float64 else torch.float32

    def base_fingerprint(self) -> tuple[float, float] | None:
        """See `rosa.subspace.fingerprint`, of the pretrained weight; None on the meta device."""
        if self._fingerprint is None and not self._weight().is_meta:
            changed = any(self.standing().values())
            weight = self.pretrained_weight() if changed else self._weight()
            self._fingerprint = subspace.fingerprint(weight)
        return self._fingerprint

    def _wanted(self, name: str) -> LowRank | None:
        """What of an adapter the layer's state asks for in the weight in memory."""
        entry = self.rosa_offset[name]
        if self.merged_adapters:
            if name not in self.merged_adapters:
                return None
            return entry.in_weight if entry.merged else self.whole_change(name)
        if self._disable_adapters or name not in self.active_adapters:
            return None
        return entry.terms

    def standing(self) -> dict[str, LowRank | None]:
        """What of each adapter stands in the weight in memory."""
        return {name: entry.in_weight for name, entry in self.rosa_offset.entries.items()}

    @torch.no_grad()
    def _sync(self, leaving: str | None = None) -> None:
        """Bring the weight in memory to what the layer's state asks for.

        Args:
            leaving: an adapter that is being deleted: nothing of it is wanted.
        """
        entries = self.rosa_offset.entries
        before = self.standing()
        wanted = {name: None if name == leaving else self._wanted(name) for name in entries}
        if not same_state(before, wanted):
            weight = self._weight()
            check_in_memory(self.name, self.get_base_layer())
            if self._pretrained is not None and self._versions.changed_by_others(weight):
                self._pretrained = None  # what others wrote into the weight is part of it
            if self._pretrained is None and self._needs_a_copy(wanted):
                copy = self.pretrained_weight().to(weight.dtype)
                self._pretrained = copy.to("cpu", memory_format=torch.contiguous_format)
            self._versions.leaving(weight, before)
            if self._pretrained is None:
                for name, change in wanted.items():
                    if change is not entries[name].in_weight:
                        _add(weight, entries[name].in_weight, -1)
                        _add(weight, change, +1)
            else:
                _write_sum(weight, self._pretrained, wanted.values())
            for name, entry in entries.items():
                entry.in_weight = wanted[name]
            self._versions.arrived(weight, wanted)
        if all(change is None for change in wanted.values()):
            self._pretrained = None  # the weight itself is the copy
        for name, entry in entries.items():
            entry.merged = name in self.merged_adapters and name != leaving

    def _needs_a_copy(self, wanted: dict[str, LowRank | None]) -> bool:
        """Whether taking out what was added would not give the pretrained weight back for long."""
        weight = self._weight()
        something = any(change is not None and change.rank for change in wanted.values())
        several = len(wanted) > 1 or bool(self.merged_adapters)
        return something and not weight.is_meta and (several or weight.dtype in _HALF)

    @torch.no_grad()
    def pretrained_weight(self) -> Tensor:
        """W_0 (out, in) in float32 (float64 for a float64 layer): a copy, whatever is in use."""
        dtype, weight = self._work_dtype(), self._weight()
        if self._pretrained is not None and not self._versions.changed_by_others(weight):
            return self._pretrained.to(weight.device, dtype, copy=True)
        weight = weight.to(dtype, copy=True)
        for entry in self.rosa_offset.entries.values():
            _add(weight, entry.in_weight, -1)
        return weight

    def give_pretrained_weight(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """In a state dict, let W_0 stand where the weight in memory holds an offset.

        Args:
            state_dict: the model's, or what is being saved of it; may lack the base weight.
            prefix: the layer's name in it, with a dot.
        """
        key = f"{prefix}base_layer.weight"
        if key in state_dict and any(self.standing().values()):
            pretrained = self.pretrained_weight().to(state_dict[key].dtype)
            state_dict[key] = pretrained.T.contiguous() if self.fan_in_fan_out else pretrained

    @torch.no_grad()
    def learned(self, adapter: str) -> LowRank:
        """The current factors' product s B A: a copy, in the offset's dtype, on their device."""
        dtype = self._work_dtype()
        b, a = self.rosa_B[adapter].to(dtype), self.rosa_A[adapter].to(dtype, copy=True)
        return LowRank(b * self.scaling[adapter], a)

    def whole_change(self, adapter: str) -> LowRank:
        """All that the adapter changes about the pretrained weight: O + s B A, in main memory."""
        return self.rosa_offset[adapter].terms + self.learned(adapter).to("cpu")

    def drawn(self, adapter: str) -> LowRank | None:
        """S B A as the factors were last drawn: the offset's last r terms take it out again.

        None where nothing is taken out: the factors were drawn at zero, or with ``init_weights``
        off, or were not drawn yet.
        """
        config, terms, r = (
            self.rosa_config[adapter],
            self.rosa_offset[adapter].terms,
            self.r[adapter],
        )
        if config.directions == "zero" or not config.init_weights or terms.rank < r:
            return None
        start = terms[-r:]
        return LowRank(-start.B, start.A)

    def is_untouched(self, adapter: str) -> bool:
        """Whether the adapter is as it was made: not trained, not resampled, not loaded."""
        start, draws = self.rosa_offset[adapter].terms, self.rosa_offset[adapter].draws
        if draws == 0:  # it waits for a file
            return start.rank == 0
        now = self.learned(adapter).to("cpu")
        if start.rank == 0:  # drawn at zero
            return not now.B.any()
        return torch.equal(start.A, now.A) and torch.equal(start.B, -now.B)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's whole change of the weight, in the base weight's own shape."""
        if adapter not in self.rosa_offset:
            raise UserError(f"layer {self.name} has no adapter {adapter!r}")
        delta = self.whole_change(adapter).to(self._weight().device).dense()
        delta = delta.to(self.rosa_A[adapter].dtype)
        return delta.T if self.fan_in_fan_out else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: the change is additive."""
        return True

    # -- adapters ------------------------------------------------------------------------------

    def update_layer(
        self, adapter_name: str, r: int, alpha: float | None, config: RosaConfig
    ) -> None:
        """Add an adapter to this layer and draw its first subspace.

        Not drawn are factors on the meta device and those of an adapter made for inference
        (``inference_mode``): both wait for a file. Until then they leave the model as it is.
        """
        r = min(r, self.in_features, self.out_features)
        self.r[adapter_name], self.alpha[adapter_name] = r, alpha
        self.scaling[adapter_name] = self.scaling_at(adapter_name, r)
        self.rosa_config[adapter_name] = config
        dropout = nn.Dropout(config.rosa_dropout) if config.rosa_dropout > 0 else nn.Identity()
        self.rosa_dropout[adapter_name] = dropout
        self.rosa_A[adapter_name] = nn.Parameter(torch.zeros(r, self.in_features))
        self.rosa_B[adapter_name] = nn.Parameter(torch.zeros(self.out_features, r))
        self.rosa_offset[adapter_name] = Offset(
            LowRank.zero(self.out_features, self.in_features, self._work_dtype())
        )
        self._move_adapter_to_device_of_base_layer(adapter_name)
        on_meta = self.rosa_A[adapter_name].is_meta or self._weight().is_meta
        if not on_meta and not config.inference_mode:
            start = self._draw(adapter_name, self.pretrained_weight())
            if config.init_weights:
                self.rosa_offset[adapter_name].terms = start.to("cpu")
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def scaling_at(self, adapter: str, r: int) -> float:
        """The factor s of an adapter's product, if it were of rank r."""
        alpha = self.alpha[adapter]
        return 1.0 if alpha is None else alpha / r

    def resize(self, adapter: str, r: int) -> None:
        """Give the factors another rank, and zeros until they are drawn or loaded.

        They stay the same Parameter objects; the config's `rank_pattern` follows.
        """
        config = self.rosa_config[adapter]
        self.r[adapter], self.scaling[adapter] = r, self.scaling_at(adapter, r)
        shapes = (r, self.in_features), (self.out_features, r)
        for factor, shape in zip((self.rosa_A[adapter], self.rosa_B[adapter]), shapes, strict=True):
            new = torch.zeros(shape, dtype=factor.dtype, device=factor.device)
            # Data of another dtype in between: only so does autograd forget the old shape while
            # someone still holds a loss.
            other = torch.float32 if factor.dtype == torch.float64 else torch.float64
            factor.grad, factor.data = None, new.to(other)
            factor.data = new
        name = f"^{re.escape(self.name)}"  # before other patterns, which may match it too
        others = {key: rank for key, rank in config.rank_pattern.items() if key != name}
        config.rank_pattern = {name: r, **others}

    @torch.no_grad()
    def _draw(
        self,
        adapter: str,
        weight: Tensor,
        change: LowRank | None = None,
        rank: int | None = None,
        places: Tensor | None = None,
    ) -> LowRank:
        """Draw the factors, or terms of them; returns what takes those out of the weight.

        Nothing is changed if that fails.

        Args:
            adapter: whose factors.
            weight: (out, in), in the work dtype; not changed.
            change: to be added to the weight first.
            rank: of the new factors, if it is not r.
            places: the terms to draw, in rising order, where the others stay; None draws all.
        """
        r = rank or self.r[adapter]
        config, sketch = self.rosa_config[adapter], self._sketches.pop(adapter, None)
        sides = subspace.rank_of_sides(config.side, r)
        if places is not None:
            sides = drawing.sides_of(self, adapter, places)
        a, b = drawing.draw(
            self,
            adapter,
            weight,
            change,
            sides=sides,
            scaling=self.scaling_at(adapter, r),
            sketch=sketch if config.is_informed else None,
        )
        if r != self.r[adapter]:
            self.resize(adapter, r)
        if places is None:
            self.rosa_A[adapter].copy_(a)
            self.rosa_B[adapter].copy_(b)
        else:
            self.rosa_A[adapter][places] = a.to(self.rosa_A[adapter])
            self.rosa_B[adapter][:, places] = b.to(self.rosa_B[adapter])
        self.rosa_offset[adapter].draws += 1
        # From the factors as they are now stored: their rounding cancels too.
        drawn = self.learned(adapter)
        if places is not None:
            drawn = drawn[places]
        if config.directions == "zero":
            return LowRank(drawn.B[:, :0], drawn.A[:0])
        return LowRank(-drawn.B, drawn.A)

    def watch(self, adapter: str) -> None:
        """Begin to sum up where the loss gradient lies, in backward passes, until the next draw."""
        config, entry = self.rosa_config[adapter], self.rosa_offset[adapter]
        self._sketches[adapter] = Sketch(
            self.out_features,
            self.in_features,
            subspace.rank_of_sides(config.side, self.r[adapter]),
            # Not the draw's own, which goes on from its beginning.
            subspace.generator(config.seed, f"{self.name}.{adapter}.watch", entry.draws),
            like=self._weight().new_empty((), dtype=self._work_dtype()),
        )

    def forget(self, adapter: str) -> None:
        """Drop what was summed up since `watch`."""
        self._sketches.pop(adapter, None)

    def watched(self, adapter: str) -> Sketch | None:
        """What was summed up since `watch`, if that was called since the last draw."""
        return self._sketches.get(adapter)

    @torch.no_grad()
    def resample(self, adapter: str, lasts: Tensor | None = None, rank: int | None = None) -> None:
        """Merge the adapter's product into its offset and draw a new subspace.

        What the layer computes stays the same to rounding, and the factors stay the same
        Parameter objects. Use `rosa.resample`, which also clears the optimizer's state.

        Args:
            adapter: whose product.
            lasts: which of its terms stay as they are, as `rosa.drawing.lasting` finds them: (r,),
                of bool.
            rank: of the new subspace, if it is not r; without `lasts`.
        """
        entry, r = self.rosa_offset[adapter], self.r[adapter]
        learned, weight = self.learned(adapter), self._weight()
        spent = None
        if lasts is not None and lasts.any():
            spent = torch.arange(r)[~lasts]
            learned = learned[spent]
            drawing.leave_lasting(self, adapter, self._sketches[adapter], lasts)
        start = self._draw(adapter, weight.to(self._work_dtype()), learned, rank, spent)
        change = (learned + start).joined()
        if spent is None:
            terms, last = entry.terms + change.to("cpu"), start.rank
        else:
            begun, fresh = entry.terms[-r:], start.to("cpu")  # see `drawn`
            begun_now = LowRank(
                begun.B.index_copy(1, spent, fresh.B), begun.A.index_copy(0, spent, fresh.A)
            )
            terms = entry.terms[:-r] + begun[spent] + learned.to("cpu") + begun_now
            terms, last = terms.joined(), r
        if terms.rank > _MOST_TERMS * min(self.out_features, self.in_features):
            settled = terms.rank - last
            terms = terms[:settled].compressed() + terms[settled:]
        entry.terms = terms
        if self._pretrained is None and entry.in_weight is not None:
            # In one pass over the weight: cheaper than the old offset out and the new one in.
            self._versions.leaving(weight, self.standing())
            with full_precision():
                weight.addmm_(change.B, change.A)
            entry.in_weight = entry.terms
            self._versions.arrived(weight, self.standing())
        else:
            self._sync()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; nothing of it stays in the weight."""
        self.forget(adapter_name)
        if adapter_name in self.merged_adapters:
            self.merged_adapters.remove(adapter_name)
        self._sync(leaving=adapter_name)
        super().delete_adapter(adapter_name)
        self._sync()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapter(s); their offsets take the place of the others' in the weight."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._sync()

    def enable_adapters(self, enabled: bool) -> None:
        """Put the adapters' offsets into the weight, or take them (and what is merged) out."""
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)
        self._sync()

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
        names = [name for name in names if name in self.rosa_offset]
        if not names:
            return
        if safe_merge:
            merged = self.pretrained_weight()
            for name in [*self.merged_adapters, *names]:
                _add(merged, self.whole_change(name), +1)
            if not torch.isfinite(merged.to(self._weight().dtype)).all():
                raise UserError(
                    f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to "
                    f"be broken (layer {self.name}): load an earlier checkpoint"
                )
        self.merged_adapters.extend(names)
        self._sync()

    def unmerge(self) -> None:
        """Take all merged adapters out of the weight; the layer is as before the merge."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.merged_adapters.clear()
        self._sync()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer with the adapters merged, or with the pretrained weight (PEFT's hook)."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        else:
            self.merged_adapters.clear()
        if not self.merged:
            self._disable_adapters = True
            self._sync()
        return self.get_base_layer()


class RosaLinear(nn.Module, RosaLayer):
    """ROSA on `nn.Linear` or on transformers' `Conv1D` (a linear layer stored transposed)."""

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
        RosaLayer.__init__(self, base_layer, name, fingerprint)
        self._active_adapter = adapter_name
        self.register_state_dict_post_hook(_after_save)
        self.register_load_state_dict_pre_hook(_before_load)
        self.register_load_state_dict_post_hook(_after_load)
        self.update_layer(adapter_name, r, alpha, config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus ``s B A x`` per active adapter; (..., in) to (..., out)."""
        if self._disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        active = [name for name in self.active_adapters if name in self.rosa_A]
        for name in active:
            # Torch would compute with whatever lies in memory.
            if self.rosa_A[name].is_meta and not x.is_meta:
                raise UserError(
                    f"the factors of layer {self.name} are not in memory: load the adapter's file "
                    "first (low_cpu_mem_usage), or use the model without offloading (device_map)"
                )
        result = self._compute(x, active, *args, **kwargs)
        if self._sketches and result.requires_grad:
            for name in active:
                if name in self._sketches:
                    result = Watch.apply(result, x, self._sketches[name])
        return result

    def _compute(self, x: Tensor, active: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if len(active) == 1 and not args and not kwargs:
            (name,) = active
            a, b, dropout = self.rosa_A[name], self.rosa_B[name], self.rosa_dropout[name]
            if isinstance(dropout, nn.Identity) and can_fuse(self.base_layer, x, a):
                return adapted_linear(self.base_layer, x, a, b, self.scaling[name])
        result = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        for name in active:
            a, b, scaling = self.rosa_A[name], self.rosa_B[name], self.scaling[name]
            hidden = F.linear(self.rosa_dropout[name](self._cast_input_dtype(x, a.dtype)), a)
            if scaling != 1.0:
                hidden = hidden * scaling  # on r numbers a token, not on the layer's whole output
            result = result + F.linear(hidden, b)
        return result.to(dtype)

    def __repr__(self) -> str:
        return "rosa." + super().__repr__()


def check_in_memory(name: str, base: nn.Module) -> None:
    """Raise ValueError if accelerate has offloaded the weight of a base layer."""
    if base.weight.is_meta and hasattr(base, "_hf_hook"):  # type: ignore[union-attr]
        raise UserError(
            f"the weight of {name} is offloaded by accelerate: ROSA changes weights in memory, so "
            "load the model without offloading (device_map)"
        )


def _add(weight: Tensor, change: LowRank | None, sign: int) -> None:
    """Add a change to a weight (+1) or take it out (-1), in place and in the weight's own dtype.

    The product is rounded to that dtype first: taking it out is then the exact opposite of adding
    it, which the promise of no drift needs.
    """
    if change is not None and change.rank:
        weight.add_(change.to(weight.device).dense().to(weight.dtype), alpha=sign)


@full_precision()
def _write_sum(weight: Tensor, pretrained: Tensor, changes: Iterable[LowRank | None]) -> None:
    """Write the pretrained weight plus changes into a weight, rounded once."""
    pretrained = pretrained.to(weight.device)
    found = [change for change in changes if change is not None and change.rank]
    if len(found) != 1 or weight.dtype in _HALF:
        total = pretrained.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        for change in found:
            _add(total, change, +1)
        weight.copy_(total)
        return
    (change,) = (change.to(weight.device) for change in found)
    torch.addmm(pretrained, change.B, change.A, out=weight)  # one pass over the weight


def _after_save(layer: RosaLinear, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Give the pretrained weight to who reads the base model's state dict.

    The state dict of a whole PeftModel keeps the weight in memory, without a copy, and the marks
    say what is in it. That of a module inside it is how PEFT reads the base model's weights.
    """
    if "base_model.model." in prefix:
        return
    layer.give_pretrained_weight(state_dict, prefix)
    for adapter in layer.rosa_offset:
        state_dict[f"{prefix}rosa_offset.{adapter}.in_weight"] = torch.tensor(0)


def _before_load(layer: RosaLinear, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Note what of each adapter will be in the base weight once the state dict is loaded.

    A state dict with the base weight brings a weight of its own: it holds of each adapter what the
    mark saved beside the offset says, and is the pretrained weight where there is none.
    """
    for adapter, factor in layer.rosa_A.items():
        loaded = state_dict.get(f"{prefix}rosa_A.{adapter}", factor)
        if layer.rosa_config[adapter].allocate and len(loaded) != layer.r[adapter]:
            layer.resize(adapter, len(loaded))  # a draw has given it this rank
    layer._loaded_marks = None
    if f"{prefix}base_layer.weight" in state_dict:
        marks = {a: f"{prefix}rosa_offset.{a}.in_weight" for a in layer.rosa_offset}
        layer._loaded_marks = {a: int(state_dict.get(key, 0)) for a, key in marks.items()}


def _after_load(layer: RosaLinear, _: Any) -> None:
    """Bring the weight in memory in line with the factors and offsets that were loaded."""
    for adapter, entry in layer.rosa_offset.entries.items():
        if layer._loaded_marks is None:
            entry.merged = False  # merged from factors that may just have been replaced
        else:
            mark = layer._loaded_marks[adapter]
            entry.in_weight = (None, entry.terms, layer.whole_change(adapter))[mark]
            entry.merged = mark == 2
            layer._fingerprint = None
            layer._pretrained = None
    layer._loaded_marks = None
    layer._sync()
