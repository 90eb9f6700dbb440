"""Push outputs to DVC's remote, all or some: `make share REMOTE=URL` sets the remote first, named `share`.

Reads   REMOTE in the environment (FOLDER, s3://BUCKET/PATH or ssh://HOST/PATH; empty: the remote that is set);
        PARTS and ENCODER, words with spaces between: only the outputs that tools/inputs.py lists for them; dvc.lock,
        .dvc/config, DVC's cache.
Writes  .dvc/config where REMOTE is given, and the remote, by `dvc push`. Where outputs are then still neither in this
        clone's cache nor on the remote, it names them and ends with an error; of a share of the outputs, those of it.
Costs   what has to be sent, and one look at the remote for each file.

.dvc/config is committed. So a REMOTE with a password, a token or a signature in it is refused, and so is a
.dvc/config that holds one already; they belong into .dvc/config.local.

    make share REMOTE=../fieldmark-cache
    make share ENCODER=clip PARTS="moments graphs"
"""

import argparse
import configparser
import json
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from fieldmark.command import UserError, redact, run
from fieldmark.lock import LOCK, covers
from tools.inputs import outputs_of

CONFIG = Path(".dvc/config")
EXAMPLES = "REMOTE=FOLDER, s3://BUCKET/PATH or ssh://HOST/PATH"
# Where the part before @ is the name that one logs in with; elsewhere it is a password or a token.
LOGIN_SCHEMES = {"ssh", "sftp", "hdfs"}
LOGIN = re.compile(r"[A-Za-z_][\w.-]{0,31}")
# DVC's settings of remotes that are secrets.
SECRETS = re.compile(r"password|passphrase|secret|token|account_key|connection_string", re.IGNORECASE)
SHOWN = 5


def problem_of_url(url: str) -> str | None:
    """What must not stand in a remote's address and what to do, or None. It does not repeat the address."""
    if "://" not in url:
        return None
    local = "leave it out (`dvc config --local remote.share.KEY VALUE` keeps a secret out of git)"
    try:
        parts = urlsplit(url)
    except ValueError:
        return f"is no address; write {EXAMPLES}"
    user, at, _ = parts.netloc.rpartition("@")
    if at and not (parts.scheme in LOGIN_SCHEMES and LOGIN.fullmatch(user)):
        return f"holds a password or a token, and {CONFIG} is committed; {local}"
    if "?" in url or "#" in url:
        return f"holds a query, which may be a signature, and {CONFIG} is committed; {local}"
    return None


def set_remote(remote: str) -> None:
    """Make `remote` the default one. Raises UserError for one that no committed file may hold."""
    problem = problem_of_url(remote)
    if problem:
        raise UserError(f"REMOTE {problem}")
    if "://" not in remote:
        if re.match(r"[^/]*@[^/]*:", remote):
            raise UserError("REMOTE is a folder to DVC as it stands; write ssh://HOST/PATH")
        remote = os.path.abspath(os.path.expanduser(remote))
        print(f"{CONFIG} names a folder of this machine, {remote}; where another machine sees it elsewhere, run there:")
        print("    dvc config --local remote.share.url FOLDER", flush=True)
    dvc("config", "remote.share.url", remote)
    dvc("config", "core.remote", "share")


def check_config() -> None:
    """Raises UserError where the committed configuration holds what may be a secret."""
    config = configparser.RawConfigParser(strict=False)
    try:
        config.read(CONFIG, encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError) as error:
        raise UserError(f"{CONFIG}: cannot be read ({type(error).__name__}); correct it") from None
    for section in config.sections():
        for key, value in config.items(section):
            where = f"{CONFIG}: {section.strip(chr(39))}: {key}"
            if key == "url" and (problem := problem_of_url(value)):
                raise UserError(f"{where} {problem}")
            if SECRETS.search(key):
                raise UserError(f"{where} is a secret in a file that is committed; move it to {CONFIG}.local")


def dvc(*words: str) -> str:
    """What a DVC command prints. Raises UserError with its last line where it fails."""
    done = subprocess.run(["dvc", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["it does not say why"]
        raise UserError(f"dvc {words[0]}: {redact(lines[-1])}")
    return done.stdout


def lacking(outputs: Sequence[str]) -> list[str]:
    """The files of these outputs (none: of all) that are neither in this clone's cache nor on the remote."""
    status = json.loads(dvc("data", "status", "--granular", "--not-in-remote", "--json"))
    files = sorted(path for path in status.get("not_in_remote", []) if not path.endswith("/"))
    return [path for path in files if not outputs or any(covers(out, path) for out in outputs)]


def share(remote: str, parts: Sequence[str] = (), encoders: Sequence[str] = ()) -> None:
    if not LOCK.is_file():
        raise UserError(f"{LOCK}: is missing: nothing to share; run make repro first")
    if remote:
        set_remote(remote)
    elif subprocess.run(["dvc", "remote", "default"], capture_output=True, check=False).returncode != 0:
        raise UserError(f"no remote is set; make share {EXAMPLES}")
    check_config()
    outputs = outputs_of(parts, encoders) if parts or encoders else []
    if subprocess.run(["dvc", "push", *outputs], check=False).returncode != 0:
        raise UserError("not all outputs were pushed; mend what dvc push says above and run make share again")
    missing = lacking(outputs)
    if missing:
        some = ", ".join(missing[:SHOWN]) + (f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else "")
        raise UserError(
            f"{len(missing)} files of {LOCK} are neither in this clone nor on the remote: {some}; `dvc pull --remote"
            " NAME` them from where they are, or make them (make repro), and run make share again"
        )
    print(f"to commit for a second machine: {LOCK} and {CONFIG}")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    parts, encoders = (os.environ.get(name, "").split() for name in ("PARTS", "ENCODER"))
    share(os.environ.get("REMOTE", ""), parts, encoders)


if __name__ == "__main__":
    run(main)
