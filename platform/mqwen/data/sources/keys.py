"""Keys: names that a tar's members can have, each once."""

from __future__ import annotations

import hashlib
import re

_LONGEST = 64  # a tar member's name takes 100 bytes, in UTF-8
_DIGEST = 12  # characters at the end of a name that was cut: other chunks may cut another one to the same


class Keys:
    """Makes keys of the names that a source gives its samples, which need not be unique."""

    def __init__(self) -> None:
        self._same: dict[str, int] = {}
        self._taken: set[str] = set()

    def make(self, name: str, number: int) -> str:
        """`number` stands for a name that is empty."""
        stem = re.sub(r"[^\w-]", "_", name, flags=re.ASCII) or str(number)
        if len(stem) > _LONGEST:
            digest = hashlib.sha256(name.encode("utf-8", "backslashreplace")).hexdigest()[:_DIGEST]
            stem = f"{stem[: _LONGEST - _DIGEST - 1]}-{digest}"
        self._same[stem] = count = self._same.get(stem, 0) + 1
        key = stem if count == 1 else f"{stem}-{count}"
        while key in self._taken:
            key += "-"
        self._taken.add(key)
        return key
