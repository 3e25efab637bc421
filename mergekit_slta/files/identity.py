"""The identity of alphas: what they are valid for, as label -> value, and how two identities differ.

Scope: pure functions over such a mapping; `job.identity` fills it. A model's labels are made here and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence

from mergekit_slta.errors import listing


def rows_label(model: str) -> str:
    """The label of the hash of a task's rows."""
    return f"rows of {model}"


def importance_label(model: str) -> str:
    """The label of a task's share in the objective."""
    return f"importance of {model}"


def weights_label(model: str) -> str:
    """The label of the hash of a model's checkpoint."""
    return f"weights of {model}"


def hash_identity(record: Mapping[str, str]) -> str:
    """One hash of an identity."""
    return hash_text(json.dumps(dict(record), sort_keys=True))


def differences(expected: Mapping[str, str], stored: Mapping[str, str], stored_models: Iterable[str]) -> list[str]:
    """Labels whose values differ between two identities, sorted.

    A label counts where `expected` has it. Models that only the stored identity has count as well.

    Args:
        expected: the identity of what is to be merged.
        stored: the identity in a file.
        stored_models: names of the models of that file, the base included.
    """
    labels = [label for label, value in expected.items() if stored.get(label) != value]
    labels += [label for label in map(weights_label, stored_models) if label in stored and label not in expected]
    return sorted(labels)


def describe(labels: Sequence[str]) -> str:
    """Labels for a message, the first six of them."""
    return listing(labels, 6)


def hash_text(text: str) -> str:
    """SHA-256 of a text, as hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
