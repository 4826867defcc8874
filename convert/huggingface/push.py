"""A written model to the Hugging Face Hub: one commit with all of its files, or none.

What is no part of a model stays here, whatever lies in the folder. A repository that has a model is replaced only with
`overwrite`, and then the files of the old one go in the same commit: shards of two models never lie side by side.
"""

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from convert.card_header import CARD_FILE
from convert.huggingface.hub import looks_like_hub_id
from convert.output import CHAT_TEMPLATE_FOLDER, MODEL_FILES, MODEL_FOLDERS
from gluprune_jax.errors import GlupruneError, OperationError, RequestError, first_line
from gluprune_jax.files.object_store import Folder, in_store

_PATTERNS = (*MODEL_FILES, "*.gguf", f"{CHAT_TEMPLATE_FOLDER}/*.jinja", *(f"{name}/*" for name in MODEL_FOLDERS))
_WEIGHTS = ("*.safetensors", "*.gguf", *(f"{name}/*" for name in MODEL_FOLDERS))
_TIMEOUT = 10.0  # seconds, for what is asked before the upload
_TOKENS = "https://huggingface.co/settings/tokens"
_Answer = TypeVar("_Answer")


@dataclasses.dataclass(frozen=True)
class Upload:
    """What is sent to the Hub.

    Attributes:
      repo_id: the repository, owner/name.
      private: whether a repository that is made for it is private.
      files: where each file lies here, by its path in the repository.
      left_out: what lies in the folder too and is no part of a model.
      nbytes: of all files.
    """

    repo_id: str
    private: bool
    files: Mapping[str, Path]
    left_out: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of all files."""
        return sum(path.stat().st_size for path in self.files.values())

    @property
    def has_card(self) -> bool:
        """Whether a model card is among them."""
        return CARD_FILE in self.files


def plan_upload(model: Path, repo_id: str, *, private: bool = False) -> Upload:
    """What `push_to_hub` would send, without a connection and without a token.

    Args:
      model: a model folder, or a GGUF file.
      repo_id: the repository, owner/name.
      private: whether a repository that is made for it is private.

    Raises:
      RequestError: no such folder, one without weights, or a name that is none of a repository.
    """
    check_repo_id(repo_id)
    if model.is_file():
        found = {model.name: model}
    elif model.is_dir():
        found = {path.relative_to(model).as_posix(): path for path in sorted(model.rglob("*")) if path.is_file()}
    else:
        raise RequestError(f"there is no model {model} to upload; accepted: a model folder or a GGUF file")
    files = {name: path for name, path in found.items() if _matches(name, _PATTERNS)}
    if not any(_matches(name, _WEIGHTS) for name in files):
        raise RequestError(f"{model} holds no weights (.safetensors, .gguf or orbax/), so it is no model to upload")
    return Upload(repo_id, private, files, tuple(name for name in found if name not in files))


def check_options(repo_id: str | None, private: bool, output: Folder | None) -> None:
    """Refuses a command's options that go with no upload, or with no files to upload.

    Raises:
      RequestError: as said; or a name that is none of a repository.
    """
    if repo_id is None:
        if private:
            raise RequestError("`private` is about the repository of `push_to_hub`; give that too, or leave it out")
        return
    if output is None or in_store(output):
        raise RequestError("`push_to_hub` uploads a folder or file that is written here; give `output`")
    check_repo_id(repo_id)


def check_repo_id(repo_id: str) -> None:
    """Refuses a name that is none of a repository.

    Raises:
      RequestError: it is spelled otherwise than owner/name.
    """
    if not looks_like_hub_id(repo_id):
        raise RequestError(f"`push_to_hub` is {repo_id!r}; it has the form owner/name, as in me/llama-3.2-1b-pruned")


def check_push(repo_id: str, *, private: bool = False, overwrite: bool = False) -> None:
    """Refuses an upload that the Hub would refuse, before any work is done; the Hub is asked.

    Raises:
      RequestError: a bad name; no token, or one that may not write; the repository has a model and `overwrite` is not
        given; it is public and `private` is given.
      OperationError: the Hub cannot be reached.
    """
    check_repo_id(repo_id)
    _old_files(_api(repo_id), repo_id, private=private, overwrite=overwrite)


def push_to_hub(
    model: Path, repo_id: str, *, private: bool = False, overwrite: bool = False, dry_run: bool = False
) -> Upload:
    """Uploads a model that was written, in one commit, and makes the repository if there is none.

    Args:
      model: a model folder with its card, or a GGUF file.
      repo_id: the repository, owner/name.
      private: whether a repository that is made for it is private.
      overwrite: whether a model that is there is replaced.
      dry_run: sends nothing and asks nobody.

    Returns:
      What was sent, or would be.

    Raises:
      RequestError: as `plan_upload` and `check_push`.
      OperationError: the Hub cannot be reached, or the upload failed; the repository has then what it had.
    """
    upload = plan_upload(model, repo_id, private=private)
    if dry_run:
        return upload
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete  # here: it costs 0.4 s, to those who use it

    api = _api(repo_id)
    gone = _old_files(api, repo_id, private=private, overwrite=overwrite) - set(upload.files)
    _asked(repo_id, lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    operations: list[Any] = [CommitOperationDelete(name) for name in sorted(gone)]
    operations += [CommitOperationAdd(name, str(path)) for name, path in upload.files.items()]
    _asked(repo_id, lambda: api.create_commit(repo_id, operations, commit_message="Upload of a model by gluprune_jax"))
    return upload


def _api(repo_id: str) -> Any:
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise RequestError(
            f"an upload to {repo_id} needs a token that may write: set HF_TOKEN to one of {_TOKENS}, or run "
            f"`hf auth login`"
        )
    return HfApi()


def _old_files(api: Any, repo_id: str, *, private: bool, overwrite: bool) -> set[str]:
    """The files of the model that a repository has; none, if there is no such repository yet."""
    from huggingface_hub import errors

    def ask() -> Any:
        try:
            return api.repo_info(repo_id, timeout=_TIMEOUT)
        except errors.GatedRepoError:
            raise
        except errors.RepositoryNotFoundError:
            return None

    info = _asked(repo_id, ask)
    if info is None:
        return set()
    names = {sibling.rfilename for sibling in info.siblings or ()}
    if private and not info.private:
        raise RequestError(f"{repo_id} is public, and `private` is given; make it private on the Hub or choose another")
    if any(_matches(name, _WEIGHTS) for name in names) and not overwrite:
        raise RequestError(f"{repo_id} has a model on the Hub; choose another repository or add `overwrite`")
    return {name for name in names if _matches(name, _PATTERNS)}


def _asked(repo_id: str, ask: Callable[[], _Answer]) -> _Answer:
    """What the Hub answers; its refusals and all failures on the way to it in one sentence."""
    from huggingface_hub import errors

    try:
        return ask()
    except GlupruneError:
        raise
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise RequestError(
                f"the token may not write to {repo_id} (the Hub answers {status}); set HF_TOKEN to one of {_TOKENS} "
                f"with the right to write there"
            ) from error
        raise OperationError(f"the Hub refuses the upload to {repo_id}: {first_line(error)}") from error
    except Exception as error:  # the network library differs between versions, and so do its exceptions
        raise OperationError(
            f"the upload to {repo_id} failed ({type(error).__name__}: {first_line(error)}); the model is whole on the "
            f"disk, so try again"
        ) from error


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a path fits a pattern; * crosses no slash unless the pattern has one."""
    return any(fnmatch.fnmatchcase(name, one) for one in patterns if "/" in one or "/" not in name)
