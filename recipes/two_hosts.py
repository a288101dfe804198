"""Two hosts on one machine: `accelerate launch --machine_rank` on a 2 x 2 mesh, and what becomes of it when one goes.

    python recipes/two_hosts.py [--only PART …] [--steps 8] [--timeout 20] [--keep FOLDER]

Each host is a set of Linux namespaces of its own (network, host name, processes, mounts), joined by a virtual cable. It
needs no root: `unshare` gives this process the right to make them. Linux only, `ip` and `unshare` must be there. Every
host runs two gloo ranks of `recipes/sft.py` from the preset of `hf-tpsp config --dp 2 --tp 2 --hosts 2 --cpu`: one TP
pair on each, FSDP2 across. The defaults take some minutes on two cores.

- same: the losses of the two hosts beside those of one host and of one process;
- spans: a mesh whose TP group spans the hosts says so;
- killed: all processes of the second host, then of the first, are killed; the other ends; resumed from the checkpoint;
- cable: the network link is taken down; both hosts end after `ddp_timeout`; resumed;
- folders: an output folder that only one host sees, and one that has another name on each;
- address: hosts whose names lead to no address, and an interface that is not there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NETWORK = "10.77.0"
CABLE = "eth0"
LIMIT = 120

# What a host runs in its namespaces: it waits for its cable, and then for the command.
HOST = """
hostname "$1"; ip link set lo up; mount --make-rprivate /
read _
ip addr add "$2/24" dev eth0 2>/dev/null && ip link set eth0 up
eval "$3"
shift 3
"$@"
exit $?
"""


@dataclass
class Host:
    """Processes that share a host name, a network and mounts, and of which none outlives the first."""

    name: str
    process: subprocess.Popen
    lines: list[tuple[float, str]] = field(default_factory=list)
    ended: float | None = None
    reader: threading.Thread | None = None
    network: int | None = None

    @property
    def output(self) -> str:
        return "\n".join(line for _, line in self.lines)

    def read(self, heard: Callable[[Host, str], None]) -> None:
        def follow() -> None:
            for line in self.process.stdout:
                self.lines.append((time.monotonic(), line.rstrip()))
                heard(self, line)
            self.process.wait()
            self.ended = time.monotonic()

        self.reader = threading.Thread(target=follow, daemon=True)
        self.reader.start()

    def kill(self) -> None:
        """End all of its processes at once, as a host that loses its power does but for its connections, which close."""
        self.process.send_signal(signal.SIGKILL)

    def unplug(self) -> None:
        """Take its link down: what it sends is lost, and nobody is told."""
        command("nsenter", "-t", self.process.pid, "-n", "ip", "link", "set", CABLE, "down")


def command(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True, stdin=subprocess.DEVNULL)


@contextmanager
def hosts(commands: list[list[str]], mounts: list[str] | None = None) -> Iterator[list[Host]]:
    """One host for each of the commands, which start when all hosts are joined; two have a cable."""
    found = []
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_"))}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}
    environment |= {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": CABLE if len(commands) > 1 else "lo"}
    for rank, words in enumerate(commands):
        name = f"host{rank}"
        isolated = ["unshare", "--net", "--uts", "--pid", "--mount", "--mount-proc", "--fork", "--kill-child=SIGKILL"]
        script = ["sh", "-c", HOST, "host", name, f"{NETWORK}.{rank + 1}", mounts[rank] if mounts else ":"]
        process = subprocess.Popen(
            [*isolated, *script, *words], cwd=ROOT, env=environment, text=True, errors="replace",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        found.append(Host(name, process))
    try:
        for host in found:
            # Its namespaces are there when its own process has become another's child.
            own = Path(f"/proc/{host.process.pid}/ns/net")
            while os.readlink(own) == os.readlink("/proc/self/ns/net"):
                time.sleep(0.01)
            # It outlives the host's processes, as a network card does, so that their connections close.
            host.network = os.open(own, os.O_RDONLY)
        if len(found) == 2:
            first, second = (host.process.pid for host in found)
            command("ip", "link", "add", CABLE, "netns", first, "type", "veth", "peer", "name", CABLE, "netns", second)
        for host in found:
            host.process.stdin.write("\n")
            host.process.stdin.close()
        yield found
    finally:
        for host in found:
            host.kill()
            host.process.wait()
            if host.network is not None:
                os.close(host.network)


@dataclass
class Run:
    """What became of a run: each host's output, its exit status, and the seconds from the fault to its end."""

    hosts: list[Host]
    fault: float | None
    timed_out: bool

    def ended(self, host: int) -> str:
        found = self.hosts[host]
        after = f" {found.ended - self.fault:.1f} s after it" if self.fault and found.ended else ""
        return f"{found.name} ended{after} with exit status {found.process.returncode}"


class Recipe:
    """The runs, in a folder of its own."""

    def __init__(self, place: Path, steps: int, timeout: int):
        self.place, self.steps, self.timeout = place, steps, timeout
        self.failed: list[str] = []
        sys.path.insert(0, str(ROOT / "recipes"))
        from tiny_model import save_tiny_model

        save_tiny_model(place / "model")

    def preset(self, name: str, *mesh: object) -> Path:
        path = self.place / f"{name}.yaml"
        command(sys.executable, "-m", "hf_tpsp.cli", "config", *mesh, "--cpu", "-o", path)
        return path

    def script(self, out: Path, *, rows: int, resume: bool = False, **options: object) -> list[str]:
        """`recipes/sft.py` with a checkpoint after each second step."""
        options = {
            "model": self.place / "model", "output_dir": out, "max_steps": self.steps, "save_strategy": "steps",
            "save_steps": 2, "logging_steps": 1, "eval_rows": 0, "lr_scheduler_type": "constant", "sample": "",
            "per_device_train_batch_size": rows, "use_cpu": True, "ddp_timeout": self.timeout, **options,
        }  # fmt: skip
        if resume:
            options["resume_from_checkpoint"] = self.newest(out)
        return ["recipes/sft.py", *(f"--{name}={value}" for name, value in options.items())]

    @staticmethod
    def newest(out: Path) -> Path:
        return max(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))

    def launch(self, preset: Path, script: list[str], count: int = 2) -> list[list[str]]:
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(preset)]
        where = ["--main_process_ip", f"{NETWORK}.1"] if count > 1 else []
        return [[*launcher, *where, "--machine_rank", str(rank), *script] for rank in range(count)]

    def run(self, commands: list[list[str]], at_step: int = 0, fault: Callable[[list[Host]], None] | None = None,
            mounts: list[str] | None = None) -> Run:  # fmt: skip
        """Run the commands, one on each host, to their end; the fault comes when rank 0 has logged that step."""
        begun, seen = threading.Event(), itertools.count(1)

        def heard(host: Host, line: str) -> None:
            if host.name == "host0" and re.search(r"'loss':", line) and next(seen) == at_step:
                begun.set()

        with hosts(commands, mounts) as found:
            at = None
            for host in found:
                host.read(heard)
            if fault is not None:
                begun.wait(LIMIT)
                at = time.monotonic()
                fault(found)
            until = time.monotonic() + LIMIT
            for host in found:
                host.reader.join(max(0.0, until - time.monotonic()))
            for host in found:
                (self.place / f"{time.strftime('%H%M%S')}-{host.name}.log").write_text(host.output)
            return Run(found, at, timed_out=any(host.ended is None for host in found))

    def losses(self, out: Path) -> list[float]:
        """Of each step, from the last checkpoint's state."""
        state = json.loads((out / f"checkpoint-{self.steps}" / "trainer_state.json").read_text())
        return [entry["loss"] for entry in state["log_history"] if "loss" in entry]

    # ---- the parts -----------------------------------------------------------------------------------------------------

    def same(self) -> None:
        """Three runs of the same steps: one process, one host, two hosts."""
        place = self.place / "same"
        one = [[sys.executable, *self.script(place / "one", rows=8)]]
        self.done(self.run(one), "one process")
        host = self.launch(self.preset("one", "--dp", 2, "--tp", 2), self.script(place / "host", rows=4), count=1)
        self.done(self.run(host), "one host of four ranks")
        two = self.run(self.launch(self.two(), self.script(place / "two", rows=4)))
        self.done(two, "two hosts of two ranks")
        self.quote(two.hosts[0], r"hf_tpsp: .*host")
        losses = {name: self.losses(place / name) for name in ("one", "host", "two")}
        for step, values in enumerate(zip(*losses.values(), strict=True), 1):
            print(f"  step {step}: " + ", ".join(f"{n} {v:.6f}" for n, v in zip(losses, values, strict=True)))
        self.close("two hosts beside one host", losses["two"], losses["host"], 0.0)
        self.close("two hosts beside one process", losses["two"], losses["one"], 1e-5)

    def spans(self) -> None:
        """`hf-tpsp config` refuses a TP group that spans hosts; a mesh that was made otherwise says so."""
        options = ["--dp", "1", "--tp", "4", "--hosts", "2", "--cpu"]
        words = [sys.executable, "-m", "hf_tpsp.cli", "config", *options]
        refused = subprocess.run(words, capture_output=True, text=True)
        print(f"  hf-tpsp config {' '.join(options)}: {refused.stderr.strip()}")
        self.expect(refused.returncode == 2, "hf-tpsp config refuses it")
        path = self.two()
        text = path.read_text().replace("tp_size: 2", "tp_size: 4").replace("dp_shard_size: 2", "dp_shard_size: 1")
        (self.place / "spans.yaml").write_text(text)
        script = self.script(self.place / "spans", rows=4, max_steps=1, save_strategy="no")
        run = self.run(self.launch(self.place / "spans.yaml", script))
        self.done(run, "a config that was written by hand")
        self.quote(run.hosts[0], r"hf_tpsp: .*host")
        self.expect("spans hosts" in run.hosts[0].output, "a TP group that spans hosts is said")

    def killed(self) -> None:
        """All processes of one host at once."""
        for victim in (1, 0):
            self.fault(
                f"killed{victim}", f"all of host{victim} killed", lambda found, v=victim: found[v].kill(), victim
            )

    def cable(self) -> None:
        """The link goes down; nobody's connection is closed."""
        self.fault("cable", "the link of host1 taken down", lambda found: found[1].unplug())

    def folders(self) -> None:
        """Output folders that are not one: each host has its own under the same name; one folder has two names."""
        shared, other = self.place / "folders", self.place / "other_name"
        for folder in (shared, other):
            folder.mkdir()
        script = self.script(shared, rows=4)
        run = self.run(self.launch(self.two(), script), mounts=[":", f"mount -t tmpfs none {shared}"])
        print("  an output folder that is another one on the second host:")
        for host in run.hosts:
            self.quote(host, r"Error: ", last=True)
        self.expect(
            not run.timed_out and all(h.process.returncode for h in run.hosts), "both hosts ended with an error"
        )
        shutil.rmtree(shared)
        shared.mkdir()
        commands = self.launch(self.two(), script)
        elsewhere = f"mount --bind {shared} {other}"
        commands[1] = [word.replace(f"--output_dir={shared}", f"--output_dir={other}") for word in commands[1]]
        self.done(self.run(commands, mounts=[":", elsewhere]), "one output folder with two names")
        shutil.rmtree(shared / f"checkpoint-{self.steps}")
        newest = self.newest(shared).name
        again = [
            [*words, f"--resume_from_checkpoint={o / newest}"]
            for o, words in zip((shared, other), commands, strict=True)
        ]
        self.done(self.run(again, mounts=[":", elsewhere]), "resumed from it")

    def address(self) -> None:
        """Without GLOO_SOCKET_IFNAME, where a host's name leads nowhere; and with a wrong one."""
        for what, setting in (("unset", "unset GLOO_SOCKET_IFNAME"), ("eth9", "export GLOO_SOCKET_IFNAME=eth9")):
            print(f"  GLOO_SOCKET_IFNAME {what}:")
            run = self.run(self.launch(self.two(), self.script(self.place / "address", rows=4)), mounts=[setting] * 2)
            for host in run.hosts:
                self.quote(host, r"IFNAME", last=True)
                self.expect("IFNAME" in host.output and host.process.returncode == 1, f"{host.name} ended and said why")

    # ---- what they share -----------------------------------------------------------------------------------------------

    def two(self) -> Path:
        return self.preset("two", "--dp", 2, "--tp", 2, "--hosts", 2)

    def fault(self, name: str, what: str, fault: Callable[[list[Host]], None], victim: int | None = None) -> None:
        """A run that the fault ends in step 5 of 8, and the same that goes on from its last checkpoint."""
        out = self.place / name
        run = self.run(self.launch(self.two(), self.script(out, rows=4)), at_step=5, fault=fault)
        print(f"  {what}, ddp_timeout {self.timeout} s:")
        for i, host in enumerate(run.hosts):
            if i == victim:
                continue
            print(f"    {run.ended(i)}")
            self.quote(host, r"hf_tpsp: rank|hf_tpsp: a coll|Error: ", last=True)
            self.expect(host.ended is not None and host.process.returncode != 0, f"{host.name} ended with an error")
            late = run.fault + self.timeout + 15
            self.expect((host.ended or math.inf) < late, f"{host.name} ended within ddp_timeout and 15 s")
        there = sorted(path.name for path in out.glob("checkpoint-*"))
        resumed = self.run(self.launch(self.two(), self.script(out, rows=4, resume=True)))
        self.done(resumed, f"resumed; it found {', '.join(there)}")
        whole = self.place / "same" / "two"
        if whole.exists():
            self.close("resumed beside the run that nothing happened to", self.losses(out), self.losses(whole), 0.0)

    def done(self, run: Run, what: str) -> None:
        good = not run.timed_out and all(host.process.returncode == 0 for host in run.hosts)
        self.expect(good, f"{what}: trained to the end")
        for host in run.hosts if not good else []:
            self.quote(host, r"hf_tpsp: |Error: ", last=True)

    def quote(self, host: Host, pattern: str, last: bool = False) -> None:
        """The lines of a host's output that match, each once, without what a launcher writes before them."""
        found = list(dict.fromkeys(line.strip() for _, line in host.lines if re.search(pattern, line)))
        for line in found[-6:] if last else found:
            print(f"    {host.name}| {line[:400]}")

    def close(self, what: str, values: list[float], others: list[float], limit: float) -> None:
        difference = max(abs(a - b) / abs(b) for a, b in zip(values, others, strict=True))
        self.expect(difference <= limit, f"{what}: the losses' largest relative difference is {difference:.1e}")

    def expect(self, holds: bool, what: str) -> None:
        print(f"  {'ok  ' if holds else 'FAIL'} {what}", flush=True)
        if not holds:
            self.failed.append(what)


PARTS = ("same", "spans", "killed", "cable", "folders", "address")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--steps", type=int, default=8, help="of each run, 6 at least (default 8)")
    parser.add_argument("--timeout", type=int, default=20, help="ddp_timeout of the runs in seconds (default 20)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the runs here")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.inside:
        # A user of its own, who may make networks and mounts; what is started ends with this process.
        own = ["unshare", "--user", "--map-root-user", "--net", "--mount", "--pid", "--mount-proc", "--fork"]
        sys.exit(subprocess.call([*own, "--kill-child", sys.executable, __file__, "--inside", *sys.argv[1:]]))
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        place = (args.keep or Path(temporary)).resolve()
        place.mkdir(parents=True, exist_ok=True)
        recipe = Recipe(place, args.steps, args.timeout)
        for part in args.only:
            print(f"{part}: {getattr(recipe, part).__doc__}", flush=True)
            getattr(recipe, part)()
    print(f"{len(recipe.failed)} failed, {time.monotonic() - begin:.0f} s")
    sys.exit(bool(recipe.failed))


if __name__ == "__main__":
    main()
