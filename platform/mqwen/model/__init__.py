"""What a checkpoint is: configuration, network, tokenizer, image processor, import and export.

The names load when they are first used: tasks that only tokenize and decode pictures need no torch, whose import takes
longer than their work. `import mqwen.model.auto` makes them known to transformers' Auto classes.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mqwen.model.cache import MQWenCache
    from mqwen.model.configuration import MQWenConfig
    from mqwen.model.network import MQWenLMHeadModel
    from mqwen.model.processor import MQWenProcessor
    from mqwen.model.tokenizer import MQWenTokenizer
    from mqwen.model.transformer import MQWenModel

__all__ = ["MQWenCache", "MQWenConfig", "MQWenLMHeadModel", "MQWenModel", "MQWenProcessor", "MQWenTokenizer"]

_FILES = {
    "MQWenCache": "cache",
    "MQWenConfig": "configuration",
    "MQWenLMHeadModel": "network",
    "MQWenModel": "transformer",
    "MQWenProcessor": "processor",
    "MQWenTokenizer": "tokenizer",
}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FILES[name]}"), name)
