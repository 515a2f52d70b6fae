"""vLLM in its own interpreter: a JSON line of prompts in, a line with the seconds out. Imports no other module here."""

import json
import sys
import time

from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

# Marks replies among the lines that vLLM logs to standard output.
ANSWER = "ANSWER "


def main() -> None:
    """Answers every line: greedy, in float32, exactly the requested number of tokens per prompt."""
    model = LLM(model=sys.argv[1], dtype="float32", max_model_len=4096, max_num_seqs=64, enable_prefix_caching=False)
    print(ANSWER, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        sampling = SamplingParams(temperature=0.0, max_tokens=request["tokens"], ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
        started = time.perf_counter()
        answers = model.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - started
        generated = [len(answer.outputs[0].token_ids) for answer in answers]
        print(f"{ANSWER}{json.dumps({'seconds': seconds, 'generated': generated})}", flush=True)


if __name__ == "__main__":
    main()
