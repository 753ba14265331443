"""The secret that the trainers and the rollout workers of one cluster share: 32 random bytes, in hexadecimal.

It stands in a file that only its owner may read, or in the environment variable VCR1_ROLLOUT_KEY.
"""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

from vcr1_fast.settings.error import ConfigError

VARIABLE = "VCR1_ROLLOUT_KEY"
KEY_BYTES = 32


def read_key(file: str) -> bytes:
    """Raises ConfigError when there is none, it is no key, or others could read it."""
    if VARIABLE in os.environ:
        return _parsed(os.environ[VARIABLE], f"the environment variable {VARIABLE}")
    path = Path(file).expanduser()
    try:
        mode, text = path.stat().st_mode, path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"no key for the rollout workers: {path} cannot be read ({error}). `vcr1-fast serve` writes it on the "
            f"rollout node: copy it here, or set {VARIABLE}, or name the file with rollout.sglang.key_file"
        ) from None
    if mode & 0o077:
        raise ConfigError(f"others may read the key in {path} (mode {mode & 0o777:o}): chmod 600 it, or make a new one")
    return _parsed(text, str(path))


def read_or_make_key(file: str) -> tuple[bytes, str]:
    """The key and where it stands; it is made where there is none. Raises ConfigError, and OSError when it cannot be
    written."""
    path = Path(file).expanduser()
    if VARIABLE in os.environ:
        return read_key(file), f"the environment variable {VARIABLE}"
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as out:
            out.write(secrets.token_hex(KEY_BYTES) + "\n")
        try:
            os.link(partial, path)  # whole or not at all; two nodes that start together take the first one's
        except FileExistsError:
            pass
        finally:
            partial.unlink()
    return read_key(file), str(path)


def _parsed(text: str, where: str) -> bytes:
    if not re.fullmatch(rf"[0-9a-fA-F]{{{2 * KEY_BYTES}}}", text.strip()):
        raise ConfigError(f"{where} holds no key, wanted {2 * KEY_BYTES} hexadecimal digits")
    return bytes.fromhex(text.strip())
