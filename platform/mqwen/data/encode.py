"""A sample as training takes it. Ingest runs the same, so that what it lets pass is what training can read."""

from __future__ import annotations

import numpy as np

from mqwen.data.errors import SampleError
from mqwen.data.sample import Sample
from mqwen.model import MQWenProcessor
from mqwen.model.chat import EncodedChat, encode_chat
from mqwen.model.errors import ConversationError, PictureError


def encode(processor: MQWenProcessor, sample: Sample | SampleError) -> tuple[EncodedChat, list[np.ndarray]]:
    """Ids and labels with one placeholder a picture, and the pictures as uint8 (3, image_size, image_size).

    Raises SampleError: what reading the sample gave, or for reason "conversation", "picture" or "picture count".
    """
    if isinstance(sample, SampleError):
        raise sample
    try:
        chat = encode_chat(processor.tokenizer, sample.messages)
        pictures = [processor.pixels(picture, fast=True) for picture in sample.pictures]
    except ConversationError as error:
        raise SampleError("conversation", str(error)) from error
    except PictureError as error:
        raise SampleError("picture", str(error)) from error
    places = chat.input_ids.count(processor.tokenizer.image_token_id)
    if places != len(pictures):
        raise SampleError("picture count", f"{places} places for pictures in the text, {len(pictures)} pictures")
    return chat, pictures
