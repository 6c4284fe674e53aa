"""The pod launchers: recorded plans, missing settings, secrets; the supervisor starts again what was preempted."""

import os
import signal
import subprocess
import time
from pathlib import Path

import launch_plans
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", launch_plans.SCENARIOS)
def test_plans_are_the_recorded_ones(name):
    """After a wanted change: python tests/launch/launch_plans.py, and read the difference."""
    assert launch_plans.plan(name) == (launch_plans.PLANS / f"{name}.txt").read_text()


def test_every_recorded_plan_has_its_scenario():
    assert {path.stem for path in launch_plans.PLANS.iterdir()} == set(launch_plans.SCENARIOS)


@pytest.mark.parametrize(
    ("script", "command", "missing"),
    [
        ("tpu_vm.sh", "create", "PROJECT ZONE NAME ACCELERATOR_TYPE RUNTIME_VERSION"),
        ("tpu_vm.sh", "run", "PROJECT ZONE NAME CONFIG WORKDIR"),
        ("tpu_vm.sh", "resume", "PROJECT ZONE NAME ACCELERATOR_TYPE RUNTIME_VERSION BUCKET CONFIG WORKDIR"),
        ("gke_xpk.sh", "submit", "PROJECT ZONE CLUSTER WORKLOAD TPU_TYPE CONFIG WORKDIR STORAGE"),
        ("gke_xpk.sh", "stop", "PROJECT ZONE CLUSTER WORKLOAD"),
    ],
)
def test_missing_settings_are_listed_at_once_and_nothing_runs(script, command, missing):
    done = launch_plans.launch(script, command, {})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: set {missing} (see {script} help)\n"


def test_an_unknown_command_and_a_bad_setting_are_errors():
    assert launch_plans.launch("tpu_vm.sh", "dance", {}).returncode == 2
    done = launch_plans.launch("tpu_vm.sh", "create", {**launch_plans.TPU_VM, "PROVISIONING": "free"})
    assert done.returncode == 2 and "PROVISIONING is free" in done.stderr and done.stdout == ""


@pytest.mark.parametrize("script", ["tpu_vm.sh", "gke_xpk.sh"])
def test_help_names_every_setting_and_command(script):
    said = launch_plans.launch(script, "help", {}).stdout
    settings = launch_plans.TPU_VM if script == "tpu_vm.sh" else launch_plans.GKE
    commands = {c for s, commands, _ in launch_plans.SCENARIOS.values() if s == script for c in commands.split()}
    assert all(word in said for word in {*settings, *commands, "SECRETS_FILE", "DRY_RUN"})


def test_the_content_of_the_secrets_file_never_shows(tmp_path):
    secrets = tmp_path / "secrets"
    secrets.write_text("TOKEN=hunter2\n")
    for script, command, settings in (
        ("tpu_vm.sh", "setup", launch_plans.TPU_VM),
        ("gke_xpk.sh", "submit", launch_plans.GKE),
    ):
        done = launch_plans.launch(script, command, {**settings, "SECRETS_FILE": str(secrets)})
        assert str(secrets) in done.stdout and "hunter2" not in done.stdout + done.stderr


@pytest.fixture
def supervised(tmp_path):
    """Starts the supervisor over a program that exits with the next of some codes, and counts its starts."""
    log, codes, starts = tmp_path / "log", tmp_path / "codes", tmp_path / "starts"

    def start(*wanted: int, body: str = "") -> subprocess.Popen:
        codes.write_text("".join(f"{code}\n" for code in wanted))
        program = f'echo start >>{starts}; {body} n=$(wc -l <{starts}); exit "$(sed -n "${{n}}p" {codes})"'
        env = {**os.environ, "RETRY_SECONDS": "0.05", "MAX_CRASHES": "2"}
        return subprocess.Popen([ROOT / "launch" / "supervise.sh", log, "bash", "-c", program], env=env)

    start.starts = lambda: len(starts.read_text().splitlines())
    start.log = log
    return start


@pytest.mark.parametrize(
    ("codes", "starts", "code"),
    [
        ((0,), 1, 0),
        ((75, 75, 75, 75, 0), 5, 0),  # as often as it is preempted
        ((1, 0), 1, 1),  # an error of the run is not repeated
        ((2, 0), 1, 2),
        ((134, 75, 137, 137, 0), 5, 0),  # crashes count in a row
        ((134, 134, 134, 0), 3, 134),
    ],
)
def test_the_supervisor_starts_again_what_was_preempted(supervised, codes, starts, code):
    assert supervised(*codes).wait(timeout=30) == code
    assert supervised.starts() == starts
    assert supervised.log.with_name("log.exit").read_text() == f"{code}\n"
    assert not supervised.log.with_name("log.pid").exists()


def test_the_supervisor_passes_a_stop_on_and_starts_nothing_more(supervised):
    """The run saves for a while after TERM, and exits with the code that means: start me again."""
    saves = "trap 'sleep 0.3; exit 75' TERM; echo ready; while :; do sleep 0.05; done;"
    process = supervised(0, body=saves)
    until(lambda: supervised.log.exists() and "ready" in supervised.log.read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    assert supervised.starts() == 1


def until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
