"""ROSA's entry in PEFT: the check of PEFT's version and the type `PeftType.ROSA`.

PEFT keeps its methods in an enum. A method from outside extends it, here and nowhere else; the
model and config classes are entered in `rosa.model` by PEFT's own `register_peft_method`.
"""

from __future__ import annotations

import warnings

import peft
from aenum import extend_enum
from packaging.version import Version
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.peft_types import PeftType

OLDEST = Version("0.21.2")
UNTESTED = Version("0.22")
# The parts of PEFT's tuner interface that ROSA's saving and loading stand on.
_NEEDED = ("_prepare_model", "_get_adapter_state_dict", "_remap_adapter_state_dict_for_load")


def check_peft_version(version: str) -> None:
    """Raise ImportError for a PEFT that ROSA cannot work with; warn of an untested one."""
    found = Version(version)
    missing = [name for name in _NEEDED if not hasattr(BaseTuner, name)]
    if found < OLDEST or missing:
        raise ImportError(
            f"rosa needs peft >= {OLDEST} and < {UNTESTED}, found {version}"
            + (f" (without BaseTuner.{', '.join(missing)})" if missing else "")
            + f": run pip install 'peft>={OLDEST},<{UNTESTED}'"
        )
    if found >= UNTESTED:
        warnings.warn(
            f"rosa was tested with peft >= {OLDEST} and < {UNTESTED}, found {version}: "
            "check a save and a load before you rely on it",
            stacklevel=2,
        )


def _register_type() -> PeftType:
    if "ROSA" in PeftType.__members__:
        raise ImportError(
            f"peft {peft.__version__} already has a method called ROSA, which is not this "
            f"package's: install peft < {UNTESTED} or use that one"
        )
    extend_enum(PeftType, "ROSA", "ROSA")
    return PeftType["ROSA"]


check_peft_version(peft.__version__)
ROSA = _register_type()
