"""vLLM in an interpreter of its own: a line of prompts in, a line of seconds out. Imports nothing of this project."""

import json
import sys
import time

from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

# What vLLM logs to standard output is told apart by this.
ANSWER = "ANSWER "


def main() -> None:
    """Greedy, in float32, each prompt exactly as many tokens as the line asks for."""
    model = LLM(model=sys.argv[1], dtype="float32", max_model_len=4096, max_num_seqs=64, enable_prefix_caching=False)
    print(ANSWER, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        sampling = SamplingParams(temperature=0.0, max_tokens=asked["tokens"], ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
        started = time.perf_counter()
        answers = model.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - started
        generated = [len(answer.outputs[0].token_ids) for answer in answers]
        print(f"{ANSWER}{json.dumps({'seconds': seconds, 'generated': generated})}", flush=True)


if __name__ == "__main__":
    main()
