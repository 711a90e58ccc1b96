"""Run by openvino-genai's own environment: a request on standard input, the answers on standard output.

It reads GGUF files, and a draft once it has been converted to OpenVINO's own format beside its file.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy
import openvino
import openvino_genai

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}


def converted(file: str, folder: Path) -> str:
    """The folder of a GGUF file's model in OpenVINO's own format."""
    folder.mkdir()
    (folder / "model.gguf").symlink_to(Path(file).resolve())
    openvino_genai.LLMPipeline(folder / "model.gguf", "CPU", enable_save_ov_model=True)
    return str(folder)


def main() -> None:
    request = json.load(sys.stdin)
    with tempfile.TemporaryDirectory() as place:
        options = dict(EXACT)
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = 1
        options["scheduler_config"] = scheduler
        if request["draft"]:
            folder = converted(request["draft"], Path(place) / "draft")
            options["draft_model"] = openvino_genai.draft_model(folder, "CPU", **EXACT)
        pipeline = openvino_genai.LLMPipeline(converted(request["target"], Path(place) / "target"), "CPU", **options)
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.do_sample, config.ignore_eos = request["tokens"], False, True
        if request["draft"]:
            config.num_assistant_tokens = request["draft_tokens"]
        answers, drafted, accepted, began = [], 0, 0, time.perf_counter()
        for prompt in request["prompts"]:
            done = pipeline.generate(openvino.Tensor(numpy.array([prompt], dtype=numpy.int64)), config)
            answers.append(list(done.tokens[0]))
            if request["draft"]:
                metrics = done.extended_perf_metrics
                accepted += metrics.get_num_accepted_tokens()
                drafted += metrics.draft_model_metrics.get_num_generated_tokens()
        seconds = time.perf_counter() - began
    print(json.dumps({"tokens": answers, "seconds": seconds, "drafted": drafted, "accepted": accepted}))


main()
