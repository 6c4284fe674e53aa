"""What the pod launchers would run (DRY_RUN=1). To record the plans: python tests/launch/launch_plans.py."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLANS = Path(__file__).parent / "plans"

TPU_VM = {
    "PROJECT": "a-project",
    "ZONE": "us-west4-a",
    "NAME": "dream",
    "ACCELERATOR_TYPE": "v5litepod-16",
    "RUNTIME_VERSION": "v2-alpha-tpuv5-lite",
    "BUCKET": "a-bucket",
    "CONFIG": "configs/dreamlite.py:t2i_256",
    "WORKDIR": "/gcs/runs/t2i_256",
}
MULTISLICE = {**TPU_VM, "SLICES": "2", "PROVISIONING": "spot", "TRAIN_ARGS": "--config.mesh.fsdp=16 --config.seed=1"}
GKE = {
    "PROJECT": "a-project",
    "ZONE": "us-west4-a",
    "CLUSTER": "a-cluster",
    "WORKLOAD": "joint",
    "TPU_TYPE": "v5litepod-256",
    "STORAGE": "dreamlite",
    "CONFIG": "configs/dreamlite.py:joint",
    "WORKDIR": "/gcs/runs/joint",
}
SECRETS = {"SECRETS_FILE": str(Path(__file__).parent / "my secrets")}  # the space shows the quoting; never printed
SUSPENDED = {"DRY_RUN_STATE": "SUSPENDED"}
ABSENT = {"DRY_RUN_STATE": ""}

# Name of the plan: script, commands, settings.
SCENARIOS = {
    "tpu_vm": ("tpu_vm.sh", "create setup preflight run logs status resume stop delete", TPU_VM),
    "tpu_vm_multislice": ("tpu_vm.sh", "create setup preflight run status stop", {**MULTISLICE, **SECRETS}),
    "tpu_vm_preempted": ("tpu_vm.sh", "status resume", {**MULTISLICE, **SUSPENDED}),
    "tpu_vm_queued": ("tpu_vm.sh", "resume", {**TPU_VM, "DRY_RUN_STATE": "WAITING_FOR_RESOURCES"}),
    "tpu_vm_absent": ("tpu_vm.sh", "status resume", {**TPU_VM, **ABSENT}),
    "gke_xpk": ("gke_xpk.sh", "submit monitor resume stop", GKE),
    "gke_xpk_complete": ("gke_xpk.sh", "resume", {**GKE, "DRY_RUN_STATE": "Completed"}),
    "gke_xpk_absent": ("gke_xpk.sh", "resume", {**GKE, "DRY_RUN_STATE": ""}),
    "gke_xpk_multislice": ("gke_xpk.sh", "submit", {**GKE, **SECRETS, "SLICES": "2", "MAX_RESTARTS": "3"}),
}


def launch(script: str, command: str, settings: dict[str, str]) -> subprocess.CompletedProcess:
    """One command of a launcher, dry, with these settings and none of our own environment's."""
    env = {"PATH": os.environ["PATH"], "DRY_RUN": "1", **settings}
    return subprocess.run([ROOT / "launch" / script, command], capture_output=True, text=True, env=env, cwd="/")


def plan(name: str) -> str:
    """The recorded text: each command of the scenario, then what it printed."""
    script, commands, settings = SCENARIOS[name]
    text = ""
    for command in commands.split():
        done = launch(script, command, settings)
        said = (done.stderr + done.stdout).replace(str(ROOT), "CHECKOUT")
        text += f"$ launch/{script} {command}\n{said}" + (f"exit code {done.returncode}\n" if done.returncode else "")
    return text


if __name__ == "__main__":
    PLANS.mkdir(exist_ok=True)
    for name in SCENARIOS:
        (PLANS / f"{name}.txt").write_text(plan(name))
