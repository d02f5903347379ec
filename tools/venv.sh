#!/usr/bin/env bash
# Makes or updates .venv in the checkout: tools/venv.sh [EXTRA ...], as in `pip install -e .[EXTRA,...]`.
# Does nothing if it is up to date. From the environment:
#   PYTHON   the interpreter to make it with: CPython 3.11, 3.12 or 3.13 (else the first such on PATH)
#   TORCH    cpu: PyTorch's CPU build, 0.2 GB to fetch. PyPI's build for x86-64 is for CUDA: 2.7 GB, and 5.4 GB in .venv
set -euo pipefail
cd "$(dirname "$0")/.."
fail() { printf 'error: %s\n' "$1" >&2; shift; [ $# = 0 ] || printf '%s\n' "$@" >&2; exit 2; }

if [ "$(uname -s)" != Linux ]; then
  fail "megatron_soda runs only on Linux, and this is $(uname -s). A container or a virtual machine with Linux will do."
fi
case ${TORCH:-} in '' | cpu) ;; *) fail "TORCH=$TORCH: it may be cpu, or be unset for the build that pip finds" ;; esac

# Prints which interpreter it is, the same for a virtual environment and what it was made with; fails saying why it is
# no good. The program runs on any Python.
identify() {
  "$1" - <<'PY'
import os, platform, sys
version, name = sys.version_info[:2], "%s is %s %s" % (sys.executable, platform.python_implementation(), platform.python_version())
if platform.python_implementation() != "CPython" or not (3, 11) <= version < (3, 14):
    sys.exit(name + "; CPython 3.11, 3.12 or 3.13 is needed (megatron-core has no wheels for others)")
import sysconfig
libc, libc_version = platform.libc_ver()
if sysconfig.get_config_var("Py_GIL_DISABLED"):
    sys.exit(name + ", free-threaded; the usual build is needed")
if platform.machine() not in ("x86_64", "aarch64") or sys.maxsize < 2**32:
    sys.exit(name + " for " + platform.machine() + "; torch has wheels for x86_64 and aarch64")
if libc != "glibc" or tuple(map(int, libc_version.split(".")[:2])) < (2, 28):
    sys.exit(name + " on " + (" ".join([libc, libc_version]).strip() or "a C library of its own") + "; glibc 2.28 or newer is needed")
try:
    if sys.prefix == sys.base_prefix:
        import ensurepip, venv
except ImportError:
    sys.exit(name + " without the module venv (on Debian and Ubuntu: apt install python3-venv)")
print(os.path.realpath(getattr(sys, "_base_executable", sys.executable)) + " " + platform.python_version())
PY
}

there=   # the interpreter of .venv
if [ -x .venv/bin/python ]; then
  there=$(identify .venv/bin/python) || fail ".venv cannot be used. To make it anew: rm -r .venv"
fi
if [ -n "${PYTHON:-}" ]; then
  command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON: there is no such program"
  found=$(identify "$PYTHON") || fail "PYTHON=$PYTHON cannot be used"
  if [ -n "$there" ] && [ "$there" != "$found" ]; then
    fail "PYTHON=$PYTHON is $found, but .venv was made with $there." "Unset PYTHON, or make .venv anew: rm -r .venv"
  fi
fi

stamp=.venv/soda-installed   # a checksum of what was installed from, the build of torch, then the extras
checksum=$(cat pyproject.toml setup.py tools/venv.sh $(find csrc -name '*.c*' -o -name '*.h' | sort) | cksum | tr ' ' '-')
if [ -f "$stamp" ]; then read -r old build kept <"$stamp" || true; fi
missing=0
[ "${old:-}" = "$checksum" ] || missing=1
if [ -n "${TORCH:-}" ] && [ "${build:-}" != "$TORCH" ]; then build=$TORCH missing=1; fi
for extra in "$@"; do case " ${kept:-} " in *" $extra "*) ;; *) missing=1 ;; esac; done
if [ $missing = 0 ]; then exit 0; fi
extras=$(printf '%s\n' "$@" ${kept:-} | grep -E '^[a-z]+$' | sort -u | tr '\n' ' ' || true)   # one once installed is kept
extras=${extras% }

if [ -z "$there" ]; then
  python=${PYTHON:-}
  if [ -z "$python" ]; then
    reasons=()
    for candidate in python3 python3.13 python3.12 python3.11; do
      command -v "$candidate" >/dev/null || continue
      if found=$(identify "$candidate" 2>&1); then python=$candidate; break; fi
      reasons+=("$candidate: ${found##*$'\n'}")
    done
    [ -n "$python" ] || fail "no Python that can be used; name one with PYTHON=/path/to/python3.12" "${reasons[@]:-none is on PATH}"
  fi
  echo "making .venv with $found"
  "$python" -m venv --clear .venv || fail "$python -m venv .venv failed; its reason is above"
fi

# pip shows its progress on a terminal; elsewhere a line for each large file. All it says is in the log.
log=.venv/install.log
: >"$log"
install() {
  # Most of the files are never imported, and the others are compiled then: that halves the time.
  local pip=(.venv/bin/python -m pip install --disable-pip-version-check --no-compile)
  echo "pip install $*"
  if [ -t 1 ]; then
    "${pip[@]}" --log "$log" "$@"
  else
    "${pip[@]}" --progress-bar off "$@" 2>&1 | tee -a "$log" \
      | { grep --line-buffered -E '([0-9]{2}|[0-9]\.[0-9]) [MG]B\)|^Installing|^ERROR|^error' || true; }
  fi || fail "pip install $* failed: its reason is above or in $log." \
    "Without a network, see which index pip is set to use: .venv/bin/pip config list"
}
# torch comes first: csrc is compiled against it. The version is pinned so that everybody has the one that was tested.
if [ "${build:-}" = cpu ]; then
  install --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu
else
  echo "torch: where pip finds PyPI's build for CUDA, 2.7 GB are fetched; TORCH=cpu has 0.2 GB instead"
  install torch==2.13.0
fi
install "setuptools>=77" wheel
install --no-build-isolation -e ".${extras:+[${extras// /,}]}"
echo "$checksum ${build:-any} $extras" >"$stamp"
.venv/bin/python -c 'from megatron_soda.ops import library; print("csrc:", library.describe())'
echo ".venv is ready: source .venv/bin/activate"
