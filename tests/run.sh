#!/usr/bin/env bash
# Sets up .venv and runs the tests: bash tests/run.sh [--full] [pytest arguments]
# --full adds what takes long: the browser, kills, a full disk, the whole quickstart.
# Without pytest arguments a short quickstart runs, too, in an environment that is not the developer's (machines.sh).
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
test_with() { .venv/bin/python -m pytest --durations 10 "${selection[@]}" "$@"; }

.venv/bin/ruff check .
.venv/bin/ruff format --check .
if [ $# != 0 ] || [ ${#selection[@]} = 0 ]; then
  .venv/bin/basedpyright
  test_with "$@"
  if [ $# = 0 ]; then bash tests/machines.sh clean; fi
  exit
fi

# Two cores are enough for both halves at once. What the other one says is shown when this one is through.
log=runs/tests.log
mkdir -p runs
echo "tests/distributed and the short quickstart run beside these: $log"
set -m   # a process group of its own, to be ended with this script
{ test_with tests/distributed && bash tests/machines.sh clean; } >"$log" 2>&1 </dev/null &
beside=$! failed=0
trap 'kill -- -$beside 2>/dev/null || true' EXIT
{ .venv/bin/basedpyright && test_with --ignore tests/distributed; } || failed=1
wait $beside || failed=1
cat "$log"
exit $failed
