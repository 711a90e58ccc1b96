"""Checkpoints as other projects save them: folders in their exact layout, made from a tiny model."""

import json
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import kangaroo
from eagle3_reference import release_files
from kangaroo.exchange.checkpoint import Checkpoint, Table
from kangaroo.exchange.eagle3 import make_head
from runs import teach

QUESTIONS = ["Where would you", "The answer"]
DRAFTED = 120
"""Tokens that a head can draft."""


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], file: str) -> Path:
    """A folder with a config.json and weights, as a pickle or as safetensors."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if file.endswith(".safetensors"):
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / file)
    else:
        torch.save(dict(tensors), folder / file)
    return folder


def official(place: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of place/adapter as the Kangaroo release has its own, trained on several devices."""
    own = load_file(place / "adapter" / "adapter.safetensors")
    renamed = {"attention": "self_attn", "norm_in": "input_layernorm", "norm_out": "norm"}
    tensors = {"module.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    for name, value in own.items():
        parts = [renamed.get(part, part) for part in name.split(".")]
        tensors["module." + ".".join(parts)] = value.half()
    config = json.loads((place / "target" / "config.json").read_text())
    for name in ("rope_parameters", "rope_scaling", "rope_theta", "head_dim", "bos_token_id", "eos_token_id"):
        config.pop(name, None)
    config |= {"num_hidden_layers": 1, "max_position_embeddings": 512, "rms_norm_eps": 1e-6}
    return config, tensors


def eagle3(place: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of a head for place/target as the authors of EAGLE-3 save it; it has learnt some answers."""
    config, tensors = _head_of(place)
    return dict(config), dict(tensors)


@cache
def _head_of(place: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    decoder = kangaroo.load(place / "target", drafter="none", dtype="float32", exact=False)
    config, tensors = release_files(decoder.target.model, DRAFTED)
    tensors = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    head = make_head(Checkpoint(Table(config, place), tensors, place, ""), decoder.target)
    answers = decoder.generate(QUESTIONS, max_tokens=24)
    asked = [decoder.tokenizer.encode(question) for question in QUESTIONS]
    teach(head, [[*prompt, *answer.tokens] for prompt, answer in zip(asked, answers, strict=True)])
    return config, tensors | {"lm_head.weight": head.lm_head.weight.detach().clone()}


def speculators(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The same head as speculators has it."""
    layer = {key: value for key, value in config.items() if key not in ("architectures", "draft_vocab_size")}
    around = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": config["draft_vocab_size"],
        "norm_before_residual": False,
        "target_hidden_size": None,
        "transformer_layer_config": layer,
    }
    return around, {name.replace("midlayer.", "layers.0."): value for name, value in tensors.items()}
