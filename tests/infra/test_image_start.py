"""Each image's own commands, out of its Dockerfile, in an empty environment of a user who was made for it.

Only places are other ones: what the image has in /opt, /app and /build lies in the user's home. Python is Debian's, as
in the image; what is downloaded is what the locks name, several GB with CUDA's libraries.
"""

import os
import pwd
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from infra.docker.lock import HERE, ROOT
from mqwen.data.sources.digits import vocabulary_texts
from mqwen.model.vocabulary import VOCABULARY_FILE, train_vocabulary
from serve.keys import ENVIRONMENT, hash_key
from tests.end_to_end.commands import SMALL
from tests.end_to_end.nodes import wait
from tests.end_to_end.place import PICTURES, draw
from tests.engine.tiny import build_artifact

PYTHON = Path("/usr/bin/python3")  # the fresh user may not read others' homes, where pyenv keeps its own
DOCKERFILE = (HERE / "Dockerfile").read_text().replace("\\\n", "")
(INSTALL,), (VARIABLES,), (WORKDIR,), (HEALTH, START) = (
    re.findall(rf"^{line}$", DOCKERFILE, re.M) for line in ("RUN (/build/.+)", "ENV (.+)", "WORKDIR (.+)", ".*CMD (.+)")
)
pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(3600),  # most of it is the download
    pytest.mark.skipif(os.getuid() != 0 or not PYTHON.exists(), reason="makes a user, who runs Debian's Python"),
]


@dataclass(frozen=True)
class Image:
    home: Path
    user: str

    def place(self, text: str) -> str:
        return re.sub(r"(?<![\w/])/(opt|app|build)\b", rf"{self.home}/\1", text)

    def environment(self) -> dict[str, str]:
        given = dict(word.split("=", 1) for word in shlex.split(self.place(VARIABLES)))
        usual = {"HOME": str(self.home), "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "TMPDIR": str(self.home)}
        return usual | {name: value.replace("$PATH", usual["PATH"]) for name, value in given.items()}

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """As its user, in its working directory. What it says is in the log."""
        with self.log.open("wb") as log:
            return subprocess.Popen(
                words,
                cwd=self.place(WORKDIR),
                env=self.environment(),
                user=self.user,
                group=self.user,
                extra_groups=[],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def own(self) -> None:
        """Gives it all that lies there."""
        subprocess.run(["chown", "--recursive", self.user, str(self.home)], check=True)

    @property
    def log(self) -> Path:
        return self.home / "log"

    def done(self, *words: str) -> str:
        """What a command says that must do its work."""
        code = self.start(*map(self.place, words)).wait()
        assert code == 0, self.log.read_text()
        return self.log.read_text()


def end_all_of(user: str) -> None:
    number = pwd.getpwnam(user).pw_uid
    for process in [one for one in psutil.process_iter(["uids"]) if one.info["uids"].real == number]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


@contextmanager
def image(name: str) -> Iterator[Image]:
    """Built: what the Dockerfile copies is there, but for what .dockerignore keeps out, and its RUN has installed."""
    user = f"mqwen-{name}"
    subprocess.run(["useradd", "--system", "--create-home", "--base-dir", "/tmp", user], check=True)
    made = Image(Path(pwd.getpwnam(user).pw_dir), user)
    try:
        for words in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE.replace("${IMAGE}", name), re.M):
            *sources, target = words.split()
            for source in sources:
                place = Path(made.place(target)) / (Path(source).name if target.endswith("/") else "")
                place.parent.mkdir(parents=True, exist_ok=True)
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
                else:
                    shutil.copy(ROOT / source, place)
        (made.home / "opt").mkdir()
        made.own()
        began = time.monotonic()
        words = shlex.split(INSTALL.replace("${IMAGE}", name).replace("python3", str(PYTHON)))
        assert "No broken requirements found" in made.done(*words)
        size = sum(file.lstat().st_size for file in (made.home / "opt").rglob("*") if not file.is_dir())
        print(f"{name}: installed in {time.monotonic() - began:.0f} s, {size / 1e9:.1f} GB")
        yield made
    finally:
        end_all_of(user)
        subprocess.run(["userdel", "--force", "--remove", user], check=True, stderr=subprocess.DEVNULL)


def test_serving_starts_and_is_healthy() -> None:
    with image("serving") as made:
        config = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
        (application,) = config["applications"]
        application["args"]["checkpoint"] = str(build_artifact(made.home / "artifact"))
        application["runtime_env"]["env_vars"] = {ENVIRONMENT: hash_key("key")}
        (made.home / "app" / "serve.yaml").write_text(yaml.safe_dump(config))
        made.own()
        process = made.start(*[made.place(word) for word in yaml.safe_load(START)])
        asked, _, _ = HEALTH.partition(" || ")  # what follows is for where no server is

        def healthy() -> bool:
            assert process.poll() is None, made.log.read_text()
            return subprocess.run(shlex.split(asked)).returncode == 0

        began = time.monotonic()
        assert not healthy()
        wait(healthy, 240)
        print(f"serving: healthy after {time.monotonic() - began:.0f} s")


def test_training_ingests_and_trains() -> None:
    with image("training") as made:
        train_vocabulary(vocabulary_texts(), 400, made.home / VOCABULARY_FILE)
        draw(made.home, PICTURES)
        made.own()
        home = str(made.home)
        data, words = (
            f"{home}/data",
            ["--conversations", f"{home}/conversations.json", "--pictures", f"{home}/pictures"],
        )
        said = made.done("python", "jobs/ingest.py", "llava", *words, "--dataset", data, "--tokenizer", home)
        assert f"{data}: {PICTURES} samples" in said
        words = ["--data.dataset", data, "--runs", f"{home}/runs", "--name", "fresh", "--tokenizer", home]
        said = made.done("python", "jobs/pretrain.py", *SMALL, *words, "--steps", "3", "--log-every", "1")
        assert re.search(r"step 3/3 +loss \d", said)
