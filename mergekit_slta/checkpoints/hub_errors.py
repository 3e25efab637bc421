"""What errors of the Hub's library say, in one line each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, is_offline_mode
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from mergekit.common import ModelPath

from mergekit_slta.errors import ModelError, path_hint, show


@contextmanager
def explain(model: ModelPath) -> Iterator[None]:
    """Turn the Hub's errors about a model or adapter into one line each; other errors pass.

    Raises:
        ModelError: there is no such model or revision, it may not be read, or the Hub cannot be reached.
    """
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        problem = hub_problem(model, error)
        if problem is None:
            raise
        raise problem from error


def hub_problem(model: ModelPath, error: BaseException | None) -> ModelError | None:
    """What an error of the Hub's library, or of transformers because of one, says; None for other errors."""
    name, page = show(model), f"{constants.ENDPOINT}/{show(model.path)}"
    while error is not None:
        if isinstance(error, RemoteEntryNotFoundError):  # the model lacks the file: callers know what that means
            return None
        if isinstance(error, GatedRepoError):
            return ModelError(
                f"{name} is gated: ask for access at {page}, then log in with `hf auth login` or set HF_TOKEN",
                code="no-access",
            )
        if isinstance(error, RevisionNotFoundError):
            return ModelError(
                f"{name} has no revision {show(model.revision or 'main')} on the Hub: choose one of those at {page}",
                code="missing-model",
            )
        if isinstance(error, RepositoryNotFoundError):
            return ModelError(
                f"there is no model folder {name} {path_hint(model.path)}, and no such model on the Hub: check the "
                "path or id; to read a private one, log in with `hf auth login` or set HF_TOKEN",
                code="missing-model",
            )
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            return ModelError(
                f"the Hub refuses to give {name} ({error.response.status_code}): HF_TOKEN has expired or lacks the "
                f"right to read {page}; make a new one",
                code="no-access",
            )
        if isinstance(error, OfflineModeIsEnabled) or (
            isinstance(error, LocalEntryNotFoundError) and is_offline_mode()
        ):
            return ModelError(
                f"there is no model folder {name} {path_hint(model.path)}, and the Hub's cache does not hold such a "
                "model completely: check the path, or unset HF_HUB_OFFLINE, which switches the Hub off",
                code="hub-unreachable",
            )
        if isinstance(error, LocalEntryNotFoundError) or _is_connection(error):
            return ModelError(
                f"there is no model folder {name} {path_hint(model.path)}, the Hub's cache does not hold such a model "
                f"completely, and the Hub cannot be reached at {constants.ENDPOINT} ({show(error)}): check the path, "
                "the network, or HF_ENDPOINT",
                code="hub-unreachable",
            )
        error = error.__cause__ or error.__context__
    return None


def _is_connection(error: BaseException) -> bool:
    """Whether an error is the HTTP client's: no connection, a time-out, or a failure of the server."""
    return isinstance(error, HfHubHTTPError) or type(error).__module__.partition(".")[0] in (
        "httpx",
        "httpx2",
        "httpcore",
    )
