#!/bin/sh
# install.sh PYTHON LOCK VENV: an environment of exactly the locked files; each is checked against its hash.
set -eu
python=$1 lock=$2 venv=$3
"$python" -m venv "$venv"
pip="$venv/bin/pip --quiet --disable-pip-version-check --no-cache-dir install --require-hashes --no-deps"
here=$(dirname "$0")
# DeepSpeed comes as source and looks for torch when it is built: all else first.
wheels=$(mktemp)
awk '/^deepspeed==/ {skip = 1} /^[a-z]/ && !/^deepspeed==/ {skip = 0} !skip' "$lock" > "$wheels"
$pip --only-binary :all: --requirement "$wheels"
if grep -q '^deepspeed==' "$lock"; then
  awk '/^deepspeed==/ {keep = 1} /^[a-z]/ && !/^deepspeed==/ {keep = 0} keep' "$lock" > "$wheels"
  $pip --no-build-isolation --requirement "$wheels"
fi
rm "$wheels"
"$venv/bin/python" -m pip check
