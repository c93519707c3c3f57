"""What a process holds of memory for itself."""

from pathlib import Path


def anonymous_bytes(pid: int | str = "self") -> int:
    """RssAnon: unlike RSS without the pages of libraries and other files, which the kernel takes and gives back."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
