"""What a checkpoint is: configuration, network, tokenizer, image processor, import and export."""

from mqwen.model.cache import MQWenCache
from mqwen.model.configuration import MQWenConfig
from mqwen.model.network import MQWenLMHeadModel, MQWenModel
from mqwen.model.processor import MQWenProcessor
from mqwen.model.tokenizer import MQWenTokenizer

__all__ = ["MQWenCache", "MQWenConfig", "MQWenLMHeadModel", "MQWenModel", "MQWenProcessor", "MQWenTokenizer"]
