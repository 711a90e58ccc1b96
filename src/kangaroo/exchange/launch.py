"""How an engine is started with an exported draft, for exactly the target it was exported for."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

ENGINES = ("vllm", "sglang", "transformers", "llama.cpp", "mlx", "hub")
GGUF_FILE = "draft.gguf"
FIXED_DRAFT = 3
"""Tokens to draft in engines that know no confidence: each further one is drafted whether or not it has a chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What to type, and what else to know."""

    language: str
    """Of the text: "sh" or "python"."""
    text: str
    notes: tuple[str, ...]
    """What ruins the speed when forgotten comes first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafting:
    """What a launch line has to say of the draft."""

    target: str
    folder: Path
    dtype: str
    max_draft: int
    threshold: float
    fixed: int = FIXED_DRAFT


def launch(engine: str, draft: Drafting) -> Launch:
    """The launch of one of ENGINES."""
    makers = {"vllm": _vllm, "sglang": _sglang, "transformers": _transformers, "llama.cpp": _llama_cpp, "mlx": _mlx}
    return {**makers, "hub": _hub}[engine](draft)


def _shell(command: str, *words: str) -> str:
    """A command line, broken before each option."""
    quoted = [shlex.quote(word) for word in words]
    return command + "".join(f" \\\n    {word}" if word.startswith("-") else f" {word}" for word in quoted)


def _vllm(draft: Drafting) -> Launch:
    config = {"method": "draft_model", "model": str(draft.folder), "num_speculative_tokens": draft.fixed}
    line = _shell("vllm serve", draft.target, "--dtype", draft.dtype, "--speculative-config", json.dumps(config))
    return Launch(
        language="sh",
        text=f"VLLM_USE_V2_MODEL_RUNNER=0 {line}",
        notes=(
            f"vLLM drafts a fixed number of tokens, sure of them or not: start with {draft.fixed}, then try one more "
            "and one less.",
            "`VLLM_USE_V2_MODEL_RUNNER=0` keeps the runner that captures the draft in piecewise graphs.",
            "With `--tensor-parallel-size N` the draft is split as the target is; its vocabulary is the target's.",
            "The target's embeddings and head are held twice. `min_p` and `logit_bias` are refused under speculation.",
            "In one Python process: `LLM(..., speculative_config={...})` with the same settings.",
        ),
    )


def _sglang(draft: Drafting) -> Launch:
    return Launch(
        language="sh",
        text=_shell(
            *("python -m sglang.launch_server", "--model-path", draft.target, "--dtype", draft.dtype),
            *("--speculative-algorithm", "STANDALONE", "--speculative-draft-model-path", str(draft.folder)),
            *("--speculative-num-steps", str(draft.fixed), "--speculative-eagle-topk", "1"),
            *("--speculative-num-draft-tokens", str(draft.fixed + 1)),
        ),
        notes=(
            "All three numbers have to be given: left to itself, SGLang drafts trees of 8 tokens in 5 steps. "
            "`num-draft-tokens` is `num-steps` plus one for a chain.",
            "A draft has a fixed length, sure of it or not. The target's embeddings and head are held twice.",
        ),
    )


def _transformers(draft: Drafting) -> Launch:
    text = f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

target = AutoModelForCausalLM.from_pretrained({draft.target!r}, dtype={draft.dtype!r})
tokenizer = AutoTokenizer.from_pretrained({draft.target!r})
assistant = AutoModelForCausalLM.from_pretrained({str(draft.folder)!r}, dtype={draft.dtype!r})
inputs = tokenizer("The capital of France is", return_tensors="pt")
output = target.generate(**inputs, assistant_model=assistant, do_sample=False, max_new_tokens=64)
print(tokenizer.decode(output[0]))"""
    return Launch(
        language="python",
        text=text,
        notes=(
            f"The folder's generation_config.json has transformers draft {draft.max_draft} tokens at most, and stop "
            f"after one of confidence below {draft.threshold:g}; without it, transformers would draft 20.",
            "If scikit-learn is installed, transformers moves that threshold as it goes, from answer to answer.",
            "One prompt at a time: assisted generation has no batches.",
            "With `custom_generate` (`kangaroo export --for hub`) transformers runs Kangaroo itself, in batches too, "
            "and nothing is held or computed twice.",
        ),
    )


def _llama_cpp(draft: Drafting) -> Launch:
    return Launch(
        language="sh",
        text=_shell(
            *("llama-server", "-m", draft.target, "-md", str(draft.folder / GGUF_FILE), "--spec-type", "draft-simple"),
            *("--spec-draft-n-max", str(draft.max_draft), "--spec-draft-p-min", f"{draft.threshold:g}"),
        ),
        notes=(
            "**`--spec-draft-p-min` must be given**: its default of 0 drafts on however unsure the draft is, and most "
            "of that is refused.",
            "llama.cpp drops the token it was unsure of; Kangaroo keeps it, so drafts are a token longer there.",
            "The tokens and the special ones are compared with the target's when the server starts.",
        ),
    )


def _mlx(draft: Drafting) -> Launch:
    return Launch(
        language="sh",
        text=_shell(
            *("mlx_lm.generate", "--model", draft.target, "--draft-model", str(draft.folder)),
            *("--num-draft-tokens", str(draft.fixed), "--prompt", "The capital of France is"),
        ),
        notes=(
            f"A draft has a fixed length, sure of it or not: start with {draft.fixed}.",
            "`mlx_lm.server` takes the same two options; a draft model turns its batching off.",
            "Loaded as it is; if the target was converted to another precision, convert the draft likewise.",
        ),
    )


def _hub(draft: Drafting) -> Launch:
    text = f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({draft.target!r}, dtype={draft.dtype!r})
tokenizer = AutoTokenizer.from_pretrained({draft.target!r})
inputs = tokenizer("The capital of France is", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=64, custom_generate={str(draft.folder)!r}, trust_remote_code=True)
print(tokenizer.decode(output[0]))"""
    return Launch(
        language="python",
        text=text,
        notes=(
            "`trust_remote_code=True` is needed for local folders too: read custom_generate/generate.py first.",
            "Once uploaded, the repository's name stands in place of the folder, and the target's in place of its own. "
            "`pip install -r custom_generate/requirements.txt` brings what it needs.",
            "The first call makes the model ready, which takes seconds; later ones with the same model find it so.",
        ),
    )


def readme(engine: str, draft: Drafting, title: str, facts: list[str]) -> str:
    """The README.md of an exported folder."""
    how = launch(engine, draft)
    shown = "transformers, through custom_generate" if engine == "hub" else engine
    lines = [f"# {title}", "", *[f"- {fact}" for fact in facts], "", f"## With {shown}", ""]
    lines += [f"```{how.language}", how.text, "```", "", *[f"- {note}" for note in how.notes]]
    return "\n".join(lines) + "\n"
