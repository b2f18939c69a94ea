"""Certificates and keys. Private ones are readable by their owner only; the key of the CA is not saved."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

HOST = "127.0.0.1"
VALID_FOR = datetime.timedelta(days=365)


def write(path: Path, content: bytes, *, private: bool) -> None:
    """Write a whole file or nothing. A private one is never readable by others than its owner."""
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)  # of a call that was interrupted
    part.touch(0o600 if private else 0o644, exist_ok=False)
    part.write_bytes(content)
    part.replace(path)


def keep_out_of_git(folder: Path) -> None:
    """Create a folder with a `.gitignore` that excludes everything in it. An existing `.gitignore` is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / ".gitignore").exists():
        (folder / ".gitignore").write_text("*\n")


def make_certificates(folder: Path, hosts: Sequence[str] = (HOST, "localhost", "superlink")) -> None:
    """Create a CA (`ca.crt`) and the SuperLink's certificate and key (`server.crt`, `server.key`).

    The certificate is also valid for 127.0.0.1, by which the ServerApp reaches the SuperLink that starts it.
    The CA's private key is not saved, so it cannot be stolen or sign anything else. A folder that
    has a `ca.crt` is left as it is. Raises FileExistsError if its certificate has expired.
    """
    import trustme  # nodes, which only make their key, do without it

    if (folder / "ca.crt").exists():
        until = x509.load_pem_x509_certificate((folder / "server.crt").read_bytes()).not_valid_after_utc
        if until < datetime.datetime.now(datetime.UTC):
            raise FileExistsError(
                f"{folder / 'server.crt'} expired on {until.date()}. Delete {folder}, start again, and give the new "
                "ca.crt to all nodes."
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    begin = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=5)
    ca = trustme.CA(path_length=0, organization_unit_name="Flower federation's CA")
    names = dict.fromkeys([*hosts, HOST])
    server = ca.issue_cert(*names, common_name="SuperLink", not_before=begin, not_after=begin + VALID_FOR)
    write(folder / "server.key", server.private_key_pem.bytes(), private=True)
    write(folder / "server.crt", server.cert_chain_pems[0].bytes(), private=False)
    write(folder / "ca.crt", ca.cert_pem.bytes(), private=False)  # last: it says that the others are there


def make_node_key(path: Path) -> None:
    """Create a SuperNode's key pair unless it exists.

    `path` is the private key; `path.pub` is the public key for `flwr supernode register`.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    public_path = path.with_name(path.name + ".pub")  # with_suffix would shorten a name such as site.org
    key = ec.generate_private_key(ec.SECP384R1())
    openssh = serialization.PrivateFormat.OpenSSH
    private = key.private_bytes(serialization.Encoding.PEM, openssh, serialization.NoEncryption())
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    write(public_path, public + b"\n", private=False)
    write(path, private, private=True)  # last: it says that the other one is there
