"""What a submitted job needs of this checkout, as JSON for `ray job submit --runtime-env-json`.

Ray uploads the working directory, without what .gitignore and .rayignore name. It gives up in the middle of an upload
that is too large, so the size is looked at first. The commit goes along in the environment: the upload has no .git.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT = 100 << 20  # bytes; Ray's own


def git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *words], check=True, capture_output=True, text=True).stdout


def uploaded() -> dict[Path, int]:
    """The files that go to the cluster, with their bytes: those of git, tracked or not, that no ignore file names."""
    ignores = "--exclude-from=.rayignore", "-z"
    names = set(git("ls-files", "--cached", "--others", "--exclude-standard", *ignores).split("\0"))
    names -= set(git("ls-files", "--cached", "--ignored", *ignores).split("\0"))  # git lists what it tracks anyway
    return {ROOT / name: (ROOT / name).stat().st_size for name in names if name and (ROOT / name).is_file()}


def main() -> None:
    environment = {"PYTHONPATH": "platform"}
    try:
        sizes = uploaded()
        commit = git("rev-parse", "HEAD").strip() + ("-dirty" if git("status", "--porcelain").strip() else "")
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"no git here ({error}): the run's commit stays unknown, the upload's size unchecked", file=sys.stderr)
        sizes = {}
    else:
        environment["MQWEN_COMMIT"] = commit
    if (total := sum(sizes.values())) > LIMIT:
        largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:5]
        listed = ", ".join(f"{path.relative_to(ROOT)} ({sizes[path] >> 20} MiB)" for path in largest)
        sys.exit(
            f"error: {total >> 20} MiB would be uploaded, Ray takes {LIMIT >> 20}. Put what the job does not need into "
            f".rayignore; the largest are {listed}"
        )
    print(json.dumps({"working_dir": str(ROOT), "env_vars": environment}))


if __name__ == "__main__":
    main()
