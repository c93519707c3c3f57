"""Runs several command lines of jobs/, each in a process of its own that is forked when all imports are done.

python tests/end_to_end/lines.py < LINES.json

LINES is {name: words}; the last line printed is {name: [exit code, output]}. Starting Python and importing torch is
most of what a bad command line takes; this does it once for all of them.
"""

import json
import os
import runpy
import sys
import tempfile
import traceback


def answer(words: list[str]) -> tuple[int, str]:
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if not child:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            os._exit(exit_code(words))
        _, status = os.waitpid(child, 0)
        output.seek(0)
        return os.waitstatus_to_exitcode(status), output.read().decode()


def exit_code(words: list[str]) -> int:
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else bool(end.code)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    lines: dict[str, list[str]] = json.load(sys.stdin)
    for job in {words[0] for words in lines.values()}:
        runpy.run_path(job)
    print(json.dumps({name: answer(words) for name, words in lines.items()}))
