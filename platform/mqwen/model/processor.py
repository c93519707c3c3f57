"""Conversations and pictures to what the model takes: one processor for training, serving and export."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image
from transformers import BatchEncoding

from mqwen.model.chat import IGNORED, EncodedChat, Message, encode_chat
from mqwen.model.errors import ArtifactError, ConversationError, PictureCountError
from mqwen.model.files import read_json
from mqwen.model.picture import CLIP_MEAN, CLIP_STD, MAX_PIXELS, Encoded, are_statistics, decode_picture, normalize
from mqwen.model.tokenizer import AllowedSpecial, MQWenTokenizer

PREPROCESSOR_FILE = "preprocessor_config.json"
BICUBIC = 3  # Pillow's number, which CLIP's files hold

Picture = Encoded | Image.Image


class MQWenProcessor:
    """A tokenizer and CLIP's preprocessing.

    Attributes:
        image_size: side of the square that the vision tower takes, in pixels.
        image_mean, image_std: of each channel, on the scale 0 to 1.
        max_pixels: largest width x height of a picture, checked before it is decoded.
    """

    def __init__(
        self,
        tokenizer: MQWenTokenizer,
        *,
        image_size: int = 224,
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.image_mean = tuple(image_mean)
        self.image_std = tuple(image_std)
        self.max_pixels = max_pixels

    @classmethod
    def from_pretrained(cls, directory: str | Path, **tokenizer_options: Any) -> Self:
        """Reads the processor from an artifact's folder."""
        return cls.from_components(qwen=directory, clip=directory, **tokenizer_options)

    @classmethod
    def from_components(cls, *, qwen: str | Path, clip: str | Path, **tokenizer_options: Any) -> Self:
        """Builds it from published folders: `qwen` holds qwen.tiktoken, `clip` holds preprocessor_config.json.

        Raises:
            ArtifactError: a file is missing or damaged, or asks for a preprocessing other than CLIP's.
            VocabularyError: qwen.tiktoken is damaged.
        """
        tokenizer = MQWenTokenizer.from_pretrained(qwen, **tokenizer_options)
        return cls(tokenizer, **_read_preprocessor(Path(clip) / PREPROCESSOR_FILE))

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes qwen.tiktoken, tokenizer_config.json, chat_template.jinja and CLIP's preprocessor_config.json."""
        self.tokenizer.save_pretrained(str(directory))
        settings = {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": self.image_size},
            "resample": BICUBIC,
            "do_center_crop": True,
            "crop_size": {"height": self.image_size, "width": self.image_size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
        }
        (Path(directory) / PREPROCESSOR_FILE).write_text(json.dumps(settings, indent=2) + "\n")

    def pixels(self, source: Picture, fast: bool = False) -> np.ndarray:
        """One picture as uint8 (3, image_size, image_size); see `decode_picture` for `fast` and the errors."""
        return decode_picture(source, self.image_size, fast=fast, max_pixels=self.max_pixels)

    def normalize(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (..., 3, H, W) to CLIP's float32. The model does the same to uint8 pixel_values on its device."""
        return normalize(pixels, self.image_mean, self.image_std)

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: Picture | Sequence[Picture] | None = None,
        *,
        messages: Sequence[Message] | Sequence[Sequence[Message]] | None = None,
        add_generation_prompt: bool = True,
        allowed_special: AllowedSpecial | None = None,
        padding: bool | str = False,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """Prepares prompts, or conversations, and their pictures for the model.

        Args:
            text: a prompt or several, in which <|extra_0|> marks a picture (when `images` are given). For text from
                users take `messages`.
            images: a picture, or a list of the pictures of all prompts in their order; each a file's bytes or a Pillow
                image.
            messages: a conversation or several. Pictures come from `images`, or from the parts' "image" key, not both.
            add_generation_prompt: with messages, open the assistant's turn. False gives training samples, with labels.
            allowed_special: control tokens that `text` may spell out; "all" for a prompt made by a chat template.
            padding: as in transformers; on the left.
            return_tensors: "pt" or "np".

        Returns:
            input_ids and attention_mask (B, T), each picture one placeholder; labels (B, T) for training samples;
            pixel_values float32 (pictures, 3, H, W) when there are pictures.

        Raises:
            ConversationError: messages that cannot be laid out, or that give pictures in a way that is not read.
            PictureError: an unreadable picture, or one past the limits.
            PictureCountError: not as many pictures as placeholders.
        """
        if (text is None) == (messages is None):
            raise TypeError("give either text or messages")
        if messages is not None and allowed_special is not None:
            raise TypeError("allowed_special goes with text: in messages no text can spell control tokens out")
        pictures: list[Any] = list(images) if isinstance(images, (list, tuple)) else [] if images is None else [images]
        training = False
        if messages is not None:
            batched = bool(messages) and not isinstance(messages[0], Mapping)
            conversations: Any = messages if batched else [messages]
            chats = [
                encode_chat(self.tokenizer, conversation, add_generation_prompt=add_generation_prompt)
                for conversation in conversations
            ]
            brought = [picture for conversation in conversations for picture in _pictures(conversation)]
            if pictures and brought:
                raise ConversationError(
                    f"pictures come both ways: {len(pictures)} in images=, {len(brought)} in the messages; choose one"
                )
            pictures = pictures or brought
            training = not add_generation_prompt
        else:
            batched = not isinstance(text, str)
            if allowed_special is None:
                allowed_special = (self.tokenizer.image_token,) if pictures else ()
            prompts: Any = text if batched else [text]
            chats = [EncodedChat(self.tokenizer.encode_text(prompt, allowed_special)) for prompt in prompts]
        placeholders = sum(chat.input_ids.count(self.tokenizer.image_token_id) for chat in chats)
        if placeholders != len(pictures):
            raise PictureCountError(placeholders, len(pictures))
        batch = self._pad(chats, padding, training)
        if not batched and return_tensors is None:
            batch = {name: rows[0] for name, rows in batch.items()}
        if pictures:
            batch["pixel_values"] = self.normalize(np.stack([self.pixels(picture) for picture in pictures]))
        return BatchEncoding(batch, tensor_type=return_tensors)

    def apply_chat_template(
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = True,
        padding: bool | str = False,
        return_tensors: str | None = None,
    ) -> Any:
        """transformers' method: the conversation as text, or with `tokenize` what `__call__` gives for it."""
        if not tokenize:
            return self.tokenizer.apply_chat_template(
                conversation, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        inputs = self(
            messages=conversation,
            add_generation_prompt=add_generation_prompt,
            padding=padding,
            return_tensors=return_tensors,
        )
        return inputs if return_dict else inputs["input_ids"]

    def decode(self, token_ids: Any, **options: Any) -> str | list[str]:
        return self.tokenizer.decode(token_ids, **options)

    def batch_decode(self, sequences: Any, **options: Any) -> list[str]:
        return self.tokenizer.batch_decode(sequences, **options)

    def _pad(self, chats: list[EncodedChat], padding: bool | str, training: bool) -> dict[str, Any]:
        rows = {"input_ids": [chat.input_ids for chat in chats]}
        batch = dict(self.tokenizer.pad(rows, padding=padding, padding_side="left", return_attention_mask=True))
        if training:
            labels = (chat.labels for chat in chats)
            batch["labels"] = [
                [IGNORED] * (len(ids) - len(row)) + row for ids, row in zip(batch["input_ids"], labels, strict=True)
            ]
        return batch


def _pictures(conversation: Sequence[Message]) -> list[Picture]:
    """The pictures in a conversation's parts."""
    found = []
    for number, message in enumerate(conversation):
        for part in message["content"] if not isinstance(message["content"], str) else ():
            if part["type"] != "image":
                continue
            # None: rows of a table have the keys of all parts in each.
            if unread := [key for key, value in part.items() if key not in ("type", "image") and value is not None]:
                raise ConversationError(
                    f"message {number}: {', '.join(unread)} of a picture is not read; give its file's bytes, or a "
                    "Pillow image, as 'image', or beside the messages as images="
                )
            if part.get("image") is not None:
                found.append(part["image"])
    return found


def _read_preprocessor(path: Path) -> dict[str, Any]:
    """What a CLIP folder's preprocessor_config.json sets, and a check that the rest is CLIP's own preprocessing."""
    settings = read_json(path)
    size, crop = settings.get("size", 224), settings.get("crop_size", 224)
    short = size.get("shortest_edge") if isinstance(size, dict) else size
    sides = [crop.get("height"), crop.get("width")] if isinstance(crop, dict) else [crop, crop]
    factor = settings.get("rescale_factor", 1 / 255)
    mean, std = settings.get("image_mean", CLIP_MEAN), settings.get("image_std", CLIP_STD)
    expected = {
        "do_convert_rgb": True,
        "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": BICUBIC,
    }
    wrong = [f"{name}={settings[name]}" for name, value in expected.items() if settings.get(name, value) != value]
    if type(factor) is not float or abs(factor - 1 / 255) > 1e-9:
        wrong.append(f"rescale_factor={factor}")
    if type(short) is not int or short < 1 or sides != [short, short]:
        wrong.append(f"size={size} with crop_size={crop}")
    if not are_statistics(mean, std):
        wrong.append(f"image_mean={mean} with image_std={std}")
    if wrong:
        raise ArtifactError(
            path,
            f"{', '.join(wrong)}; allowed is CLIP's preprocessing: RGB, bicubic resize of the short side, a square "
            "centre crop of the same size, rescale by 1/255, normalise by three means and three positive deviations",
        )
    return {"image_size": short, "image_mean": mean, "image_std": std}
