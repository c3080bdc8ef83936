"""Goes on with what a workdir says of itself: an imported model, or a run.

    deconstruct train --config=configs/workdir.py:runs/imported --workdir=runs/imported --config.data=prepared/text

The argument is the workdir. Its config.json is the start; `--config.key=value` changes it as ever.
"""

import json
from pathlib import Path

from deconstruct.config import default_config


def get_config(argument=None):
    if not argument or not (Path(argument) / "config.json").is_file():
        raise ValueError(f"{argument or ''!r}: expected a workdir with a config.json, as in configs/workdir.py:runs/a")
    saved = json.loads((Path(argument) / "config.json").read_text())
    saved.pop("code", None)
    for derived in ("layers", "document_mask", "without_mixers"):  # they follow from the rest
        saved["model"].pop(derived, None)
    config = default_config()
    config.update(saved)
    return config
