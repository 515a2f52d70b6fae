"""Who calls: the key in a call's metadata or header, and the names in the certificate of its connection."""

from __future__ import annotations

from typing import Any

import grpc

from router_gateway.admission.tenants import Credentials

Context = grpc.aio.ServicerContext[Any, Any]
_BEARER = "bearer "
_NAME_PROPERTIES = ("x509_subject_alternative_name", "x509_common_name")


def credentials_of(context: Context) -> Credentials:
    """What the caller of a method shows of itself."""
    metadata: Any = context.invocation_metadata() or ()
    sent = next((value for name, value in metadata if name == "authorization"), None)
    proven: Any = context.auth_context()
    names = [name.decode(errors="replace") for one in _NAME_PROPERTIES for name in proven.get(one, ())]
    return Credentials(key_of(sent), names)


def traceparent_of(context: Context) -> str:
    """The span of the caller, as W3C's Trace Context has it; empty where it sends none."""
    metadata: Any = context.invocation_metadata() or ()
    return next((value for name, value in metadata if name == "traceparent" and isinstance(value, str)), "")


def key_of(authorization: object) -> str | None:
    """The key in a header `authorization`; None where it has none."""
    if not isinstance(authorization, str) or not authorization.lower().startswith(_BEARER):
        return None
    return authorization[len(_BEARER) :].strip()
