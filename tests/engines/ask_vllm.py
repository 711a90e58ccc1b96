"""Run by vLLM's own environment: a request on standard input, the answers on standard output."""

import json
import os
import sys
import time

os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from vllm import LLM, SamplingParams


def main() -> None:
    request = json.load(sys.stdin)
    options = {"dtype": "float32", "max_model_len": 2048, "disable_log_stats": False, "enforce_eager": True}
    if request["draft"]:
        options["speculative_config"] = {
            "method": "draft_model",
            "model": request["draft"],
            "num_speculative_tokens": request["draft_tokens"],
        }
    engine = LLM(request["target"], max_num_seqs=1, **options)
    greedy = SamplingParams(temperature=0, max_tokens=request["tokens"], ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
    began = time.perf_counter()
    done = engine.generate(prompts, greedy, use_tqdm=False)
    seconds = time.perf_counter() - began
    counts = {metric.name: getattr(metric, "value", 0) for metric in engine.get_metrics()}
    facts = {
        "tokens": [list(answer.outputs[0].token_ids) for answer in done],
        "seconds": seconds,
        "drafted": counts.get("vllm:spec_decode_num_draft_tokens", 0),
        "accepted": counts.get("vllm:spec_decode_num_accepted_tokens", 0),
    }
    print(json.dumps(facts))


main()
