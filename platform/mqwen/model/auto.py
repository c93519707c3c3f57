"""transformers' Auto classes learn this model's: after `import mqwen.model.auto` AutoConfig, AutoTokenizer,
AutoProcessor, AutoModelForCausalLM and AutoModelForImageTextToText open an artifact.

Not in `mqwen.model` itself: to register a class it must be there, and all of them bring torch, which takes ten times as
long to import as what tasks need that only tokenize and decode.
"""

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from mqwen.model.configuration import MQWenConfig
from mqwen.model.network import MQWenLMHeadModel
from mqwen.model.processor import MQWenProcessor
from mqwen.model.tokenizer import MQWenTokenizer

AutoConfig.register(MQWenConfig.model_type, MQWenConfig)
AutoModelForCausalLM.register(MQWenConfig, MQWenLMHeadModel)
AutoModelForImageTextToText.register(MQWenConfig, MQWenLMHeadModel)
AutoTokenizer.register(MQWenConfig, tokenizer_class=MQWenTokenizer)
AutoProcessor.register(MQWenConfig, MQWenProcessor)
