"""Qwen's vocabulary file `qwen.tiktoken`: one line a token, its bytes in base64 and its rank.

A token's rank is its id and its place in the order of merges, so the file is the whole byte-pair encoding. The 208
control tokens stand in no file: they follow the last rank.
"""

import base64
import binascii
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from mqwen.model.errors import VocabularyError

VOCABULARY_FILE = "qwen.tiktoken"
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
# How Qwen v1 cuts text before merging; no merge crosses such a cut. One digit a token.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte, which `tokenizer.json` uses to write bytes as text."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTE_TO_CHARACTER = _byte_characters()
CHARACTER_TO_BYTE = {character: byte for byte, character in BYTE_TO_CHARACTER.items()}


def token_string(token: bytes) -> str:
    """A token's bytes as `tokenizer.json` and transformers write them, e.g. b" a" as "Ġa"."""
    return "".join(BYTE_TO_CHARACTER[byte] for byte in token)


def read_ranks(path: str | Path) -> dict[bytes, int]:
    """Reads a vocabulary: token bytes to rank, in rank order.

    Raises:
        VocabularyError: a line that is not "base64 rank", ranks that do not run 0, 1, 2, ..., a token twice, or one of
            the 256 single bytes missing (some text could then not be encoded).
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            encoded, rank = line.split()
            token = base64.b64decode(encoded, validate=True)
            in_order = int(rank) == len(ranks)
        except (ValueError, binascii.Error) as error:
            raise VocabularyError(
                f"{path}, line {number}: {line[:80]!r} is not '<base64 of a token> <rank>'"
            ) from error
        if not in_order or token in ranks:
            raise VocabularyError(
                f"{path}, line {number}: token {token!r} has rank {int(rank)}; ranks must run 0, 1, 2, ... line by "
                f"line, each token once (expected rank {len(ranks)})"
            )
        ranks[token] = len(ranks)
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise VocabularyError(
            f"{path}: {len(ranks)} tokens, but the single bytes {missing[:8]} are missing; a byte-level vocabulary "
            "needs all 256 of them, or some text has no encoding"
        )
    return ranks


def write_ranks(ranks: dict[bytes, int], path: str | Path) -> None:
    """Writes a vocabulary in Qwen's format; `read_ranks` gives it back."""
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in sorted(ranks.items(), key=lambda x: x[1])]
    Path(path).write_bytes(b"".join(lines))


def train_vocabulary(texts: Iterable[str], size: int, path: str | Path) -> dict[bytes, int]:
    """Trains a byte-level BPE on texts and writes it to `path` in Qwen's format.

    Args:
        texts: what to learn merges from; normalised to NFC and cut by Qwen's pattern first.
        size: ranks wanted, at least 256; fewer come out when the texts hold no more pairs. The tokenizer has 208
            ids more.

    Returns:
        The ranks written.
    """
    if size < 256:
        raise VocabularyError(f"size {size}: a byte-level vocabulary holds the 256 bytes, so size must be at least 256")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer()
    # Training is single-threaded in its order of ties, so the same texts give the same file.
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=size, initial_alphabet=sorted(CHARACTER_TO_BYTE), show_progress=False),
    )
    learnt = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merged = (bytes(CHARACTER_TO_BYTE[c] for c in token) for token, _ in learnt if len(token) > 1)
    ranks = {token: rank for rank, token in enumerate([*(bytes([byte]) for byte in range(256)), *merged])}
    write_ranks(ranks, path)
    return ranks


def fast_tokenizer(ranks: dict[bytes, int]) -> Tokenizer:
    """The same encoding as a `tokenizers.Tokenizer`, which needs no code of ours to load.

    Control tokens in its input become control ids: it has no other way to mark them.
    """
    merges = [pair for token, rank in ranks.items() if (pair := _last_merge(ranks, token, rank)) is not None]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token_string(token): rank for token, rank in ranks.items()},
            merges=[(token_string(left), token_string(right)) for left, right in merges],
            ignore_merges=True,  # as tiktoken: a piece that is a token as a whole is not merged at all
        )
    )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _last_merge(ranks: dict[bytes, int], token: bytes, rank: int) -> tuple[bytes, bytes] | None:
    """The two tokens whose merge makes this one: what is left when only lower ranks may merge."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        candidates = [(ranks.get(parts[i] + parts[i + 1], rank), i) for i in range(len(parts) - 1)]
        lowest, at = min(candidates)
        if lowest >= rank:
            return None  # no merge makes it: only a piece equal to it becomes it
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None
