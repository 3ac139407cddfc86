"""Adapters' folders damaged in every way: each is refused in words, or is what its file says.

`make fuzz` tries thousands of them; `python -m tests.fuzzing --kind bert --first 17 --cases 1` one.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rosa import RosaConfig
from rosa.bench.exporting import export_folder
from rosa.bench.storage import models
from rosa.errors import UserError
from tests.helpers import moved
from tests.models import save_with_tokenizer, tiny_bert, tiny_gpt2, tiny_llama

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SECONDS, MEMORY = 20, 600 * 2**20
"""What one load may take, of time and of main memory."""
CLEAR = ("UserError", "UserTypeError", "FileNotFoundError", "NothingToAdaptError")
OF_READERS = ("ValueError", "JSONDecodeError", "SafetensorError", "TypeError")
"""Errors that may be raised: this package's, and those of PEFT and its readers of files."""
DEPTHS = ("KeyError", "AttributeError", "IndexError", "RecursionError", "MemoryError", "Traceback")
"""What no message may speak of."""


# -- models ----------------------------------------------------------------------------------------


@dataclass
class Kind:
    """A model with a saved adapter."""

    base: nn.Module
    inputs: Any
    folder: Path
    outputs: Tensor
    adapted: PeftModel
    weights: dict[str, Tensor]
    config: dict[str, Any]


def outputs_of(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        result = model(inputs)
    return getattr(result, "logits", result)


def _convolution() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(64, 3)
    )


_IDS = torch.arange(12).reshape(2, 6)
KINDS: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any]]] = {
    "bert": (
        tiny_bert,
        _IDS,
        {"task_type": "SEQ_CLS", "target_modules": ["query", "value"], "bias": "rosa_only"},
    ),
    "gpt2": (
        tiny_gpt2,
        _IDS,
        {
            "task_type": "CAUSAL_LM",
            "target_modules": r".*\.(c_attn|c_fc)",
            "rank_pattern": {"c_fc": 1},
            "alpha": 3,
        },
    ),
    "llama": (
        tiny_llama,
        _IDS,
        {"task_type": "CAUSAL_LM", "target_modules": "all-linear", "trainable_token_indices": [1]},
    ),
    "conv": (
        _convolution,
        torch.randn(2, 2, 6, 6),
        {"target_modules": ["0", "2"], "modules_to_save": ["4"], "trained": "B"},
    ),
}


def made(kind: str, folder: Path) -> Kind:
    """A model of a kind with a trained adapter in a folder."""
    torch.manual_seed(0)
    build, inputs, options = KINDS[kind]
    base = save_with_tokenizer(build(), folder / "base") if kind == "bert" else build()
    if kind == "bert":
        base = type(tiny_bert()).from_pretrained(folder / "base")
    base = base.eval()
    adapted = get_peft_model(copy.deepcopy(base), RosaConfig(r=2, **options)).eval()
    moved(adapted)
    adapted.save_pretrained(str(folder / "saved"))
    if kind == "bert":
        base.config.save_pretrained(folder / "saved")
    weights = load_file(folder / "saved" / FILE)
    config = json.loads((folder / "saved" / CONFIG).read_text())
    outputs = outputs_of(adapted, inputs)
    return Kind(base, inputs, folder / "saved", outputs, adapted, weights, config)


# -- damage ----------------------------------------------------------------------------------------

ODD_JSON = [
    *("null", "true", "false", "0", "1", "-1", "2", "3", "1e400", "-1e400", "NaN", "Infinity"),
    *("1e308", "0.5", "1e-320", "123456789012345678901234567890", "9" * 5000, '""', '"x"', '"("'),
    *('"none"', '"all"', '"(a+)+$"', '".*"', '"all-linear"', '"\\u0000"', '"\\ud800"', '"../x"'),
    *('"/etc/passwd"', "[]", "[[]]", '["x"]', '["("]', '[""]', "[0]", "[-1]", "[true]", "[null]"),
    *('{"x": 1}', '{"": 1}', '{"(": 1}', '{"x": null}', '{"x": [1]}', '{"x": {}}', "{}"),
    *('{"dtypes": ["int8"], "layers": {}}', '{"dtypes": ["float32"], "layers": {"x": ["y"]}}'),
    *('"SEQ_CLS"', '"CAUSAL_LM"', '"FEATURE_EXTRACTION"', "[" * 300 + "]" * 300, '"' * 3),
    *('"got an unexpected keyword argument"', '["classifier", 1]', '"zero"', '"svd"', '"A"'),
    '"' + "x" * 10**5 + '"',
]
NAMES = [
    *(
        "../../x",
        "/etc/passwd",
        "x\0y",
        "",
        ".",
        "..",
        "base_model.model",
        "🙂",
        "weight",
        "x" * 9999,
    ),
    *("rosa_A", ".rosa_A", "base_model.model.rosa_A", "base_model.model..rosa_offset.draws"),
]
DTYPES = [
    *(torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8),
    *(torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2),
]
Damage = Callable[[Path, random.Random, Kind], None]
DAMAGES: list[Damage] = []


def damage(function: Damage) -> Damage:
    DAMAGES.append(function)
    return function


def _either(folder: Path, rng: random.Random) -> Path:
    return folder / rng.choice([FILE, FILE, CONFIG])


@damage
def flip_bytes(folder: Path, rng: random.Random, kind: Kind) -> None:
    path = _either(folder, rng)
    content = bytearray(path.read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0] if path.name == FILE else len(content)
    end = rng.choice([8, header, len(content)])
    for _ in range(rng.choice([1, 1, 2, 8])):
        content[rng.randrange(end)] ^= rng.choice([1 << rng.randrange(8), rng.randrange(1, 256)])
    path.write_bytes(content)


@damage
def cut(folder: Path, rng: random.Random, kind: Kind) -> None:
    path = _either(folder, rng)
    content = path.read_bytes()
    length = rng.choice([0, 1, 7, 8, 9, len(content) - 1, rng.randrange(len(content))])
    path.write_bytes(content[:length])


@damage
def move_chunks(folder: Path, rng: random.Random, kind: Kind) -> None:
    path = _either(folder, rng)
    content = path.read_bytes()
    a, b, c = sorted(rng.randrange(len(content)) for _ in range(3))
    first, second = content[a:b], content[b:c]
    more = rng.choice([second + first, first + first + second, second, bytes(c - a)])
    path.write_bytes(content[:a] + more + content[c:])


@damage
def rename_tensors(folder: Path, rng: random.Random, kind: Kind) -> None:
    tensors = dict(kind.weights)
    of_base = [f"base_model.model.{name}" for name in kind.base.state_dict()]
    old, other = rng.sample(sorted(tensors), 2)
    taken = tensors.pop(old)
    name = rng.choice([*NAMES, old + "x", old.replace("rosa", "lora"), rng.choice(of_base), other])
    tensors[name] = taken
    _save(tensors, folder)


@damage
def drop_or_add_tensors(folder: Path, rng: random.Random, kind: Kind) -> None:
    tensors = dict(kind.weights)
    of_base = kind.base.state_dict()
    for _ in range(rng.choice([1, 1, 3])):
        some, base = rng.choice(sorted(tensors)), rng.choice(sorted(of_base))
        if rng.random() < 0.5:
            del tensors[some]
        elif rng.random() < 0.5:
            tensors[f"base_model.model.{base}"] = of_base[base] + 1
        else:
            tensors[rng.choice([*NAMES, some + ".x", f"x.{some}"])] = tensors[some]
    _save(tensors, folder)


@damage
def change_tensors(folder: Path, rng: random.Random, kind: Kind) -> None:
    tensors = dict(kind.weights)
    name = rng.choice(sorted(tensors))
    if rng.random() < 0.3:  # what is beside the factors
        name = rng.choice([n for n in sorted(tensors) if "rosa_" not in n] or [name])
    value = tensors[name]
    changes: list[Callable[[], Tensor]] = [
        lambda: value.to(rng.choice(DTYPES)),
        lambda: value.to(rng.choice(DTYPES)),
        lambda: value.flatten(),
        lambda: value[None],
        lambda: value.new_zeros(()),
        lambda: value.new_zeros((0, *value.shape[1:])),
        lambda: value.new_zeros((*value.shape, 0)),
        lambda: value.T if value.ndim == 2 else value,
        lambda: value[:1] if value.ndim else value[None],
        lambda: torch.cat([value, value]) if value.ndim else value + 1,
        lambda: value * rng.choice([float("nan"), float("inf"), -1.0, 1e38]),
        lambda: torch.full_like(value, rng.choice([-1, 2, 2**40]) if value.ndim == 0 else -1),
    ]
    tensors[name] = rng.choice(changes)()
    _save(tensors, folder)


@damage
def change_header(folder: Path, rng: random.Random, kind: Kind) -> None:
    path = folder / FILE
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    entry = header[rng.choice(sorted(name for name in header if name != "__metadata__"))]
    which = rng.randrange(8)
    if which == 0:
        entry["dtype"] = rng.choice(["F16", "F64", "I32", "BOOL", "F8_E4M3", "X", "", 1, None])
    elif which == 1:
        odd = [[-1], [2**62, 4], [0], [], [2**64], "x", None, [1.5]]
        entry["shape"] = rng.choice([*odd, entry["shape"][::-1]])
    elif which == 2:
        odd = [[0, 4], [0, 2**63], [-4, 4], [8, 0], [], [0], "x", [0, 2**64 - 1]]
        entry["data_offsets"] = rng.choice(odd)
    elif which == 3:
        header["__metadata__"] = rng.choice(
            [{"format": "tf"}, {}, {"x": 1}, [], "x", {"x": "y" * 9999}]
        )
    elif which == 4:
        header[rng.choice(NAMES)] = dict(entry)
    elif which == 5:
        entry["more"] = 1
    text = json.dumps(header).encode()
    if which == 6:
        text = b"[" * 10**5 + b"]" * 10**5
    if which == 7:
        text = text[:-1] + b"," + text[1:]  # every key twice
    length = rng.choice([len(text)] * 6 + [2**63, len(text) + 10**9, 0, 10**8 + 1])
    path.write_bytes(struct.pack("<Q", length) + text + data)


@damage
def odd_field(folder: Path, rng: random.Random, kind: Kind) -> None:
    name = rng.choice([field.name for field in fields(RosaConfig)])
    _set_raw(folder, kind, {name: rng.choice(ODD_JSON)})


@damage
def odd_fields(folder: Path, rng: random.Random, kind: Kind) -> None:
    odd_field(folder, rng, kind)


@damage
def many_fields(folder: Path, rng: random.Random, kind: Kind) -> None:
    names = [field.name for field in fields(RosaConfig)]
    further = ["split", "a_setting_of_tomorrow", "runtime_config", "__class__", "self", "kwargs"]
    some = rng.sample([*names, *further], rng.choice([1, 2, 3]))
    _set_raw(folder, kind, {name: rng.choice(ODD_JSON) for name in [*some, rng.choice(further)]})


@damage
def drop_fields(folder: Path, rng: random.Random, kind: Kind) -> None:
    kept = dict(kind.config)
    for name in rng.sample(sorted(kept), rng.choice([1, 2, 5])):
        del kept[name]
    (folder / CONFIG).write_text(json.dumps(kept))


@damage
def odd_config(folder: Path, rng: random.Random, kind: Kind) -> None:
    text = (folder / CONFIG).read_text()
    twice = text.rstrip()[:-1] + f', "{rng.choice(sorted(kind.config))}": {rng.choice(ODD_JSON)}}}'
    bombs = ["[" * 10**5, '{"peft_type":' * 10**4 + "1" + "}" * 10**4, "9" * 10**4, "{" * 10]
    odd: list[bytes] = [each.encode() for each in (twice, twice, *bombs, *ODD_JSON[:30])]
    odd += [text.encode("utf-16"), b"\xef\xbb\xbf" + text.encode(), b"\0" * 100, os.urandom(50)]
    method = rng.choice(["ROZA", "rosa", "", "__class__", 1, None, [], {}])
    odd.append(json.dumps({**kind.config, "peft_type": method}).encode())
    (folder / CONFIG).write_bytes(rng.choice(odd))


@damage
def odd_files(folder: Path, rng: random.Random, kind: Kind) -> None:
    path = _either(folder, rng)
    content = path.read_bytes()
    path.unlink()
    which = rng.randrange(8)
    if which == 0:
        path.mkdir()
    elif which == 1:
        path.symlink_to(rng.choice([path, "nothing", "/dev/zero", "/dev/null", "/etc", ".."]))
    elif which == 2:
        os.mkfifo(path)
    elif which == 3:
        path.write_bytes(b"")
    elif which == 4:
        torch.save(kind.weights, folder / "adapter_model.bin")
    elif which == 5:
        path.write_bytes(os.urandom(rng.choice([1, 8, 100, 10**5])))
    elif which == 6:
        elsewhere = folder / "elsewhere"
        elsewhere.write_bytes(content)
        path.symlink_to(elsewhere)  # as the hub's cache has it: nothing is wrong


def _save(tensors: dict[str, Tensor], folder: Path) -> None:
    with contextlib.suppress(SafetensorError):  # a name that cannot be written
        save_file({name: t.contiguous().clone() for name, t in tensors.items()}, folder / FILE)


def _set_raw(folder: Path, kind: Kind, values: dict[str, str]) -> None:
    """Write fields into a config as they are, JSON or not."""
    whole = {name: json.dumps(value) for name, value in kind.config.items()} | values
    text = ",".join(f'"{name}": {value}' for name, value in whole.items())
    (folder / CONFIG).write_text("{" + text + "}")


# -- what may come of it ---------------------------------------------------------------------------


def load_plain(kind: Kind, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(kind.base, str(folder))


def load_low_memory(kind: Kind, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(kind.base, str(folder), low_cpu_mem_usage=True)


def load_trainable(kind: Kind, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(kind.base, str(folder), is_trainable=True).eval()


def load_second(kind: Kind, folder: Path) -> PeftModel:
    kind.adapted.load_adapter(str(folder), "second")
    return kind.adapted


def load_by_command(kind: Kind, folder: Path) -> PeftModel:
    return models.load_trained(folder)[0]  # type: ignore[return-value]


def export_by_command(kind: Kind, folder: Path) -> None:
    export_folder(folder, "merged", folder / "out", low_memory=True)


WAYS = [load_plain, load_low_memory, load_trainable, load_second]
BY_COMMAND = [load_by_command, export_by_command]


def wrong(kind: Kind, way: Any, folder: Path) -> tuple[str, str]:
    """What happened ("loaded" or an error's name), and what is wrong about it, if anything is."""
    fresh = copy.deepcopy(kind)
    before = outputs_of(fresh.base, kind.inputs)
    modules = dict(fresh.base.named_modules())
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    try:
        with _limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = way(fresh, folder)
    except BaseException as error:
        name, message = type(error).__name__, str(error)
        problem = _unclear(name, message, error, way in BY_COMMAND)
        if not problem and way is load_second:
            if list(fresh.adapted.peft_config) != ["default"]:
                problem = "the second adapter is still there"
            elif not torch.equal(outputs_of(fresh.adapted, kind.inputs), kind.outputs):
                problem = "the first adapter has changed"
        elif not problem and dict(fresh.base.named_modules()) != modules:
            problem = "the base model has other modules"
        if not problem and not torch.equal(outputs_of(fresh.base, kind.inputs), before):
            problem = "the base model has changed"
        return name, problem
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - most > MEMORY:
        return "loaded", "it took much memory"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return "loaded", "" if loaded is None else _another(kind, loaded, folder, way)
        except RuntimeError as error:
            return "loaded", f"what was loaded cannot be used: {error}"


def _unclear(name: str, message: str, error: BaseException, by_command: bool) -> str:
    if name not in (CLEAR if by_command else CLEAR + OF_READERS):
        return f"{name}: {message[:300]}"
    if len(message) < 10 or (len(message) > 2000 and isinstance(error, UserError)):
        return f"a message of {len(message)} characters: {message[:100]}"
    if isinstance(error, UserError) and any(word in message for word in DEPTHS):
        return f"of the depths: {message[:300]}"
    return ""


def _another(kind: Kind, loaded: PeftModel, folder: Path, way: Any) -> str:
    """What of a loaded adapter is not what the files say; empty if all is."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    adapter = "second" if way is load_second else "default"
    if config["peft_type"] != "ROSA":
        return ""  # another method's; this package is not asked
    loaded.set_adapter(adapter, inference_mode=True)
    there = load_file(folder / FILE)
    held = get_peft_model_state_dict(loaded, adapter_name=adapter)
    # Embeddings are in a file where they were resized or adapted, and PEFT gives them so.
    beside = loaded.state_dict()
    embeddings = [n for n in there if any(part in n for part in ("embed", "wte", "lm_head"))]
    held |= {name: beside[name] for name in embeddings if name in beside}
    if missing := there.keys() - held.keys():
        return f"nobody took {sorted(missing)[:3]}"
    if extra := {name for name in held.keys() - there.keys() if "embed" not in name}:
        return f"nobody brought {sorted(extra)[:3]}"
    for name, value in there.items():
        own = held[name]
        value = value.reshape(own.shape) if own.numel() == value.numel() == 1 else value
        if not torch.equal(own, value.to(own.dtype)):
            return f"{name} is not what the file has"
    same = there.keys() == kind.weights.keys() and all(  # an output embedding may have come too
        torch.equal(value, there[name].to(value)) for name, value in kind.weights.items()
    )
    told = ("alpha", "alpha_pattern", "trainable_token_indices", "task_type")
    if same and all(config.get(name) == kind.config[name] for name in told):
        found = outputs_of(loaded, kind.inputs)
        if not torch.allclose(found, kind.outputs, rtol=1e-4, atol=1e-5):
            return f"other outputs, by {float((found - kind.outputs).abs().max()):.1e}"
    return ""


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# -- many of them ----------------------------------------------------------------------------------


def tried(
    kind: str, first: int, cases: int, by_command: bool = False
) -> tuple[Counter[str], list[str]]:
    """What came of so many damaged folders, and what was wrong, with the number to repeat it."""
    counts: Counter[str] = Counter()
    found = []
    with tempfile.TemporaryDirectory() as place:
        sound = made(kind, Path(place))
        for number in range(first, first + cases):
            rng = random.Random(number)
            folder = Path(place) / "damaged"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(sound.folder, folder)
            change = rng.choice(DAMAGES)
            change(folder, rng, sound)
            way = rng.choice(BY_COMMAND if by_command else WAYS)
            outcome, problem = wrong(sound, way, folder)
            counts[outcome] += 1
            if problem:
                how = " --by-command" if by_command else ""
                found.append(
                    f"--kind {kind}{how} --first {number} --cases 1: "
                    f"{change.__name__}, {way.__name__}: {problem}"
                )
    return counts, found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=list(KINDS), help="all kinds in turn if left out")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--cases", type=int, default=int(os.environ.get("ROSA_FUZZ", "10000")))
    parser.add_argument("--by-command", action="store_true")
    given = parser.parse_args()
    kinds = [(given.kind, given.by_command)] if given.kind else [*((k, False) for k in KINDS)]
    kinds += [] if given.kind else [("bert", True)]
    total: Counter[str] = Counter()
    problems: list[str] = []
    each, begun = -(-given.cases // len(kinds)), time.monotonic()
    for kind, by_command in kinds:
        for first in range(given.first, given.first + each, 100):
            cases = min(100, given.first + each - first)
            counts, found = tried(kind, first, cases, by_command)
            total += counts
            problems += found
            print("\n".join(found), end="\n" if found else "", flush=True)
            how = " by command" if by_command else ""
            done = f"{sum(total.values())} tried, {len(problems)} wrong"
            print(f"{kind}{how}: {done}, {time.monotonic() - begun:.0f} s", flush=True)
    print(", ".join(f"{name} {count}" for name, count in total.most_common()))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
