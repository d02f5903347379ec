#!/usr/bin/env bash
# Sets up .venv and runs the tests: bash tests/run.sh [--full] [pytest arguments]
# --full adds what takes long: the browser, kills, a full disk, the whole quickstart.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ "${1:-}" = --full ]; then
  shift
  bash tools/venv.sh dev full
  if ! command -v chromedriver >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing chromium for the browser test"
    { apt-get update && apt-get install -y --no-install-recommends chromium chromium-driver; } >.venv/apt.log 2>&1 \
      || echo "chromium cannot be installed (.venv/apt.log); the browser test will be skipped"
  fi
  selection=()
else
  bash tools/venv.sh dev
  selection=(-m "not full")
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/basedpyright
.venv/bin/python -m pytest "${selection[@]}" "$@"
