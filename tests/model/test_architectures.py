"""ROSA on the architectures that people have, from attaching to both exports, in numbers.

Every comparison is held to a small part of the change that training has made.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from rosa import RosaConfig, export_lora, export_merged, export_rosa, resample, watch
from rosa.errors import ExportError
from rosa.export.lazily import mapped_lazily
from rosa.export.merged import write_plain
from rosa.layers.in_model import rosa_layers
from rosa.targeting.matching import is_trained_in_full
from tests.architectures import ARCHITECTURES, Architecture, loss_of, outputs_of

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and PEFT's own, of many kinds


class Trained:
    """A model with a trained adapter, what it was before, and the changes on the way."""

    def __init__(self, architecture: Architecture, dtype: torch.dtype, **options: Any) -> None:
        self.architecture, self.dtype = architecture, dtype
        self.options = {
            "r": 2,
            "target_modules": architecture.target_modules,
            "task_type": architecture.task_type,
            **architecture.adapter,
            **options,
        }
        self.seed = int(torch.randint(2**31, ()))
        self.inputs = architecture.inputs()
        if dtype != torch.float32:
            self.inputs = {
                k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v
                for k, v in self.inputs.items()
            }
        self.pretrained = outputs_of(self.base(), self.inputs)
        self.model: Any = get_peft_model(self.base(), RosaConfig(**self.options)).eval()
        self.attached = self.outputs(self.model)
        self.jumps: list[float] = []  # of the outputs, at each draw
        self.roundings: list[float] = []  # of the outputs, if each weight were rounded once more
        for round_ in range(3):
            if round_:
                watch(self.model)
            optimizer = train(self.model, self.inputs, steps=3)
            if round_:
                before = self.outputs(self.model)
                if dtype == torch.float32:
                    self.roundings.append(far(self.outputs(rounded_anew(self.model)), before))
                resample(self.model, optimizer)
                self.jumps.append(far(self.outputs(self.model), before))
        self.trained = self.outputs(self.model)
        self.change = far(self.trained, self.pretrained)

    def base(self) -> Any:
        return self.architecture.build(self.seed).to(self.dtype)

    def outputs(self, model: Any) -> Tensor:
        return outputs_of(model, self.inputs)

    def same(self, found: Any, expected: Tensor, step: str) -> None:
        """Fail unless a model (or outputs) gives these outputs, to a part of the change."""
        found = found if torch.is_tensor(found) else self.outputs(found.eval())
        part = 1e-3 if self.dtype == torch.float32 else 0.3
        assert far(found, expected) <= part * self.change, (
            f"{step}: {far(found, expected):.1e} off, of a change of {self.change:.1e}"
        )


def train(model: nn.Module, inputs: dict[str, Tensor], steps: int) -> torch.optim.Optimizer:
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(steps):
        loss_of(model, inputs).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return optimizer


@torch.no_grad()
def rounded_anew(model: nn.Module) -> nn.Module:
    """A copy whose adapted weights are off by one rounding: what a model makes of that, it must.

    A few models make much of it: MobileBERT, which has no norms, hundreds of times as much.
    """
    model = copy.deepcopy(model)
    for _, layer in rosa_layers(model):
        weight = layer.base_weight.parameter
        weight.mul_(1 + torch.finfo(weight.dtype).eps * torch.empty_like(weight).uniform_(-1, 1))
    return model


def far(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def adapted(model: nn.Module) -> list[str]:
    return [name.removeprefix("base_model.model.") for name, _ in rosa_layers(model)]


@pytest.fixture(params=ARCHITECTURES)
def trained(request: pytest.FixtureRequest, _fresh_random_inputs: None) -> Trained:
    return Trained(ARCHITECTURES[request.param], torch.float32)


def check_training(case: Trained) -> None:
    scale = float(case.pretrained.abs().max())
    rounding = (1e-5 if case.dtype == torch.float32 else 0.1) * scale
    assert case.change > (0.03 if case.dtype == torch.float32 else 0.1) * scale, "nothing learned"
    assert far(case.attached, case.pretrained) <= rounding
    assert len(case.jumps) == 2
    assert max(case.jumps) <= max(rounding, 4 * max(case.roundings, default=0.0))
    names = adapted(case.model)
    assert names
    assert not [n for n in names if is_trained_in_full(RosaConfig(**case.options), n)]
    for _, layer in rosa_layers(case.model):
        assert layer.adapters["default"].draws == 3


def check_life(case: Trained, folder: Any) -> None:
    model, expected = case.model, case.trained
    model.save_pretrained(str(folder))
    loaded = PeftModel.from_pretrained(case.base(), str(folder))
    case.same(loaded, expected, "loaded")
    assert adapted(loaded) == adapted(model)
    with model.disable_adapter():
        case.same(model, case.pretrained, "disabled")
    case.same(model, expected, "enabled again")
    model.merge_adapter()
    case.same(model, expected, "merged")
    model.unmerge_adapter()
    case.same(model, expected, "unmerged")

    weights = case.base().state_dict()
    plain = copy.deepcopy(model).unload().state_dict()
    assert plain.keys() == weights.keys()
    config = RosaConfig(**case.options)
    for name, weight in weights.items():
        if not is_trained_in_full(config, name.rpartition(".")[0]):
            limit = 0.0 if case.dtype != torch.float32 else 1e-6
            assert far(plain[name].float(), weight.float()) <= limit, f"unloaded: {name}"
    merged = copy.deepcopy(model).merge_and_unload()
    assert type(merged) is type(case.base())
    case.same(merged, expected, "merge_and_unload")

    model.add_adapter("second", RosaConfig(**(case.options | {"seed": 7})))
    case.same(model, expected, "beside a second adapter")
    model.set_adapter("second")
    case.same(model, case.pretrained, "a second adapter, untrained")
    train(model, case.inputs, steps=3)
    second = case.outputs(model)
    assert far(second, case.pretrained) > 0.1 * case.change
    for name, outputs in (("default", expected), ("second", second), ("default", expected)):
        model.set_adapter(name)
        case.same(model, outputs, f"switched to {name}")
    with model.disable_adapter():
        case.same(model, case.pretrained, "disabled beside a second adapter")


def check_exports(case: Trained, folder: Any) -> None:
    export_merged(case.model, folder / "merged")
    plain: Any = type(case.base())
    case.same(plain.from_pretrained(folder / "merged"), case.trained, "exported merged")
    case.model.save_pretrained(str(folder / "adapter"))
    base = case.base()
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    write_plain(*mapped_lazily(base, folder / "adapter"), folder / "by weight", "30KB")
    case.same(plain.from_pretrained(folder / "by weight"), case.trained, "merged weight by weight")
    assert all(torch.equal(base.state_dict()[name], value) for name, value in weights.items())
    export_rosa(case.model, folder / "rosa")
    case.same(PeftModel.from_pretrained(case.base(), folder / "rosa"), case.trained, "compact")
    if case.architecture.lora:
        export_lora(case.model, folder / "lora")
        lora = PeftModel.from_pretrained(case.base(), str(folder / "lora"))
        assert lora.peft_config["default"].peft_type == "LORA"
        case.same(lora, case.trained, "exported to LoRA")
    else:
        with pytest.raises(ExportError, match="cannot be exported to LoRA"):
            export_lora(case.model, folder / "lora")
        assert not (folder / "lora").exists()
    case.same(case.model, case.trained, "after the exports")


def test_training_starts_at_the_pretrained_model_and_draws_keep_the_outputs(trained):
    check_training(trained)


def test_saved_loaded_switched_merged_and_unloaded(trained, tmp_path):
    check_life(trained, tmp_path)


def test_both_exports_load_as_the_trained_model(trained, tmp_path):
    check_exports(trained, tmp_path)


SETTINGS = {
    "again": {},
    "svd": {"directions": "svd"},
    "orthonormal": {"directions": "orthonormal", "alpha": 3},
    "zero": {"directions": "zero"},
    "A": {"trained": "A"},
    "B": {"trained": "B"},
    "ranks": {"rank_pattern": {r".*(0|1)\..*": 3}, "bias": "rosa_only"},
    "half": {},
}


@pytest.mark.matrix
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_larger_matrix(name, settings, tmp_path):
    dtype = torch.bfloat16 if settings == "half" else torch.float32
    if settings == "half" and not ARCHITECTURES[name].half:
        pytest.skip("not a matter of rounding in this precision")
    case = Trained(ARCHITECTURES[name], dtype, **SETTINGS[settings])
    check_training(case)
    check_exports(case, tmp_path / "exports")
    if "bias" not in case.options:  # PEFT allows one adapter with biases
        check_life(case, tmp_path / "life")
