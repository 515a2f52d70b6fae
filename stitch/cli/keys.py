"""`stitch keys new`: a key for a tenant, and the section of the gateway's keys file that accepts it."""

from __future__ import annotations

import argparse
import hashlib
import secrets

KEY_BYTES = 32


def run(parsed: argparse.Namespace) -> int:
    """Prints a new key, which is kept nowhere, and its hash."""
    key = f"stitch-{secrets.token_urlsafe(KEY_BYTES)}"
    print("# For the client alone, in $STITCH_KEY or a file for --key; it is shown only now.")
    print(f"# {key}")
    print("# For the gateway's keys file:")
    print(f"[tenants.{parsed.tenant}]")
    print(f'keys = ["{hashlib.sha256(key.encode()).hexdigest()}"]')
    return 0
