#!/usr/bin/env bash
# Makes or updates .venv in the checkout: tools/venv.sh [EXTRA ...], as in `pip install -e .[EXTRA,...]`.
# Does nothing if it is up to date. PYTHON names the interpreter (3.11 or newer).
set -euo pipefail
cd "$(dirname "$0")/.."

stamp=.venv/soda-installed   # a checksum of what was installed from, then the extras
checksum=$(cat pyproject.toml setup.py tools/venv.sh $(find csrc -name '*.c*' -o -name '*.h' | sort) | cksum | tr ' ' '-')
installed=$(cat "$stamp" 2>/dev/null || true)
missing=0
[ "${installed%% *}" = "$checksum" ] || missing=1
for extra in "$@"; do case " ${installed#* } " in *" $extra "*) ;; *) missing=1 ;; esac; done
if [ $missing = 0 ]; then exit 0; fi
read -ra kept <<<"${installed#* }"   # an extra once installed is kept up to date
extras=$(printf '%s\n' "$@" "${kept[@]:-}" | grep -E '^[a-z]+$' | sort -u | tr '\n' ' ' || true)
extras=${extras% }

python=${PYTHON:-}
for candidate in "$python" python3.12 python3.11 python3; do
  [ -n "$candidate" ] && command -v "$candidate" >/dev/null || continue
  if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$candidate; break; fi
done
if [ -z "$python" ]; then
  echo "error: Python 3.11 or newer is needed and was not found; name one: PYTHON=/path/to/python3.11 $0" >&2
  exit 2
fi

echo "setting up .venv (once; a few minutes)"
fail() {
  echo "error: $1 failed; its last lines are above, all of it is in .venv/install.log." >&2
  echo "If there is no network, see which index pip is set to use: .venv/bin/pip config list" >&2
  exit 2
}
if [ ! -x .venv/bin/pip ]; then
  "$python" -m venv .venv || { echo "error: cannot make .venv (on Debian: apt install python3-venv)" >&2; exit 2; }
fi
install() {
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@" >.venv/install.log 2>&1 \
    || { tail -n 5 .venv/install.log >&2; fail "pip install $*"; }
}
install torch==2.13.0   # first and pinned: a range would take a newer build with several GB of CUDA packages
install "setuptools>=77" wheel
install --no-build-isolation -e ".${extras:+[${extras// /,}]}"
echo "$checksum $extras" >"$stamp"
