#!/usr/bin/env bash
# The main job on machines that are not the developer's: bash tests/run.sh --machines [MEMBER ...]
#
# Each member sets up a copy of the checkout in a clean environment, runs a short quickstart there (made-up speech, four
# steps on two processes, resume, export, evaluation, speech, page) and the tests of checkpoints and csrc. The members:
#   pyVERSION-cpu, pyVERSION-cuda   every CPython found that can be used, with either build of torch
#   refused        every Python found that cannot be used: an error at once, and nothing made
#   no-compiler    without a C++ compiler or nvcc: csrc is left out, and its absence explained
#   user           as a user who is not root, in a folder with a space and an umlaut
#   one-core       on one core
#   no-name        on a host whose name does not resolve
#   bookworm, trixie   in a bare Debian, with the quickstart's own speech from Debian's packages
#   clean          the system's Python, without the tests: what tests/run.sh runs
# MEMBER may be a pattern: 'py3.12*'. Without one all are run but `clean`. Logs are in runs/machines. Exit status 1 if one
# failed. pip's settings in the environment (PIP_*) are kept, and its cache is shared.
set -uo pipefail
cd "$(dirname "$0")/.."

# ---- the job, inside the copy

job() {   # $1: with tests, or without; SPEECH=asterisk: not made-up speech
  set -euo pipefail
  local with_tests=$1 run="runs/short run" recipe=examples/quickstart/recipe.yaml
  local small=(
    "run=$run" prepare.valid_share=0.2 prepare.test_share=0.2 data.sequence_length=512 model.num_layers=2
    model.hidden_size=64 model.ffn_hidden_size=128 model.num_attention_heads=2 model.num_query_groups=1
    training.steps=4 checkpoint.save_every=2 logging.log_every=1 training.global_batch_size=4
    training.micro_batch_size=2 training.valid_every=4 training.valid_windows=2 evaluate.documents=2
    "evaluate.suite=[nll,grammar]"
    evaluate.generations=2 generate.samples=1 generate.candidates=1 generate.max_seconds=3
  )
  if [ "$with_tests" = yes ]; then bash tools/venv.sh dev; else bash tools/venv.sh; fi
  if [ "${SPEECH:-}" = asterisk ]; then
    small+=("prepare.languages=[en]" "prepare.text=[wordnet]")
  else
    .venv/bin/python -c "from pathlib import Path; from tests.voices import write_speech; write_speech(Path('runs/sp eech'), 24)"
    small+=("prepare.speech=$PWD/runs/sp eech" "prepare.text=[]" prepare.numbers=0 prepare.codebooks=0 prepare.entries=0
      data.pack=false)
  fi
  echo "== four steps, of which the last two are lost"
  .venv/bin/soda prepare $recipe "${small[@]}"
  NPROC_PER_NODE=2 bash examples/pretrain/launch.sh $recipe "${small[@]}"
  rm -r "$run/checkpoints/step_00000004"
  echo "== the quickstart goes on from there"
  bash examples/quickstart/run.sh "${small[@]}"
  [ -d "$run/checkpoints/step_00000004" ]
  [ "$(grep -c '"loss"' "$run/metrics.jsonl")" = 4 ]   # the steps after a resume replace what was there
  for file in hf/model.safetensors eval.json report.html; do [ -s "$run/$file" ]; done
  ls "$run"/samples/*.wav >/dev/null
  .venv/bin/soda doctor
  if [ "$with_tests" = yes ]; then
    .venv/bin/python -m pytest -m "not full" tests/ops/test_ops.py tests/ops/test_csrc_build.py tests/distributed/test_checkpoint*.py
  fi
}
if [ "${1:-}" = --job ]; then job "$2"; exit; fi

# ---- where members run

logs=$PWD/runs/machines
mkdir -p "$logs"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# pip's settings, and how it gets through: without these the index may not be there
settings=()
while IFS= read -r name; do settings+=("$name=${!name}"); done < <(compgen -e | grep -E '^PIP_|^(https?|no)_proxy$|^SSL_CERT_FILE$')
cache=${PIP_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/pip}
path=/usr/local/bin:/usr/bin:/bin
from_pypi=(PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS=)   # torch's build for CUDA, whatever pip is set to

skip() { echo "$1" >"$logs/$member.reason"; return 77; }

copy() {   # the checkout as it is now, without what git ignores
  mkdir -p "$1"
  git ls-files -z --cached --others --exclude-standard | tar c --null --files-from - --ignore-failed-read 2>/dev/null | tar x -C "$1"
  rm -f "$1/.venv"   # a link, if anything
}

clean() {   # VARIABLE=VALUE ... COMMAND ...: in a clean environment with a home of its own
  mkdir -p "$work/home"
  env -i "HOME=$work/home" "PATH=$path" "PIP_CACHE_DIR=$cache" PIP_NO_COMPILE=1 "${settings[@]}" "$@"
}

has_cpu_torch() {   # does pip find PyTorch's CPU build for this interpreter?
  "$1" -m venv "$work/probe" && clean "$work/probe/bin/pip" download --quiet --no-deps --dest "$work/probe/torch" \
    --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu \
    || { skip "pip finds no CPU build of torch 2.13.0 for $1"; return 77; }
}

pythons() {   # every python3.x on PATH, in the system and in pyenv: "VERSION PATH", each version once
  local found
  for found in /usr/bin/python3 /usr/bin/python3.* /usr/local/bin/python3.* "$HOME"/.pyenv/versions/*/bin/python3 \
    $(compgen -c python3. | grep -E '^python3\.[0-9]+$' | sort -u); do
    [[ $found == *config* || $found == *-* ]] || "$found" -c \
      'import platform, os, sys; print(platform.python_version(), os.path.realpath(sys.executable))' 2>/dev/null || true
  done | sort -u -V -k1,1
}
usable() { [[ $1 == 3.11.* || $1 == 3.12.* || $1 == 3.13.* ]]; }

# ---- the members

with_python() {   # PATH BUILD
  if [ "$2" = cpu ]; then
    has_cpu_torch "$1" || return
    clean PYTHON="$1" TORCH=cpu bash tests/machines.sh --job yes
  else
    clean "${from_pypi[@]}" PYTHON="$1" bash tests/machines.sh --job yes
  fi
}

refused() {
  local version found status
  pythons | while read -r version found; do
    usable "$version" && continue
    clean PYTHON="$found" bash tools/venv.sh >said 2>&1; status=$?
    echo "$found $version: exit status $status: $(tail -n 1 said)"
    [ $status = 2 ] && [ ! -e .venv ] && grep -q "3.11, 3.12 or 3.13 is needed" said || exit 1
  done
}

no_compiler() {
  local bin=$work/bin program
  mkdir -p "$bin"
  for program in /bin/* /usr/bin/* /usr/local/bin/*; do
    case ${program##*/} in
      cc | c++ | gcc* | g++* | clang* | nvcc* | c89* | c99* | *-gcc* | *-g++* | *-cpp* | cpp*) ;;
      *) ln -sf "$program" "$bin" ;;
    esac
  done
  path=$bin PYTHON=/usr/bin/python3 system yes | tee said
  [ "${PIPESTATUS[0]}" = 0 ] && grep "^csrc: torch code does the work of csrc: not built (.*c++" said
}

system() {   # with the system's Python, and the build of torch that pip finds; $1: with tests? then what to run it by
  local with_tests=$1; shift
  [ -x /usr/bin/python3 ] || { skip "there is no /usr/bin/python3"; return; }
  usable "$(/usr/bin/python3 -c 'import platform; print(platform.python_version())')" || { skip "/usr/bin/python3 is too old or too new"; return; }
  /usr/bin/python3 -c 'import ensurepip' 2>/dev/null || { skip "/usr/bin/python3 has no venv (apt install python3-venv)"; return; }
  clean PYTHON=/usr/bin/python3 "$@" bash tests/machines.sh --job "$with_tests"
}

user() {
  [ "$(id -u)" = 0 ] || { system yes; return; }   # is one already
  command -v setpriv >/dev/null || { skip "setpriv is not there"; return; }
  mkdir -p "$work/home" && chown -R 65534:65534 "$PWD" "$work/home" && chmod 755 "$work"
  cache=$work/home/cache system yes setpriv --reuid=65534 --regid=65534 --clear-groups
}

one_core() { system yes taskset -c 0; }

no_name() {
  unshare --uts true 2>/dev/null || { skip "unshare --uts is not allowed (needs root)"; return; }
  system no unshare --uts sh -c 'hostname no-such-host && exec "$@"' sh
}

debian() {   # SUITE
  [ "$(id -u)" = 0 ] || { skip "needs root"; return; }
  command -v debootstrap >/dev/null || { skip "debootstrap is not there (apt install debootstrap)"; return; }
  local root=$work/root folder
  debootstrap --variant=minbase --include=python3-venv,ca-certificates "$1" "$root" \
    || { skip "debootstrap $1 failed: is there a network?"; return; }
  mkdir "$root/soda" && tar c . | tar x -C "$root/soda"
  cp /etc/resolv.conf "$root/etc"
  for folder in ${PIP_FIND_LINKS:-} ${PIP_CERT:-} ${SSL_CERT_FILE:-}; do   # what pip's settings name
    if [ -e "$folder" ]; then mkdir -p "$root/$(dirname "$folder")" && cp -rL "$folder" "$root/$(dirname "$folder")"; fi
  done
  cache=/var/cache/pip clean unshare --mount bash -c '
    mount -t proc proc "$1/proc" && mount --rbind /dev "$1/dev" && shift &&
    exec /usr/sbin/chroot "$0" env HOME=/tmp PATH=/usr/sbin:/usr/bin:/sbin:/bin SPEECH=asterisk bash /soda/tests/machines.sh --job no' "$root" "$root"
}

members() {
  local version found
  while read -r version found; do
    if usable "$version"; then
      echo "py$version-cpu with_python $found cpu"
      echo "py$version-cuda with_python $found cuda"
    fi
  done < <(pythons)
  printf '%s\n' refused "no-compiler no_compiler" user "one-core one_core" "no-name no_name" \
    "bookworm debian bookworm" "trixie debian trixie" "clean system no"
}

chosen() {   # NAME PATTERN ...
  local name=$1 pattern; shift
  if [ $# = 0 ]; then [ "$name" != clean ]; return; fi
  for pattern in "$@"; do [[ $name == $pattern ]] && return; done   # shellcheck disable=SC2053
  return 1
}

failed=0 ran=0
table=
while read -r member command; do
  chosen "$member" "$@" || continue
  ran=1 began=$SECONDS
  echo "$member: ${logs#"$PWD/"}/$member.log"
  rm -f "$logs/$member.reason"
  here=$work/"check out ü"
  (copy "$here" && cd "$here" && ${command:-$member}) >"$logs/$member.log" 2>&1 </dev/null
  case $? in
    0) result=pass reason= ;;
    77) result=skip reason=$(cat "$logs/$member.reason") ;;
    *) result=FAIL failed=1 reason=$(tail -n 1 "$logs/$member.log" | cut -c 1-150) ;;
  esac
  table+=$(printf '%-18s %s %5d s  %s' "$member" "$result" $((SECONDS - began)) "$reason")$'\n'
  [ $result != FAIL ] || tail -n 30 "$logs/$member.log" | sed 's/^/    /'
  rm -rf "$here" "$work"/{home,probe,bin,root}
done < <(members)
[ $ran = 1 ] || { echo "error: no member matches $*; there are:" $(members | cut -d ' ' -f 1) >&2; exit 2; }
printf '\n%s' "$table"
exit $failed
