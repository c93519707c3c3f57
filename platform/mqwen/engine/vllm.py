"""The second engine: vLLM's AsyncLLM on an export of the form llava, behind the same interface as ours.

It wants the extra mqwen[vllm]. Prompts go in as ids and pictures as the square that our processor makes, so that both
engines see the same input; adapters are not served.
"""

import asyncio
import hashlib
import json
import os
from collections import Counter
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from mqwen.engine.engine import EngineStats
from mqwen.engine.observer import follow
from mqwen.engine.request import (
    ContextLengthError,
    EngineClosedError,
    EngineFailedError,
    InvalidGrammarError,
    InvalidPictureError,
    Request,
    RequestError,
    TokenEvent,
    TokenLogprob,
    UnknownAdapterError,
    join,
)
from mqwen.engine.text import TextStream, token_bytes

if TYPE_CHECKING:
    from mqwen.model import MQWenProcessor

MAX_PICTURES = 64  # of one request, for which vLLM sets room aside


class VllmEngine:
    """folder: the export. kv_cache_bytes: None takes what vLLM finds right for a device of its own."""

    def __init__(
        self, folder: Path, processor: "MQWenProcessor", model_name: str, *, kv_cache_bytes: int | None = None
    ) -> None:
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = AsyncEngineArgs(
            str(folder),
            dtype=json.loads((folder / "config.json").read_text())["dtype"],  # "auto" would make float32 less
            limit_mm_per_prompt={"image": MAX_PICTURES},
            kv_cache_memory_bytes=kv_cache_bytes,
            max_logprobs=20,
            enable_log_requests=False,
        )
        self._processor = processor
        self._bytes = token_bytes(processor.tokenizer)
        self._seen = _Seen()
        self._engine = AsyncLLM.from_engine_args(arguments, stat_loggers=[self._seen.logger])
        self.max_length = self._engine.vllm_config.model_config.max_model_len
        config = self._engine.vllm_config.model_config.hf_config
        self.picture_positions: int = config.image_seq_length
        self._image_token: int = config.image_token_index
        self._live: set[str] = set()
        self._counts: Counter[str] = Counter()
        self._closing = False
        self._unfollow = follow(model_name, self.stats)

    async def generate(self, request: Request) -> AsyncGenerator[TokenEvent]:
        if self._closing:
            raise EngineClosedError("the engine is draining")
        if request.request_id in self._live:
            raise RequestError(f"request {request.request_id!r} is under way", "request_id")
        positions = self._check(request)
        pictures = await asyncio.gather(
            *(asyncio.to_thread(self._picture, one, place) for place, one in enumerate(request.pictures))
        )
        prompt: dict[str, Any] = {"prompt_token_ids": list(request.input_ids)}
        if pictures:
            prompt["multi_modal_data"] = {"image": list(pictures)}
            prompt["multi_modal_uuids"] = {"image": [_hash(one) for one in pictures]}
        self._live.add(request.request_id)
        # vLLM's own text keeps the bytes of a last character that is not whole for itself.
        stream, generated, ended = TextStream(self._bytes, request.stop), 0, "aborted"
        try:
            async for output in self._engine.generate(prompt, self._sampling(request, positions), request.request_id):
                (added,) = output.outputs
                generated += len(added.token_ids)
                self._counts["tokens"] += len(added.token_ids)
                if added.finish_reason is not None:
                    ended = "aborted" if added.finish_reason == "abort" else "finished"
                text = "".join(map(stream.push, added.token_ids))
                yield TokenEvent(
                    tuple(added.token_ids),
                    text if added.finish_reason is None else text + stream.flush(),
                    added.finish_reason,
                    positions,
                    generated,
                    tuple(
                        _logprob(*one, request.logprobs)
                        for one in zip(added.token_ids, added.logprobs or (), strict=False)
                    ),
                )
        except ValueError as error:  # vLLM's word for a request that it does not take
            ended = "failed"
            if request.json_schema is not None or request.regex is not None:
                param = "json_schema" if request.json_schema is not None else "regex"
                raise InvalidGrammarError(f"{param} cannot be followed", param) from error
            raise RequestError("vLLM does not take this request") from error
        except (RequestError, asyncio.CancelledError, GeneratorExit):
            raise
        except Exception as error:
            ended = "failed"
            raise EngineFailedError("vLLM failed; its log has the cause") from error
        finally:
            self._counts[ended] += 1
            self._live.discard(request.request_id)

    async def complete(self, request: Request) -> TokenEvent:
        return join([event async for event in self.generate(request)])

    def abort(self, request_id: str) -> None:
        if request_id in self._live:
            asyncio.get_running_loop().create_task(self._engine.abort(request_id))

    def stats(self) -> EngineStats:
        blocks = self._engine.vllm_config.cache_config.num_gpu_blocks or 1
        return EngineStats(
            waiting=self._seen.waiting,
            running=max(0, len(self._live) - self._seen.waiting),
            finished=self._counts["finished"],
            aborted=self._counts["aborted"],
            failed=self._counts["failed"],
            generated_tokens=self._counts["tokens"],
            preemptions=self._seen.preemptions,
            kv_blocks=blocks,
            kv_blocks_used=round(self._seen.usage * blocks),
            prefix_queries=self._seen.queries,
            prefix_hits=self._seen.hits,
            pictures_encoded=0,
            pictures_reused=0,
            picture_cache_bytes=0,
        )

    def health(self) -> bool:
        return not self._engine.errored

    async def drain(self) -> None:
        self._closing = True
        while self._live:
            await asyncio.sleep(0.05)
        self._unfollow()
        self._engine.shutdown()

    def _check(self, request: Request) -> int:
        """Positions of the prompt. Raises RequestError and its kinds."""
        if request.adapter is not None:
            raise UnknownAdapterError("vLLM serves no adapters here", "adapter")
        placeholders = list(request.input_ids).count(self._image_token)
        if placeholders != len(request.pictures) or placeholders > MAX_PICTURES:
            message = f"{len(request.pictures)} pictures were given for {placeholders} placeholders in the prompt"
            raise InvalidPictureError(f"{message}; at most {MAX_PICTURES} are allowed", "pictures")
        positions = len(request.input_ids) + placeholders * (self.picture_positions - 1)
        room, asked = self.max_length - positions, request.max_tokens
        if room < 1 or (asked or 1) > room:
            wanted = "" if asked is None else f" and {asked} tokens to generate are asked for"
            message = f"the prompt has {positions} positions{wanted}; the context has {self.max_length} for both"
            raise ContextLengthError(message, "input_ids" if room < 1 else "max_tokens")
        return positions

    def _picture(self, source: Any, place: int) -> Image.Image:
        try:
            pixels = self._processor.pixels(source) if isinstance(source, bytes) else source
        except ValueError as error:
            raise InvalidPictureError(f"Picture {place + 1}: {error}", f"pictures[{place}]") from error
        return Image.fromarray(pixels.transpose(1, 2, 0))

    def _sampling(self, request: Request, positions: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        structure = None
        if request.json_schema is not None:
            schema = request.json_schema
            structure = StructuredOutputsParams(json=schema if isinstance(schema, str) else json.dumps(schema))
        elif request.regex is not None:
            structure = StructuredOutputsParams(regex=request.regex)
        return SamplingParams(
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            min_p=request.min_p,
            repetition_penalty=request.repetition_penalty,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            seed=None if request.seed is None else request.seed % (1 << 63),
            stop=list(request.stop),
            stop_token_ids=[*self._processor.tokenizer.stop_ids, *request.stop_ids],
            ignore_eos=request.ignore_eos,
            max_tokens=request.max_tokens or self.max_length - positions,
            logprobs=request.logprobs,
            logit_bias={self._image_token: -100.0},  # a placeholder is no word of an answer
            structured_outputs=structure,
            output_kind=RequestOutputKind.DELTA,
        )


class _Seen:
    """What vLLM's own statistics last said."""

    def __init__(self) -> None:
        self.usage, self.waiting, self.queries, self.hits, self.preemptions = 0.0, 0, 0, 0, 0

    def logger(self, *_: Any) -> Any:
        from vllm.v1.metrics.loggers import StatLoggerBase

        seen = self

        class Logger(StatLoggerBase):
            def __init__(self) -> None:
                pass

            def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
                if scheduler_stats is not None:
                    seen.usage, seen.waiting = scheduler_stats.kv_cache_usage, scheduler_stats.num_waiting_reqs
                    seen.queries += scheduler_stats.prefix_cache_stats.queries
                    seen.hits += scheduler_stats.prefix_cache_stats.hits
                if iteration_stats is not None:
                    seen.preemptions += iteration_stats.num_preempted_reqs

            def log_engine_initialized(self) -> None:
                pass

        return Logger()


def _hash(picture: Image.Image) -> str:
    return hashlib.sha256(picture.tobytes()).hexdigest()


def _logprob(token: int, found: dict[int, Any], wanted: int | None) -> TokenLogprob:
    """found: of the likeliest tokens, and of this one wherever it ranks."""
    ranked = sorted(found.items(), key=lambda one: one[1].rank or 0)[: wanted or 0]
    return TokenLogprob(token, found[token].logprob, tuple((other, value.logprob) for other, value in ranked))
