"""Certificates and keys. Private ones are readable by their owner only; the key of the CA is not saved."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

HOST = "127.0.0.1"
VALID_FOR = datetime.timedelta(days=365)


def write_new(path: Path, content: bytes, *, private: bool) -> None:
    """Create a file, readable by its owner only if it is private. Raises FileExistsError if it exists."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o644)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def keep_out_of_git(folder: Path) -> None:
    """Create a folder with a `.gitignore` that excludes everything in it. An existing `.gitignore` is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        write_new(folder / ".gitignore", b"*\n", private=False)


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
    for leftover in ("server.key", "server.crt"):  # of a call that was interrupted
        (folder / leftover).unlink(missing_ok=True)
    write_new(folder / "server.key", server.private_key_pem.bytes(), private=True)
    write_new(folder / "server.crt", server.cert_chain_pems[0].bytes(), private=False)
    write_new(folder / "ca.crt", ca.cert_pem.bytes(), private=False)


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
    public_path.unlink(missing_ok=True)  # of a call that was interrupted
    write_new(public_path, public + b"\n", private=False)
    write_new(path, private, private=True)
