"""launch/setup.sh, really making environments, of a toy project without dependencies: killed anywhere, it recovers."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"
BASE = os.path.realpath(sys.executable)  # of no environment

FILES = 2000  # of the toy package: copying them takes long enough to be killed in the middle
BACKEND = f"""
import os, time, zipfile

def build_editable(folder, config_settings=None, metadata_directory=None):
    open("building", "w").close()
    time.sleep(float(os.environ.get("TOY_BUILD_SECONDS", 0)))
    name, info = "toy-1-py3-none-any.whl", "toy-1.dist-info"
    files = {{f"{{info}}/METADATA": "Metadata-Version: 2.1\\nName: toy\\nVersion: 1\\n"}}  # first, as the worst case
    files[f"{{info}}/WHEEL"] = "Wheel-Version: 1.0\\nGenerator: toy\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
    files |= {{f"toy/m{{i}}.txt": "x = 1\\n" for i in range({FILES})}}
    files[f"{{info}}/RECORD"] = "".join(f"{{file}},,\\n" for file in files) + f"{{info}}/RECORD,,\\n"
    with zipfile.ZipFile(f"{{folder}}/{{name}}", "w") as wheel:
        for file, text in files.items():
            wheel.writestr(file, text)
    return name

build_wheel = build_editable
"""


@pytest.fixture
def project(tmp_path):
    """A checkout of a toy project, and how to start its setup.sh. Nothing is asked of a network."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    shutil.copy(ROOT / "setup.cfg", tmp_path)
    (tmp_path / "constraints.txt").touch()
    (tmp_path / "backend.py").write_text(BACKEND)
    (tmp_path / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        '[project]\nname = "toy"\nversion = "1"\n'
    )
    return tmp_path


def environment(project: Path, **changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_") and name != "PYTHONPATH"}
    return {
        **kept, "DREAMLITE_VENV": str(project / ".venv"), "PYTHON": BASE, "PIP_NO_INDEX": "1",
        "PIP_CONFIG_FILE": os.devnull, **changes,
    }  # fmt: skip


def setup(project: Path, **changes: str) -> subprocess.CompletedProcess:
    command = ["bash", project / "launch" / "setup.sh", "none"]
    return subprocess.run(command, env=environment(project, **changes), capture_output=True, text=True, timeout=120)


def whole(project: Path) -> bool:
    """Everything of the package is there, and pip knows it."""
    found = list(project.glob(".venv/lib/python*/site-packages/toy/m*.txt"))
    python = project / ".venv" / "bin" / "python"
    return len(found) == FILES and subprocess.run([python, "-m", "pip", "show", "-q", "toy"]).returncode == 0


def kill_when(project: Path, reached, **changes: str) -> None:
    """Starts it and kills it, and all that it started, as soon as `reached()`."""
    process = subprocess.Popen(
        ["bash", project / "launch" / "setup.sh", "none"], env=environment(project, **changes),
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not reached():
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


MOMENTS = {
    "folder": ".venv",
    "python": ".venv/bin/python",
    "pip": ".venv/lib/python*/site-packages/pip/_internal",
    "build": "building",
    "copying": f".venv/lib/python*/site-packages/toy/m{FILES // 2}.txt",
}
QUICK = ("copying",)


@pytest.mark.parametrize("moment", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in MOMENTS])
def test_killed_at_any_moment_it_recovers(project, moment):
    kill_when(project, lambda: any(project.glob(MOMENTS[moment])), TOY_BUILD_SECONDS="30" if moment == "build" else "0")
    assert not whole(project)
    done = setup(project)
    assert done.returncode == 0, done.stderr
    assert whole(project)
    assert not any(project.glob(".venv*/.dreamlite_*ing")) and not any(project.glob(".venv.*"))
    (project / "building").unlink()
    assert setup(project).returncode == 0 and not (project / "building").exists()  # nothing is left to do


def test_one_that_the_first_release_left_half_made_is_made_again(project):
    """A Python without pip, and nothing that says who made it."""
    subprocess.run([BASE, "-m", "venv", "--without-pip", project / ".venv"], check=True)
    done = setup(project)
    assert done.returncode == 0 and "it has no working pip" in done.stderr
    assert whole(project)


def fake_python(folder: Path, version: str) -> str:
    python = folder / f"python{version}"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && echo {version} && exit\necho made > "{folder}/made"\n')
    python.chmod(0o755)
    return str(python)


@pytest.mark.parametrize(
    ("python", "says"), [("3.10", "is Python 3.10; it must be one of 3.11"), ("3.99", "Python 3.99")]
)
def test_a_python_that_is_not_supported_is_refused_before_anything_is_made(project, python, says):
    done = setup(project, PYTHON=fake_python(project, python))
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (project / ".venv").exists() and not (project / "made").exists()


def test_a_python_that_does_not_run_is_refused(project):
    done = setup(project, PYTHON="no-such-python")
    assert (done.returncode, done.stderr) == (2, "error: PYTHON=no-such-python is no Python that runs\n")


@pytest.fixture
def other(project):
    """An environment of another Python than ours, by its looks; what is installed is up to the test."""
    packages = project / ".venv" / "lib" / "python3.10" / "site-packages"
    packages.mkdir(parents=True)
    (project / ".venv" / "bin").mkdir()
    (project / ".venv" / "pyvenv.cfg").touch()
    os.rename(fake_python(project, "3.10"), project / ".venv" / "bin" / "python")
    return packages


@pytest.mark.slow
def test_an_environment_of_another_python_is_made_again(project, other):
    (other / "pip-23.0.dist-info").mkdir()
    done = setup(project)
    assert done.returncode == 0 and f"it holds Python 3.10, not {HERE}" in done.stderr
    assert whole(project) and not other.exists()


def test_an_environment_of_another_python_with_packages_is_not_ours_to_remove(project, other):
    (other / "numpy-2.0.dist-info").mkdir()
    done = setup(project)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"holds Python 3.10, not {HERE}, and there are packages in it; remove it" in done.stderr
    assert (other / "numpy-2.0.dist-info").exists()


def test_a_folder_of_something_else_is_left_alone(project):
    (project / ".venv").mkdir()
    (project / ".venv" / "letters.txt").write_text("mine")
    done = setup(project)
    assert done.returncode == 2 and "is no Python environment; remove it" in done.stderr
    assert (project / ".venv" / "letters.txt").read_text() == "mine"
