"""Other engines with one interface: `generate` of transformers, and vLLM's build for CPUs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

# GiB of KV cache; and all cores, since vLLM would reserve one for its other processes.
VLLM_SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": ",".join(str(core) for core in sorted(os.sched_getaffinity(0))),
}
WORKER = Path(__file__).with_name("vllm_worker.py")
ANSWER = "ANSWER "


class Engine(Protocol):
    """A whole model in one process."""

    def seconds(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        """The seconds to generate exactly `tokens` tokens, greedily, after each prompt."""
        ...


class Generate:
    """`generate` of transformers over one batch of prompts of equal length."""

    def __init__(self, folder: Path) -> None:
        self._model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def seconds(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        ids = torch.tensor(prompts)
        started = time.perf_counter()
        with torch.inference_mode():
            self._model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                pad_token_id=0,
            )
        return time.perf_counter() - started


class Vllm:
    """vLLM in a process that is stopped between requests, since its threads would take the cores from other engines."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        if process.stdin is None or process.stdout is None:
            raise ValueError("the worker's standard input and output must be pipes")
        self._process, self._requests, self._replies = process, process.stdin, process.stdout
        # The end of its other output.
        self._log: deque[str] = deque(maxlen=60)
        self._answer()
        self._signal(signal.SIGSTOP)

    def seconds(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        self._signal(signal.SIGCONT)
        self._requests.write(json.dumps({"prompts": prompts, "tokens": tokens}) + "\n")
        self._requests.flush()
        answer = json.loads(self._answer())
        self._signal(signal.SIGSTOP)
        if answer["generated"] != [tokens] * len(prompts):
            raise RuntimeError(f"vLLM generated {answer['generated']} tokens instead of {tokens} each")
        return float(answer["seconds"])

    def _answer(self) -> str:
        for line in self._replies:
            if line.startswith(ANSWER):
                return line.removeprefix(ANSWER)
            self._log.append(line)
        raise RuntimeError(f"vLLM ended with {self._process.wait()}:\n{''.join(self._log)}")

    def _signal(self, number: signal.Signals) -> None:
        os.killpg(self._process.pid, number)


@contextmanager
def engines(folder: Path) -> Iterator[dict[str, Engine]]:
    """The engines by name: `generate`, and `vLLM` where `$VLLM_PYTHON` names an interpreter with vLLM."""
    found: dict[str, Engine] = {"generate": Generate(folder)}
    with ExitStack() as stack:
        interpreter = os.environ.get("VLLM_PYTHON")
        if interpreter:
            found["vLLM"] = Vllm(stack.enter_context(_worker([interpreter, str(WORKER), str(folder)])))
        yield found


@contextmanager
def _worker(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=VLLM_SETTINGS | os.environ,
    )
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
