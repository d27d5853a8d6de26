#!/usr/bin/env bash
# Check imports, format and code: dev/lint.sh. Mend what can be mended: dev/lint.sh --fix
set -euo pipefail
cd "$(dirname "$0")/.."

check=--check
[ "${1:-}" = --fix ] && check=
dev/python -m isort $check .
dev/python -m black $check -l 100 .
dev/python -m flake8 .
