"""The API's replies, as OpenAI's: the whole of an answer, or chunk by chunk."""

import json
import time
from typing import Any

from serve.errors import ApiError
from serve.task import Chunk


class Reply:
    """The JSON objects of one answer. with_logprobs: the request asks for them."""

    def __init__(self, completion_id: str, model: str, with_logprobs: bool) -> None:
        self.model, self._with_logprobs = model, with_logprobs
        self._head = {"id": completion_id, "created": int(time.time()), "model": model}

    def completion(self, answer: Chunk) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = self._choice("message", message, _finish_reason(answer), self._logprobs(answer))
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage(answer)}

    def opening(self) -> dict[str, Any]:
        return self._chunk({"role": "assistant", "content": "", "refusal": None})

    def addition(self, added: Chunk) -> dict[str, Any]:
        return self._chunk({"content": added.text}, logprobs=self._logprobs(added))

    def end(self, last: Chunk) -> dict[str, Any]:
        return self._chunk({}, _finish_reason(last))

    def usage(self, last: Chunk) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage(last)}

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None, logprobs: Any = None) -> dict[str, Any]:
        choices = [self._choice("delta", delta, finish_reason, logprobs)]
        return {**self._head, "object": "chat.completion.chunk", "choices": choices}

    def _choice(self, kind: str, content: dict[str, Any], finish_reason: str | None, logprobs: Any) -> dict[str, Any]:
        return {"index": 0, kind: content, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, added: Chunk) -> dict[str, Any] | None:
        return {"content": list(added.logprobs), "refusal": None} if self._with_logprobs else None


def usage(last: Chunk) -> dict[str, int]:
    prompt, completion = last.prompt_tokens, last.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def sse(data: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _finish_reason(last: Chunk) -> str:
    if last.finish_reason not in ("stop", "length"):
        raise ApiError(503, "The generation was ended by the server. Try again.", code="aborted", retry_after=1)
    return last.finish_reason
