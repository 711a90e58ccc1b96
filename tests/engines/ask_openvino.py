"""Run by openvino-genai's environment: a setup on standard input, then prompts; an answer to each on standard output.

It reads GGUF files, and a draft once it has been converted to OpenVINO's own format beside its file. The first line
that comes back says that the engine is ready.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy
import openvino
import openvino_genai


def converted(file: str, folder: Path) -> str:
    """The folder of a GGUF file's model in OpenVINO's own format."""
    folder.mkdir()
    (folder / "model.gguf").symlink_to(Path(file).resolve())
    openvino_genai.LLMPipeline(folder / "model.gguf", "CPU", enable_save_ov_model=True)
    return str(folder)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the engine prints itself is no answer
    setup = json.loads(sys.stdin.readline())
    kind = {"float32": "f32", "bfloat16": "bf16"}[setup["dtype"]]
    exact = {"INFERENCE_PRECISION_HINT": kind, "INFERENCE_NUM_THREADS": 1}
    if kind == "f32":  # by default it keeps keys and values in eight bits
        exact["KV_CACHE_PRECISION"] = kind
    with tempfile.TemporaryDirectory() as place:
        options = dict(exact)
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = 1
        scheduler.enable_prefix_caching = False
        options["scheduler_config"] = scheduler
        if setup["draft"]:
            folder = converted(setup["draft"], Path(place) / "draft")
            options["draft_model"] = openvino_genai.draft_model(folder, "CPU", **exact)
        pipeline = openvino_genai.LLMPipeline(converted(setup["target"], Path(place) / "target"), "CPU", **options)
        config = openvino_genai.GenerationConfig()
        config.do_sample = False
        if setup["draft"]:
            config.num_assistant_tokens = setup["draft_tokens"]
        print(json.dumps({"ready": True}), file=answers)
        for line in sys.stdin:
            asked = json.loads(line)
            config.max_new_tokens = asked["tokens"]
            began = time.perf_counter()
            done = pipeline.generate(openvino.Tensor(numpy.array([asked["prompt"]], dtype=numpy.int64)), config)
            facts = {"tokens": list(done.tokens[0]), "seconds": time.perf_counter() - began}
            if setup["draft"]:
                metrics = done.extended_perf_metrics
                facts["accepted"] = metrics.get_num_accepted_tokens()
                facts["drafted"] = metrics.draft_model_metrics.get_num_generated_tokens()
            print(json.dumps(facts), file=answers)


if __name__ == "__main__":
    main()
