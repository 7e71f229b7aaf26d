"""The Hugging Face hub: from a repository id to a local snapshot directory.

All is left to huggingface-hub: its cache, its token, its offline mode, its resumed downloads.  This module says which files a
conversion needs and turns whatever goes wrong into one CheckpointError.  The library is imported on use: local sources do not pay
for it.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from pathlib import Path

from quantkit.errors import CheckpointError, CorpusError, QuantkitError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

# What an artifact keeps of its source beside the weights: names in lower case, any case matches.
_CARRIED = (
    "tokenizer*",
    "*.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "generation_config.json",
    "*processor_config.json",
    *(word + ending for word in ("license", "licence", "use_policy", "notice", "copying") for ending in ("", "[._-]*")),
)
# The same for the hub, whose patterns heed case, and weights, index and configs; not the copy in Meta's own layout that releases
# keep in original/.
NEEDED = (
    "*.safetensors",
    "*.json",
    "README.md",
    *(re.sub("[a-z]", lambda letter: f"[{letter[0]}{letter[0].upper()}]", pattern) for pattern in _CARRIED),
)
NOT_NEEDED = ("*/*",)
# Of a dataset: what can be read without a library for tables.
DATASET_FILES = ("*.jsonl", "*.json", "*.txt")


def is_carried(name: str) -> bool:
    """Whether a file of that name is carried along: tokenizer, chat template, generation and processor settings, licence."""
    return any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in _CARRIED)


def is_repository_id(source: str) -> bool:
    """Whether a source that is no local path can be a hub repository: ``owner/name``."""
    return _REPOSITORY.fullmatch(source) is not None


def download_file(repository: str, name: str, revision: str | None) -> Path:
    """Local path of one file of the repository; downloads it unless it is cached."""
    from huggingface_hub import hf_hub_download

    return _download(repository, revision, lambda: hf_hub_download(repository, name, revision=revision))


def download_snapshot(repository: str, revision: str | None) -> Path:
    """Local directory with the files a conversion needs; downloads what is not cached, and goes on where it was interrupted."""
    from huggingface_hub import snapshot_download

    return _download(
        repository,
        revision,
        lambda: snapshot_download(repository, revision=revision, allow_patterns=list(NEEDED), ignore_patterns=list(NOT_NEEDED)),
    )


def download_dataset(repository: str, revision: str | None) -> Path:
    """Local directory with the text files of a dataset repository; holds nothing when there are none.  Raises CorpusError."""
    from huggingface_hub import snapshot_download

    return _download(
        repository,
        revision,
        lambda: snapshot_download(repository, repo_type="dataset", revision=revision, allow_patterns=list(DATASET_FILES)),
        CorpusError,
        "dataset",
    )


def _download(
    repository: str,
    revision: str | None,
    load: Callable[[], str],
    failure: type[QuantkitError] = CheckpointError,
    noun: str = "model",
) -> Path:
    from huggingface_hub import errors

    # The hub's own errors have no common base, and connection errors are those of the HTTP library it happens to use.
    known = [item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, Exception)]
    expected: tuple[type[Exception], ...] = (*known, OSError, RuntimeError, ValueError)
    at = f"{repository}{f' at revision {revision}' if revision else ''}"
    try:
        return Path(load())
    except errors.GatedRepoError as error:
        raise failure(
            f"{at} is gated: accept its licence on the hub's page of the {noun}, then log in with `hf auth login`."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise failure(f"{repository} has no revision {revision}. Look up its branches and commits on the hub.") from error
    except errors.RepositoryNotFoundError as error:
        raise failure(
            f"{repository} is neither a local directory nor a repository that the hub shows you. Check the name; if it is private, "
            "log in with `hf auth login`."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise failure(
            f"{at} is neither a local directory nor complete in the local cache, and the hub cannot be reached: "
            f"{_first_line(error)}. Check the name, or go online."
        ) from error
    except errors.EntryNotFoundError as error:
        raise failure(f"{at} lacks a file that every Llama 4 checkpoint has: {_first_line(error)}") from error
    except expected as error:
        raise failure(
            f"{at} cannot be downloaded: {_first_line(error)}. Run the same command again; finished parts are not downloaded twice."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300].rstrip(".")
