"""Which model, which drafter: every way to say it, and what cannot be."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kangaroo
from chat_model import save_chat_model
from kangaroo.drafters import DRAFTERS
from kangaroo.drafters.none import NoDrafter
from kangaroo.errors import AdapterError, ConfigError, KangarooError, ModelError

PROMPT = "Where would"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat"))


def load(folder: Path, **settings: Any) -> kangaroo.Decoder:
    return kangaroo.load(folder / "target", **{"dtype": "float64", **settings})


class Repeater(NoDrafter):
    """A drafter of one's own, from public names alone: it drafts the pending token again."""

    nodes = 2

    def __init__(self, target: kangaroo.Target):
        self.target = target

    def draft(self, state: kangaroo.State) -> kangaroo.Draft:
        room = ((state.room > 1) & state.active)[:, None]
        return kangaroo.Draft(
            tokens=state.pending.repeat(1, 2),
            parents=torch.tensor([[-1, 0]]).expand(state.batch, 2),
            valid=torch.cat([torch.ones_like(room), room], 1),
            depth=1,
            stops=(kangaroo.Stop.LENGTH,) * state.batch,
        )


@pytest.mark.parametrize(
    ("drafter", "settings", "described"),
    [
        ("kangaroo", {"max_draft": 3}, "kangaroo, max_draft=3"),
        (kangaroo.ChainConfig(max_draft=3, threshold=0.0), {}, "kangaroo, max_draft=3, threshold=0.0, stop=threshold"),
        (kangaroo.ChainConfig(threshold=0.0), {"exit_layer": 1}, "early-exit, max_draft=6"),
        (kangaroo.TreeConfig(top_k=2, max_draft=3), {}, "kangaroo-tree, top_k=2"),
        (kangaroo.TreeConfig(top_k=2, max_draft=3), {"exit_layer": 2}, "early-exit-tree, top_k=2"),
        (kangaroo.KangarooLookupConfig(max_copy=4), {}, "kangaroo+lookup, max_draft=6"),
        (kangaroo.LookupConfig(max_draft=4), {}, "prompt-lookup, longest=3"),
        (kangaroo.LLMAConfig(max_draft=4), {}, "llma, longest=5"),
        (Repeater, {}, "Repeater"),
    ],
)
def test_a_drafter_is_a_name_a_config_or_ones_own(
    folder: Path, drafter: Any, settings: dict[str, Any], described: str
) -> None:
    decoder = load(folder, drafter=drafter, adapter=folder / "adapter", **settings)
    assert decoder.drafter.startswith(described)
    plain = decoder.plain().generate([PROMPT, "The"], max_tokens=12)
    assert [a.tokens for a in decoder.generate([PROMPT, "The"], max_tokens=12)] == [a.tokens for a in plain]
    if drafter is Repeater:
        assert decoder.generate([PROMPT], max_tokens=12)[0].stats.drafted > 0


def test_every_config_belongs_to_a_drafter(folder: Path) -> None:
    draft_model = load(folder, drafter=kangaroo.DraftModelConfig(first_draft=2), draft_model=folder / "target")
    assert draft_model.drafter.startswith("draft-model, ")
    for config, needs in (
        (kangaroo.MedusaChainConfig(), "heads"),
        (kangaroo.MedusaTreeConfig(), "heads"),
        (kangaroo.Eagle3ChainConfig(), "eagle3"),
        (kangaroo.Eagle3TreeConfig(), "eagle3"),
        (kangaroo.RestConfig(), "datastore"),
    ):
        with pytest.raises(ConfigError, match=f"needs {needs}"):
            load(folder, drafter=config)
    configs = {entry.config for entry in DRAFTERS.values() if entry.config is not None}
    assert {config.__name__ for config in configs} <= set(kangaroo.__all__)


def test_where_and_how_the_model_is_loaded(folder: Path) -> None:
    model, adapter = folder / "target", folder / "adapter"
    for dtype in ("bfloat16", torch.bfloat16, "torch.bfloat16"):
        assert kangaroo.load(model, drafter="none", dtype=dtype).target.dtype == torch.bfloat16
    decoder = kangaroo.load(model, adapter=adapter, device="cpu", dtype="float64", attn_implementation="eager")
    assert decoder.target.config._attn_implementation == "eager"
    assert decoder.target.device == torch.device("cpu")
    tokenizer = AutoTokenizer.from_pretrained(model)
    by_name, by_object = (load(folder, drafter="none", tokenizer=t) for t in (str(model), tokenizer))
    assert by_name.tokenizer.encode(PROMPT) == by_object.tokenizer.encode(PROMPT)


def test_what_is_loaded_knows_its_revision(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[object, object]] = []
    for kind in (AutoModelForCausalLM, AutoTokenizer):
        honest = kind.from_pretrained

        def noted(name: object, _honest: Any = honest, **options: Any) -> object:
            seen.append((options.pop("revision", None), options.pop("trust_remote_code", None)))
            return _honest(name, **options)

        monkeypatch.setattr(kind, "from_pretrained", noted)
    load(folder, drafter="none", revision="v2", trust_remote_code=True)
    assert seen == [("v2", True)] * 2


@pytest.mark.parametrize(
    ("settings", "kind", "named"),
    [
        ({"dtype": "int3"}, ConfigError, "dtype must be one of"),
        ({"dtype": torch.int8}, ConfigError, "dtype must be one of"),
        ({"device": "toaster"}, ConfigError, "toaster"),
        ({"device": "cuda:99"}, ConfigError, "cuda:99"),
        ({"attn_implementation": "guesswork"}, ModelError, "guesswork"),
        ({"drafter": kangaroo.ChainConfig}, ConfigError, "write ChainConfig()"),
        ({"drafter": NoDrafter()}, ConfigError, "a function that makes one"),
        ({"drafter": 7}, ConfigError, "a function that makes one"),
        ({"drafter": lambda target: "draft"}, ConfigError, "'taps'"),
        ({"drafter": Repeater, "max_draft": 3}, ConfigError, "max_draft"),
        ({"drafter": kangaroo.ChainConfig(), "max_draft": 3}, ConfigError, "give it there, ChainConfig(...)"),
        ({"drafter": kangaroo.ChainConfig()}, ConfigError, "needs adapter"),
        ({"drafter": "none", "treshold": 3}, ConfigError, "treshold"),
    ],
)
def test_what_cannot_be_loaded(folder: Path, settings: dict[str, Any], kind: type[KangarooError], named: str) -> None:
    with pytest.raises(KangarooError) as caught:
        kangaroo.load(folder / "target", **settings)
    assert type(caught.value) is kind
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("setting", [{"dtype": "float32"}, {"device": "cpu"}, {"revision": "x"}])
def test_a_loaded_model_stays_as_it_is(folder: Path, setting: dict[str, str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "target", dtype=torch.float64)
    with pytest.raises(ConfigError, match="loaded already"):
        kangaroo.load(model, drafter="none", **setting)  # type: ignore[arg-type]


def test_an_adapter_of_a_relative_drafts_if_it_is_told_to(folder: Path, tmp_path: Path) -> None:
    tuned = AutoModelForCausalLM.from_pretrained(folder / "target", dtype=torch.float64)
    for parameter in tuned.parameters():
        parameter.data += 0.003 * torch.randn_like(parameter)
    adapter = folder / "adapter"
    with pytest.raises(AdapterError) as caught:
        kangaroo.load(tuned, adapter=adapter)
    own = kangaroo.load(tuned, drafter="none").target.fingerprint
    theirs = load(folder, drafter="none").target.fingerprint
    assert all(part in str(caught.value) for part in (own, theirs, "allow_other_target"))
    relative = kangaroo.load(tuned, adapter=adapter, allow_other_target=True, threshold=0.02)
    answers = relative.generate([PROMPT, "The"], max_tokens=30)
    assert sum(answer.stats.accepted for answer in answers) > 0
    assert [a.tokens for a in answers] == [a.tokens for a in relative.plain().generate([PROMPT, "The"], max_tokens=30)]
    assert relative.with_drafter("kangaroo-tree").generate(["The"], max_tokens=9)[0].tokens == answers[1].tokens[:9]


def test_a_stranger_does_not_fit_even_then(folder: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(folder / "target")
    config.num_key_value_heads = 4
    other = LlamaForCausalLM(config).double().eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "target")
    with pytest.raises(AdapterError, match=r"_proj.weight' is of shape \[16, 32\], not \[32, 32\]"):
        kangaroo.load(other, adapter=folder / "adapter", tokenizer=tokenizer, allow_other_target=True)


def test_the_command_line_says_so_too(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from command import invoke

    other = save_chat_model(tmp_path, seed=1)
    options = ("generate", "--model", str(other / "target"), "--adapter", str(folder / "adapter"), "--prompt", "eat")
    options = (*options, "--max-tokens", "4", "--json")
    assert invoke(*options) == 2
    assert "belong to another target" in capsys.readouterr().err
    for allowed in (("--allow-other-target",), ("--set", "allow_other_target=true")):
        assert invoke(*options, *allowed) == 0
    assert invoke(*options, "--set", "allow_other_target=false") == 2


def test_settings_that_are_true_or_false_are_so(folder: Path) -> None:
    from kangaroo.cli.options import ModelOptions

    found = ModelOptions(settings=["adaptive=false", "first_draft=3", "stop=auto", "on=true"]).parsed_settings
    assert found == {"adaptive": False, "first_draft": 3, "stop": "auto", "on": True}
