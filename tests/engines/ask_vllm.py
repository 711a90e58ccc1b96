"""Run by vLLM's own environment: a setup on standard input, then prompts; an answer to each on standard output.

The first line that comes back says that the engine is ready.
"""

import json
import os
import sys
import time

SETTINGS = {
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
}
COUNTS = {
    "rounds": "vllm:spec_decode_num_drafts",
    "drafted": "vllm:spec_decode_num_draft_tokens",
    "accepted": "vllm:spec_decode_num_accepted_tokens",
}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the engine prints itself is no answer
    os.environ.update({name: os.environ.get(name, value) for name, value in SETTINGS.items()})
    from vllm import LLM, SamplingParams  # it reads the settings when it is imported

    setup = json.loads(sys.stdin.readline())
    # It warms up with as many tokens as a pass may hold: no more than a prompt may have.
    options = {
        "dtype": setup["dtype"],
        "max_model_len": 2048,
        "max_num_batched_tokens": 2048,
        "disable_log_stats": False,
    }
    options["enforce_eager"] = not setup["compiled"]
    if setup["draft"]:
        options["speculative_config"] = {
            "method": "draft_model",
            "model": setup["draft"],
            "num_speculative_tokens": setup["draft_tokens"],
        }
    engine = LLM(setup["target"], max_num_seqs=1, enable_prefix_caching=False, **options)
    print(json.dumps({"ready": True}), file=answers)
    before = dict.fromkeys(COUNTS, 0)
    for line in sys.stdin:
        asked = json.loads(line)
        greedy = SamplingParams(temperature=0, max_tokens=asked["tokens"])
        began = time.perf_counter()
        done = engine.generate([{"prompt_token_ids": asked["prompt"]}], greedy, use_tqdm=False)
        seconds = time.perf_counter() - began
        counts = {metric.name: getattr(metric, "value", 0) for metric in engine.get_metrics()}
        facts = {"tokens": list(done[0].outputs[0].token_ids), "seconds": seconds}
        if setup["draft"]:
            after = {kind: counts[name] for kind, name in COUNTS.items()}
            facts |= {kind: after[kind] - before[kind] for kind in COUNTS}
            before = after
        print(json.dumps(facts), file=answers)


if __name__ == "__main__":
    main()
