"""The files of a tokenizer: carried between a checkpoint and a workdir byte for byte, whoever can read them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

from deconstruct.data import tokenizer
from deconstruct.data.tokenizer import JsonTokenizer, SentencePieceTokenizer, Tokenizer
from deconstruct.interop.files import own_file, write_json
from deconstruct.types import UserError

CARRIED = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


class Found(NamedTuple):
    """A folder's tokenizer: None, with the reason, where it is not one that this package reads."""

    tokenizer: Tokenizer | None
    files: tuple[str, ...]
    why: str

    def line(self) -> str:
        if not self.files:
            return "none"
        carried = f"carried {', '.join(self.files)}"
        if self.tokenizer is None:
            return f"{carried}; not usable here: {self.why}"
        return f"{carried}; {self.tokenizer.vocab_size:,} ids"


def find(folder: Path, sha256: str | None = None, of: str = "") -> Found:
    """What there is of a tokenizer in a folder. `sha256`: of the one that is meant, and `of` says whose it is; then
    another kind of tokenizer beside it is left out.

    Raises UserError where only another one is there, and for links that lead out of the folder.
    """
    files = tuple(name for name in CARRIED if own_file(folder / name).is_file())
    if sha256 and {"tokenizer.json", "tokenizer.model"} & set(files):
        meant = tokenizer.load(folder, sha256, of)
        others = {"tokenizer.json", "tokenizer.model"} - {meant.file_name}
        return Found(meant, tuple(name for name in files if name not in others), "")
    try:
        return Found(tokenizer.load(folder), files, "")
    except UserError as error:
        return Found(None, files, str(error))


def carry(found: Found, source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for name in found.files:
        shutil.copyfile(source / name, target / name)


def complete(found: Found, folder: Path) -> str:
    """Adds the tokenizer_config.json that transformers wants beside a tokenizer.json, where it is missing.

    Returns what there is to say of reading the tokenizer with transformers; "" where there is nothing.
    """
    own = found.tokenizer
    if isinstance(own, SentencePieceTokenizer) and "tokenizer.json" not in found.files:
        return (
            "tokenizer.model is SentencePiece: `deconstruct` and the sentencepiece library read it, AutoTokenizer not"
        )
    if isinstance(own, JsonTokenizer) and "tokenizer_config.json" not in found.files:
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        write_json(folder / "tokenizer_config.json", settings | {"eos_token": own.decode([own.end_of_text])})
        return (
            "carried tokenizer.json; in transformers 5 read it with PreTrainedTokenizerFast: for model_type qwen2 its "
            "AutoTokenizer applies Qwen's own splitting, whatever tokenizer_config.json says"
        )
    return ""
