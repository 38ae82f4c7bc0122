"""A real Slurm (munged, slurmctld, N slurmd) on this one machine, with fake GPUs, brought up in about a second.

Each node is a network namespace: an address of its own on a bridge, a loopback of its own, a host name that resolves to
127.0.1.1 on the node itself, as Debian has it. What is told a wrong address finds nobody. Where namespaces are not allowed
all nodes are 127.0.0.1 (TORL_IFNAME=lo says that this is meant), and their names get marked lines in /etc/hosts.

Everything else lives below one folder; the system's own Slurm, munge and configuration are not touched, and `down` takes
everything away. Limits: root is needed (slurmd starts jobs as their owner), all nodes share one kernel, its processes and
files, there is no accounting database, and a container is only as real as the pyxis stub (tests/slurm/pyxis_stub.c), which
accepts the options and starts the job bare.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("slurm-wlm", "slurmctld", "slurmd", "munge", "libslurm-dev", "gcc", "libc6-dev")
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol")
HOSTS, NETNS = Path("/etc/hosts"), Path("/etc/netns")
MARK = "# torl-slurm-test"
CLEAN_ENV = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": os.environ.get("HOME", "/root"),
    "LANG": "C.UTF-8",
}


def why_absent() -> str | None:
    """None where a cluster can be brought up, else the reason for the skip."""
    if os.geteuid() != 0:
        return "needs root: slurmd starts jobs as their owner"
    missing = [name for name in PROGRAMS if shutil.which(name, path=CLEAN_ENV["PATH"]) is None]
    return f"Slurm is absent ({', '.join(missing)}); install {' '.join(PACKAGES)}" if missing else None


def namespaces_allowed() -> bool:
    links = "ip link add torl0 type bridge && ip link add torl1 type veth peer name torl2"
    return subprocess.run(["unshare", "--net", "--mount", "sh", "-c", links], capture_output=True).returncode == 0


@dataclass(frozen=True)
class Shape:
    nodes: int = 4
    gpus: int = 8
    cpus: int = 224
    memory_mb: int = 1_000_000
    base_port: int = 17000
    slurmd_timeout_s: int = 10
    kill_wait_s: int = 5
    grace_s: int = 15


@dataclass
class Cluster:
    """Handle on a running cluster. `env` reaches it; `job_dir` is where tests put what their jobs write."""

    root: Path
    shape: Shape
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    has_pyxis: bool = False
    own_networks: bool = field(default_factory=namespaces_allowed)

    @property
    def mark(self) -> str:
        """Ends this cluster's lines in /etc/hosts."""
        return f"{MARK} {self.root}"

    @property
    def env(self) -> dict[str, str]:
        meant = {} if self.own_networks else {"TORL_IFNAME": "lo"}
        return {**CLEAN_ENV, **meant, "SLURM_CONF": str(self.root / "slurm.conf")}

    def address(self, node: int | None = None) -> str:
        """Of a node, or of the controller."""
        block = self.shape.base_port // 20
        last = 1 if node is None else 10 + node
        return f"10.{200 + block // 256}.{block % 256}.{last}" if self.own_networks else "127.0.0.1"

    def namespace(self, node: str) -> str:
        return f"torl{self.shape.base_port}{node}"

    # ---------------------------------------------------------------------------------------- jobs

    def run(self, *command: str, check: bool = True, env: dict[str, str] | None = None, **kwargs) -> str:
        """Runs a Slurm command against this cluster; stdout and stderr together."""
        done = subprocess.run(
            command, env={**self.env, **(env or {})}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, timeout=60, **kwargs,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)} ended with {done.returncode}: {done.stdout}")
        return done.stdout

    def sbatch(self, *arguments: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> int:
        """Submits and returns the job id."""
        return int(
            self.run("sbatch", "--parsable", *arguments, env=env, cwd=cwd).strip().splitlines()[-1].split(";")[0]
        )

    def job(self, job_id: int) -> dict[str, str]:
        """`scontrol show job` as a mapping."""
        text = self.run("scontrol", "show", "job", "--oneliner", str(job_id))
        return dict(part.split("=", 1) for part in text.split() if "=" in part)

    def wait(self, job_id: int, states: tuple[str, ...] = (), timeout_s: float = 120.0) -> dict[str, str]:
        """The job's record once it is in one of `states` (default: ended); AssertionError after `timeout_s`."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL")
        deadline = time.monotonic() + timeout_s
        record = self.job(job_id)
        while record["JobState"] not in (states or ended):
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"job {job_id} is {record['JobState']} ({record.get('Reason')}) after {timeout_s} s"
                )
            time.sleep(0.25)
            record = self.job(job_id)
        return record

    # --------------------------------------------------------------------------------------- nodes

    def start_slurmd(self, node: str) -> None:
        (self.root / f"spool.{node}").mkdir(exist_ok=True)
        command = ["slurmd", "-D", "-N", node]
        if self.own_networks:
            inside = ["ip", "netns", "exec", self.namespace(node), "unshare", "--uts"]
            command = [*inside, "sh", "-c", 'hostname "$0"; exec "$@"', node, *command]
        self._start(f"slurmd.{node}", *command)

    def lose(self, node: str) -> None:
        """A node dies: its slurmd, its step daemons and everything they started, all at once, by SIGKILL."""
        daemon = self.processes.pop(f"slurmd.{node}")
        steps = [pid for pid in _pids("slurmstepd") if self._ours(pid) and self._holds_socket(pid, node)]
        for pid in [daemon.pid, *steps, *(child for step in steps for child in descendants(step))]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        daemon.wait()

    def _holds_socket(self, pid: int, node: str) -> bool:
        """Does `pid` hold a unix socket below `node`'s spool folder, as every step daemon of that node does?"""
        with contextlib.suppress(OSError):
            lines = [line.split() for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()]
            sockets = {f"socket:[{words[6]}]" for words in lines if words[-1].startswith(f"{self.root}/spool.{node}/")}
            return any(os.readlink(fd) in sockets for fd in Path(f"/proc/{pid}/fd").iterdir())
        return False

    # ----------------------------------------------------------------------------------- up and down

    def up(self) -> None:
        if self.root.exists():
            shutil.rmtree(self.root)
        for folder in (self.root, self.root / "log", self.root / "state", self.root / "dev"):
            folder.mkdir(mode=0o755)
        self._munge()
        (self.root / "gres.conf").write_text(self._gres())
        (self.root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (self.root / "plugstack.conf").write_text(self._pyxis())
        (self.root / "slurm.conf").write_text(self._slurm_conf())
        if self.own_networks:
            self._networks_up()
        else:
            with HOSTS.open("a") as hosts:
                hosts.writelines(f"127.0.0.1 n{i} {self.mark}\n" for i in range(self.shape.nodes))
        self._start("slurmctld", "slurmctld", "-D", "-c")
        for i in range(self.shape.nodes):
            self.start_slurmd(f"n{i}")
        self.wait_idle()

    def _networks_up(self) -> None:
        """A bridge with a pair of virtual Ethernet ends to each node. `ip netns exec` puts a node's own file over /etc/hosts."""
        bridge, nodes = f"torl{self.shape.base_port}", range(self.shape.nodes)
        self._ip(
            f"link add {bridge} type bridge", f"addr add {self.address()}/24 dev {bridge}", f"link set {bridge} up"
        )
        for i in nodes:
            space, end = self.namespace(f"n{i}"), f"{bridge}v{i}"
            self._ip(f"netns add {space}", f"link add {end} type veth peer name eth0 netns {space}")
            self._ip(f"link set {end} master {bridge} up", f"-n {space} link set lo up")
            self._ip(f"-n {space} addr add {self.address(i)}/24 dev eth0", f"-n {space} link set eth0 up")
            names = [f"{'127.0.1.1' if i == j else self.address(j)} n{j}\n" for j in nodes]
            hosts = NETNS / space / "hosts"
            hosts.parent.mkdir(parents=True)
            hosts.write_text("".join(["127.0.0.1 localhost\n", *names]))

    def _networks_down(self) -> None:
        bridge = f"torl{self.shape.base_port}"
        for i in range(self.shape.nodes):
            self._ip(f"link del {bridge}v{i}", f"netns del {self.namespace(f'n{i}')}", check=False)
            shutil.rmtree(NETNS / self.namespace(f"n{i}"), ignore_errors=True)
        self._ip(f"link del {bridge}", check=False)

    @staticmethod
    def _ip(*commands: str, check: bool = True) -> None:
        for command in commands:
            subprocess.run(["ip", *command.split()], check=check, capture_output=True)

    def wait_idle(self, timeout_s: float = 30.0) -> None:
        deadline = time.monotonic() + timeout_s
        while self.run("sinfo", "-h", "-p", "train", "-t", "idle", "-o", "%D", check=False).strip() != str(
            self.shape.nodes
        ):
            if time.monotonic() > deadline:
                raise AssertionError(f"nodes are not all idle after {timeout_s} s: {self.run('sinfo', check=False)}")
            time.sleep(0.1)

    def down(self) -> None:
        """Cancels all jobs, ends every daemon and step this cluster started, and restores /etc/hosts."""
        with contextlib.suppress(Exception):
            jobs = self.run("squeue", "-h", "-o", "%A").split()
            if jobs:
                self.run("scancel", *jobs)
            deadline = time.monotonic() + self.shape.kill_wait_s + 5
            while self.run("squeue", "-h").strip() and time.monotonic() < deadline:
                time.sleep(0.2)
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in reversed(self.processes.values()):
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pid in [pid for pid in _pids("slurmstepd") if self._ours(pid)]:
            for victim in [*descendants(pid), pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
        if self.own_networks:
            self._networks_down()
        kept = [line for line in HOSTS.read_text().splitlines(keepends=True) if not line.endswith(f"{self.mark}\n")]
        HOSTS.write_text("".join(kept))  # written in place: it may be a bind mount
        shutil.rmtree(self.root, ignore_errors=True)

    def _ours(self, pid: int) -> bool:
        return _environment(pid, "SLURM_CONF") == str(self.root / "slurm.conf")

    def _start(self, name: str, *command: str) -> None:
        with (self.root / "log" / f"{name}.out").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, env=self.env, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=self.root
            )

    def _munge(self) -> None:
        """Our own munged with our own key; --force because it refuses a socket below a world-writable folder."""
        folder = self.root / "munge"
        folder.mkdir(mode=0o711)
        key = folder / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        for path in (folder, key):
            shutil.chown(path, "munge", "munge")
        words = f"munged --foreground --force --num-threads=4 --key-file={key} --socket={folder}/sock"
        words += f" --pid-file={folder}/pid --log-file={folder}/log --seed-file={folder}/seed"
        self._start("munged", "setpriv", "--reuid", "munge", "--regid", "munge", "--clear-groups", *words.split())
        deadline = time.monotonic() + 10
        while not (folder / "sock").exists():
            if time.monotonic() > deadline:
                raise AssertionError("munged did not come up")
            time.sleep(0.05)

    def _gres(self) -> str:
        """Fake GPUs are character devices like /dev/null: with plain files CUDA_VISIBLE_DEVICES would stay empty."""
        if not self.shape.gpus:
            return ""
        for i in range(self.shape.gpus):
            os.mknod(self.root / "dev" / f"nvidia{i}", 0o20666, os.makedev(1, 3))
        last = self.shape.gpus - 1
        return f"NodeName=n[0-{self.shape.nodes - 1}] Name=gpu Type=h100 File={self.root}/dev/nvidia[0-{last}]\n"

    def _pyxis(self) -> str:
        """Builds the pyxis stub where gcc and Slurm's headers are; without them container tests skip."""
        source, library = Path(__file__).with_name("pyxis_stub.c"), self.root / "pyxis_stub.so"
        command = ["gcc", "-shared", "-fPIC", "-o", str(library), str(source)]
        if shutil.which("gcc") and Path("/usr/include/slurm/spank.h").exists():
            subprocess.run(command, check=True, capture_output=True)
            self.has_pyxis = True
            return f"required {library}\n"
        return ""

    def _slurm_conf(self) -> str:
        shape, root, host = self.shape, self.root, socket.gethostname().split(".")[0]
        gres = f"Gres=gpu:h100:{shape.gpus}" if shape.gpus else ""
        nodes = [
            f"NodeName=n{i} NodeHostname={f'n{i}' if self.own_networks else host} NodeAddr={self.address(i)} "
            f"Port={shape.base_port + 10 + i} CPUs={shape.cpus} "
            f"Sockets=1 CoresPerSocket={shape.cpus} ThreadsPerCore=1 RealMemory={shape.memory_mb} {gres} "
            f"Feature=h100,gpu State=UNKNOWN"
            for i in range(shape.nodes)
        ]
        every = f"Nodes=n[0-{shape.nodes - 1}] MaxTime=INFINITE State=UP"
        return "\n".join([
            *CONF.format(root=root, host=host, address=self.address(), shape=shape).splitlines(),
            # with one network for all, everybody listens on its own address alone
            "" if self.own_networks else "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny",
            "GresTypes=gpu" if shape.gpus else "",
            *nodes,
            f"PartitionName=train {every} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={shape.grace_s}",
            f"PartitionName=urgent {every} PriorityTier=100 PreemptMode=OFF",
            "",
        ])  # fmt: skip


# cred_expire: a requeued job waits that long plus a second before it may start again (default 120).
# config_overrides: a node may claim more cores and memory than this machine has.
# preempt_send_user_signal: --signal also acts on preemption (Slurm 22.05's spelling).
CONF = """\
ClusterName=torl
SlurmctldHost={host}({address})
SlurmUser=root
SlurmdUser=root
SlurmctldPort={shape.base_port}
SlurmctldParameters=preempt_send_user_signal
AuthType=auth/munge
AuthInfo=socket={root}/munge/sock,cred_expire=5
CryptoType=crypto/munge
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
LaunchParameters=enable_nss_slurm
ReturnToService=2
SlurmdTimeout={shape.slurmd_timeout_s}
SlurmctldTimeout=30
InactiveLimit=0
KillWait={shape.kill_wait_s}
MinJobAge=600
Waittime=0
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=5,batch_sched_delay=0,requeue_setup_env_fail
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PlugStackConfig={root}/plugstack.conf
"""


def _pids(name: str) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "comm").read_text().strip() == name:
                found.append(int(folder.name))
    return found


def _environment(pid: int, key: str) -> str | None:
    with contextlib.suppress(OSError):
        for pair in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if pair.startswith(f"{key}=".encode()):
                return pair.partition(b"=")[2].decode()
    return None


def descendants(pid: int) -> list[int]:
    """Every process below `pid`, children first."""
    found = []
    for folder in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in folder.read_text().split():
                found += [int(child), *descendants(int(child))]
    return found


@contextlib.contextmanager
def cluster(root: Path, shape: Shape | None = None) -> Iterator[Cluster]:
    """A running cluster, taken down completely whatever happens inside."""
    handle = Cluster(root, shape or Shape())
    try:
        handle.up()
        yield handle
    finally:
        handle.down()
