"""Measure the little model on held-out prompts, and the loss of its target on held-out documents.

    python recipes/little/measure.py held-out --output results/little/demo-cpu.json
    python recipes/little/measure.py loss --data chat_open.jsonl.gz --output results/little/demo-loss.json

Speeds are ratios of interleaved runs in one process. Run it on an otherwise idle machine.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import kangaroo
from kangaroo.bench.compare import PairedRun, compare, without_end
from kangaroo.bench.cost import decoder_costs
from kangaroo.bench.questions import read_prompts
from kangaroo.decoder import Decoder
from kangaroo.files import write_json
from kangaroo.machine import surroundings
from kangaroo.sampling import Sampling
from kangaroo.training.corpus import choose_documents
from kangaroo.training.recipe import read_recipe
from kangaroo.tree import sequence

TOKENS = 64


def figures(result: PairedRun) -> dict[str, Any]:
    """What is kept of a comparison."""
    varied = result.without_repetitions()
    stats = [pair.method.stats for pair in result.pairs]
    return {
        "identical": result.identical,
        "prompts": len(result.pairs),
        "tokens": sum(s.emitted for s in stats),
        "speedup": round(result.speedup, 3),
        "decode_speedup": round(result.decode_speedup, 3),
        "cr": round(result.compression_rate, 3),
        "drafted_per_round": round(sum(s.drafted for s in stats) / sum(s.rounds for s in stats), 3),
        "accepted_share": round(sum(s.accepted for s in stats) / max(1, sum(s.drafted for s in stats)), 3),
        "method_tokens_per_second": round(result.method_speed, 1),
        "baseline_tokens_per_second": round(result.baseline_speed, 1),
        "without_repetitions": {
            "prompts": len(varied.pairs),
            "speedup": round(varied.speedup, 3) if varied.pairs else None,
            "cr": round(varied.compression_rate, 3) if varied.pairs else None,
        },
    }


def run(decoder: Decoder, prompts: list[Any], temperature: float) -> PairedRun:
    """Compare a decoder with plain decoding, ends of answers barred."""
    sampling = without_end(Sampling(temperature=temperature, seed=1), decoder.eos)
    return compare(decoder.plain(), decoder, prompts, max_tokens=TOKENS, sampling=sampling)


def held_out() -> dict[str, Any]:
    """What is reported."""
    prompts = [p.messages for p in read_prompts(split="held-out")]
    record: dict[str, Any] = {}
    decoder = kangaroo.load("tests/little/target", adapter="tests/little/adapter")
    for temperature in (0.0, 0.8):
        result = run(decoder, prompts, temperature)
        record[f"kangaroo, temperature {temperature:g}"] = show(figures(result), f"temperature {temperature:g}")
        if temperature == 0.0:
            record["bound"] = show(bound(decoder, result), "bound")
    record["transformers.generate"] = show(beside_transformers(decoder, prompts), "transformers")
    ends = compare(decoder.plain(), decoder, prompts, max_tokens=128, sampling=Sampling())
    record["kangaroo, answers end by themselves, at most 128"] = show(figures(ends), "natural ends")
    return record


def bound(decoder: Decoder, result: PairedRun) -> dict[str, Any]:
    """The speed-up this trace would have if a round cost only its pieces, each timed alone."""
    costs = decoder_costs(decoder, nodes=9, repeats=60)
    emitted = sum(pair.method.stats.emitted for pair in result.pairs)
    limit = costs.bound(result.drafts, emitted)
    return {
        "bound": round(limit, 3),
        "measured_share": round(result.decode_speedup / limit, 3),
        "seconds": asdict(costs),
        "draft_step_share": round(costs.draft_share, 4),
    }


def beside_transformers(decoder: Decoder, prompts: list[Any]) -> dict[str, Any]:
    """Plain decoding here against transformers.generate, same weights, dtype and threads, in turn."""
    model, plain, sampling = decoder.target.model, decoder.plain(), without_end(Sampling(), decoder.eos)

    def ask(prompt: Any) -> tuple[float, float, bool]:
        ids = torch.tensor([decoder.tokenizer.encode(prompt)])
        settings = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
        began = time.perf_counter()
        text = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        theirs = time.perf_counter() - began
        completion = plain.generate([prompt], max_tokens=TOKENS, sampling=sampling)[0]
        ours = completion.stats.prefill_seconds + completion.stats.decode_seconds
        return theirs, ours, text[0, ids.shape[1] :].tolist() == completion.tokens

    ask(prompts[0])
    rows = [ask(prompt) for prompt in prompts]
    ratio = sum(theirs for theirs, _, _ in rows) / sum(ours for _, ours, _ in rows)
    return {
        "plain_speed_over_transformers": round(ratio, 3),
        "identical": sum(r[2] for r in rows),
        "prompts": len(rows),
    }


def loss(data: Path) -> dict[str, Any]:
    """Next-token loss on the documents the recipe held out, with all layers and with the deepest half removed."""
    recipe = read_recipe(Path("recipes/little/target.toml"))
    _, documents = choose_documents([data], recipe.data, recipe.seed)
    decoder = kangaroo.load("tests/little/target", drafter="none", dtype=torch.float32)
    target, totals, count = decoder.target, {}, 0
    depths = (target.num_layers, target.num_layers // 2)
    totals = dict.fromkeys(depths, 0.0)
    with torch.inference_mode():
        for document in documents:
            prompt = document.messages or document.text
            ids = decoder.tokenizer.encode(prompt)[:-1][: target.context]  # less the generation prompt
            tokens = torch.tensor([ids])
            _, taps = target.run(target.embed(tokens), sequence(1, len(ids)), None, taps=depths)
            for depth in depths:
                logits = target.logits(target.norm(taps[depth]))[0, :-1]
                totals[depth] += float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum"))
            count += len(ids) - 1
    means = {f"{depth} layers": round(total / count, 4) for depth, total in totals.items()}
    return {"documents": len(documents), "tokens": count, "nats_per_token": show(means, "loss")}


def show(facts: dict[str, Any], label: str) -> dict[str, Any]:
    """Print what was found as it is found."""
    print(label, json.dumps(facts), flush=True)
    return facts


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("held-out", "loss"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="chat data, for `loss`")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    began = surroundings() | {"when": time.strftime("%Y-%m-%d")}
    found = loss(options.data) if options.what == "loss" else held_out()
    record = {"what": options.what, **began, "figures": found}
    write_json(options.output, record)


if __name__ == "__main__":
    main()
