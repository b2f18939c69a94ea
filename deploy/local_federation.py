"""A real federation on one machine: SuperLink and SuperNodes over TLS, with authentication.

    python -m deploy.local_federation --nodes 3

makes certificates and keys, starts the SuperLink and the SuperNodes as processes of their own,
registers the nodes' keys, waits until all are online and prints the `flwr run` command for it.
Ctrl-C stops everything. What it makes lies below `--state` (default: ./federation) and is used
again the next time; nothing is ever overwritten, and the user's Flower configuration is not
touched.
"""

from __future__ import annotations

import argparse
import datetime
import ipaddress
import json
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from deploy.cli import PROJECT, FlowerCli, free_port, start, stop

HOST = "127.0.0.1"
VALID_FOR = datetime.timedelta(days=365)


# ------------------------------------------------------------------------ Certificates, keys


def write_new(path: Path, content: bytes, *, private: bool) -> None:
    """Write a file that must not exist yet; a private one is for its owner's eyes only."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o644)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a private key as PEM, not encrypted: a service starts without anybody there."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def make_certificates(folder: Path, hosts: Sequence[str] = (HOST, "localhost", "superlink")) -> None:
    """Make a CA (`ca.crt`) and the SuperLink's certificate and key (`server.crt`, `server.key`).

    The CA's own key is not kept: it can sign nothing else, and nobody can steal it.
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
    """Make a SuperNode's key pair: `path` is private, `path.pub` is for `flwr supernode register`."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP384R1())
    openssh = serialization.PrivateFormat.OpenSSH
    private = key.private_bytes(serialization.Encoding.PEM, openssh, serialization.NoEncryption())
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    write_new(path, private, private=True)
    write_new(path.with_suffix(".pub"), public + b"\n", private=False)


# -------------------------------------------------------------------------------- Federation


class Federation:
    """A SuperLink and its SuperNodes on this machine; a context manager that stops them all."""

    def __init__(self, state: Path, nodes: int, data: Path | None = None) -> None:
        self.state = state.absolute()
        self.num_nodes = nodes
        self.data = data.absolute() if data else None
        self.port = free_port()
        self.flwr = FlowerCli(self.state / "flower")
        self.run, self.lines = self.flwr.run, self.flwr.lines
        self.certificates = self.state / "certificates"
        self.superlink: subprocess.Popen[bytes] | None = None
        self.supernodes: dict[int, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Federation:
        """Start everything; wait until all nodes are online."""
        make_certificates(self.certificates)
        for index in range(self.num_nodes):
            make_node_key(self.key(index))
        self._write_flower_configuration()
        try:
            self.start_superlink()
            self._register_keys()
            for index in range(self.num_nodes):
                self.start_supernode(index)
            self.wait_until_online(self.num_nodes)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *args: object) -> None:
        """Stop all processes."""
        for process in (*self.supernodes.values(), self.superlink):
            if process is not None:
                stop(process)

    def key(self, index: int) -> Path:
        """Return where the private key of a node lies."""
        return self.state / "keys" / f"node-{index}"

    def start_superlink(self) -> None:
        """Start the SuperLink and wait until it answers."""
        command = ["flower-superlink", "--host", HOST, "--port", str(self.port), "--enable-supernode-auth"]
        command += ["--database", str(self.state / "superlink.db")]
        for option, name in (
            ("--ssl-ca-certfile", "ca.crt"),
            ("--ssl-certfile", "server.crt"),
            ("--ssl-keyfile", "server.key"),
        ):
            command += [option, str(self.certificates / name)]
        self.superlink = start(command, self.state, self.flwr.env, self.state / "superlink.log")
        deadline = time.monotonic() + 60
        while self._nodes() is None:
            if self.superlink.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the SuperLink did not start; see {self.state / 'superlink.log'}")

    def start_supernode(self, index: int) -> None:
        """Start a SuperNode with its own data: a folder if there are any, else its partition."""
        config = f"partition-id={index} num-partitions={self.num_nodes}"
        if self.data is not None:
            config += f" data-path='{self.data / f'node-{index}'}'"
        command = ["flower-supernode", "--superlink", f"{HOST}:{self.port}", "--port", str(free_port())]
        command += ["--root-certificates", str(self.certificates / "ca.crt")]
        command += ["--auth-supernode-private-key", str(self.key(index)), "--node-config", config]
        self.supernodes[index] = start(command, self.state, self.flwr.env, self.state / f"node-{index}.log")

    def wait_until_online(self, count: int, timeout: float = 120) -> None:
        """Wait until so many nodes are online, telling how many are. Raises TimeoutError."""
        deadline, last = time.monotonic() + timeout, -1
        while (online := self.online()) < count:
            if online != last:
                print(f"{online}/{count} SuperNodes are online ...", flush=True)
                last = online
            if time.monotonic() > deadline:
                raise TimeoutError(f"{online}/{count} SuperNodes are online; see {self.state}/node-*.log")
            time.sleep(0.5)

    def online(self) -> int:
        """Return how many nodes are online."""
        return sum(node["status"] == "online" for node in self._nodes() or ())

    def _nodes(self) -> list[dict[str, str]] | None:
        """Ask the SuperLink for its nodes; None as long as it does not answer."""
        answer = self.flwr("supernode", "ls", "--format", "json")
        try:
            parsed = json.loads(answer[answer.index("{") :])
        except ValueError:
            return None
        return list(parsed["nodes"]) if parsed.get("success") else None

    def _register_keys(self) -> None:
        """Admit the nodes' keys; those of an earlier start are in the database already."""
        for index in range(self.num_nodes):
            marker = self.key(index).with_suffix(".registered")
            if not marker.exists():
                answer = self.flwr("supernode", "register", str(self.key(index).with_suffix(".pub")))
                if "registered successfully" not in answer:
                    raise RuntimeError(f"node {index} could not be registered:\n{answer}")
                write_new(marker, b"", private=False)

    def _write_flower_configuration(self) -> None:
        """Tell the `flwr` command of this federation where its SuperLink is; the port is new each time."""
        (self.flwr.home / "config.toml").write_text(
            f'[superlink]\ndefault = "federation"\n\n[superlink.federation]\naddress = "{HOST}:{self.port}"\n'
            f'root-certificates = "{self.certificates / "ca.crt"}"\n'
        )


def main() -> None:
    """Start a federation and keep it until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=3, help="SuperNodes to start (default: %(default)s)")
    parser.add_argument("--state", type=Path, default=Path("federation"), help="folder for keys, logs and the database")
    parser.add_argument("--data", type=Path, help="folder that deploy.prepare_partitions has written")
    args = parser.parse_args()
    if args.nodes < 1:
        parser.error("--nodes must be at least 1")
    if args.data is not None and not (args.data / f"node-{args.nodes - 1}").is_dir():
        parser.error(f"--data: {args.data} has no folder node-{args.nodes - 1}; make it with deploy.prepare_partitions")
    with Federation(args.state, args.nodes, args.data) as federation:
        print(f"All {args.nodes} SuperNodes are online, over TLS, each with its own key. To run the app:\n")
        print(f"    FLWR_HOME={federation.flwr.home} flwr run {PROJECT} --stream --run-config query-timeout=30.0\n")
        print(f"Its outputs come below {federation.state / 'outputs'}. Ctrl-C stops the federation.", flush=True)
        try:
            while True:
                time.sleep(1)
        except KeyboardInterrupt:
            print("\nStopping ...", flush=True)


if __name__ == "__main__":
    main()
