#!/usr/bin/env bash
# Make this checkout ready to run. Safe to repeat: it returns at once when nothing has changed.
#
# It works in the active virtual or conda environment, or else creates .venv here, with the
# interpreter named by PYTHON (default: python3). A Detectron2, torch, torchvision, numpy or cv2
# that it finds is used as it is, never replaced; only what is missing is installed.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { echo "[setup] $*"; }

# Can the environment import module $1? Asked from / so that no folder of this one counts.
has() {
    local python=$PWD/dev/python
    (cd / && "$python" -c "
import importlib.util, sys
spec = importlib.util.find_spec(sys.argv[1])
sys.exit(spec is None or spec.origin is None)" "$1")
}

if ! dev/python -c "" 2>/dev/null; then
    base=${PYTHON:-python3} options=
    # Images for GPU machines often have torch outside any environment: share it.
    if (cd / && "$base" -c "import torch; assert int(torch.__version__.split('.')[0]) >= 2") 2>/dev/null; then
        options=--system-site-packages
    fi
    say "creating .venv with $("$base" --version) $options"
    "$base" -m venv $options .venv
fi

prefix=$(dev/python -c "import sys; print(sys.prefix)")
stamp=$prefix/.d2kd-setup
state=$({ pwd; cat setup.py constraints.txt dev/setup.sh third_party/detectron2/*.{py,toml}; } | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" = "$state" ] && has d2kd && has detectron2; then
    say "$prefix is up to date"
    exit
fi
say "installing into $prefix"
dev/python -m pip --version >/dev/null 2>&1 || dev/python -m ensurepip

# pip may add packages, but it must not trade an installed torch for the one it likes better.
pins=$(mktemp)
trap 'rm -f "$pins"' EXIT
dev/python - >"$pins" <<'EOF'
from importlib.metadata import PackageNotFoundError, version

for name in ("torch", "torchvision", "numpy"):
    try:
        print(f"{name}=={version(name)}")
    except PackageNotFoundError:
        pass
EOF
if has torch; then
    say "keeping what is installed: $(tr '\n' ' ' <"$pins")"
else
    say "no torch yet: installing the one in constraints.txt, about 3 GB with its CUDA libraries;" \
        "it runs on the CPU where there is no GPU"
    cat constraints.txt >>"$pins"
fi

extras=dev
has cv2 || extras=dev,opencv
packages=(-e ".[$extras]")
if has detectron2; then
    say "keeping the Detectron2 that is installed"
    # Upstream's newest imports pkg_resources, which setuptools dropped in version 82.
    ! has pkg_resources || echo "setuptools<82" >>"$pins"
else
    say "no Detectron2 yet: building v0.5 from third_party/detectron2"
    packages+=(./third_party/detectron2)
fi
dev/python -m pip install --disable-pip-version-check -c "$pins" "${packages[@]}"

# The newest torch needs a new driver, and would otherwise train on the CPU without a word.
if [[ $(nvidia-smi -L 2>/dev/null) == *GPU* ]]; then
    dev/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())" ||
        say "WARNING: torch cannot use this machine's GPU, so runs would use the CPU." \
            "Install the torch and torchvision that fit its driver into $prefix."
fi
echo "$state" >"$stamp"
say "done"
