"""The llama.cpp peer of `jilju bench speed`: runs under an environment that has llama-cpp-python.

Arguments: the model file, the number of threads. Reads one JSON line a run {"prompt_ids", "num_output"} and answers with
{"prefill_s", "decode_s"}: the time to evaluate the prompt as one batch, and that of `num_output` single-token steps, greedy.
"""

import json
import sys
import time

import llama_cpp
import numpy as np
from llama_cpp import Llama


def main(model: str, num_threads: int) -> None:
    # n_batch and n_ubatch of 512: the whole prompt in one pass, llama.cpp's own default for prompt processing
    llm = Llama(
        model, n_ctx=2048, n_batch=512, n_ubatch=512, n_threads=num_threads, n_threads_batch=num_threads, verbose=False
    )
    print(json.dumps({"name": "llama.cpp"}), flush=True)

    def newest_token() -> int:
        logits = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
        return int(np.argmax(np.ctypeslib.as_array(logits, shape=(llm.n_vocab(),))))

    for line in sys.stdin:
        run = json.loads(line)
        llm.reset()
        begin = time.perf_counter()
        llm.eval(run["prompt_ids"])
        token = newest_token()
        first = time.perf_counter()
        for _ in range(run["num_output"]):
            llm.eval([token])
            token = newest_token()
        end = time.perf_counter()
        print(json.dumps({"prefill_s": first - begin, "decode_s": end - first}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
