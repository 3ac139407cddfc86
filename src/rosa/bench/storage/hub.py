"""`--push-to-hub`: what was trained or exported, in a repository of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from rosa.bench.processes import is_first
from rosa.errors import UserError


def check_hub(name: str | None, private: bool) -> None:
    """Make sure that `name` can be pushed to: it is made if it is not there.

    Args:
        name: of the repository, as me/name; None pushes nowhere.
        private: whether only its owner sees one that is made.

    Raises:
        UserError: it is no name, nobody is logged in, the hub cannot be reached, or says no.
    """
    if name is None and private:
        raise UserError("--private is of a repository: name it by --push-to-hub, or leave it out")
    if name is None or not is_first():
        return
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        api = HfApi()
        api.whoami()
        api.create_repo(name, private=private, exist_ok=True)
        is_public = private and not api.repo_info(name).private
    except LocalTokenNotFoundError as error:
        raise UserError(
            "--push-to-hub needs a token of the hub: run `hf auth login`, or set HF_TOKEN"
        ) from error
    except OfflineModeIsEnabled as error:
        raise UserError("--push-to-hub: the hub is switched off by HF_HUB_OFFLINE") from error
    except Exception as error:  # of whatever library speaks to it
        raise UserError(f"--push-to-hub {name} cannot be: {_said(error)}") from error
    if is_public:
        raise UserError(
            f"--push-to-hub {name} is there and public: leave --private out, make it private "
            "first, or take another name"
        )


def push(folder: Path, name: str) -> str:
    """Upload a folder's files in one commit; returns where they are.

    Raises:
        UserError: they could not be uploaded; what is in the folder stays.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message="Upload by rosa")
    except Exception as error:  # of whatever library speaks to it
        raise UserError(
            f"{folder} is whole, but could not be pushed ({_said(error)}): "
            f"`hf upload {name} {folder}` tries that again"
        ) from error
    return f"{HfApi().endpoint}/{name}"


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
