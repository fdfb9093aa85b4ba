"""An exported folder to a model hub, where huggingface-hub is installed and someone is logged in."""

from pathlib import Path
from typing import Any

from llamagen_dist.errors import UserError


def open_hub(repo: str) -> Any:
    """The hub's client, before anything is written. Raises UserError: not installed, a bad name, nobody logged in."""
    try:
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.utils import HFValidationError, validate_repo_id
    except ImportError:
        raise UserError("--push needs huggingface-hub: pip install 'llamagen-dist[hub]'") from None
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push {repo}: not a repository's name ({' '.join(str(error).split())})") from None
    if get_token() is None:
        raise UserError("--push: nobody is logged in; run `hf auth login`, or set the environment variable HF_TOKEN")
    return HfApi()


def push(hub: Any, folder: Path, repo: str) -> str:
    """Upload the folder's files in one commit; returns where they are. The same again uploads what has changed.

    hub: from ``open_hub``.
    Raises UserError where the hub refuses or is not reached; the folder stays as it is.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        hub.create_repo(repo, repo_type="model", exist_ok=True)
        return str(hub.upload_folder(repo_id=repo, repo_type="model", folder_path=folder, ignore_patterns=[".*"]))
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        first = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"--push {repo}: the hub was not reached or refused ({first}); {folder} is whole, and the same command "
            "tries again"
        ) from None
