"""Every value in every field of a config is allowed, or refused by the field's name."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest

from rosa import RosaConfig
from rosa.errors import UserError
from rosa.patterns import check_pattern

ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 10**30, 10**400, 0.5, -0.0, 1e-320, 1e308),
    *(
        float("nan"),
        float("inf"),
        float("-inf"),
        "",
        "x",
        "8",
        "none",
        "(",
        "(a+)+$",
        "\0",
        "\ud800",
    ),
    *([], [[]], ["x"], ["("], [""], [1], [-1], [True], [None], [1, "x"], [10**30], {}, {"x": 1}),
    *({"": 1}, {"(": 1}, {"x": None}, {"x": [1]}, {"x": "1"}, {"x": {}}, {"x": 10**400}),
    *({"dtypes": [], "layers": {}}, {"dtypes": [1], "layers": {}}, {"dtypes": ["float32"]}),
    *({"dtypes": ["float32"], "layers": {"x": [1, None]}}, "got an unexpected keyword argument"),
    *({"dtypes": ["int8"], "layers": {}}, {"dtypes": "float32", "layers": []}),
    json.loads("[" * 500 + "]" * 500),
]
WRITTEN = {"peft_type", "loading"}  # by ROSA, whatever is given


@pytest.mark.parametrize("field", [f.name for f in fields(RosaConfig) if f.name not in WRITTEN])
def test_any_value_in_any_field_is_allowed_or_refused_by_name(field):
    for value in ODD:
        try:
            config = RosaConfig(**{field: value})
        except UserError as error:
            assert field in str(error)  # noqa: PT017
            assert len(str(error)) < 500  # noqa: PT017
        else:
            assert RosaConfig(**{field: getattr(config, field)}) == config


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("lora_alpha", "alpha"),
        ("lora_dropout", "rosa_dropout"),
        ("init_lora_weights", "directions"),
    ],
)
def test_loras_names_are_told_what_is_in_their_place(theirs, ours, tmp_path):
    with pytest.raises(TypeError, match=f"{theirs}', which is LoRA's: its place has '{ours}' here"):
        RosaConfig(**{theirs: 1})
    RosaConfig(r=3).save_pretrained(str(tmp_path))  # of a file PEFT leaves out what is unknown
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), theirs: 1}))
    with pytest.warns(UserWarning, match=f"Unexpected keyword arguments.*{theirs}"):
        assert RosaConfig.from_pretrained(str(tmp_path)).r == 3


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("r", True, "r must be a positive integer, got True"),
        ("alpha", 10**400, "alpha must be a positive number"),
        ("alpha_pattern", {"x": float("nan")}, r"alpha_pattern\['x'\] must be a positive number"),
        ("rank_pattern", {"x(": 1}, r"rank_pattern='x\(' is not a regex: missing \)"),
        ("modules_to_save", "classifier", "modules_to_save must be a list of names or None"),
        ("modules_to_save", ["a(b"], r"modules_to_save='a\(b' is not a regex"),
        ("target_modules", ["x", 1], "target_modules must be a list of names, a regex or None"),
        ("target_modules", "(" * 5000 + ")" * 5000, "is not a regex: it is nested too deep"),
        ("target_modules", r"(\w+)*\.query", "can take for ever to match, since it repeats"),
        ("exclude_modules", "[", r"exclude_modules='\[' is not a regex"),
        ("layers_to_transform", [0, True], "layers_to_transform must be the index of a layer"),
        ("rosa_dropout", "0", "rosa_dropout must be at least 0 and below 1, got '0'"),
        ("inference_mode", 1, "inference_mode must be a bool, got 1"),
        ("base_fingerprint", {"dtypes": ["int8"], "layers": {}}, "this one is damaged: remove it"),
        ("seed", "x" * 10**6, r"seed must be an integer, got 'x{31}\.\.\."),
    ],
)
def test_what_is_refused_and_why(field, value, message):
    with pytest.raises(UserError, match=message) as error:
        RosaConfig(**{field: value})
    assert len(str(error.value)) < 400


SLOW = [
    *("(a+)+", "(.*)*", "((a*)*)*x", "(.|..)*X", "(..?)*X", "(?:.+|x)+y", r"(\w+\w)+X"),
    *("(a*)(a*)(a*)(a*)(a*)(a*)b", ".*.*.*.*.*.*X", "(?:.*){20}X", "(?=(.+)+z)", "([a-z]+)*X"),
]
QUICK = [
    *("all-linear", "", r".*\.(q|v)_proj", r"(?:\w+\.)*attn\..*", r"[a-z0-9_.]+", "^first"),
    *(r"model\.layers\.(1|2|30)\..*(q|k|v|o)_proj", r"^(?!.*(lm_head|embed)).*proj$"),
    *(r".*layers\.\d+\.(self_attn|mlp)\.(up|down|gate)_proj", r".*\.block\.(\d+\.)*conv\d"),
    *(r"(encoder|decoder)(\.[a-z_0-9]+)+", r"(?:.*?\.)?layers\.(?P<i>\d+)\..*"),
]


@pytest.mark.parametrize("pattern", SLOW)
def test_regexes_that_can_take_for_ever_are_refused(pattern):
    with pytest.raises(UserError, match="can take for ever"):
        check_pattern("target_modules", pattern)


@pytest.mark.parametrize("pattern", QUICK)
def test_usual_regexes_are_allowed(pattern):
    check_pattern("target_modules", pattern)
