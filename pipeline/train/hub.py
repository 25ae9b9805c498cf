"""Uploading a folder to the Hugging Face hub, with the hub's own client.

The token is where the client looks for it: `HF_TOKEN`, or what `hf auth login` has stored. `HF_ENDPOINT` names another
hub.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from ast_core.errors import ConfigError, UserError

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"

DENIED = (401, 403)


def check_access(name: str) -> str:
    """The full name `OWNER/NAME` of the repository, before any work. Without an owner it is the user's.

    Raises:
        ConfigError: the name is not allowed, or there is no valid token.
        UserError: the hub does not answer.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as err:
        raise ConfigError(f"--push-to-hub {name} is not a name of a repository: {err}") from err
    with _errors_in_one_line(name):
        user = HfApi().whoami()["name"]
    return name if "/" in name else f"{user}/{name}"


def push(folder: Path, name: str, *, public: bool) -> str:
    """Upload the files of a folder in one commit, and return the repository's URL.

    Args:
        name: `OWNER/NAME`. The repository is created if it does not exist.
        public: whether a new repository can be read by everyone.

    Raises:
        ConfigError: the token may not write there.
        UserError: the hub does not answer, or refuses the files.
    """
    api = HfApi()
    with _errors_in_one_line(name):
        url = api.create_repo(name, private=not public, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload a model with ast-ray")
    return str(url)


@contextmanager
def _errors_in_one_line(name: str) -> Iterator[None]:
    try:
        yield
    except LocalTokenNotFoundError as err:
        raise ConfigError(f"--push-to-hub {name} needs a token; {LOG_IN}") from err
    except HfHubHTTPError as err:
        status = err.response.status_code if err.response is not None else None
        if status in DENIED:
            raise ConfigError(f"the hub does not let this token write to {name} (HTTP {status}); {LOG_IN}") from err
        raise UserError(f"the hub refused {name}: {_line(err)}") from err
    except (HTTPError, OSError, ValueError) as err:  # the first is that of the HTTP library
        raise UserError(f"{name} could not be uploaded: {_line(err)}; run the same command again") from err


def _line(err: Exception) -> str:
    return " ".join(str(err).split())[:300] or type(err).__name__
