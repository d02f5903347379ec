"""tools/venv.sh and run.sh on other machines: what cannot work says so at once, before anything is installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BASE = os.path.realpath(sys._base_executable)  # type: ignore[attr-defined]

# A Python that makes a virtual environment of itself, whose pip writes down what it is asked for. LIE is run first.
FAKE = f"""#!/bin/sh
here=$(dirname "$0")
case "$1" in
  -) exec {sys.executable} -c "import platform, sys, sysconfig
$(cat "$here/lie" 2>/dev/null)
exec(sys.stdin.read())" ;;
  -m) if [ "$2" = venv ]; then
        mkdir -p .venv/bin; cp "$0" .venv/bin/python
      else
        shift 2; echo "$*" >>"$LOG"; echo "Downloading a (12.3 MB)"; echo "Downloading b (3 kB)"
        if [ -n "$FAILS" ]; then echo "ERROR: no index"; exit 1; fi
      fi ;;
  -c) echo "csrc: CPU kernels" ;;
esac
"""


class Checkout:
    def __init__(self, folder: Path) -> None:
        self.folder = folder / "check out ü"
        (self.folder / "tools").mkdir(parents=True)
        (self.folder / "csrc").mkdir()
        shutil.copy(ROOT / "tools/venv.sh", self.folder / "tools")
        for name in ("pyproject.toml", "setup.py"):
            shutil.copy(ROOT / name, self.folder)
        self.log = folder / "log"
        self.python = self.make_python(folder / "python")

    def make_python(self, path: Path, lie: str = "") -> Path:
        path.parent.mkdir(exist_ok=True)
        path.write_text(FAKE)
        path.chmod(0o755)
        (path.parent / "lie").write_text(lie)
        return path

    def set_up(self, *extras: str, **environment: str) -> tuple[int, str, list[str]]:
        """-> exit status, what it printed, what pip was asked for."""
        settings = {"PATH": "/usr/bin:/bin", "LOG": str(self.log), "FAILS": "", **environment}
        command = ["bash", str(self.folder / "tools/venv.sh"), *extras]
        done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=60, check=False)
        asked = self.log.read_text().splitlines() if self.log.is_file() else []
        self.log.unlink(missing_ok=True)
        return done.returncode, done.stdout + done.stderr, asked


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    return Checkout(tmp_path)


def test_what_is_installed_and_said(checkout):
    status, said, asked = checkout.set_up("dev", PYTHON=str(checkout.python))
    assert status == 0, said
    assert [line.split()[-1] for line in asked] == ["torch==2.13.0", "wheel", ".[dev]"]
    assert "TORCH=cpu has 0.2 GB" in said
    assert "(12.3 MB)" in said
    assert "3 kB" not in said
    assert "csrc: CPU kernels" in said
    assert checkout.set_up("dev", PYTHON=str(checkout.python)) == (0, "", [])  # up to date
    status, _, asked = checkout.set_up("full")
    assert asked[-1].endswith("-e .[dev,full]")


def test_the_cpu_build_of_torch(checkout):
    """From PyTorch's index, or a mirror that has it: the local version is in the requirement. It stays so."""
    status, said, asked = checkout.set_up(PYTHON=str(checkout.python), TORCH="cpu")
    assert status == 0, said
    assert asked[0].endswith("--extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu")
    assert checkout.set_up(TORCH="cpu")[2] == []
    assert checkout.set_up("dev")[2][0].endswith("torch==2.13.0+cpu")
    status, said, _ = checkout.set_up(TORCH="gpu")
    assert status == 2
    assert "error: TORCH=gpu" in said


def test_a_failed_install_says_why_and_is_tried_again(checkout):
    status, said, _ = checkout.set_up(PYTHON=str(checkout.python), FAILS="1")
    assert status == 2
    assert "ERROR: no index" in said
    assert "error: pip install torch==2.13.0 failed" in said
    assert len(checkout.set_up()[2]) == 3


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        ("sys.version_info = (3, 8, 18)", "3.11, 3.12 or 3.13 is needed"),
        ("sys.version_info = (3, 14, 0)", "3.11, 3.12 or 3.13 is needed"),
        ("platform.python_implementation = lambda: 'PyPy'", "PyPy"),
        ("sysconfig.get_config_var = lambda name: 1", "free-threaded"),
        ("platform.machine = lambda: 'riscv64'", "for riscv64; torch has wheels for"),
        ("platform.libc_ver = lambda: ('', '')", "a C library of its own; glibc 2.28 or newer is needed"),
        ("platform.libc_ver = lambda: ('glibc', '2.17')", "glibc 2.17; glibc 2.28 or newer is needed"),
        ("sys.base_prefix = sys.prefix; sys.modules['ensurepip'] = None", "apt install python3-venv"),
    ],
    ids=["3.8", "3.14", "pypy", "free-threaded", "machine", "musl", "glibc", "no-venv"],
)
def test_an_interpreter_that_is_no_good(checkout, lie, words):
    python = checkout.make_python(checkout.python, lie)
    status, said, asked = checkout.set_up(PYTHON=str(python))
    assert status == 2
    assert words in said
    assert f"error: PYTHON={python} cannot be used" in said
    assert asked == []
    assert not (checkout.folder / ".venv").exists()
    # found on PATH, and nothing better:
    folder = checkout.make_python(checkout.python.with_name("bin") / "python3", lie).parent
    for name in ("bash", "uname", "dirname", "cat", "cksum", "tr", "find", "sort", "grep"):
        (folder / name).symlink_to(str(shutil.which(name)))
    status, said, _ = checkout.set_up(PATH=str(folder))
    assert status == 2
    assert "error: no Python that can be used; name one with PYTHON=" in said
    assert words in said


def test_an_absent_or_another_interpreter_is_an_error(checkout, tmp_path):
    assert checkout.set_up(PYTHON="/nowhere/python3")[:2] == (
        2,
        "error: PYTHON=/nowhere/python3: there is no such program\n",
    )
    assert checkout.set_up(PYTHON=str(checkout.python))[0] == 0
    other = checkout.make_python(tmp_path / "other" / "python", "platform.python_version = lambda: '3.12.9'")
    status, said, asked = checkout.set_up(PYTHON=str(other))
    assert status == 2
    assert f"is {BASE} 3.12.9, but .venv was made with {BASE} {sys.version.split()[0]}" in said
    assert "rm -r .venv" in said
    assert asked == []


def test_linux_only(checkout, tmp_path):
    (tmp_path / "uname").write_text("#!/bin/sh\necho Darwin\n")
    (tmp_path / "uname").chmod(0o755)
    status, said, _ = checkout.set_up(PATH=f"{tmp_path}:/usr/bin:/bin")
    assert status == 2
    assert "runs only on Linux, and this is Darwin" in said
    program = "import sys; sys.platform = 'darwin'; import megatron_soda"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "megatron_soda runs only on Linux" in done.stderr
