"""Models from the Hugging Face Hub: a repository id becomes a local folder."""

import re
from pathlib import Path

from gluprune_jax.errors import OperationError, RequestError

# What a conversion reads or carries over. The patterns match whole paths, in which * crosses a slash.
_WANTED = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*.json",
    "*.model",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template*",
    "LICENSE*",
    "USE_POLICY*",
    "NOTICE*",
    "README.md",  # its header says the licence
)
# Weights a second time: other formats live in sub-folders, the original ones are called consolidated.
_UNWANTED = ("*/*", "consolidated*")
_TEMPLATES = "additional_chat_templates/*.jinja"  # the only sub-folder that is wanted

_TIMEOUT = 10.0  # seconds

_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"


def looks_like_hub_id(name: str) -> bool:
    """Whether `name` is spelled as a Hub id: one `owner/name` of letters, digits, `_`, `.` and `-`."""
    well_formed = re.fullmatch(f"{_NAME}/{_NAME}", name, re.ASCII) is not None
    return well_formed and "--" not in name and ".." not in name and not name.endswith(".git")


def hub_snapshot(repo_id: str, revision: str | None = None) -> Path:
    """Downloads the safetensors, config and tokenizer of a model into the Hub's cache and returns their folder.

    Nothing else is fetched: no pickle, no second copy of the weights. Without a connection the cached copy is used.

    Raises:
      RequestError: there is no such repository or revision for this user, its licence is not accepted yet, or it has
        no safetensors.
      OperationError: there is no connection and no cached copy, or the download failed.
    """
    if not looks_like_hub_id(repo_id):
        raise RequestError(f"{repo_id!r} is not a Hub id; it has the form owner/name, as in meta-llama/Llama-3.2-1B")

    from huggingface_hub import errors, snapshot_download  # here: it costs 0.4 s, to those who use it

    unreachable = _why_unreachable(repo_id, revision)
    try:
        for wanted, unwanted in ((_WANTED, _UNWANTED), ((_TEMPLATES,), ())):
            folder = Path(
                snapshot_download(
                    repo_id,
                    revision=revision,
                    allow_patterns=list(wanted),
                    ignore_patterns=list(unwanted),
                    local_files_only=unreachable is not None,
                )
            )
    except errors.GatedRepoError as error:  # before its base, RepositoryNotFoundError
        raise RequestError(
            f"{repo_id} is gated: accept its licence at https://huggingface.co/{repo_id} and set HF_TOKEN to a "
            "token of that account"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise RequestError(
            f"the Hub has no model {repo_id}, or it is private: check the name, or set HF_TOKEN to a token that may "
            "read it"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise RequestError(f"{repo_id} has no revision {revision!r}; give a branch, tag or commit of it") from error
    except errors.HFValidationError as error:
        raise RequestError(f"{repo_id!r} is not a Hub id: {_first_line(error)}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise _no_copy(repo_id, unreachable or _first_line(error)) from error
    except Exception as error:  # the network library differs between versions, and so do its exceptions
        raise OperationError(
            f"the download of {repo_id} failed ({type(error).__name__}: {_first_line(error)}); try again, or give a "
            "local folder as the model instead"
        ) from error
    if not any(folder.glob("*.safetensors")):
        if unreachable is not None:  # older versions of the library return what little the cache has
            raise _no_copy(repo_id, unreachable)
        raise RequestError(
            f"{repo_id} has no .safetensors file, and other formats of weights (.bin, .pth) are not read; choose a "
            "repository or revision that has safetensors"
        )
    return folder


def _why_unreachable(repo_id: str, revision: str | None) -> str | None:
    """Asks the Hub with a time limit: `snapshot_download` waits for ever for a network that drops packets."""
    from huggingface_hub import HfApi, errors

    try:
        HfApi().model_info(repo_id, revision=revision, timeout=_TIMEOUT)
    except errors.HfHubHTTPError:
        return None  # an answer, if no welcome one; the download gets it too, and knows what the cache can do
    except Exception as error:  # of the network library, as above
        return f"{type(error).__name__}: {_first_line(error)}"
    return None


def _no_copy(repo_id: str, reason: str) -> OperationError:
    return OperationError(
        f"no connection to the Hub ({reason}) and no complete copy of {repo_id} in its cache; give a local folder as "
        "the model instead"
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
