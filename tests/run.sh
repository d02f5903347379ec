#!/usr/bin/env bash
# Sets up .venv and runs the tests: bash tests/run.sh [--full] [pytest arguments]
# --full adds what takes long: the browser, kills, a full disk, the whole quickstart.
# Without pytest arguments a short quickstart follows in an environment that is not the developer's (machines.sh).
# bash tests/run.sh --machines [MEMBER ...] runs that on every kind of machine: see machines.sh.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ "${1:-}" = --machines ]; then
  shift
  exec bash tests/machines.sh "$@"
fi
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
.venv/bin/python -m pytest --durations 10 "${selection[@]}" "$@"
if [ $# = 0 ]; then bash tests/machines.sh clean; fi
