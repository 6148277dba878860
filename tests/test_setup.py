"""scripts/setup says before it installs anything what a machine lacks. Its commands are stand-ins of a Mac's."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[1] / "scripts" / "setup"
BASH = shutil.which("bash")


@pytest.fixture
def mac(tmp_path):
    """Sets a Mac up; (exit status, what was said)."""
    commands = tmp_path / "commands"
    commands.mkdir()
    (tmp_path / "scripts").mkdir()
    shutil.copy(SETUP, tmp_path / "scripts")
    (commands / "dirname").symlink_to(shutil.which("dirname"))

    def make(name: str, text: str) -> Path:
        file = commands / name
        file.write_text(f"#!{BASH}\n{text}\n")
        file.chmod(0o755)
        return file

    def run(machine: str, translated: str, macos: str, python: str | None = None) -> tuple[int, str]:
        make("uname", f'[ "$*" = -m ] && echo {machine} || echo Darwin')
        make("sysctl", f'[ "$*" = "-n sysctl.proc_translated" ] && echo {translated}')
        make("sw_vers", f'[ "$*" = -productVersion ] && echo {macos}')
        if python is not None:  # answers what is asked of a Python of that machine, and installs nothing
            make(
                "python3",
                f'case "$*" in *machine*) [ {python} = arm64 ];; *ensurepip*) ;; *) echo "$*" >&2; exit 7;; esac',
            )
        done = subprocess.run(
            [BASH, "scripts/setup"], cwd=tmp_path, env={"PATH": str(commands)}, capture_output=True, text=True
        )
        return done.returncode, done.stderr

    return run


@pytest.mark.parametrize(
    "found, said",
    [
        (("x86_64", "1", "15.1", "x86_64"), "arch -arm64 scripts/setup"),
        (("x86_64", "", "13.7.1", "x86_64"), "no MLX for x86_64"),
        (("x86_64", "0", "15.1", "x86_64"), "no MLX for x86_64"),
        (("arm64", "0", "13.7.1", "arm64"), "this is macOS 13.7.1"),
        (("arm64", "0", "14.0", "x86_64"), "Python 3.11 or newer, for arm64, is needed"),
        (("arm64", "0", "14.0"), "Python 3.11 or newer, for arm64, is needed"),
    ],
    ids=["Rosetta", "Intel", "newer Intel", "macOS 13", "Python for Intel", "no Python"],
)
def test_a_mac_that_mlx_does_not_run_on_is_told_so_in_one_line(mac, found, said):
    status, err = mac(*found)
    assert status == 1 and said in err and len(err.splitlines()) == 1 and err.startswith("Error: ")


@pytest.mark.parametrize("macos", ["14", "15.1", "26.0.1"])
def test_others_go_on_to_install(mac, macos):
    status, err = mac("arm64", "0", macos, "arm64")
    assert status == 7 and "-m venv .venv" in err


def test_an_environment_of_a_python_for_intel_is_named(mac, tmp_path):
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!{BASH}\nexit 1\n")
    python.chmod(0o755)
    assert os.access(python, os.X_OK)
    status, err = mac("arm64", "0", "15.1", "arm64")
    assert status == 1 and "Delete .venv and run this again" in err and len(err.splitlines()) == 1
