"""gke_xpk.sh against stand-ins of xpk and kubectl that answer from a script and note what they were asked."""

import os
import subprocess
from pathlib import Path

import launch_plans
import pytest
import yaml

# What `kubectl get jobset NAME --output=jsonpath…` answers, one line a question; "lost" is no connection.
KUBECTL = """#!/usr/bin/env bash
echo "kubectl $*" >>"$HERE/asked"
if [ "$2" = jobsets ]; then cat "$HERE/names"; exit; fi
answer=$(head -n 1 "$HERE/answers"); sed -i 1d "$HERE/answers"
[ "$answer" != lost ] || { echo "Unable to connect to the server" >&2; exit 1; }
printf %s "$answer"
"""
XPK = """#!/usr/bin/env bash
echo "xpk $2 $3" >>"$HERE/asked"
for word in "$@"; do
  case $word in --env-file=*) cp "${word#*=}" "$HERE/env" && echo "${word#*=}" >"$HERE/spelled" ;; esac
done
"""


@pytest.fixture
def cluster(tmp_path):
    """Runs a command of the launcher in front of a cluster with these answers and workloads; what was asked of xpk."""
    for name, text in (("kubectl", KUBECTL), ("xpk", XPK), ("crane", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(command: str, answers=(), names=(), **settings: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        (tmp_path / "answers").write_text("".join(f"{line}\n" for line in answers))
        (tmp_path / "names").write_text("".join(f"jobset.jobset.x-k8s.io/{name}\n" for name in names))
        (tmp_path / "asked").write_text("")
        path = f"{tmp_path}:{os.environ['PATH']}"
        env = {"PATH": path, "HERE": str(tmp_path), "ASK_SECONDS": "0", **launch_plans.GKE, **settings}
        script = launch_plans.ROOT / "launch" / "gke_xpk.sh"
        done = subprocess.run([script, command], capture_output=True, text=True, env=env, timeout=60)
        asked = (tmp_path / "asked").read_text().splitlines()
        return done, [line.split()[1] for line in asked if line.startswith("xpk") and " list" not in line]

    run.folder = tmp_path
    return run


@pytest.mark.parametrize(
    ("answers", "changes"),
    [
        (["joint Completed"], []),
        (["joint", "joint Suspended", "lost", "lost", "joint StartupPolicyCompleted", "joint Completed"], []),
        (["joint Failed", "joint", "joint Completed"], ["delete", "create"]),
        (["", "lost", "joint", "joint Completed"], ["create"]),
        (["joint", "joint Failed", "joint", "joint Failed", "joint Completed"], ["delete", "create"] * 2),
    ],
)
def test_resume_deletes_nothing_but_what_the_cluster_says_has_failed(cluster, answers, changes):
    """A workload that runs, waits in the queue, or of which nothing can be known at the moment is left alone."""
    done, asked = cluster("resume", answers, ["joint"])
    assert done.returncode == 0, done.stderr
    assert asked == changes
    assert (cluster.folder / "answers").read_text() == ""  # it asked to the end, and no further


def test_resume_gives_up_after_so_many_submissions(cluster):
    done, asked = cluster("resume", ["joint Failed"] * 5, ["joint"], MAX_SUBMISSIONS="2")
    assert done.returncode == 1 and "not completed after 2 submissions" in done.stderr
    assert asked == ["delete", "create"] * 2


@pytest.mark.parametrize(("other", "command"), [("joint-2", "submit"), ("jo", "submit"), ("joint-2", "resume")])
def test_a_name_that_begins_like_another_is_refused_before_anything_is_changed(cluster, other, command):
    done, asked = cluster(command, ["joint Failed"], ["joint", other, "sft"])
    assert done.returncode == 2 and f"workload {other} begin alike" in done.stderr
    assert asked == []


def test_other_names_are_no_hindrance(cluster):
    done, asked = cluster("submit", names=["joint", "sft", "the-joint"])
    assert done.returncode == 0 and asked == ["create"]


def test_what_is_missing_on_the_machine_is_said_at_once(cluster):
    (cluster.folder / "crane").unlink()
    done, asked = cluster("submit")
    assert done.returncode == 2 and "install crane first" in done.stderr and asked == []


VALUES = {
    "PLAIN": "hf_Abc123",
    "EMPTY": "",
    "SPACES": " two  words ",
    "QUOTES": """a"b'c""",
    "BACKSLASH": r"C:\new\table\\",
    "DOLLARS": "$HOME $(PLAIN) $$ ${X}",
    "EQUALS": "a=b==",
    "SHELL": "`id`; x | y # z & {!}",
}


def secrets_file(folder: Path) -> Path:
    path = folder / "secrets"
    path.write_text("# tokens\n\n" + "".join(f"{name}={value}\n" for name, value in VALUES.items()).rstrip("\n"))
    return path


def test_secrets_mean_the_same_to_a_shell_as_in_the_jobset(cluster, tmp_path):
    """The JobSet's values: as xpk pastes a line of its file into YAML, and as Kubernetes then reads dollar signs."""
    path = secrets_file(tmp_path)
    done, _ = cluster("submit", SECRETS_FILE=str(path))
    assert done.returncode == 0, done.stderr
    pairs = [line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines()]
    pasted = yaml.safe_load("\n".join(f'{name}: "{value}"' for name, value in pairs))
    assert {name: value.replace("$$", "$") for name, value in pasted.items()} == VALUES
    assert not Path((tmp_path / "spelled").read_text().strip()).exists()  # the copy is gone
    pod = launch_plans.ROOT / "launch"
    line = f'. {pod}/pod.sh; eval "$(sed -n "/^for_shell/p" {pod}/tpu_vm.sh)"; secrets for_shell >{tmp_path}/shell; '
    line += f"set -a; . {tmp_path}/shell; env -0"
    env = {"PATH": os.environ["PATH"], "SECRETS_FILE": str(path)}
    seen = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=env, check=True).stdout
    found = dict(entry.split("=", 1) for entry in seen.split("\0") if "=" in entry)
    assert {name: found[name] for name in VALUES} == VALUES


@pytest.mark.parametrize("script", ["gke_xpk.sh", "tpu_vm.sh"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("export TOKEN=hunter2\n", "line 1 begins with export"),
        ('A=1\nTOKEN="hunter2"\n', "line 2 puts the value of TOKEN into quotes"),
        ("TOKEN='hunter2'\n", "line 1 puts the value of TOKEN into quotes"),
        ("hunter2\n", "line 1 is not NAME=value"),
        ("1TOKEN=hunter2\n", "line 1 is not NAME=value"),
        ("TOKEN=hunter2\r\n", "line 1 has a control character in the value of TOKEN"),
        (None, "does not exist"),
    ],
)
def test_lines_that_two_readers_would_read_differently_are_refused(tmp_path, script, text, said):
    path = tmp_path / "secrets"
    if text is not None:
        path.write_bytes(text.encode())
    command, settings = {"gke_xpk.sh": ("submit", launch_plans.GKE), "tpu_vm.sh": ("setup", launch_plans.TPU_VM)}[
        script
    ]
    done = launch_plans.launch(script, command, {**settings, "SECRETS_FILE": str(path)})
    assert done.returncode == 2 and said in done.stderr and "hunter2" not in done.stderr + done.stdout
