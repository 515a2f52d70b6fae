"""A device that isn't there is said before anything is loaded."""

from __future__ import annotations

import pytest
import torch

from stitch.errors import InvalidRequest
from stitch_server.devices import pick_device, sent


def test_auto_is_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, wanted in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert pick_device("auto").type == wanted


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidRequest, match=r"compute\.device is 'cuda:1', but this machine has no GPU"):
        pick_device("cuda:1")
    assert pick_device("cpu").type == "cpu"


def test_what_is_on_a_processor_already_is_not_copied() -> None:
    numbers = torch.arange(3)
    assert sent(numbers, torch.device("cpu")) is numbers
