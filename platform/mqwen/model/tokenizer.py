"""Qwen v1's tokenizer for transformers, with tiktoken inside.

Reads a `qwen.tiktoken` of any size: ranks 0 to n-1, then 208 control tokens from n on. What looks like a control token
in text stays text unless `allowed_special` names it, so a user cannot end a turn or place a picture by typing.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, Self

import tiktoken
from jinja2 import TemplateError
from transformers import AddedToken, BatchEncoding, PreTrainedTokenizer, PreTrainedTokenizerFast

from mqwen.model.chat import CHAT_TEMPLATE, Message, encode_chat
from mqwen.model.errors import ArtifactError, CheckpointError, ConversationError, MQWenError
from mqwen.model.files import read_json, read_text
from mqwen.model.vocabulary import (
    CHARACTER_TO_BYTE,
    CONTROL_TOKENS,
    PATTERN,
    VOCABULARY_FILE,
    fast_tokenizer,
    read_ranks,
    token_string,
    write_ranks,
)

OPTIONS_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"

AllowedSpecial = Literal["all"] | Collection[str]

# tiktoken's matcher keeps one state for each character of a run of white space and aborts past a million of them.
_LONG_WHITE_SPACE = re.compile(r"(\s{100000})")


class MQWenTokenizer(PreTrainedTokenizer):
    """Text to ids and back.

    Attributes:
        eod_id: id of <|endoftext|>, which is also padding and transformers' end of sequence.
        im_start_id, im_end_id: ids of <|im_start|> and <|im_end|>.
        image_token_id: id of <|extra_0|>, one for each picture.
        stop_ids: what ends an answer: <|im_end|>, <|endoftext|>.
        fingerprint: SHA-256 of ranks, control tokens and pattern: equal for tokenizers that give equal ids.
    """

    vocab_files_names = {"vocab_file": VOCABULARY_FILE}  # noqa: RUF012 (transformers declares it as a plain dict)
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    padding_side = "left"  # generation continues at the right end
    image_token = "<|extra_0|>"

    def __init__(self, vocab_file: str | Path, **kwargs: Any) -> None:
        self._ranks = read_ranks(vocab_file)
        self._control = {token: len(self._ranks) + i for i, token in enumerate(CONTROL_TOKENS)}
        self._encoding = tiktoken.Encoding(
            "qwen", pat_str=PATTERN, mergeable_ranks=self._ranks, special_tokens=self._control
        )
        self.eod_id, self.im_start_id, self.im_end_id, self.image_token_id = (
            self._control[token] for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", self.image_token)
        )
        self.stop_ids = [self.im_end_id, self.eod_id]
        self._vocab: dict[str, int] | None = None
        # Ids come from the vocabulary alone: a tokenizer_config.json cannot move or add any.
        for key in ("added_tokens_decoder", "extra_special_tokens", "model_specific_special_tokens", "image_token"):
            kwargs.pop(key, None)
        self._added_tokens_decoder = {
            index: AddedToken(token, special=True, normalized=True) for token, index in self._control.items()
        }
        super().__init__(
            **{"pad_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "chat_template": CHAT_TEMPLATE, **kwargs}
        )

    @classmethod
    def from_pretrained(cls, directory: str | Path, *inputs: Any, **kwargs: Any) -> Self:
        """Reads a local folder that holds qwen.tiktoken: an artifact, a Qwen v1 checkpoint, or that file alone.

        Raises:
            CheckpointError: it does not; transformers would look for the name on the Hub.
            VocabularyError: the file is damaged.
            ArtifactError: another one is.
        """
        folder = Path(directory)
        if not (folder / VOCABULARY_FILE).is_file():
            raise CheckpointError(f"{directory} holds no {VOCABULARY_FILE}; give a local folder with that file")
        if (folder / TEMPLATE_FILE).exists():
            read_text(folder / TEMPLATE_FILE)
        if (folder / OPTIONS_FILE).exists():
            read_json(folder / OPTIONS_FILE)
        try:
            return super().from_pretrained(str(directory), *inputs, **kwargs)
        except MQWenError:
            raise
        except Exception as error:  # transformers checks no option, and fails by whatever comes of it
            raise ArtifactError(
                folder / OPTIONS_FILE, f"no tokenizer can be made with these options: {error}"
            ) from error

    @property
    def vocab_size(self) -> int:
        """Ids that mean something: ranks and control tokens. A model's embedding may have more rows."""
        return len(self._ranks) + len(CONTROL_TOKENS)

    @cached_property
    def longest_token(self) -> int:
        """Bytes of the longest rank: n bytes of text make n / longest_token tokens or more."""
        return max(map(len, self._ranks))

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for token in self._ranks:
            digest.update(len(token).to_bytes(4, "little") + token)
        digest.update(json.dumps([CONTROL_TOKENS, PATTERN, "NFC"]).encode())
        return digest.hexdigest()

    def get_vocab(self) -> dict[str, int]:
        if self._vocab is None:
            self._vocab = {token_string(token): rank for token, rank in self._ranks.items()} | self._control
        return self._vocab

    def encode_text(self, text: str, allowed_special: AllowedSpecial = ()) -> list[int]:
        """Text to ids, after NFC; nothing is added. Lone surrogates become U+FFFD.

        Args:
            allowed_special: control tokens that text may spell out, or "all". Never for text from users.

        Raises:
            ValueError: an allowed one that is no control token.
        """
        text = unicodedata.normalize("NFC", text)
        pieces = _LONG_WHITE_SPACE.split(text) if _LONG_WHITE_SPACE.search(text) else [text]
        if not allowed_special:
            return [token for piece in pieces for token in self._encoding.encode_ordinary(piece)]
        allowed: Any = allowed_special if isinstance(allowed_special, str) else set(allowed_special)
        if allowed != "all" and (isinstance(allowed, str) or not allowed <= self._control.keys()):
            raise ValueError(
                f'allowed_special={allowed_special!r}: "all" or a list of control tokens is allowed; those are '
                f"{', '.join(CONTROL_TOKENS[:4])} to {CONTROL_TOKENS[-1]}"
            )
        return [
            token
            for piece in pieces
            for token in self._encoding.encode(piece, allowed_special=allowed, disallowed_special=())
        ]

    def tokenize(
        self,
        text: str,
        pair: str | None = None,
        add_special_tokens: bool = False,
        *,
        allowed_special: AllowedSpecial = (),
        **kwargs: Any,
    ) -> list[str]:
        ids = self.encode_text(text, allowed_special) + (self.encode_text(pair, allowed_special) if pair else [])
        return self.convert_ids_to_tokens(ids)

    def _encode_plus(
        self, text: Any, text_pair: Any = None, *, allowed_special: AllowedSpecial = (), **kwargs: Any
    ) -> BatchEncoding:
        # transformers' own way takes ids as well as text; ids spare it tiktoken's tokens as strings and back.
        def to_ids(value: Any) -> Any:
            if isinstance(value, str):
                return self.encode_text(value, allowed_special) or value  # it refuses an empty list of ids
            return [to_ids(item) for item in value] if isinstance(value, (list, tuple)) else value

        if kwargs.pop("return_offsets_mapping", False):
            raise NotImplementedError("this tokenizer knows no offsets; `to_fast()` makes one that does")
        if kwargs.get("is_split_into_words"):
            return super()._encode_plus(text, text_pair, allowed_special=allowed_special, **kwargs)
        return super()._encode_plus(to_ids(text), to_ids(text_pair), **kwargs)

    def _decode(
        self,
        token_ids: int | Sequence[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        errors: str = "replace",
        **kwargs: Any,
    ) -> str:
        """Ids to text; what is no UTF-8 becomes U+FFFD, and so do ids without a meaning: negative ones, a model's rows
        past the control tokens. With `skip_special_tokens` those give no text, as control tokens.

        Raises:
            TypeError: an id that is no integer.
        """
        ids = list(token_ids) if isinstance(token_ids, Iterable) else [token_ids]
        if wrong := [i for i in ids if not isinstance(i, Integral)]:
            raise TypeError(f"a token id is an integer, not {wrong[0]!r:.80} ({type(wrong[0]).__name__})")
        end = len(self._ranks) if skip_special_tokens else self.vocab_size
        unknown = b"" if skip_special_tokens else "\N{REPLACEMENT CHARACTER}".encode()
        of = self._encoding.decode_single_token_bytes
        return b"".join(of(i) if 0 <= i < end else unknown for i in ids).decode("utf-8", errors)

    def _add_tokens(self, new_tokens: Sequence[str | AddedToken], special_tokens: bool = False) -> int:
        if unknown := [str(token) for token in new_tokens if str(token) not in self._control]:
            raise NotImplementedError(
                f"{unknown[0]!r} cannot be added: Qwen's vocabulary is what its file holds, and {len(CONTROL_TOKENS)} "
                f"control tokens, of which <|extra_1|> to {CONTROL_TOKENS[-1]} are free to be given a meaning"
            )
        return 0

    def _convert_token_to_id(self, token: str) -> int | None:
        return self.get_vocab().get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return token_string(self._encoding.decode_single_token_bytes(index)) if 0 <= index < self.vocab_size else ""

    def convert_tokens_to_string(self, tokens: Iterable[str]) -> str:
        return bytes(CHARACTER_TO_BYTE[c] for token in tokens for c in token).decode("utf-8", "replace")

    def apply_chat_template(
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        tools: Any = None,
        documents: Any = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """transformers' method; with `tokenize` ids come from `encode_chat`, so that no text becomes control ids.

        Raises:
            ConversationError: messages that the template, or Qwen's layout, has no place for.
        """
        if not tokenize:
            try:
                return super().apply_chat_template(
                    conversation,
                    tools=tools,
                    documents=documents,
                    chat_template=chat_template,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    tokenize=False,
                    **kwargs,
                )
            except TemplateError as error:  # the template's own, of which it makes its refusals too
                raise ConversationError(f"the chat template cannot be filled in: {error}") from error
        refused = {"tools": tools, "documents": documents, "chat_template": chat_template, **kwargs}
        refused["continue_final_message"] = continue_final_message
        if given := [name for name, value in refused.items() if value]:
            raise ConversationError(
                f"{', '.join(given)} cannot be used with tokenize=True: ids follow Qwen's layout. Render with "
                'tokenize=False, then encode with allowed_special="all" (which trusts every text in the conversation)'
            )
        batched = bool(conversation) and not isinstance(conversation[0], Mapping)
        chats = [
            encode_chat(self, messages, add_generation_prompt=add_generation_prompt).input_ids  # type: ignore[arg-type]
            for messages in (conversation if batched else [conversation])
        ]
        encoded = self(
            chats if batched else chats[0],
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            add_special_tokens=False,
            return_tensors=return_tensors,
        )
        return encoded if return_dict else encoded["input_ids"]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        path = Path(save_directory) / ((f"{filename_prefix}-" if filename_prefix else "") + VOCABULARY_FILE)
        write_ranks(self._ranks, path)
        return (str(path),)

    def to_fast(self) -> PreTrainedTokenizerFast:
        """The same ids from transformers' own classes, for programs that have no code of ours.

        Control tokens spelt out in its input become control ids, as with `allowed_special="all"`.
        """
        fast = fast_tokenizer(self._ranks)
        # Matched after NFC, as Qwen does: a composed character that swallows a token's last ">" unmakes it.
        fast.add_special_tokens([AddedToken(token, special=True, normalized=True) for token in CONTROL_TOKENS])
        return PreTrainedTokenizerFast(
            tokenizer_object=fast,
            pad_token=self.pad_token,
            eos_token=self.eos_token,
            padding_side=self.padding_side,
            model_max_length=self.model_max_length,
            chat_template=self.chat_template,
            model_input_names=self.model_input_names,
            extra_special_tokens={"image_token": self.image_token},
        )

    def save_fast(self, directory: str | Path) -> None:
        """Writes `to_fast()`: tokenizer.json, tokenizer_config.json, chat_template.jinja."""
        self.to_fast().save_pretrained(directory)
