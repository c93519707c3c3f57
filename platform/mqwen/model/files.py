"""The small files of a checkpoint's folder, read without torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mqwen.model.errors import ArtifactError

Folder = str | os.PathLike[str]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint.

    Raises:
        ArtifactError: the file is missing or is no JSON object.
    """
    try:
        content = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ArtifactError(path, f"cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ArtifactError(path, f"holds a JSON {type(content).__name__}, not an object")
    return content


def read_text(path: Path) -> str:
    """Raises ArtifactError where the file is missing or no UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ArtifactError(path, "is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(path, f"cannot be read: {error}") from None
