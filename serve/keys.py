"""API keys. The server knows their SHA-256 only; a client sends the key itself as `Authorization: Bearer KEY`.

`python -m serve.keys` makes a key and prints it with its hash.
"""

import hashlib
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

ENVIRONMENT = "MQWEN_API_KEYS"
WAY_OUT = (
    f"Put SHA-256 hashes of keys, in hex, into the environment variable {ENVIRONMENT} (separated by commas) or into a "
    "file given as keys_file=FILE (one a line); `python -m serve.keys` makes a key and its hash. "
    "auth=off serves without keys."
)


class KeysError(ValueError):
    """No keys, or a hash that is none."""


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def load_hashes(file: Path | None) -> frozenset[str]:
    """Hashes from the file and the environment together. Raises KeysError, which tells the way out."""
    sources: dict[str, Iterable[str]] = {ENVIRONMENT: os.environ.get(ENVIRONMENT, "").split(",")}
    if file is not None:
        if not file.is_file():
            raise KeysError(f"keys_file={file} does not exist. {WAY_OUT}")
        sources[f"keys_file={file}"] = (line.partition("#")[0] for line in file.read_text().splitlines())
    hashes = frozenset(entry for name, entries in sources.items() for entry in _checked(name, entries))
    if not hashes:
        raise KeysError(f"Authentication is on and no API keys are configured. {WAY_OUT}")
    return hashes


def _checked(name: str, entries: Iterable[str]) -> Iterable[str]:
    for number, entry in enumerate((entry.strip().lower() for entry in entries), start=1):
        if entry and not re.fullmatch("[0-9a-f]{64}", entry):
            raise KeysError(f"Entry {number} of {name} is no SHA-256 hash (64 hex digits). {WAY_OUT}")
        if entry:
            yield entry


def known_hash(header: str | None, hashes: frozenset[str]) -> str | None:
    """The hash of the key that an Authorization header carries, if it is known. Comparing hashes gives nothing away
    by its time."""
    scheme, _, key = (header or "").partition(" ")
    hashed = hash_key(key.strip())
    return hashed if scheme.lower() == "bearer" and hashed in hashes else None


if __name__ == "__main__":
    made = "sk-" + secrets.token_urlsafe(32)
    print(f"key   {made}   (for the client; it is stored nowhere)\nhash  {hash_key(made)}   (for {ENVIRONMENT})")
