"""Errors of the model room. Each is a ValueError that names what was given, what is allowed and the way out."""

from mqwen.errors import UserError


class MQWenError(UserError, ValueError):
    """Base of all errors that bad input to the model raises."""


class ConfigurationError(MQWenError):
    """A configuration that no network can be built from."""


class PictureCountError(MQWenError):
    """Placeholders in the ids and pictures given differ in number."""

    def __init__(self, placeholders: int, pictures: int) -> None:
        super().__init__(
            f"{placeholders} picture placeholders in input_ids, but {pictures} pictures were given; one placeholder "
            "stands for one picture, in row-major order. A prompt cut at a maximum length may have lost placeholders: "
            "drop their pictures too, or shorten the text instead."
        )
        self.placeholders = placeholders
        self.pictures = pictures


class PictureShapeError(MQWenError):
    """Pictures, or picture features, of a shape or dtype that the model cannot take."""


class TokenRangeError(MQWenError):
    """A token id outside of the vocabulary."""


class LengthError(MQWenError):
    """Labels, a mask or segment ids that are as long as neither the ids nor the expanded row."""


class SegmentError(MQWenError):
    """Segment ids that do not describe packed rows."""


class CacheError(MQWenError):
    """A cache that does not fit the call."""


class GenerationError(MQWenError):
    """A generation option that this model does not serve."""


class AdapterError(MQWenError):
    """An adapter that was made for other modules, shapes or kinds."""


class CheckpointError(MQWenError):
    """A checkpoint folder with a file that is missing, truncated or of another model."""


class VocabularyError(MQWenError):
    """A vocabulary file that is none, or a size that no vocabulary can have."""


class ConversationError(MQWenError):
    """A conversation that cannot be laid out; says which message, what was given and what is allowed."""


class PictureError(MQWenError):
    """Bytes that are no readable picture, or a picture past the limits."""


class ArtifactError(CheckpointError):
    """A file of a checkpoint that is missing, damaged or another model's: names it and, if one is at fault, the tensor.

    An artifact that is not whole raises this one for each of its files.
    """

    def __init__(self, file: object, problem: str, tensor: str | None = None) -> None:
        super().__init__(f"{file}: {f'tensor {tensor}: ' if tensor else ''}{problem}")
        self.file = str(file)
        self.tensor = tensor


class ArtifactVersionError(ArtifactError, ConfigurationError):
    """An artifact that a newer mqwen wrote."""
