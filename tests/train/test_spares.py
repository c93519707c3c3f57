"""What spares import. tests/end_to_end/test_faults.py has that they take the place of killed workers."""

import sys
import threading
from pathlib import Path

import pytest

from mqwen.train import spares

WORKERS, READERS = "mailbox", "sched"  # modules that nothing here needs


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the processes of a run tell what they have imported, once it is there."""
    monkeypatch.setattr(spares, "_folder", lambda: tmp_path / "told")
    for name, value in spares.environment({"ROLE": "reader"}).items():
        monkeypatch.setenv(name, value)
    for module in (WORKERS, READERS):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return tmp_path / "told"


def test_the_first_processes_tell_what_they_have_imported(folder: Path) -> None:
    spares.prepare()
    (teller,) = [thread for thread in threading.enumerate() if thread.name == "spares"]
    folder.mkdir()
    teller.join(30)
    (told,) = folder.iterdir()
    assert told.name.startswith("worker-")
    assert {"pytest", spares.__name__} <= set(told.read_text().splitlines())


def test_the_others_import_what_those_of_their_kind_had(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    (folder / "worker-1").write_text(f"no.such.module\n{WORKERS}")
    (folder / "reader-2").write_text(READERS)
    spares.prepare()
    assert WORKERS in sys.modules
    assert READERS not in sys.modules
    monkeypatch.setenv("ROLE", "reader")
    spares.prepare()
    assert READERS in sys.modules
