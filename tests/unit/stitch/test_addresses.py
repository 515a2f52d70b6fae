"""Which addresses only this machine reaches."""

from __future__ import annotations

import pytest

from stitch.addresses import check_exposure, is_loopback
from stitch.errors import InvalidRequest


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("localhost", True),
        ("[::1]", True),
        ("0.0.0.0", False),
        ("[::]", False),
        ("192.168.1.5", False),
        ("localhost.example.org", False),
    ],
)
def test_loopback_is_what_no_other_machine_reaches(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_an_exposed_address_needs_a_word() -> None:
    with pytest.raises(InvalidRequest, match=r"listen is '0\.0\.0\.0:7', but .*--insecure allows it"):
        check_exposure("listen", "0.0.0.0:7", secured=False, insecure=False)
    check_exposure("listen", "0.0.0.0:7", secured=False, insecure=True)
    check_exposure("listen", "0.0.0.0:7", secured=True, insecure=False)
    check_exposure("listen", "127.0.0.1:7", secured=False, insecure=False)
