"""The identity of alphas: the inputs that they depend on, as label -> value.

Scope: names of the labels, hashing and comparing identities. `job.identity` computes the values.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence

from mergekit_slta.errors import listing


def rows_label(model: str) -> str:
    """Label of the hash of a task's rows."""
    return f"rows of {model}"


def held_out_label(model: str) -> str:
    """Label of the hash of a task's held-out rows."""
    return f"held-out rows of {model}"


def importance_label(model: str) -> str:
    """Label of a task's importance in the objective."""
    return f"importance of {model}"


def role_label(model: str) -> str:
    """Label of the role of a model without a task."""
    return f"role of {model}"


def weights_label(model: str) -> str:
    """Label of the hash of a model's checkpoint."""
    return f"weights of {model}"


def rows_run(identity: Mapping[str, str], model: str, base: str) -> str | None:
    """Hash of everything that the rows which a model writes depend on; None if its weights or the base's are not in the
    identity, because they cannot be read yet."""
    labels = (rows_label(model), weights_label(model), weights_label(base))
    parts = [identity.get(label) for label in labels]
    return None if None in parts else hash_text(json.dumps(parts))


def hash_identity(record: Mapping[str, str]) -> str:
    """Hash of an identity, as hexadecimal digits."""
    return hash_text(json.dumps(dict(record), sort_keys=True))


def differences(
    expected: Mapping[str, str],
    stored: Mapping[str, str],
    stored_models: Iterable[str],
    unread: Collection[str] = (),
) -> list[str]:
    """Labels whose values differ between two identities, sorted.

    Only the labels of `expected` are compared. Models that occur only in `stored` count as differences, too.

    Args:
        expected: the identity of the merge to run.
        stored: the identity in a file.
        stored_models: names of the models of that file, the base included.
        unread: models of the merge to run whose weights are not in `expected`, because they cannot be read yet.
    """
    labels = [label for label, value in expected.items() if stored.get(label) != value]
    labels += [weights_label(model) for model in unread if weights_label(model) not in stored]
    known = {*expected, *map(weights_label, unread)}
    labels += [label for label in map(weights_label, stored_models) if label in stored and label not in known]
    return sorted(labels)


def describe(labels: Sequence[str]) -> str:
    """List the first six labels, for a message."""
    return listing(labels, 6)


def hash_text(text: str) -> str:
    """SHA-256 of a text, as hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
