"""API keys: hashes in, keys never; what is wrong says the way out."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from serve.keys import ENVIRONMENT, KeysError, hash_key, known_hash, load_hashes

KEY = "sk-test"
HASH = hashlib.sha256(KEY.encode()).hexdigest()


def test_environment_and_file_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# for the demo\n{HASH.upper()}  # Ann\n\n")
    other = hash_key("sk-other")
    monkeypatch.setenv(ENVIRONMENT, f" {other} ,")
    assert load_hashes(file) == {HASH, other}


@pytest.mark.parametrize("value", ["", " , ", None])
def test_no_keys_is_an_error_with_the_way_out(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    if value is not None:
        monkeypatch.setenv(ENVIRONMENT, value)
    with pytest.raises(KeysError, match=r"no API keys.*MQWEN_API_KEYS.*keys_file.*auth=off"):
        load_hashes(None)


def test_a_key_in_the_clear_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, f"{HASH},{KEY}")
    with pytest.raises(KeysError, match="Entry 2 of MQWEN_API_KEYS is no SHA-256 hash") as raised:
        load_hashes(None)
    assert KEY not in str(raised.value)


def test_a_missing_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    with pytest.raises(KeysError, match=r"keys_file=.*nowhere does not exist"):
        load_hashes(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("header", "enters"),
    [
        (f"Bearer {KEY}", True),
        (f"bearer {KEY}", True),
        (None, False),
        ("", False),
        ("Bearer", False),
        (f"Basic {KEY}", False),
        (f"Bearer {KEY}x", False),
        (f"Bearer {HASH}", False),  # who reads the hashes cannot enter with them
        (KEY, False),
        ("Bearer ключ", False),
    ],
)
def test_headers(header: str | None, enters: bool) -> None:
    assert known_hash(header, frozenset({HASH})) == (HASH if enters else None)


def test_the_module_makes_a_key_and_its_hash() -> None:
    out = subprocess.run([sys.executable, "-m", "serve.keys"], capture_output=True, text=True, check=True).stdout
    (_, key, *_), (_, hashed, *_) = (line.split() for line in out.splitlines())
    assert hash_key(key) == hashed
