"""A process finds its number and the address of process 0 in the environment of each launcher."""

import contextlib
import http.server
import os
import re
import socket
import subprocess
import threading
import time
from pathlib import Path

import jax
import pytest
import yaml

from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.processes import launch, tpu_metadata
from gpt2_flax.processes.launch import start_processes
from gpt2_flax.processes.messages import SECRET
from gpt2_flax.processes.place import ATTEMPT, Place, find_place
from gpt2_flax.processes.watchdog import Watchdog

SCRIPTS = Path(__file__).parents[2] / "scripts"
LAUNCHERS = (
    r"(GPT2_FLAX|GCE_|SLURM|OMPI|PMIX|JAX_(COORD|NUM_P|PROC|LOCAL)|"
    r"MASTER|WORLD_S|RANK|LOCAL_|TORCHEL|TPU|MEGASC|JOB_C|CUDA_V)"
)

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_NODELIST": "node[001-004]",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "PMIX_NAMESPACE": "1531576321",
}
TORCHRUN = {
    "WORLD_SIZE": "2",
    "RANK": "1",
    "MASTER_ADDR": "host0",
    "MASTER_PORT": "29500",
    "LOCAL_WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
}
TPU = {"TPU_WORKER_HOSTNAMES": "t0,t1,t2,t3", "TPU_WORKER_ID": "3"}
GENERAL = {"JAX_COORDINATOR_ADDRESS": "host0:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
KUBERNETES = {**GENERAL, "JOB_COMPLETION_INDEX": "1"}
del KUBERNETES["JAX_PROCESS_ID"]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Return a function that sets the variables of one launcher and removes the variables of all others."""
    for name in os.environ:
        if re.match(LAUNCHERS, name):
            monkeypatch.delenv(name)

    def be(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return be


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, None),
        (SLURM, Place("node001:PORT", 4, 2)),
        (SLURM | {"SLURM_STEP_NODELIST": "node7,node9"}, Place("node7:PORT", 4, 2)),
        (SLURM | {"SLURM_STEP_NODELIST": "node[7,9-12]-ib,other"}, Place("node7-ib:PORT", 4, 2)),
        (SLURM | {"SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "1"}, Place("node001:PORT", 4, 2, 1)),
        (SLURM | {"SLURM_STEP_NUM_NODES": "2", "CUDA_VISIBLE_DEVICES": "5"}, Place("node001:PORT", 4, 2)),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "4711", "SLURM_PROCID": "0"}, None),  # salloc, or the script of sbatch
        (OPEN_MPI, Place("10.96.0.1:PORT", 2, 1)),
        (OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp6://[fe80::1,2620::2]:43370"}, Place("[fe80::1]:PORT", 2, 1)),
        (
            OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            Place("localhost:PORT", 2, 1, 1),
        ),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None),
        (TORCHRUN, Place("host0:29500", 2, 1)),
        (TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True"}, Place("host0:29501", 2, 1)),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}, Place("host0:29500", 2, 1, 1)),
        ({"WORLD_SIZE": "2", "RANK": "1"}, None),
        (TPU, Place("t0:8482", 4, 3)),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
        ({"TPU_WORKER_ID": "WARNING: could not determine TPU worker number, please set it"}, None),
        (
            dict.fromkeys(("TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID"), "WARNING: could not determine it, please set it"),
            None,
        ),
        (
            TPU | {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "s0:8080"},
            Place("s0:8482", 8, 7),
        ),
        (GENERAL, Place("host0:1234", 2, 1)),
        (KUBERNETES, Place("host0:1234", 2, 1)),
        (KUBERNETES | {"JOB_COMPLETION_INDEX": "0"}, Place("host0:1234", 2, 0)),
        ({"JOB_COMPLETION_INDEX": "1"}, None),  # an indexed job of another program
        ({"JAX_NUM_PROCESSES": "1"}, None),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "other:99"}, Place("other:99", 4, 2)),
        (SLURM | GENERAL, Place("host0:1234", 2, 1)),
    ],
)
def test_place_by_environment(environment, variables, place):
    environment(variables)
    found = find_place()
    if place and "PORT" in place.coordinator:
        port = int(found.coordinator.rsplit(":", 1)[1])
        assert 20000 <= port < 30000
        place = place._replace(coordinator=place.coordinator.replace("PORT", str(port)))
    assert found and found._replace(attempt="") == place if place else found is None


def test_the_command_line_comes_first(environment):
    environment(SLURM)
    assert find_place("[::1]:1234", 3, 2) == Place("[::1]:1234", 3, 2)
    assert find_place("host0:1234", 1, 0) is None


def test_two_steps_of_a_job_have_ports_of_their_own(environment):
    environment(SLURM)
    first = find_place().coordinator
    assert find_place().coordinator == first
    environment({"SLURM_STEP_ID": "1"})
    assert find_place().coordinator != first


def test_ports_come_in_pairs(environment):
    environment(SLURM)
    ports = set()
    for job in range(300):
        environment({"SLURM_JOB_ID": str(job)})
        ports.add(find_place().port)
    assert len(ports) > 250
    assert all(
        20000 <= port < 30000 and port % 2 == 0 for port in ports
    )  # the port after a job's port belongs to no other job
    assert find_place("host0:65534", 2, 0).port == 65534


@pytest.mark.parametrize(
    ("variables", "again", "attempt"),
    [
        (SLURM, {"SLURM_RESTART_COUNT": "1"}, "4711.0.0"),
        (OPEN_MPI, {"PMIX_NAMESPACE": "1531576322"}, "1531576321"),
        (GENERAL, {"GPT2_FLAX_ATTEMPT": "1"}, ""),
        (SLURM | {"GPT2_FLAX_ATTEMPT": "a"}, {"GPT2_FLAX_ATTEMPT": "b"}, "a"),
        (
            TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "0"},
            {"GPT2_FLAX_ATTEMPT": "x"},
            "",
        ),  # the count differs between hosts
    ],
)
def test_each_start_is_another_attempt(environment, variables, again, attempt):
    environment(variables)
    assert find_place().attempt == find_place().attempt == attempt
    environment(again)
    assert find_place().attempt not in ("", attempt)


@pytest.mark.parametrize(
    ("given", "variables", "what", "fix"),
    [
        (("host0:1", 2, None), {}, "incomplete process group", "give --coordinator"),
        ((None, None, 0), GENERAL, "incomplete process group", "give --coordinator"),
        ((), {"JAX_COORDINATOR_ADDRESS": "h:1"}, "incomplete", "set JAX_NUM_PROCESSES and JAX_PROCESS_ID too"),
        ((), {"JAX_NUM_PROCESSES": "2", "JOB_COMPLETION_INDEX": "0"}, "incomplete", "set JAX_COORDINATOR_ADDRESS too"),
        ((), {"JAX_PROCESS_ID": "0"}, "incomplete", "set JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES too"),
        ((), {**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": ""}, "incomplete", "set JAX_COORDINATOR_ADDRESS too"),
        ((), {**TPU, "TPU_WORKER_ID": ""}, "incomplete", "set JAX_PROCESS_ID too"),
        ((), GENERAL | {"JAX_PROCESS_ID": "x"}, "'x' is no number", "correct or unset it"),
        ((), SLURM | {"SLURM_STEP_NUM_TASKS": "-1"}, "'-1' is no number", "correct or unset it"),
        (("host0:1", 2, 2), {}, "process 2 of 2", "numbers are 0 to 1"),
        ((), GENERAL | {"JAX_PROCESS_ID": "7"}, "process 7 of 2", "numbers are 0 to 1"),
        (("host0", 2, 0), {}, "'host0' is no address", "give HOST:PORT"),
        (("host0:99999", 2, 0), {}, "'host0:99999' is no address", "give HOST:PORT"),
        (("host0:65535", 2, 0), {}, "'host0:65535' is no address", "PORT + 1 is used too, so PORT is at most 65534"),
        (("host0:0", 2, 0), {}, "'host0:0' is no address", "give HOST:PORT"),
        ((), TORCHRUN | {"MASTER_PORT": "65535"}, "'host0:65535' is no address", "PORT + 1 is used too"),
        (("a b:1", 2, 0), {}, "'a b:1' is no address", "give HOST:PORT"),
        ((":1", 2, 0), {}, "':1' is no address", "give HOST:PORT"),
    ],
)
def test_missing_or_wrong_values_are_refused(environment, given, variables, what, fix):
    environment(variables)
    with pytest.raises(UserError) as error:
        find_place(*given)
    assert error.value.exit_code == ExitCode.USAGE
    assert what in error.value.what
    assert fix in error.value.fix
    tried = ("SLURM", "Open MPI", "torchrun", "TPU pods", "the metadata server of TPU VMs", "Kubernetes")
    if what == "incomplete" and not given:
        assert all(name in error.value.where for name in tried)


# TPU VMs of Google Cloud


@pytest.fixture
def metadata(monkeypatch, tmp_path):
    """Return a function that starts a metadata server, which returns the list of requested paths."""
    (tmp_path / "product_name").write_text("Google Compute Engine\n")
    monkeypatch.setattr(tpu_metadata, "PRODUCT", tmp_path / "product_name")
    monkeypatch.setattr(tpu_metadata, "TIMEOUT", 0.2)
    monkeypatch.setattr(tpu_metadata, "has_tpu", lambda: True)
    servers = []

    def serve(attributes, failures=0, flavor="Google"):
        class Server(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append(self.path)
                name = self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
                known = name in attributes and self.headers["Metadata-Flavor"] == "Google"
                self.send_response(503 if len(asked) <= failures else 200 if known else 404)
                if flavor:
                    self.send_header("Metadata-Flavor", flavor)
                self.end_headers()
                self.wfile.write(attributes.get(name, "").encode())

            def log_message(self, *arguments):
                pass

        asked = []
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{servers[-1].server_port}")
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nothing listens there: the proxy is not used
        return asked

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


VM = {
    "agent-worker-number": "2",
    "worker-network-endpoints": "unknown:unknown:10.0.0.2,unknown:unknown:10.0.0.3,unknown:unknown:10.0.0.4",
    "tpu-env": "ACCELERATOR_TYPE: 'v4-24'\nWORKER_ID: '2'\nTYPE: 'V4'\n",
}
SLICES = "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\nMEGASCALE_COORDINATOR_ADDRESS: '10.9.0.1:8080'\n"


@pytest.mark.parametrize(
    ("attributes", "variables", "place"),
    [
        (VM, {}, Place("10.0.0.2:8482", 3, 2)),
        (VM | {"worker-network-endpoints": "t-w0,t-w1, t-w2"}, {}, Place("t-w0:8482", 3, 2)),
        (VM | {"tpu-env": VM["tpu-env"] + SLICES}, {}, Place("10.9.0.1:8482", 6, 5)),
        (VM | {"tpu-env": VM["tpu-env"] + SLICES}, {"MEGASCALE_SLICE_ID": "0"}, Place("10.9.0.1:8482", 6, 2)),
        (VM, {"JAX_COORDINATOR_ADDRESS": "other:99"}, Place("other:99", 3, 2)),
        ({"agent-worker-number": "0", "worker-network-endpoints": "unknown:unknown:10.0.0.2"}, {}, None),
        ({"agent-worker-number": "0"}, {}, None),
        ({}, {}, None),  # a machine of Google Cloud without a slice
    ],
)
def test_tpu_vms_find_each_other(environment, metadata, capsys, attributes, variables, place):
    metadata(attributes)
    environment(variables)
    assert find_place() == place
    assert capsys.readouterr().err == ""


def test_a_metadata_server_that_is_busy_is_asked_again(metadata, environment):
    asked = metadata(VM, failures=2)
    assert find_place() == Place("10.0.0.2:8482", 3, 2)
    assert len(asked) == 2 + 3


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"TPU_SKIP_MDS_QUERY": "1"}, None),
        ({"JAX_NUM_PROCESSES": "1"}, None),
        (GENERAL, Place("host0:1234", 2, 1)),
        (SLURM, Place),
        (TPU, Place("t0:8482", 4, 3)),
    ],
)
def test_no_metadata_server_is_asked_if_the_place_is_known(metadata, environment, variables, place):
    asked = metadata(VM)
    environment(variables)
    assert find_place() == place or place is Place
    assert not asked


@pytest.mark.parametrize(
    ("product", "tpu", "variables", "may_be"),
    [
        ("Google Compute Engine", True, {}, True),
        ("Google", True, {}, True),
        ("Google Compute Engine", False, {}, False),
        ("Standard PC (Q35 + ICH9, 2009)", True, {}, False),  # /dev/vfio is there to pass a GPU to a guest
        ("Standard PC (Q35 + ICH9, 2009)", True, {"TPU_ACCELERATOR_TYPE": "v5litepod-16"}, True),
        (None, True, {}, True),  # a container does not see the product name
        (None, False, {"TPU_ACCELERATOR_TYPE": "v5litepod-16"}, False),
        ("Google", True, {"TPU_SKIP_MDS_QUERY": "true"}, False),
    ],
)
def test_other_machines_do_not_wait_for_a_metadata_server(
    environment, monkeypatch, tmp_path, product, tpu, variables, may_be
):
    environment(variables)
    monkeypatch.setattr(tpu_metadata, "PRODUCT", tmp_path / "product_name")
    monkeypatch.setattr(tpu_metadata, "has_tpu", lambda: tpu)
    if product:
        (tmp_path / "product_name").write_text(f"{product}\n")
    asked = []
    monkeypatch.setattr("gpt2_flax.processes.place.slice_of_this_vm", lambda: asked.append(1))
    assert find_place() is None
    assert bool(asked) == may_be


@pytest.mark.parametrize("how", ["nobody", "silence", "another server", "nonsense"])
def test_a_metadata_server_that_does_not_answer_costs_seconds_and_a_line(metadata, monkeypatch, capsys, how):
    metadata(VM, flavor="" if how == "another server" else "Google")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        if how == "nobody":
            listener.close()
        if how == "nonsense":

            def answer():
                with contextlib.suppress(OSError):
                    while True:
                        connection, _ = listener.accept()
                        connection.sendall(b"SSH-2.0\r\n")
                        connection.close()

            threading.Thread(target=answer, daemon=True).start()
        if how != "another server":
            monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{port}")
        begun = time.monotonic()
        assert find_place() is None
    assert time.monotonic() - begun < 10 * tpu_metadata.TIMEOUT
    line = capsys.readouterr().err
    assert line.startswith("warning: this TPU VM trains alone: its metadata server 127.0.0.1:")
    assert line.endswith("; if there are others, give --coordinator, --num-processes and --process-id\n")
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    "attributes",
    [{"agent-worker-number": "x"}, {"worker-network-endpoints": "a:b"}, {"worker-network-endpoints": "t0,,t2"}],
)
def test_metadata_in_an_unknown_format_is_refused(metadata, attributes):
    metadata(VM | attributes)
    with pytest.raises(UserError, match="is not understood") as error:
        find_place()
    assert error.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("variables", "devices"),
    [
        (SLURM, []),  # all devices of the host
        (SLURM | {"SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "1"}, [1]),
        (SLURM | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, None),  # JAX reads it
        (GENERAL, []),
    ],
)
def test_devices_of_a_process_follow_the_launcher(environment, monkeypatch, variables, devices):
    environment(variables)
    calls, watchdog = [], Watchdog()
    monkeypatch.setattr(launch.Watchdog, "join", lambda *place: watchdog)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *place, **keys: calls.append((place, keys)))
    place = find_place()
    assert start_processes(place) is watchdog
    assert calls[0][0] == (f"{place.host}:{place.port + 1}", place.n_processes, place.number)
    assert calls[0][1]["local_device_ids"] == devices


def test_one_process_is_not_joined_to_anything(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", None)
    assert isinstance(start_processes(None), Watchdog)


def test_the_jobset_sets_what_the_program_reads(environment):
    """It sets the variables and the number of hosts, and names the exit codes that a restart does not help."""
    jobset = yaml.safe_load((SCRIPTS / "kubernetes_jobset.yaml").read_text(encoding="utf-8"))
    name, (hosts,) = jobset["metadata"]["name"], jobset["spec"]["replicatedJobs"]
    job = hosts["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    n_hosts, index = job["parallelism"], job["parallelism"] - 1
    assert (job["completionMode"], job["completions"], hosts["replicas"]) == ("Indexed", n_hosts, 1)
    variables = {variable["name"]: variable["value"] for variable in container["env"] if "value" in variable}
    of_others = {variable["name"]: variable["valueFrom"] for variable in container["env"] if "value" not in variable}
    assert set(of_others) == {ATTEMPT, SECRET}
    assert of_others[SECRET]["secretKeyRef"]["optional"] is True
    environment(variables | {"JOB_COMPLETION_INDEX": str(index), ATTEMPT: "3"})
    place = find_place()
    assert place.attempt == "3"
    assert {port["containerPort"] for port in container["ports"]} == {place.port, place.port + 1}
    assert (place.n_processes, place.number) == (n_hosts, index)
    assert place.coordinator.split(":")[0] == f"{name}-{hosts['name']}-0-0.{name}"

    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    restarted = {ExitCode.OK, ExitCode.TRY_AGAIN, *(code for code in ExitCode if code > 128)}  # exit codes of signals
    assert set(rule["onExitCodes"]["values"]) == set(ExitCode) - restarted
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in job["template"]["spec"]["volumes"]}


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [(0, 0, False), (75, 0, True), (137, 3, True), (65, 0, False), (76, 0, False), (130, 0, False), (75, 100, False)],
)
def test_the_slurm_script_starts_again_where_that_helps(tmp_path, code, restarts, again):
    for name, end in {"srun": f"exit {code}", "scontrol": "exit 0"}.items():
        stand_in = tmp_path / name
        stand_in.write_text(f'#!/bin/sh\necho {name} "$@"\n{end}\n')
        stand_in.chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    command = ["bash", SCRIPTS / "train.slurm", "configs/x.toml", "output=a b"]
    result = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert result.stderr == ""
    assert "gpt2-flax train configs/x.toml output=a b\n" in result.stdout
    assert ("scontrol requeue 7" in result.stdout) == again
    assert result.returncode == (0 if again else code)


@pytest.mark.multiprocess
def test_the_slurm_script_makes_a_secret_of_its_own_for_each_start(tmp_path):
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$GPT2_FLAX_SECRET"\n')
    (tmp_path / "srun").chmod(0o755)
    variables = {name: value for name, value in os.environ.items() if name != SECRET}
    variables |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    found = []
    for given in ({}, {}, {SECRET: "one of the user's own"}):
        result = subprocess.run(
            ["bash", SCRIPTS / "train.slurm"], env=variables | given, capture_output=True, text=True
        )
        assert (result.stderr, result.returncode) == ("", 0)
        found.append(result.stdout.strip())
    assert found[2] == "one of the user's own"
    assert found[0] != found[1]
    assert all(re.fullmatch("[0-9a-f]{64}", secret) for secret in found[:2])
