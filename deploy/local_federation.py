"""A real federation on one machine: SuperLink and SuperNodes over TLS, with authentication.

    python -m deploy.local_federation --nodes 3

creates certificates and keys, starts a SuperLink and three SuperNodes, registers the nodes' keys,
waits until all nodes are online, and prints the `flwr run` command for this federation. Ctrl-C,
SIGTERM and SIGHUP stop everything. Keys, logs and the database are in the `--state` folder
(default: ./federation) and are used again at the next start. Your own Flower configuration is not
changed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import ipaddress
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from deploy.cli import PARTITIONS, PROJECT, STOP_SIGNALS, FlowerCli, free_port, running, signals_held, start, stop, toml

HOST = "127.0.0.1"
VALID_FOR = datetime.timedelta(days=365)


class FederationError(RuntimeError):
    """An error the user can fix; the message says how."""


# ------------------------------------------------------------------------ Certificates and keys


def write_new(path: Path, content: bytes, *, private: bool) -> None:
    """Create a file, readable by its owner only if it is private. Raises FileExistsError if it exists."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o644)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a private key as unencrypted PEM, because services start without anyone to type a password."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def make_certificates(folder: Path, hosts: Sequence[str] = (HOST, "localhost", "superlink")) -> None:
    """Create a CA (`ca.crt`) and the SuperLink's certificate and key (`server.crt`, `server.key`).

    The CA's private key is not saved, so it cannot be stolen or sign anything else. A folder that
    has a `ca.crt` is left as it is.
    """
    if (folder / "ca.crt").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    ca_key, server_key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Local federation CA")])
    server_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "SuperLink")])
    now = datetime.datetime.now(datetime.UTC)

    def certificate(subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(ca_name).public_key(key.public_key())
        builder = builder.serial_number(x509.random_serial_number())
        return builder.not_valid_before(now - datetime.timedelta(minutes=5)).not_valid_after(now + VALID_FOR)

    usage = dict.fromkeys(
        (
            "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
            "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
        ),
        False,
    )  # fmt: skip
    ca_id = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    ca = certificate(ca_name, ca_key).add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    ca = ca.add_extension(x509.KeyUsage(**usage | {"key_cert_sign": True, "crl_sign": True}), critical=True)
    ca_certificate = ca.add_extension(ca_id, critical=False).sign(ca_key, hashes.SHA384())

    names: list[x509.GeneralName] = []
    for host in hosts:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    server = certificate(server_name, server_key).add_extension(x509.SubjectAlternativeName(names), critical=False)
    server = server.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    server = server.add_extension(x509.KeyUsage(**usage | {"digital_signature": True}), critical=True)
    server = server.add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ca_id), critical=False)
    server_certificate = server.sign(ca_key, hashes.SHA384())

    write_new(folder / "server.key", pem(server_key), private=True)
    write_new(folder / "server.crt", server_certificate.public_bytes(serialization.Encoding.PEM), private=False)
    write_new(folder / "ca.crt", ca_certificate.public_bytes(serialization.Encoding.PEM), private=False)


def make_node_key(path: Path) -> None:
    """Create a SuperNode's key pair unless it exists.

    `path` is the private key; `path.pub` is the public key for `flwr supernode register`.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP384R1())
    openssh = serialization.PrivateFormat.OpenSSH
    private = key.private_bytes(serialization.Encoding.PEM, openssh, serialization.NoEncryption())
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    write_new(path, private, private=True)
    write_new(path.with_suffix(".pub"), public + b"\n", private=False)


def keep_out_of_git(folder: Path) -> None:
    """Create a folder with a `.gitignore` that excludes everything in it. An existing `.gitignore` is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        write_new(folder / ".gitignore", b"*\n", private=False)


# -------------------------------------------------------------------------------- Federation


class Federation:
    """A SuperLink and its SuperNodes on this machine, as a context manager that starts and stops them."""

    def __init__(self, state: Path, nodes: int, data: Path | None = None) -> None:
        self.state = state.absolute()
        self.num_nodes = nodes
        self.data = data.absolute() if data else None
        self._check_data()
        self.port = free_port()
        self.flwr = FlowerCli(self.state / "flower")
        self.run, self.lines = self.flwr.run, self.flwr.lines
        self.certificates = self.state / "certificates"
        self.superlink: subprocess.Popen[bytes] | None = None
        self.supernodes: dict[int, subprocess.Popen[bytes]] = {}
        self._lock: int | None = None  # a file descriptor

    def __enter__(self) -> Federation:
        """Start everything and wait until all nodes are online. Raises FederationError."""
        # The folder may be one that has a .gitignore already, so the folders of the keys get their own.
        for folder in (self.state, self.certificates, self.key(0).parent):
            keep_out_of_git(folder)
        try:
            self._acquire_lock()
            with signals_held():  # an interrupted start would leave half of the files
                make_certificates(self.certificates)
                for index in range(self.num_nodes):
                    make_node_key(self.key(index))
            self._write_flower_configuration()
            is_new = not self.database.exists()
            if is_new:  # a new database knows no keys
                for marker in self.key(0).parent.glob("*.registered"):
                    marker.unlink()
            self.start_superlink()
            self._register_keys()
            if not is_new:
                self._wait_for_earlier_nodes()
            for index in range(self.num_nodes):
                self.start_supernode(index)
            self.wait_until_online(self.num_nodes, timeout=120 + 10 * self.num_nodes)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *args: object) -> None:
        """Stop all processes."""
        with signals_held():
            stop(*self.supernodes.values())  # first: they sign off from the SuperLink
            if self.superlink is not None:
                stop(self.superlink)
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def key(self, index: int) -> Path:
        """Return the path of a node's private key."""
        return self.state / "keys" / f"node-{index}"

    def start_superlink(self) -> None:
        """Start the SuperLink and wait until it answers. Raises FederationError."""
        command = ["flower-superlink", "--host", HOST, "--port", str(self.port), "--enable-supernode-auth"]
        command += ["--database", str(self.database)]
        for option, name in (
            ("--ssl-ca-certfile", "ca.crt"),
            ("--ssl-certfile", "server.crt"),
            ("--ssl-keyfile", "server.key"),
        ):
            command += [option, str(self.certificates / name)]
        log = self.state / "superlink.log"
        with signals_held():
            self.superlink = self._start(command, log)
        deadline = time.monotonic() + 60
        while not self._listens() or self._nodes() is None:
            if self.superlink.poll() is not None or time.monotonic() > deadline:
                raise FederationError(f"the SuperLink did not start; {last_lines(log)}")

    def start_supernode(self, index: int) -> None:
        """Start a SuperNode, which uses its folder of `data` if there is one, or else its partition."""
        config: dict[str, object] = {"partition-id": index, "num-partitions": self.num_nodes}
        if self.data is not None:
            config["data-path"] = str(self.data / f"node-{index}")
        command = ["flower-supernode", "--superlink", f"{HOST}:{self.port}", "--port", str(free_port())]
        command += ["--root-certificates", str(self.certificates / "ca.crt")]
        command += ["--auth-supernode-private-key", str(self.key(index)), "--node-config", toml(config)]
        with signals_held():
            self.supernodes[index] = self._start(command, self.state / f"node-{index}.log")

    def wait_until_online(self, count: int, timeout: float = 120) -> None:
        """Wait until this many nodes are online, and print how many are. Raises FederationError."""
        deadline, last = time.monotonic() + timeout, -1
        while (online := self.online()) < count:
            if online != last:
                print(f"{online}/{count} SuperNodes are online ...", flush=True)
                last = online
            ended = [index for index, process in self.supernodes.items() if process.poll() is not None]
            if ended and len(self.supernodes) - len(ended) < count:
                log = self.state / f"node-{ended[0]}.log"
                raise FederationError(f"the SuperNode of node {ended[0]} has ended; {last_lines(log)}")
            if time.monotonic() > deadline:
                raise FederationError(
                    f"{online}/{count} SuperNodes are online after {timeout:.0f} s; see {self.state}/node-*.log"
                )
            time.sleep(2)  # asking takes a second of CPU time, which the SuperNodes need to start

    def online(self) -> int:
        """Return the number of nodes that the SuperLink lists as online."""
        return sum(node["status"] == "online" for node in self._nodes() or ())

    @property
    def database(self) -> Path:
        """The SuperLink's database, which also holds the registered keys."""
        return self.state / "superlink.db"

    def _start(self, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a process that holds the lock, and add its id to the lock file."""
        keep_open = [] if self._lock is None else [self._lock]
        process = start(command, self.state, self.flwr.env, log, keep_open)
        for descriptor in keep_open:
            os.write(descriptor, f"{process.pid}\n".encode())
        return process

    def _check_data(self) -> None:
        """Raise FederationError if a node has no folder below `data`."""
        if self.data is None:
            return
        for name in (f"node-{index}" for index in range(self.num_nodes)):
            if not (self.data / name).is_dir():
                raise FederationError(
                    f"{self.data} has no folder {name}, but each of the {self.num_nodes} nodes needs its own; "
                    "start fewer nodes, or create the folders with deploy.prepare_partitions"
                )

    def _acquire_lock(self) -> None:
        """Lock the state folder. Raises FederationError if another federation uses it.

        The SuperLink and the SuperNodes inherit the lock. So it is held until they have ended,
        even if this process is killed first. The lock file lists the ids of all these processes.
        """
        import fcntl  # not on Windows, where the functions above work nevertheless

        self._lock = os.open(self.state / "lock", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            listed, alive = (self.state / "lock").read_text().split(), running()
            ids = [pid for pid in listed if int(pid) in alive]
            if ids[:1] == listed[:1]:  # the first one stops the others
                ids = ids[:1]
            raise FederationError(
                f"another local federation uses {self.state}; stop it with `kill {' '.join(ids)}`, "
                "or choose another folder with --state"
            ) from None
        os.truncate(self._lock, 0)
        os.write(self._lock, f"{os.getpid()}\n".encode())

    def _listens(self) -> bool:
        """Return whether the SuperLink's port is open. Asking `flwr` instead takes a second of CPU time."""
        with contextlib.suppress(OSError), socket.create_connection((HOST, self.port), timeout=1):
            return True
        time.sleep(0.1)
        return False

    def _nodes(self) -> list[dict[str, str]] | None:
        """Return the SuperLink's list of nodes, or None if it does not answer."""
        answer = self.flwr("supernode", "ls", "--format", "json")
        try:
            parsed = json.loads(answer[answer.index("{") :])
        except ValueError:
            return None
        return list(parsed["nodes"]) if parsed.get("success") else None

    def _register_keys(self) -> None:
        """Register the nodes' keys, except those that an earlier start has registered."""
        for index in range(self.num_nodes):
            marker = self.key(index).with_suffix(".registered")
            if not marker.exists():
                answer = self.flwr("supernode", "register", str(self.key(index).with_suffix(".pub")))
                if "registered successfully" not in answer:
                    raise FederationError(f"node {index} could not be registered:\n{answer}")
                write_new(marker, b"", private=False)

    def _wait_for_earlier_nodes(self, timeout: float = 120) -> None:
        """Wait until nodes that were killed in an earlier federation are offline, if there are any.

        Until then the SuperLink refuses a new SuperNode with the key of a killed one.
        """
        deadline, told = time.monotonic() + timeout, False
        while self.online() and time.monotonic() < deadline:
            if not told:
                print("Waiting until the SuperNodes of an earlier start are offline (about a minute) ...", flush=True)
                told = True
            time.sleep(8)  # asking takes a second of CPU time

    def _write_flower_configuration(self) -> None:
        """Write the address of this SuperLink, whose port differs at each start, for the `flwr` command."""
        certificate = json.dumps(str(self.certificates / "ca.crt"), ensure_ascii=False)  # also valid in TOML
        (self.flwr.home / "config.toml").write_text(
            f'[superlink]\ndefault = "federation"\n\n[superlink.federation]\naddress = "{HOST}:{self.port}"\n'
            f"root-certificates = {certificate}\n"
        )


def last_lines(log: Path, count: int = 5) -> str:
    """Return the last lines of a log, for an error."""
    return f"the last lines of {log}:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-count:])


# ------------------------------------------------------------------------------ Command line


@contextlib.contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt at the first stop signal; ignore those that follow.

    A second Ctrl-C does not interrupt the cleanup. A signal that was ignored from the start, such
    as SIGHUP under `nohup`, stays ignored.
    """

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        with contextlib.suppress(OSError):  # the terminal may be closed
            os.write(2, b"\nStopping ...\n")
        raise KeyboardInterrupt

    handled = [each for each in STOP_SIGNALS if signal.getsignal(each) is not signal.SIG_IGN]
    previous = {each: signal.signal(each, interrupt) for each in handled}
    try:
        yield
    finally:
        for each, handler in previous.items():
            if signal.getsignal(each) is interrupt:  # signals that are ignored stay so until the program has ended
                signal.signal(each, handler)


def dataset_of(data: Path) -> str | None:
    """Return the data set that `deploy.prepare_partitions` has recorded, or None without a record."""
    path = data / PARTITIONS
    try:
        return str(json.loads(path.read_text())["dataset"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise FederationError(
            f"{path} has no valid record; create {data} again with deploy.prepare_partitions"
        ) from None


def run_command(home: Path, dataset: str | None) -> str:
    """Return the shell command that runs the app in this federation."""
    config = {"query-timeout": 30.0} | ({} if dataset is None else {"dataset": dataset})
    quoted = re.sub(r'([\\"$`])', r"\\\1", toml(config))
    return f'FLWR_HOME={shlex.quote(str(home))} flwr run {shlex.quote(str(PROJECT))} --stream --run-config "{quoted}"'


def main() -> None:
    """Start a federation and keep it running until a signal stops it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=3, help="number of SuperNodes (default: %(default)s)")
    parser.add_argument(
        "--state", type=Path, default=Path("federation"), help="folder for keys, logs, outputs and the database"
    )
    parser.add_argument("--data", type=Path, help="folder that deploy.prepare_partitions has written")
    args = parser.parse_args()
    if args.nodes < 1:
        parser.error("--nodes must be at least 1")
    with interrupted_by_signals():
        try:
            dataset = None if args.data is None else dataset_of(args.data)
            with Federation(args.state, args.nodes, args.data) as federation:
                print(f"All {args.nodes} SuperNodes are online. To run the app:\n")
                print(f"    {run_command(federation.flwr.home, dataset)}\n")
                if args.data is not None and dataset is None:
                    print(
                        f"The command does not name the server's data set, because {args.data} has no {PARTITIONS}.\n"
                        "Add dataset='...' to --run-config unless the nodes' images are from the app's default one.\n"
                    )
                print(
                    f"Run directories are in {federation.state / 'outputs'}. Ctrl-C stops the federation.", flush=True
                )
                while True:
                    time.sleep(1)
        except KeyboardInterrupt:
            pass
        except (FederationError, OSError) as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
