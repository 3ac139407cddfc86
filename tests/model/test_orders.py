"""Every order of calls leaves the right weights: a random walk over a PEFT model's methods.

The oracle knows nothing of offsets. It is the outputs that each adapter gave when it was last
trained, and the outputs of the pretrained model. ROSA_ORDERS is how many walks there are.
"""

from __future__ import annotations

import copy
import os
import warnings
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from rosa import RosaConfig, resample
from rosa.layers.in_model import rosa_layers
from tests.models import EXPERTS, IN, OUT, Mixture, Mlp

TARGETS = [["first"], ["middle", "last"], ["first", "middle", "last"]]
WALKS = int(os.environ.get("ROSA_ORDERS", "60"))


class Pictures(nn.Module):
    """Convolutions, one of them in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1, groups=2)
        self.middle = nn.Conv1d(4, 5, 3, stride=2)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.first(x).tanh().flatten(2)
        return self.last(self.middle(rows).tanh().mean(-1))


class Words(nn.Module):
    """An embedding, and attention with its two weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Embedding(9, 6)
        self.middle = nn.MultiheadAttention(6, 2, batch_first=True)
        self.last = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(ids)
        return self.last(x + self.middle(x, x, x, need_weights=False)[0])


class Experts(nn.Module):
    """A mixture, whose stack of experts and whose matrix are parameters of no module's kind."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, IN)
        self.middle = Mixture(bool(torch.rand(()) < 0.5))
        self.last = nn.Linear(IN, 3)
        self.register_buffer("chosen", torch.randint(EXPERTS, (5,)))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x), self.chosen))


PARAMETERS = {"target_parameters": ["experts.up", "experts.mix"]}
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "linear": (Mlp, lambda: torch.randn(5, 7), {}),
    "convolutions": (Pictures, lambda: torch.randn(3, 2, 4, 4), {}),
    "attention": (Words, lambda: torch.randint(9, (3, 4)), {}),
    "experts": (Experts, lambda: torch.randn(5, 5), PARAMETERS),
}
assert OUT > IN  # so that the experts are no squares, and their sides are told apart


class Orders(RuleBasedStateMachine):
    """One adapter is active at a time, and any may be merged."""

    @initialize(
        kind=st.sampled_from(sorted(KINDS)),
        modules=st.sampled_from(TARGETS),
        trained=st.sampled_from(["both", "A", "B"]),
        seed=st.integers(0, 2**31),
    )
    def attach(self, kind, modules, trained, seed):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        make, inputs, self.options = KINDS[kind]
        self.options = {**self.options, "trained": trained}
        self.x = inputs()
        self.x = self.x.double() if self.x.is_floating_point() else self.x
        self.base = make().double()
        self.pretrained = copy.deepcopy(self.base)
        self.outputs = {}
        self.active, self.merged, self.disabled = "default", [], False
        self.model = get_peft_model(self.base, self.config(modules))
        self.modules = {"default": modules}
        self.outputs["default"] = self.model(self.x).detach()
        self.count = 0

    def config(self, modules):
        directions = "svd" if torch.rand(()) < 0.5 else "orthonormal"
        modules = [
            name for name in modules if "target_parameters" not in self.options or name != "middle"
        ]
        return RosaConfig(r=2, target_modules=modules, directions=directions, **self.options)

    def usable(self):
        return not self.merged and not self.disabled

    @rule(modules=st.sampled_from(TARGETS))
    @precondition(lambda self: len(self.outputs) < 3)
    def add(self, modules):
        self.count += 1
        name = f"extra{self.count}"
        self.model.add_adapter(name, self.config(modules))
        self.modules[name] = modules
        self.outputs[name] = self.pretrained(self.x).detach()
        self.merged = []  # PEFT sets the active adapter anew, which unmerges

    @rule()
    @precondition(lambda self: self.usable() and self.active)
    def train(self):
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for p in trained:
            p.data.add_(torch.randn_like(p), alpha=0.1)
        self.outputs[self.active] = self.model(self.x).detach()

    @rule()
    @precondition(lambda self: self.usable() and self.active)
    def draw_again(self):
        resample(self.model)

    @rule(data=st.data())
    @precondition(lambda self: self.outputs and not self.disabled)
    def switch(self, data):
        self.active = data.draw(st.sampled_from(sorted(self.outputs)))
        self.model.set_adapter(self.active)  # unmerges what is merged
        self.merged = []

    @rule()
    @precondition(lambda self: not self.disabled and self.active)
    def disable(self):
        self.model.base_model.disable_adapter_layers()
        self.disabled, self.merged = True, []

    @rule()
    @precondition(lambda self: self.disabled)
    def enable(self):
        self.model.base_model.enable_adapter_layers()
        self.disabled = False

    @rule(safe=st.booleans(), data=st.data())
    @precondition(lambda self: self.outputs and self.usable())
    def merge(self, safe, data):
        # Layers without the merged adapter go on with the active one, as with any PEFT method.
        active = set(self.modules[self.active])
        names = [n for n in sorted(self.outputs) if active <= set(self.modules[n])]
        name = data.draw(st.sampled_from(names))
        self.model.merge_adapter([name], safe_merge=safe)
        self.merged = [name]

    @rule()
    @precondition(lambda self: self.merged)
    def unmerge(self):
        self.model.unmerge_adapter()
        self.merged = []

    @rule(data=st.data())
    @precondition(lambda self: len(self.outputs) > 1)
    def delete(self, data):
        names = sorted(set(self.outputs) - set(self.merged) - {self.active})
        if names:
            name = data.draw(st.sampled_from(names))
            self.model.delete_adapter(name)
            del self.outputs[name]

    @rule()
    def copy(self):
        self.model = copy.deepcopy(self.model)

    @rule(disabled=st.booleans(), data=st.data())
    @precondition(lambda self: self.outputs)
    def whole_state_dict(self, disabled, data):
        """A checkpoint of the whole model goes into a model in any other state."""
        other = copy.deepcopy(self.model)
        self.active = data.draw(st.sampled_from(sorted(self.outputs)))
        other.base_model.enable_adapter_layers()
        other.set_adapter(self.active)
        resample(other)
        if disabled:
            other.base_model.disable_adapter_layers()
        other.load_state_dict(self.model.state_dict())
        self.model, self.disabled, self.merged = other, disabled, []

    @rule(data=st.data())
    @precondition(lambda self: self.outputs)
    def adapter_state_dict(self, data):
        """The adapter alone, on the untouched pretrained model, gives its outputs."""
        name = data.draw(st.sampled_from(sorted(self.outputs)))
        state = get_peft_model_state_dict(self.model, adapter_name=name)
        config = copy.deepcopy(self.model.peft_config[name])
        other = get_peft_model(copy.deepcopy(self.pretrained), config)
        set_peft_model_state_dict(other, state)
        torch.testing.assert_close(other(self.x), self.outputs[name])
        plain = other.merge_and_unload()
        torch.testing.assert_close(plain(self.x), self.outputs[name])

    @rule()
    def unloaded(self):
        plain = copy.deepcopy(self.model).unload()
        assert type(plain) is type(self.pretrained)
        for (name, found), (_, expected) in zip(
            plain.state_dict().items(), self.pretrained.state_dict().items(), strict=True
        ):
            torch.testing.assert_close(found, expected, msg=name)

    @invariant()
    def the_outputs_are_right(self):
        if self.merged:
            expected = self.outputs[self.merged[0]]
        elif self.disabled:
            expected = self.pretrained(self.x)
        else:
            expected = self.outputs[self.active]
        torch.testing.assert_close(self.model(self.x), expected)

    @invariant()
    def the_pretrained_weight_is_known(self):
        for name, layer in rosa_layers(self.model):
            place = name.removeprefix("base_model.model.").replace(".base_layer", "")
            module = self.pretrained.get_submodule(place)
            weight = layer.view_of(module, layer.parameter_name).matrix
            torch.testing.assert_close(layer.pretrained_weight(), weight.detach())
            if self.disabled:
                torch.testing.assert_close(layer.base_weight.matrix, weight.detach())


Orders.TestCase.settings = settings(
    max_examples=WALKS,
    stateful_step_count=25,
    deadline=None,
    derandomize=False,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
    database=None,
)
TestOrders = Orders.TestCase
