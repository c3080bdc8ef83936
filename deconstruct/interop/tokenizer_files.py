"""The files of a tokenizer: carried between a checkpoint and a workdir byte for byte, whoever can read them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

from deconstruct.data import tokenizer
from deconstruct.data.tokenizer import JsonTokenizer, SentencePieceTokenizer, Tokenizer
from deconstruct.interop.files import write_json
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


def find(folder: Path) -> Found:
    files = tuple(name for name in CARRIED if (folder / name).is_file())
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
