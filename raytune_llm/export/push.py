"""Uploads an export to a hub (`export.push`), by huggingface_hub."""

from __future__ import annotations

import shlex
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from raytune_llm.config.export import ExportConfig
from raytune_llm.errors import ConfigError, ResourceError, first_line
from raytune_llm.hub import ask_hub, hub_failures

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
"""Of an earlier export there, these are removed by the commit that uploads others: some programs load all that they find."""


def check_push(settings: ExportConfig) -> None:
    """Raises ConfigError for a name that no repository of this user can have, and ResourceError where the hub can't be reached or
    doesn't know the token. Nothing is made there."""
    repo = settings.push
    if repo is None:
        return
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError("export.push", f"must be a name that a hub takes ({first_line(error)})", got=repo) from None
    address, state = ask_hub()
    if state != "reached":
        why = "HF_HUB_OFFLINE is set" if state == "offline" else f"{address} does not answer"
        raise ResourceError(f"export.push needs the hub, and {why}", "Set export.push=null, and upload the folder later.")
    if get_token() is None:
        raise ResourceError("export.push needs a token of the hub, and there is none", "Run `hf auth login`, or set HF_TOKEN.")
    try:
        user = HfApi().whoami()
    except hub_failures() as error:
        fix = "Run `hf auth login --force`, or set another HF_TOKEN."
        raise ResourceError(f"{address} does not take the token ({first_line(error)})", fix) from error
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise ResourceError("export.push needs a token that may write, and this one may only read", "Make another at the hub.")
    owners = [user["name"], *(organization["name"] for organization in user.get("orgs", ()))]
    # A token for chosen repositories alone need not see the organizations that they are in.
    if role != "fineGrained" and repo.partition("/")[0] not in owners:
        rule = f"must begin with the token's user or an organization of theirs ({', '.join(owners)})"
        raise ConfigError("export.push", rule, got=repo)


def push(folder: Path, settings: ExportConfig, message: str) -> str:
    """The address of the commit. Raises ResourceError, with the command that repeats it, for an upload that fails."""
    repo = settings.push
    assert repo is not None
    removed: list[str] = list(WEIGHTS) if any(folder.glob(WEIGHTS[0])) else []
    try:
        api = HfApi()
        made = api.create_repo(repo, private=settings.push_private, exist_ok=True).repo_id
        return api.upload_folder(repo_id=made, folder_path=folder, commit_message=message, delete_patterns=removed).commit_url
    except hub_failures() as error:
        again = ["hf", "upload", repo, str(folder), ".", "--private" if settings.push_private else "--no-private"]
        again += [word for pattern in removed for word in ("--delete", pattern)]
        fix = f"The export is whole in {folder}; this uploads it: {shlex.join([*again, '--commit-message', message])}"
        raise ResourceError(f"The upload to {repo} failed ({first_line(error)})", fix) from error
