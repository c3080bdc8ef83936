"""Text to token ids and back: SentencePiece models and `tokenizers` JSON files behind one face.

Models trained here are byte-level at the bottom and normalise nothing, so decode(encode(text)) == text for any text.
No text encodes to the end-of-text id, even one that spells it: only prepare puts it between documents.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator

from etils import epath

from deconstruct.data.manifest import Manifest
from deconstruct.data.sample import Sample
from deconstruct.paths import place, write_whole
from deconstruct.types import UserError

SPACE_MARK = "\u2581"  # SentencePiece's own sign for a space
RESERVED = 258  # the unknown id, the end of text, and 256 bytes
SMALLEST_VOCABULARY = RESERVED + 1
LARGEST_VOCABULARY = 2**24
COVERAGE = 0.9998  # the share of characters that are pieces of their own; rarer ones are spelt in bytes
SENTENCE_CHARACTERS = 4096
CUT_CHARACTERS = 512
END_OF_TEXT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[EOS]")


class Tokenizer(ABC):
    """`vocab_size`: ids run from 0 to it (specials included). `end_of_text`: the id between documents.
    `fingerprint`: sha256 of the file. `kind`: "sentencepiece" or "tokenizers"."""

    kind: str
    file_name: str
    vocab_size: int
    end_of_text: int

    def __init__(self, data: bytes):
        self._data = data
        self.fingerprint = hashlib.sha256(data).hexdigest()

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text, without any id before or after it."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """The text of some ids; bytes that are not UTF-8 become U+FFFD."""

    def save(self, folder: str | os.PathLike[str]) -> epath.Path:
        """Writes the tokenizer's file into the folder, byte for byte; returns its path."""
        path = place(folder) / self.file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, self._data)
        return path


class SentencePieceTokenizer(Tokenizer):
    kind = "sentencepiece"
    file_name = "tokenizer.model"

    def __init__(self, data: bytes, name: str = "tokenizer.model"):
        import sentencepiece

        super().__init__(data)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError:
            raise UserError(f"{name}: not a SentencePiece model") from None
        self.vocab_size = self._processor.vocab_size()
        self.end_of_text = self._processor.eos_id()
        if self.end_of_text < 0:
            raise UserError(f"{name}: this model has no end-of-sentence piece (eos), which separates documents")
        probe = "  a \n\t b "
        self._is_exact = self._processor.decode(self._processor.encode(probe)) == probe
        mark_bytes = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self._mark_ids = mark_bytes if self._is_exact and self._processor.unk_id() not in mark_bytes else None
        pieces = (self._processor.id_to_piece(i) for i in range(self.vocab_size))
        spans_a_cut = re.compile(f"[^{SPACE_MARK}]{SPACE_MARK}").search
        self._may_cut = self._is_exact and not any(spans_a_cut(piece) for piece in pieces)

    def encode(self, text: str) -> list[int]:
        if self._mark_ids is None or SPACE_MARK not in text:
            return self._encode(text)
        # The library would read the mark as a space: it is spelt in bytes instead.
        first, *rest = text.split(SPACE_MARK)
        ids = self._encode(first)
        for part in rest:
            ids += self._mark_ids
            ids += self._encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode([int(i) for i in ids])

    def _encode(self, text: str) -> list[int]:
        if not self._may_cut or len(text) <= CUT_CHARACTERS:
            return self._processor.encode(text)
        # No piece reaches over the gap before a space, so the parts give the same ids, several times faster.
        parts = self._processor.encode(list(_parts(text)), num_threads=1)
        return list(itertools.chain.from_iterable(parts))


class JsonTokenizer(Tokenizer):
    kind = "tokenizers"
    file_name = "tokenizer.json"

    def __init__(self, data: bytes, name: str = "tokenizer.json"):
        import tokenizers

        super().__init__(data)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(data.decode())
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{name}: not a file of the tokenizers library ({error})") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # a text that spells a special token is only text
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        found = [i for i in map(self._tokenizer.token_to_id, END_OF_TEXT_NAMES) if i is not None]
        if not found:
            raise UserError(f"{name}: has no end-of-text token; looked for {', '.join(END_OF_TEXT_NAMES)}")
        self.end_of_text = found[0]

    def encode(self, text: str) -> list[int]:
        # The batch call that keeps no character offsets is half as fast again as the plain one.
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def load(path: str | os.PathLike[str], sha256: str | None = None, of: str = "") -> Tokenizer:
    """A tokenizer from its file (.model or .json) or from a folder it was saved in.

    `sha256`: of the file that is meant; of a folder's files the one that has it is read. `of` says whose hash it is.
    Raises UserError where there is none, the file is not one, or none is the one that is meant.
    """
    found = place(path)
    tokenizer = _from_folder(found, sha256) if found.is_dir() else _load_file(found)
    if sha256 is not None and tokenizer.fingerprint != sha256:
        raise UserError(
            f"{path}: not the tokenizer of {of} (its sha256 is {tokenizer.fingerprint[:12]}, that one's "
            f"{sha256[:12]}); put that one there"
        )
    return tokenizer


def of_prepared(folder: str | os.PathLike[str], manifest: Manifest) -> Tokenizer:
    """The tokenizer of a prepared folder: the file that its manifest names, and no other that may lie beside it."""
    named = manifest.tokenizer
    tokenizer = load(place(folder) / named["file"], named["sha256"], f"{folder}/manifest.json")
    if (tokenizer.vocab_size, tokenizer.end_of_text) != (named["vocab_size"], named["end_of_text"]):
        raise UserError(
            f"{folder}/manifest.json: vocab_size={named['vocab_size']} and end_of_text={named['end_of_text']} are not "
            f"its tokenizer's, {tokenizer.vocab_size} and {tokenizer.end_of_text}"
        )
    return tokenizer


def _from_folder(folder: epath.Path, sha256: str | None) -> Tokenizer:
    names = (SentencePieceTokenizer.file_name, JsonTokenizer.file_name)
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise UserError(f"{folder}: no tokenizer in this folder; it should hold {' or '.join(names)}")
    meant = [path for path in found if hashlib.sha256(path.read_bytes()).hexdigest() == sha256]
    return _load_file((meant or found)[0])


def _load_file(path: epath.Path) -> Tokenizer:
    if path.suffix not in (".model", ".json"):
        raise UserError(f"{path}: unknown kind of tokenizer; the name should end in .model or .json")
    if not path.is_file():
        raise UserError(f"{path}: no such tokenizer file")
    if path.suffix == ".model":
        return SentencePieceTokenizer(path.read_bytes(), os.fspath(path))
    return JsonTokenizer(path.read_bytes(), os.fspath(path))


def train_sentencepiece(
    documents: Iterable[str],
    vocab_size: int,
    folder: str | os.PathLike[str],
    sample_characters: int = 10_000_000,
    seed: int = 0,
) -> Tokenizer:
    """Trains a byte-pair SentencePiece model of `vocab_size` ids and saves it in the folder.

    It sees at most about `sample_characters` characters, drawn over all documents. The same documents and seed give
    the same file. Raises UserError for a vocabulary too small for the bytes or too large for the text.
    """
    check_vocab_size(vocab_size)
    sample = Sample(sample_characters, seed)
    for document in documents:
        sample.add(document)
    excerpts = list(sample.excerpts())
    counts = _character_counts(excerpts)
    room = vocab_size - RESERVED
    # Half of the room for characters, half for what they merge to; a short text may not give that many merges, and
    # then all its characters may have pieces.
    for most in (room // 2 + 2, room):
        try:
            data = _train(excerpts, _alphabet(counts, min(most, room)), vocab_size)
            break
        except RuntimeError as error:
            found = re.search(r"value <= (\d+)", str(error))
            if found is None:
                raise
            given = found[1]
    else:
        raise UserError(
            f"--vocab-size={vocab_size}: the text gives only {given} pieces; use --vocab-size={given} or more text"
        )
    tokenizer = SentencePieceTokenizer(data)
    tokenizer.save(folder)
    return tokenizer


def _train(excerpts: list[str], alphabet: set[str], vocab_size: int) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_sentences(excerpts, alphabet), model_writer=model,
        model_type="bpe", vocab_size=vocab_size, byte_fallback=True, character_coverage=1.0,
        unk_id=0, eos_id=1, bos_id=-1, pad_id=-1,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
        allow_whitespace_only_pieces=True, max_sentence_length=4 * SENTENCE_CHARACTERS,
        num_threads=4,  # the count is written into the model: it must not follow the machine
        minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def check_vocab_size(vocab_size: int) -> None:
    """Raises UserError for a vocabulary that does not hold the bytes, or more than a model may have."""
    if vocab_size > LARGEST_VOCABULARY:
        raise UserError(f"--vocab-size={vocab_size}: must be at most {LARGEST_VOCABULARY}")
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"--vocab-size={vocab_size}: must be at least {SMALLEST_VOCABULARY} (256 bytes, the unknown id, the end of "
            "text and one character)"
        )


def _character_counts(excerpts: list[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for excerpt in excerpts:
        counts.update(excerpt)
    for never in ("\0", "\t", SPACE_MARK, "\u2047", "\u2585"):  # the trainer has uses of its own for these
        counts.pop(never, None)
    if not counts:
        raise UserError("--input: the text is empty, there is nothing to train a tokenizer on")
    return counts


def _alphabet(counts: Counter[str], most: int) -> set[str]:
    """The characters that become pieces: the commonest `most`, or fewer where those cover the text."""
    chosen: set[str] = set()
    covered = 0
    for character, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:most]:
        if covered >= COVERAGE * counts.total():
            break
        chosen.add(character)
        covered += count
    return chosen


def _sentences(excerpts: list[str], alphabet: set[str]) -> Iterator[str]:
    """The excerpts cut where a character is not in the alphabet: the trainer then adds none of its own."""
    others = {character for excerpt in excerpts for character in excerpt} - alphabet
    table = dict.fromkeys(map(ord, others), "\0")
    for excerpt in excerpts:
        for part in excerpt.translate(table).split("\0"):
            for start in range(0, len(part), SENTENCE_CHARACTERS):
                yield part[start : start + SENTENCE_CHARACTERS]


_GAP = re.compile("(?<=[^ ])(?= )")


def _parts(text: str) -> Iterator[str]:
    start = 0
    while gap := _GAP.search(text, start + CUT_CHARACTERS):
        yield text[start : gap.start()]
        start = gap.start()
    yield text[start:]
