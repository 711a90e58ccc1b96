"""The public names: which they are, that each has an example that runs, and that getting at them is quick."""

import re
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import kangaroo
from kangaroo.cli import VERBS

ROOT = Path(__file__).resolve().parent.parent
API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
PUBLIC = """
    DRAFTERS Adapter AdapterConfig AdapterError AnswerStream BatchStream CapacityError ChainConfig Committed Completion
    ConfigError DataError Decoder Draft DraftModelConfig Drafter Eagle3ChainConfig Eagle3TreeConfig Engine EngineClosed
    EngineStatus Grammar KVCache KangarooError KangarooLookupConfig LLMAConfig LayerShape Logprobs LookupConfig
    MedusaChainConfig MedusaTreeConfig ModelError Piece Placement Processor QueueFull Request RestConfig Round Sampling
    State Stats Stop Target Ticket TokenLogprobs TreeConfig custom_generate decode load start
""".split()  # noqa: SIM905 (a list would take 51 lines)
NEED_A_SERVER = {"openai_client", "ray_serve"}
"""Examples that `serve/test_openai.py` runs, or that need what is not installed here."""


def test_the_public_names_are_these() -> None:
    assert kangaroo.__all__ == PUBLIC
    for name in PUBLIC:
        assert getattr(kangaroo, name) is not None
    assert set(PUBLIC) <= set(dir(kangaroo))
    with pytest.raises(AttributeError):
        _ = kangaroo.generate  # type: ignore[attr-defined]


def test_every_public_name_is_described() -> None:
    assert set(re.findall(r"\*\*`(\w+)`\*\*", API)) == set(PUBLIC)


def test_the_examples_of_the_document_run() -> None:
    examples = re.findall(r"^```python\n(.*?)^```", API, re.DOTALL | re.MULTILINE)
    used = set(re.findall(r"kangaroo\.(\w+)", "\n".join(examples)))
    exec("\n".join(examples), {})  # those that depend on earlier ones among them
    # What a value is an instance of need not be named by the example that makes it.
    assert set(PUBLIC) - used <= {"Completion", "Processor"}


EXAMPLES = [path for path in sorted((ROOT / "examples").glob("*.py")) if path.stem not in NEED_A_SERVER]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(example), run_name="__main__")
    shown = capsys.readouterr().out
    if example.stem == "transformers_generate":
        same, streamed = shown.split("the same as without: ")[1].split("\n", 1)
        assert same == "True"
        assert len(streamed.strip()) > 20
    else:
        assert "tokens per round" in shown


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    code = textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout


def test_the_help_needs_no_torch() -> None:
    shown = run("""
        import sys
        from kangaroo.cli import main
        sys.argv = ["kangaroo", "--help"]
        try:
            main()
        except SystemExit:
            assert not {"torch", "transformers", "pydantic"} & set(sys.modules)
    """)
    assert all(verb in shown for verb in VERBS)


def test_our_own_modules_are_quickly_read_and_their_names_are_not_those_of_functions() -> None:
    seconds = run("""
        import time
        from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, PreTrainedModel, generation
        began = time.process_time()
        import kangaroo.decode, kangaroo.decoder  # which would hide the function, were names not guarded
        assert callable(kangaroo.decode)
        from kangaroo import *
        assert callable(decode) and Decoder is kangaroo.Decoder
        print(time.process_time() - began)
    """)
    assert float(seconds) < 1.5, "0.1 s on an idle machine"


def test_the_help_says_what_verbs_say_of_themselves() -> None:
    import keyword
    from importlib import import_module

    for name, summary in VERBS.items():
        own = f"{name}_" if keyword.iskeyword(name) else name
        verb = getattr(import_module(f"kangaroo.cli.{own}"), own)
        said = verb.__doc__ if callable(verb) and verb.__doc__ and name != "datastore" else verb.info.help
        assert " ".join(said.split("\n\n")[0].split()) == summary
