"""From an adapter to a folder that another engine drafts with, and the line that starts it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kangaroo import demo
from kangaroo.demo.smollm2 import find_package_file, smollm2
from kangaroo.drafters.kangaroo.adapter import Adapter
from kangaroo.errors import ConfigError
from kangaroo.exchange.gguf import check_gguf, read_gguf, write_gguf
from kangaroo.exchange.hub import write_hub_folder
from kangaroo.exchange.launch import ENGINES, GGUF_FILE, Drafting, Launch, launch, readme
from kangaroo.exchange.standalone import Proof, build_standalone, load_standalone, prove
from kangaroo.files import new_folder
from kangaroo.gguf_file import is_gguf
from kangaroo.loading import choose_device, choose_dtype, load_config, load_model, load_tokenizer
from kangaroo.model import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written."""

    folder: Path
    layers: int
    """Of the standalone draft; 0 for the hub, where the target's own are used."""
    parameters: int
    dtype: str
    proof: Proof | None
    """None for the hub, where nothing is copied."""
    launch: Launch


def export(
    adapter: Path, engine: str, output: Path, *, model: str = demo.NAME, dtype: str | None = None, **options: Any
) -> Exported:
    """Write what `engine` needs to draft with an adapter for the target `model` into a new folder.

    `dtype` is the precision of the draft, the target's own if None; for a target in a GGUF file bfloat16. `options` are
    `device`, `allow_other_target` and what transformers' loader takes.

    Raises ConfigError for an engine that is none or an output that holds something, AdapterError or ModelError for what
    cannot be loaded or exported. Nothing is left of a folder that could not be finished.
    """
    if engine not in ENGINES:
        raise ConfigError(f"--for must be one of {', '.join(ENGINES)}, got {engine!r}")
    relative = options.pop("allow_other_target", False)
    kind = choose_dtype(dtype) or (torch.bfloat16 if is_gguf(model) else load_config(model).dtype)
    device = choose_device(options.pop("device", None) or "cpu")
    with new_folder(output) as folder:
        loaded = load_model(model, kind, device, attn_implementation="eager", **options)
        target = Target(loaded, exact=False)
        trained = Adapter.load(adapter, target, allow_other_target=relative)
        draft = Drafting(
            target=_named(model, engine),
            folder=output,
            dtype=str(target.dtype).removeprefix("torch."),
            max_draft=trained.config.max_draft,
            threshold=trained.config.threshold,
        )
        proof, layers, parameters = None, 0, sum(weights.numel() for weights in trained.parameters())
        if engine == "hub":
            write_hub_folder(adapter, folder)
        else:
            proof, layers, parameters = _write_draft(trained, folder, engine, model)
        facts = _facts(trained, proof, parameters)
        text = readme(engine, draft, f"A Kangaroo draft for {model}", facts)
        (folder / "README.md").write_text(text, encoding="utf-8")
    return Exported(
        folder=output,
        layers=layers,
        parameters=parameters,
        dtype=draft.dtype,
        proof=proof,
        launch=launch(engine, draft),
    )


def _write_draft(adapter: Adapter, folder: Path, engine: str, model: str) -> tuple[Proof, int, int]:
    target, copied = adapter.target, build_standalone(adapter)
    tokenizer = load_tokenizer(model)
    if engine == "llama.cpp":
        check_gguf(copied.config, target.dtype)
        path = folder / GGUF_FILE
        write_gguf(copied, path, tokenizer, _tokenizer_source(model))
        read = read_gguf(path, target, copied.config)
    else:
        copied.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        read = load_standalone(folder, target)
    count = sum(weights.numel() for weights in read.parameters())
    return prove(adapter, read), int(copied.config.num_hidden_layers), count


def _named(model: str, engine: str) -> str:
    """The target as an engine finds it."""
    if model != demo.NAME:
        return model
    return str(find_package_file() if engine == "llama.cpp" else smollm2())


def _tokenizer_source(model: str) -> Path | None:
    if is_gguf(model):
        return Path(model)
    return find_package_file() if model == demo.NAME else None


def _facts(adapter: Adapter, proof: Proof | None, parameters: int) -> list[str]:
    target, config = adapter.target, adapter.config
    facts = [
        f"Target: {target.config.model_type}, {target.num_layers} layers of width {target.width}, "
        f"{target.vocab_size:,} tokens; fingerprint `{target.fingerprint}`.",
        f"Adapter: `{config.variant}` behind layer {config.exit_layer}; {parameters:,} weights are in this folder.",
    ]
    if proof is not None:
        facts.append(f"Loaded from this folder, {proof.in_words()}.")
    if config.draft_vocabulary and proof is not None:
        facts.append(
            f"Kangaroo drafts over {config.draft_vocabulary:,} tokens; this draft over all of them, so it chooses the "
            "same token unless one outside is better."
        )
    facts.append("Texts are the target's own, whatever is drafted.")
    return facts
