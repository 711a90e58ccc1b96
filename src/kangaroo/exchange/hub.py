"""An adapter's folder that people use with transformers alone, without knowing this library.

`model.generate(**inputs, custom_generate="USER/NAME", trust_remote_code=True)` runs the folder's
custom_generate/generate.py, once the packages in its requirements.txt are there; a folder on this machine does as well.
"""

import shutil
from importlib.metadata import version
from pathlib import Path

from kangaroo.drafters.kangaroo.adapter import Adapter
from kangaroo.drafters.kangaroo.calibration import FILE as CALIBRATION
from kangaroo.inputs import is_file
from kangaroo.weights import CONFIG

FILES = (CONFIG, Adapter.file, CALIBRATION)
"""What an adapter's folder may hold that drafting reads."""
DISTRIBUTION = "kangaroo-decoding"
GENERATE = '''\
"""Generation with a Kangaroo adapter: the target's own tokens, sooner. Written by `kangaroo export --for hub`."""

import inspect
from pathlib import Path

import kangaroo
from huggingface_hub import snapshot_download

FILES = {files}
_made = {{}}


def generate(model, *, adapter=None, drafter="kangaroo", settings=None, streamer=None, **arguments):
    """As `model.generate`; `settings` are the drafter's, `adapter` another folder than the one this file lies in."""
    # transformers hands over everything but the name of the folder, which stands one frame up.
    place = adapter or inspect.currentframe().f_back.f_locals.get("custom_generate")
    if place is None:
        raise ValueError("say adapter=FOLDER, the folder or repository that this code came with")
    folder = Path(place) if Path(place).is_dir() else Path(snapshot_download(place, allow_patterns=FILES))
    options = {{"adapter": folder, "drafter": drafter, **(settings or {{}})}}
    key = repr(sorted(options.items()))
    function = _made.get(key) if streamer is None else None
    if function is None:
        function = kangaroo.custom_generate(**options, streamer=streamer)
    if streamer is None:
        _made[key] = function
    given = {{name: value for name, value in arguments.items() if value is not None}}
    return model.generate(**given, custom_generate=function)
'''


def write_hub_folder(adapter: Path, folder: Path) -> None:
    """Copy the adapter's files into a folder that exists, with the code that transformers runs beside them."""
    for name in FILES:
        if is_file(adapter / name):
            shutil.copyfile(adapter / name, folder / name)
    code = folder / "custom_generate"
    code.mkdir()
    (code / "generate.py").write_text(GENERATE.format(files=list(FILES)), encoding="utf-8")
    (code / "requirements.txt").write_text(f"{DISTRIBUTION}>={version(DISTRIBUTION)}\n", encoding="utf-8")
