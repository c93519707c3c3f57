"""Pictures against recordings of CLIP's own preprocessing, and everything the web sends instead of a clean picture."""

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from transformers import CLIPImageProcessorPil

from mqwen.model.chat import encode_chat
from mqwen.model.configuration import CLIP_MEAN, CLIP_STD
from mqwen.model.errors import CheckpointError, ConversationError, PictureCountError, PictureError
from mqwen.model.picture import decode_picture, normalize
from mqwen.model.processor import MQWenProcessor
from mqwen.model.tokenizer import MQWenTokenizer
from mqwen.model.vocabulary import train_vocabulary

FIXTURES = Path(__file__).parent / "fixtures_text"
GOLDEN = load_file(FIXTURES / "clip_pixels.safetensors")
STATISTICS = json.loads((FIXTURES / "tokenizer_golden.json").read_text())["preprocess"]
HORSE = (FIXTURES / "horse.png").read_bytes()


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> MQWenProcessor:
    path = tmp_path_factory.mktemp("vocabulary") / "qwen.tiktoken"
    train_vocabulary(["user assistant hello there a cat"], 290, path)
    return MQWenProcessor(MQWenTokenizer(path), image_size=28)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def photo(width: int = 640, height: int = 480) -> Image.Image:
    """Smooth shapes with some texture: a photograph's spectrum, more or less."""
    y, x = np.mgrid[0:height, 0:width] / 40.0
    noise = np.random.default_rng(0).normal(0, 12, (height, width, 3))
    waves = np.stack([np.sin(x) + np.cos(y), np.sin(x * 0.7 + y), np.cos(x * y / 20)], -1) * 50 + 128
    return Image.fromarray((waves + noise).clip(0, 255).astype(np.uint8))


# --- CLIP's preprocessing


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_pixels_equal_the_recorded_ones(name: str) -> None:
    file, size = name.rsplit(".", 1)
    pixels = decode_picture((FIXTURES / file).read_bytes(), int(size))
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.shape == (3, int(size), int(size))
    np.testing.assert_array_equal(pixels, np.broadcast_to(GOLDEN[name], pixels.shape))


@pytest.mark.parametrize("record", STATISTICS, ids=lambda record: f"{record['file']}-{record['crop']}")
def test_normalised_pixels_equal_the_recorded_ones(record: dict[str, Any]) -> None:
    source = (FIXTURES / record["file"]).read_bytes()
    values = normalize(decode_picture(source, record["crop"]), CLIP_MEAN, CLIP_STD)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values[:, 0, 0], record["corner"], atol=1e-6)
    middle = record["crop"] // 2
    np.testing.assert_allclose(values[:, middle, middle], record["center"], atol=1e-6)
    np.testing.assert_allclose([values.mean(), values.std(ddof=1)], [record["mean"], record["std"]], atol=1e-5)


@pytest.mark.parametrize(("width", "height"), [(640, 480), (333, 500), (28, 28), (17, 90), (1, 1), (2000, 31)])
def test_every_shape_equals_transformers(width: int, height: int) -> None:
    image = photo(width, height)
    clip = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    theirs = clip(image, return_tensors="np")["pixel_values"][0]
    ours = normalize(decode_picture(image, 28), CLIP_MEAN, CLIP_STD)
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_the_fast_way_is_close_and_skips_only_what_jpeg_can() -> None:
    image = photo(1024, 768)
    jpeg = encoded(image, "JPEG", quality=90)
    exact, fast = (decode_picture(jpeg, 224, fast=fast).astype(int) for fast in (False, True))
    assert 0 < np.abs(exact - fast).mean() < 2.0
    png = encoded(image, "PNG")
    np.testing.assert_array_equal(decode_picture(png, 224, fast=True), decode_picture(png, 224))
    small = encoded(image.resize((300, 400)), "JPEG")  # less than twice 224: nothing to skip
    np.testing.assert_array_equal(decode_picture(small, 224, fast=True), decode_picture(small, 224))


# --- what the web sends


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("fast", [False, True])
def test_exif_turns_the_picture_upright(orientation: int, fast: bool) -> None:
    upright = Image.new("RGB", (64, 96), "black")
    upright.paste("white", (0, 0, 32, 48))  # one bright quarter, top left
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode_picture(encoded(stored, "JPEG", exif=exif, quality=95), 16, fast=fast)
    assert pixels[:, 2, 2].min() > 200
    assert max(pixels[:, 2, 13].max(), pixels[:, 13, 2].max(), pixels[:, 13, 13].max()) < 60


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_lose_the_picture() -> None:
    jpeg = encoded(Image.new("RGB", (40, 40), "white"), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert decode_picture(jpeg, 28).min() > 250


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I;16B"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    if mode.startswith("I"):  # 16 bits: three quarters of white
        image = Image.frombytes(
            mode, (60, 40), np.full((40, 60), 49_152, ">u2" if mode.endswith("B") else "<u2").tobytes()
        )
        value = 192
    else:
        image = Image.new("RGB", (60, 40), (255, 255, 255)).convert(mode)
        value = 255
    for source in (image, encoded(image, "JPEG" if mode == "CMYK" else "PNG")):
        pixels = decode_picture(source, 28)
        assert pixels.shape == (3, 28, 28)
        assert np.abs(pixels.astype(int) - value).max() <= 1


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_counts(form: str) -> None:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("white", "black", "black")]
    options = {"lossless": True} if form == "WEBP" else {}
    source = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert decode_picture(source, 28).min() > 250


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises many pixels and holds none."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "0 bytes are no picture; allowed are JPEG, PNG, WEBP, GIF, BMP"),
        (b"hello, this is text", "19 bytes are no picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture"),
        (encoded(photo(), "TIFF"), "no picture"),
        (HORSE[:-4000], "cannot be decoded.*cut short or damaged"),
        (encoded(photo(), "JPEG")[:3000], "cannot be decoded"),
        (HORSE[:20], "cannot be decoded|no picture"),
        (png_header(9_000, 9_000), "9000 x 9000 pixels; allowed are 64,000,000 in all"),
        (png_header(60_000, 60_000), "pixels"),
        (png_header(300, 60_001), "long side of 200 short ones"),
        (Image.new("RGB", (3, 900)), "long side of 200 short ones"),
        (Image.new("F", (9, 9)), "mode F holds numbers of no known scale; convert it to mode L .* or I;16"),
        (Image.new("I", (9, 9)), "mode I holds numbers of no known scale"),
        (Image.new("RGB", (0, 0)), "the picture is 0 x 0: it has no pixels"),
        (Image.new("RGB", (0, 9)), "the picture is 0 x 9: it has no pixels"),
        ("picture.png", r"as a file's bytes or as a Pillow image, not as str: Path\(...\).read_bytes\(\)"),
        (Path("picture.png"), "not as PosixPath"),
        (np.zeros((9, 9, 3), np.uint8), r"not as ndarray: .*Image.fromarray"),
        (None, "not as NoneType"),
    ],
)
def test_what_is_no_picture_is_refused(source: Any, message: str) -> None:
    for fast in (False, True):
        with pytest.raises(PictureError, match=message):
            decode_picture(source, 28, fast=fast)


def test_the_limit_holds_before_anything_is_decoded(processor: MQWenProcessor) -> None:
    small = MQWenProcessor(processor.tokenizer, image_size=28, max_pixels=400 * 328 - 1)
    with pytest.raises(PictureError, match="400 x 328 pixels; allowed are 131,199 in all"):
        small.pixels(HORSE[:8000])  # cut short, which decoding would notice
    assert processor.pixels(HORSE).shape == (3, 28, 28)


def test_random_damage_gives_a_picture_or_a_typed_error() -> None:
    rng = np.random.default_rng(1)
    sources = [HORSE, encoded(photo(90, 60), "JPEG"), encoded(photo(90, 60), "WEBP"), encoded(photo(90, 60), "GIF")]
    refused = 0
    for trial in range(400):
        damaged = bytearray(sources[trial % 4])
        for at in rng.integers(0, len(damaged), 6):
            damaged[at] = rng.integers(256)
        try:
            assert decode_picture(bytes(damaged), 28, fast=trial % 8 > 3).shape == (3, 28, 28)
        except PictureError:
            refused += 1
    assert 0 < refused < 400


# --- the processor


def test_messages_and_pictures_become_inputs(processor: MQWenProcessor) -> None:
    ask = {"role": "user", "content": [{"type": "image", "image": HORSE}, {"type": "text", "text": "hello"}]}
    inputs = processor(messages=[ask], return_tensors="pt")
    assert (
        inputs["input_ids"][0].tolist() == encode_chat(processor.tokenizer, [ask], add_generation_prompt=True).input_ids
    )
    expected = processor.normalize(processor.pixels(HORSE))
    torch.testing.assert_close(inputs["pixel_values"], torch.from_numpy(expected)[None], rtol=0, atol=0)
    template = processor.apply_chat_template([ask], add_generation_prompt=True, tokenize=True, return_tensors="pt")
    assert template["input_ids"].equal(inputs["input_ids"])
    assert template["pixel_values"].equal(inputs["pixel_values"])


def test_a_training_batch_has_labels(processor: MQWenProcessor) -> None:
    answer = {"role": "assistant", "content": "a cat"}
    conversations = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hello there"}]}, answer],
        [{"role": "user", "content": "hello"}, answer],
    ]
    inputs = processor(messages=conversations, images=[HORSE], add_generation_prompt=False, padding=True)
    assert set(inputs) == {"input_ids", "attention_mask", "labels", "pixel_values"}
    for row, messages in enumerate(conversations):
        chat = encode_chat(processor.tokenizer, messages)
        pad = len(inputs["input_ids"][row]) - len(chat.input_ids)
        assert inputs["labels"][row] == [-100] * pad + chat.labels
        assert inputs["input_ids"][row] == [processor.tokenizer.eod_id] * pad + chat.input_ids
        assert inputs["attention_mask"][row] == [0] * pad + [1] * len(chat.input_ids)


def test_prompts_mark_pictures_only_beside_pictures(processor: MQWenProcessor) -> None:
    image = processor.tokenizer.image_token_id
    with_picture = processor(text="<|extra_0|>hello <|im_end|>", images=Image.new("RGB", (9, 9)))
    assert with_picture["input_ids"].count(image) == 1
    assert processor.tokenizer.im_end_id not in with_picture["input_ids"]
    assert image not in processor(text="<|extra_0|>hello")["input_ids"]
    template = processor.apply_chat_template([{"role": "user", "content": "hello"}], add_generation_prompt=True)
    prompt = processor(text=[template], allowed_special="all", return_tensors="np")
    assert prompt["input_ids"][0].tolist() == processor(messages=[{"role": "user", "content": "hello"}])["input_ids"]


def test_pictures_and_placeholders_must_agree(processor: MQWenProcessor) -> None:
    ask = [{"role": "user", "content": [{"type": "image"}, {"type": "image", "image": HORSE}]}]
    with pytest.raises(PictureCountError, match=r"2 picture placeholders.*1 pictures"):
        processor(messages=ask)
    with pytest.raises(PictureCountError, match=r"0 picture placeholders.*1 pictures"):
        processor(text="hello", images=[HORSE])
    with pytest.raises(ConversationError):
        processor(messages=[])
    for both in ({}, {"text": "x", "messages": ask}):
        with pytest.raises(TypeError, match="either text or messages"):
            processor(**both)
    with pytest.raises(TypeError, match="allowed_special goes with text"):
        processor(messages=ask, allowed_special="all")


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda source: Image.open(io.BytesIO(source))])
def test_one_picture_needs_no_list(processor: MQWenProcessor, kind: Any) -> None:
    expected = processor(text="<|extra_0|>", images=[HORSE])
    for images in (kind(HORSE), [kind(HORSE)], (kind(HORSE),)):
        found = processor(text="<|extra_0|>", images=images)
        np.testing.assert_array_equal(found["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize("images", ["horse.png", Path("horse.png"), np.zeros((9, 9, 3), np.uint8), iter([HORSE])])
def test_what_is_no_picture_is_not_taken_apart(processor: MQWenProcessor, images: Any) -> None:
    with pytest.raises(PictureError, match=f"not as {type(images).__name__}: "):
        processor(text="<|extra_0|>", images=images)


def test_pictures_in_messages_are_read_or_refused(processor: MQWenProcessor) -> None:
    def ask(**part: Any) -> Any:
        return [{"role": "user", "content": [{"type": "image", **part}]}]

    plain = processor(messages=ask(), images=HORSE)
    from_table = processor(messages=ask(image=HORSE, text=None, url=None))
    np.testing.assert_array_equal(from_table["pixel_values"], plain["pixel_values"])
    for key in ("url", "path", "image_url"):
        for images in (None, HORSE):
            with pytest.raises(ConversationError, match=f"message 0: {key} of a picture is not read; .* as 'image'"):
                processor(messages=ask(**{key: "x"}), images=images)
    with pytest.raises(ConversationError, match="both ways: 1 in images=, 1 in the messages; choose one"):
        processor(messages=ask(image=HORSE), images=[HORSE])


def test_it_survives_save_and_load_and_clip_reads_its_file(processor: MQWenProcessor, tmp_path: Path) -> None:
    original = MQWenProcessor(processor.tokenizer, image_size=28, image_mean=(0.1, 0.2, 0.3), image_std=(0.5, 0.6, 0.7))
    original.save_pretrained(tmp_path)
    loaded = MQWenProcessor.from_pretrained(tmp_path)
    assert loaded.tokenizer.fingerprint == processor.tokenizer.fingerprint
    assert (loaded.image_size, loaded.image_mean, loaded.image_std) == (28, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    image = photo(64, 50)
    theirs = CLIPImageProcessorPil.from_pretrained(tmp_path)(image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(loaded.normalize(loaded.pixels(image)), theirs, atol=2e-6)


def test_published_folders_give_a_processor(processor: MQWenProcessor, tmp_path: Path) -> None:
    for name in ("qwen", "clip"):
        (tmp_path / name).mkdir()
    processor.tokenizer.save_vocabulary(str(tmp_path / "qwen"))
    settings = tmp_path / "clip" / "preprocessor_config.json"
    settings.write_text(json.dumps({"size": 224, "crop_size": 224, "feature_extractor_type": "CLIPFeatureExtractor"}))
    built = MQWenProcessor.from_components(qwen=tmp_path / "qwen", clip=tmp_path / "clip")
    assert (built.image_size, built.image_mean, built.image_std) == (224, CLIP_MEAN, CLIP_STD)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, "preprocessor_config.json: is missing"),
        ({"do_center_crop": False}, "do_center_crop=False; allowed is CLIP's preprocessing"),
        ({"resample": 2}, "resample=2"),
        ({"rescale_factor": 1.0}, "rescale_factor=1.0"),
        ({"size": {"shortest_edge": 256}}, "size=.*256.* with crop_size=224"),
        ({"size": {"height": 224, "width": 224}}, "size="),
    ],
)
def test_another_preprocessing_is_refused(
    processor: MQWenProcessor, tmp_path: Path, settings: dict[str, Any] | None, message: str
) -> None:
    processor.tokenizer.save_pretrained(tmp_path)
    if settings is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=message):
        MQWenProcessor.from_pretrained(tmp_path)
