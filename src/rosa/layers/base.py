"""The adapted layer: a linear layer whose weight is trained in a random subspace.

The weight in memory is ``W_0 + sum of offsets O`` of the adapters in use, and the forward pass adds
``s B A``; see `RosaLayer` for the invariant that every order of calls keeps.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rosa.algebra import subspace
from rosa.algebra.lowrank import LowRank, full_precision
from rosa.algebra.sketch import Sketch
from rosa.config import RosaConfig
from rosa.errors import UserError
from rosa.layers import drawing, statedict
from rosa.layers.offset import Offset, OffsetDict
from rosa.layers.versions import Versions, same_state

_HALF = (torch.float16, torch.bfloat16)
# An offset is compressed when it has this many times the terms that any matrix of its shape needs:
# not at every resample once it is of full rank, since that costs about as much as a full SVD.
_MOST_TERMS = 1.5
SUPPORTED_DTYPES = (*_HALF, torch.float32, torch.float64)


class RosaLayer(BaseTunerLayer):
    """The state of one adapted weight, and every change of it.

    Invariant: the weight in memory is W_0 plus `in_weight` of every adapter, where W_0 is the
    pretrained weight. `synchronize` brings `in_weight` to what the layer's state asks for:

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
    arrived: statedict.Arrived | None = None  # by state dicts since the layer was last used
    cast_input_dtype_enabled = True  # which `peft.helpers.disable_input_dtype_casting` looks for
    was_called = False
    was_read = False  # its weight's values were, which a model may do instead

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
        self._sketches: dict[str, Sketch] = {}  # of the adapters that are watched

    # -- the weight in memory ------------------------------------------------------------------

    def _weight(self) -> Tensor:
        """The base layer's weight in memory as (out, in): a view, without gradient history."""
        weight: Tensor = self.get_base_layer().weight.detach()  # type: ignore[assignment]
        return weight.T if self.fan_in_fan_out else weight

    @property
    def parameter(self) -> Tensor:
        """The parameter that the weight in memory is."""
        return self.get_base_layer().weight  # type: ignore[return-value]

    def _work_dtype(self) -> torch.dtype:
        stored = self.parameter.dtype
        return torch.float64 if stored == torch.float64 else torch.float32

    def base_fingerprint(self) -> tuple[float, float] | None:
        """See `subspace.fingerprint`, of the pretrained weight; None on the meta device."""
        self.settle()
        if self._fingerprint is None and not self._weight().is_meta:
            changed = any(self._standing().values())
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

    def _standing(self) -> dict[str, LowRank | None]:
        """What of each adapter stands in the weight in memory."""
        return {name: entry.in_weight for name, entry in self.rosa_offset.entries.items()}

    @torch.no_grad()
    def synchronize(self, leaving: str | None = None, accept: bool = False) -> None:
        """Bring the weight in memory to what the layer's state asks for.

        Args:
            leaving: an adapter that is being deleted: nothing of it is wanted.
            accept: what others have written into the weight as a part of W_0, with a warning.
        """
        self._take_account(leaving, accept)
        entries = self.rosa_offset.entries
        self._put({name: None if name == leaving else self._wanted(name) for name in entries})
        for name, entry in entries.items():
            entry.merged = name in self.merged_adapters and name != leaving

    def _put(self, wanted: Mapping[str, LowRank | None]) -> None:
        """Let these stand in the weight in memory, and nothing else; all of it or no change."""
        entries, before = self.rosa_offset.entries, self._standing()
        if not same_state(before, wanted):
            weight, parameter = self._weight(), self.parameter
            check_in_memory(self.name, self.get_base_layer())
            if self._pretrained is None and self._needs_a_copy(wanted):
                copy = self.pretrained_weight().to(weight.dtype)
                self._pretrained = copy.to("cpu", memory_format=torch.contiguous_format)
            if self._pretrained is None:
                changed = [name for name in wanted if wanted[name] is not before[name]]
                steps = [(before[n], -1) for n in changed] + [(wanted[n], +1) for n in changed]
                steps = [
                    (_rounded(change, weight), sign)
                    for change, sign in steps
                    if change is not None and change.rank
                ]
                self._versions.leaving(parameter, before)
                for change, sign in steps:
                    weight.add_(change, alpha=sign)
            else:
                self._versions.leaving(parameter, before)
                _write_sum(weight, self._pretrained, wanted.values())
            for name, entry in entries.items():
                entry.in_weight = wanted[name]
            self._versions.arrived(parameter, self._standing())
        if all(change is None for change in wanted.values()):
            self._pretrained = None  # the weight itself is the copy

    def _needs_a_copy(self, wanted: Mapping[str, LowRank | None]) -> bool:
        """Whether taking out what was added would not give the pretrained weight back for long."""
        weight = self._weight()
        something = any(change is not None and change.rank for change in wanted.values())
        several = len(wanted) > 1 or bool(self.merged_adapters)
        return something and not weight.is_meta and (several or weight.dtype in _HALF)

    @contextlib.contextmanager
    def _or_as_before(self) -> Iterator[None]:
        """Take back what was asked for if the weight cannot be brought to it."""
        merged, disabled = list(self.merged_adapters), self._disable_adapters
        active = self._active_adapter
        try:
            yield
        except BaseException:
            self.merged_adapters[:] = merged
            self._disable_adapters, self._active_adapter = disabled, active
            raise

    @torch.no_grad()
    def bare(self, overwritten: bool = False) -> None:
        """Take everything out of the weight in memory, until `synchronize`.

        Args:
            overwritten: the weight is about to be overwritten: only forget what stands in it.
        """
        if not overwritten:
            if self.arrived is None:
                self._take_account()
            self._put(dict.fromkeys(self.rosa_offset))
        for entry in self.rosa_offset.entries.values():
            entry.in_weight, entry.merged = None, False
        if overwritten:
            self._pretrained = self._fingerprint = None
            self.expect_write()

    def is_written(self) -> bool:
        """Whether someone else has written into the weight in memory."""
        return self._versions.written(self.parameter)

    def expect_write(self) -> None:
        """Let the weight be written to, until `expected_write`."""
        self._versions = Versions()

    def expected_write(self) -> None:
        """Take note of the weight as it now is."""
        if self._versions.is_new():
            self._versions.arrived(self.parameter, self._standing())

    def settle(self) -> None:
        """Take account of what state dicts brought and of what others wrote, before any use.

        Raises:
            UserError: an adapter was loaded in part; or others have written into the weight while
                an offset stood in it, so that it is not known any more what it holds.
        """
        if self.arrived is not None or self._changed_by_others():
            self.synchronize()

    def _changed_by_others(self) -> bool:
        parameter = self.parameter
        return self._versions.written(parameter) or self._versions.replaced(parameter)

    def _take_account(self, leaving: str | None = None, accept: bool = False) -> None:
        if self.arrived is not None:
            statedict.take_all(self, self.arrived, leaving)
            self.arrived = None
        if self._changed_by_others():
            self._account_for_writes(accept)
            self._versions.arrived(self.parameter, self._standing())

    def _account_for_writes(self, accept: bool) -> None:
        weight, standing = self._weight(), self._standing()
        whole = not weight.is_meta and tuple(weight.shape) == (self.out_features, self.in_features)
        if not whole or hasattr(self.get_base_layer(), "_hf_hook"):
            return  # sharded or offloaded, and back
        if self.parameter.requires_grad or not any(standing.values()):
            self._pretrained = self._fingerprint = None  # what was written is part of it
        elif self._is_pretrained_with({}):
            for entry in self.rosa_offset.entries.values():
                entry.in_weight, entry.merged = None, False
        elif not self._is_pretrained_with(standing):
            happened = (
                f"the weight of layer {self.name} was changed while ROSA's offset stood in it"
            )
            if not accept:
                raise UserError(
                    f"{happened}: by an average over models (EMA, SWA) of several draws, whose "
                    "factors belong to different subspaces, or by code that writes into weights. "
                    "Average merged models (rosa.export_merged), or begin a new average after each "
                    "draw; write into weights inside model.disable_adapter(), which, entered once "
                    "afterwards, takes what was written for a change of the pretrained weight"
                )
            warnings.warn(
                f"{happened}: what was written is taken for a change of the pretrained weight",
                stacklevel=3,
            )
            self._pretrained = self._fingerprint = None

    def _is_pretrained_with(self, standing: Mapping[str, LowRank | None]) -> bool:
        """Whether the weight in memory is W_0 with this in it, as far as one can tell."""
        weight = self._weight()
        if self._pretrained is not None:
            expected = torch.empty_like(weight)
            _write_sum(expected, self._pretrained, standing.values())
            return torch.equal(weight, expected)
        if self._fingerprint is None:
            return any(standing.values())  # nobody knows: what was believed
        rest = weight.to(self._work_dtype(), copy=True)
        for change in standing.values():
            if change is not None and change.rank:
                rest -= _rounded(change, rest)
        return subspace.same_fingerprint(subspace.fingerprint(rest), self._fingerprint, 1e-5, 0.0)

    @torch.no_grad()
    def pretrained_weight(self) -> Tensor:
        """W_0 (out, in) in float32 (float64 for a float64 layer): a copy, whatever is in use."""
        self.settle()
        dtype, weight = self._work_dtype(), self._weight()
        if self._pretrained is not None:
            return self._pretrained.to(weight.device, dtype, copy=True)
        weight = weight.to(dtype, copy=True)
        for change in self._standing().values():
            if change is not None and change.rank:
                weight -= _rounded(change, weight)
        return weight

    @property
    def keeps_a_copy(self) -> bool:
        """Whether an exact copy of the pretrained weight is kept in main memory."""
        return self._pretrained is not None

    @torch.no_grad()
    def give_pretrained_weight(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """In a state dict, let W_0 stand where the weight in memory holds more.

        Args:
            state_dict: the model's, or what is being saved of it; may lack the base weight.
            prefix: the layer's name in it, with a dot.
        """
        key = f"{prefix}base_layer.weight"
        if key in state_dict and any(self._standing().values()):
            weight = self._pretrained
            if weight is None:
                weight = self.pretrained_weight().to(self.parameter.dtype)
            state_dict[key] = weight.T.contiguous() if self.fan_in_fan_out else weight

    @torch.no_grad()
    def learned(self, adapter: str) -> LowRank:
        """The current factors' product s B A: a copy, in the offset's dtype, on their device."""
        dtype = self._work_dtype()
        b, a = self.rosa_B[adapter].to(dtype), self.rosa_A[adapter].to(dtype, copy=True)
        return LowRank(b * self.scaling[adapter], a)

    def whole_change(self, adapter: str) -> LowRank:
        """All that the adapter changes about the pretrained weight: O + s B A, in main memory."""
        self.settle()
        return self.change_of(adapter)

    def change_of(self, adapter: str) -> LowRank:
        """`whole_change` of a layer that is being settled."""
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
        self.scaling[adapter_name] = 1.0 if alpha is None else alpha / r
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

    @torch.no_grad()
    def copy_adapter(self, source: str, target: str) -> None:
        """Make one adapter what another one is: factors, offset and count of draws."""
        self.rosa_A[target].copy_(self.rosa_A[source])
        self.rosa_B[target].copy_(self.rosa_B[source])
        entry, of = self.rosa_offset[target], self.rosa_offset[source]
        entry.terms, entry.draws = LowRank(of.terms.B.clone(), of.terms.A.clone()), of.draws
        self.synchronize()

    @torch.no_grad()
    def _draw(self, adapter: str, weight: Tensor, change: LowRank | None = None) -> LowRank:
        """Draw the factors; returns what takes their product out of the weight.

        Nothing is changed if that fails.

        Args:
            adapter: whose factors.
            weight: (out, in), in the work dtype; not changed.
            change: to be added to the weight first.
        """
        config, sketch = self.rosa_config[adapter], self._sketches.pop(adapter, None)
        a, b = drawing.draw(
            self, adapter, weight, change, sketch=sketch if config.is_informed else None
        )
        self.rosa_A[adapter].copy_(a)
        self.rosa_B[adapter].copy_(b)
        self.rosa_offset[adapter].draws += 1
        # From the factors as they are now stored: their rounding cancels too.
        drawn = self.learned(adapter)
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
    def resample(self, adapter: str) -> None:
        """Merge the adapter's product into its offset and draw a new subspace.

        What the layer computes stays the same to rounding, and the factors stay the same
        Parameter objects. Use `rosa.resample`, which also clears the optimizer's state.
        """
        self.settle()
        factors = self.rosa_A[adapter], self.rosa_B[adapter]
        before = [factor.detach().clone() for factor in factors]
        entry = self.rosa_offset[adapter]
        terms, draws = entry.terms, entry.draws
        try:
            self._merge_and_draw(adapter)
        except BaseException:  # the layer is as it was
            for factor, values in zip(factors, before, strict=True):
                factor.copy_(values)
            entry.terms, entry.draws = terms, draws
            raise

    def _merge_and_draw(self, adapter: str) -> None:
        entry, weight = self.rosa_offset[adapter], self._weight()
        learned = self.learned(adapter)
        start = self._draw(adapter, weight.to(self._work_dtype()), learned)
        change = (learned + start).joined()
        terms = entry.terms + change.to("cpu")
        if terms.rank > _MOST_TERMS * min(self.out_features, self.in_features):
            settled = terms.rank - start.rank  # what was drawn stays last: see `drawn`
            terms = terms[:settled].compressed() + terms[settled:]
        entry.terms = terms
        if self._pretrained is None and entry.in_weight is not None:
            # In one pass over the weight: cheaper than the old offset out and the new one in.
            parameter = self.parameter
            self._versions.leaving(parameter, self._standing())
            with full_precision():
                weight.addmm_(change.B, change.A)
            entry.in_weight = entry.terms
            self._versions.arrived(parameter, self._standing())
        else:
            self.synchronize()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; nothing of it stays in the weight."""
        self.forget(adapter_name)
        if adapter_name in self.merged_adapters:
            self.merged_adapters.remove(adapter_name)
        self.synchronize(leaving=adapter_name, accept=True)
        super().delete_adapter(adapter_name)
        self.synchronize()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapter(s); their offsets take the place of the others' in the weight."""
        with self._or_as_before():
            super().set_adapter(adapter_names, inference_mode=inference_mode)
            self.synchronize()

    def enable_adapters(self, enabled: bool) -> None:
        """Put the adapters' offsets into the weight, or take them (and what is merged) out."""
        with self._or_as_before():
            if not enabled:
                self.merged_adapters.clear()
            super().enable_adapters(enabled)
            self.synchronize(accept=not enabled)

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
                merged += _rounded(self.whole_change(name), merged)
            if not torch.isfinite(merged.to(self._weight().dtype)).all():
                raise UserError(
                    f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to "
                    f"be broken (layer {self.name}): load an earlier checkpoint"
                )
        with self._or_as_before():
            self.merged_adapters.extend(names)
            self.synchronize()

    def unmerge(self) -> None:
        """Take all merged adapters out of the weight; the layer is as before the merge."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        with self._or_as_before():
            self.merged_adapters.clear()
            self.synchronize()

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
            self.synchronize(accept=True)
        return self.get_base_layer()


def check_in_memory(name: str, base: nn.Module) -> None:
    """Raise ValueError if accelerate has offloaded the weight of a base layer."""
    if base.weight.is_meta and hasattr(base, "_hf_hook"):  # type: ignore[union-attr]
        raise UserError(
            f"the weight of {name} is offloaded by accelerate: ROSA changes weights in memory, so "
            "load the model without offloading (device_map)"
        )


def _rounded(change: LowRank, weight: Tensor) -> Tensor:
    """A change as a matrix in a weight's own dtype: taking it out is the opposite of adding it."""
    return change.to(weight.device).dense().to(weight.dtype)


@full_precision()
def _write_sum(weight: Tensor, pretrained: Tensor, changes: Iterable[LowRank | None]) -> None:
    """Write the pretrained weight plus changes into a weight, rounded once."""
    pretrained = pretrained.to(weight.device)
    found = [change for change in changes if change is not None and change.rank]
    if len(found) != 1 or weight.dtype in _HALF:
        total = pretrained.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        for change in found:
            total += _rounded(change, total)
        weight.copy_(total)
        return
    (change,) = (change.to(weight.device, weight.dtype) for change in found)
    torch.addmm(pretrained, change.B, change.A, out=weight)  # one pass over the weight
