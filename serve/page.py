"""A chat page over the API, as an application of its own: `import_path: serve.page:build` beside the models'.

It speaks to the API as any client does, with the key that its visitor gives, and keeps neither.
"""

import atexit
import base64
import mimetypes
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application

FILES = Path(tempfile.mkdtemp(prefix="mqwen-page-"))  # uploads and examples
atexit.register(shutil.rmtree, FILES, ignore_errors=True)


class PageSettings(BaseModel):
    """api: where the models are. model: the name to ask for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    api: str = "http://127.0.0.1:8000/v1"
    model: str
    title: str = "MQWen"
    cpus: float = Field(0.5, ge=0)


def build(arguments: dict[str, Any]) -> Application:
    settings = PageSettings.model_validate(arguments)
    options: dict[str, Any] = {"num_cpus": settings.cpus}
    # One replica: an upload and the question about it must reach the same one.
    page = serve.deployment(Page, num_replicas=1, max_ongoing_requests=256, ray_actor_options=options)
    return page.bind(settings)


@serve.ingress()
class Page:
    def __init__(self, settings: PageSettings) -> None:
        self._settings = settings

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_page(self._settings)


def create_page(settings: PageSettings) -> FastAPI:
    # Gradio reads these when it is imported. Nothing here calls home, and uploads go with this process.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(FILES)}
    import gradio as gr

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    return gr.mount_gradio_app(app, interface(settings), path="/", max_file_size="20mb", show_error=True)


def interface(settings: PageSettings) -> Any:
    """A Gradio page: several turns, pictures by upload or paste, streaming, stop, examples."""
    import gradio as gr

    async def answer(
        message: dict[str, Any], history: list[dict[str, Any]], key: str, system: str, temperature: float
    ) -> AsyncIterator[str]:
        pictures = [picture_part(path) for path in message.get("files", [])]
        asked = {"role": "user", "content": [*pictures, *text_parts(message.get("text", ""))]}
        opening = [{"role": "system", "content": system}] if system else []
        messages: list[Any] = [*opening, *map(earlier, history), asked]
        text = ""
        async with openai.AsyncOpenAI(base_url=settings.api, api_key=key or "none", max_retries=0) as client:
            try:
                stream = await client.chat.completions.create(
                    model=settings.model, messages=messages, temperature=temperature, stream=True
                )
                async with stream:  # Stop leaves it, which ends the generation
                    async for chunk in stream:
                        text += chunk.choices[0].delta.content or "" if chunk.choices else ""
                        yield text
            except openai.APIStatusError as error:
                body = error.body if isinstance(error.body, dict) else {}
                raise gr.Error(str(body.get("message", error.message)), print_exception=False) from error
            except openai.APIError as error:
                raise gr.Error(error.message or "The API cannot be reached.", print_exception=False) from error

    return gr.ChatInterface(
        answer,
        multimodal=True,
        title=settings.title,
        textbox=gr.MultimodalTextbox(
            file_types=["image"],
            file_count="multiple",
            placeholder="Ask, and drop or paste pictures",
            stop_btn=True,  # one that is given has none of itself
        ),
        additional_inputs=[
            gr.Textbox(label="API key", type="password", elem_id="key"),
            gr.Textbox(label="System prompt"),
            gr.Slider(0, 2, value=0.7, step=0.1, label="Temperature"),
        ],
        additional_inputs_accordion=gr.Accordion("API key and options", open=True),
        examples=[
            [{"text": "What is in this picture?", "files": [example_picture()]}, None, None, None],
            [{"text": "Hello!", "files": []}, None, None, None],
        ],
        cache_examples=False,
        save_history=False,
    )


def text_parts(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}] if text else []


def picture_part(path: str) -> dict[str, Any]:
    """OpenAI's part of an uploaded file. Paths come from the client, so only what lies in our folder is read."""
    file = Path(path).resolve()
    if not file.is_relative_to(FILES):
        raise ValueError("no uploaded file")
    data = base64.b64encode(file.read_bytes()).decode()
    kind = mimetypes.guess_type(path)[0] or "image/png"
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}


def earlier(message: dict[str, Any]) -> dict[str, Any]:
    """A turn of Gradio's history as OpenAI's message. Of answers it keeps no outer blank lines, no tabs and no
    indentation that all lines share."""
    content = message["content"] if isinstance(message["content"], list) else [message["content"]]
    texts = [one if isinstance(one, str) else one["text"] for one in content if isinstance(one, str) or "text" in one]
    if message["role"] == "assistant":
        return {"role": "assistant", "content": "".join(texts)}
    pictures = [picture_part(one["file"]["path"]) for one in content if isinstance(one, dict) and "file" in one]
    return {"role": "user", "content": [*pictures, *text_parts("".join(texts))]}


def example_picture() -> str:
    """A drawing, made here so that the repository holds no picture for it."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (320, 240), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((40, 100, 160, 200), fill="firebrick")
    draw.ellipse((190, 40, 290, 140), fill="gold")
    image.save(FILES / "example.png")
    return str(FILES / "example.png")
