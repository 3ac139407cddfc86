"""What fine-tunes, compares and reports, by the method's public face: the commands' work."""

from importlib.util import find_spec

_PACKAGES = ("datasets", "filelock", "matplotlib", "yaml", "rich", "sacrebleu", "sklearn", "typer")
_missing = [name for name in _PACKAGES if find_spec(name) is None]
if _missing:
    raise ImportError(
        f"the rosa command and rosa.bench need more packages ({', '.join(_missing)}): run "
        "pip install 'rosa-finetune[cli]'",
        name=_missing[0],
    )
