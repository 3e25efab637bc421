"""What alphas are valid for, compared: pure functions over a record of labels (`fingerprint.py` makes it)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from mergekit_slta.errors import listing

SOLVE_ONLY = ("balance", "ridge", "importance of ")
"""Labels (or their beginnings) that statistics do not depend on: a change only needs another solve."""


def hash_identity(record: Mapping[str, str]) -> str:
    """One hash over an identity."""
    return hash_text(json.dumps(dict(record), sort_keys=True))


def statistics_identity(record: Mapping[str, str]) -> dict[str, str]:
    """The part of an identity that statistics depend on; taken at merged models they depend on the solves, too."""
    if record.get("inputs") == "merged" or record.get("steps", "0") != "0":
        return dict(record)
    return {label: value for label, value in record.items() if not label.startswith(SOLVE_ONLY)}


def differences(expected: Mapping[str, str], stored: Mapping[str, str]) -> list[str]:
    """Labels on which a stored identity departs from the expected one.

    A model that only one of the two knows always counts; other labels count where `expected` has them.
    """
    labels = [label for label, value in expected.items() if stored.get(label) != value]
    labels += [label for label in stored if label.startswith("weights of ") and label not in expected]
    return sorted(labels)


def describe(labels: Sequence[str]) -> str:
    """A readable list of labels."""
    return listing(labels, 6)


def hash_text(text: str) -> str:
    """SHA-256 of a text, as hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
