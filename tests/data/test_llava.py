"""LLaVA's format, record by record: what is taken, what is rejected and why, and that nothing raises otherwise."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mqwen.data.conversation import check_text, from_llava
from mqwen.data.encode import encode
from mqwen.data.errors import DataError, EmptyDatasetError, SampleError
from mqwen.data.sample import Sample
from mqwen.data.sources.llava import LlavaSource
from mqwen.model import MQWenProcessor
from mqwen.storage import locate
from tests.data.making import picture


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


TALK = [human("<image>\nWhat?"), gpt("That.")]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "inside").mkdir()
    (folder / "a.png").write_bytes(picture(1))
    (folder / "inside" / "b c.jpg").write_bytes(picture(2, form="JPEG"))
    (folder / "none.jpg").write_bytes(b"<html>404 Not Found</html>")
    (folder / "cut.jpg").write_bytes(picture(3, (300, 300), form="JPEG")[:900])
    (folder / "empty.jpg").write_bytes(b"")
    (folder.parent / "outside.png").write_bytes(picture(4))
    return folder


def read(pictures: Path, records: Any, size: int = 1000) -> dict[str, Sample | SampleError]:
    file = pictures.parent / "conversations.json"
    file.write_text(json.dumps(records))
    source = LlavaSource(locate(file), locate(pictures))
    found = [pair for chunk in source.chunks(size) for pair in source.read(chunk)]
    assert len({key for key, _ in found}) == len(found) == len(records)
    return dict(found)


def test_a_record_becomes_a_sample(pictures: Path) -> None:
    records = [
        {"id": "one", "image": "a.png", "conversations": TALK},
        {"id": "text", "conversations": [human("Hi"), gpt("Hello.")]},
        {
            "id": "null",
            "image": None,
            "conversations": [{"from": "system", "value": "Be brief."}, human("Hi"), gpt("!")],
        },
        {
            "id": 4,
            "image": ["inside/b c.jpg", "./a.png"],
            "conversations": [human("This <image> or that\n<image>\n?"), gpt("This."), human("Why?"), gpt("So.")],
        },
    ]
    found = read(pictures, records)
    image, a, b = {"type": "image"}, (pictures / "a.png").read_bytes(), (pictures / "inside" / "b c.jpg").read_bytes()

    def text(value: str) -> dict[str, str]:
        return {"type": "text", "text": value}

    def turn(role: str, *parts: dict[str, str]) -> dict[str, Any]:
        return {"role": role, "content": list(parts)}

    assert found == {
        "one": Sample("one", [turn("user", image, text("What?")), turn("assistant", text("That."))], [a], "one"),
        "text": Sample("text", [turn("user", text("Hi")), turn("assistant", text("Hello."))], [], "text"),
        "null": Sample(
            "null",
            [turn("system", text("Be brief.")), turn("user", text("Hi")), turn("assistant", text("!"))],
            [],
            "null",
        ),
        "4": Sample(
            "4",
            [
                turn("user", text("This "), image, text(" or that"), image, text("?")),
                turn("assistant", text("This.")),
                turn("user", text("Why?")),
                turn("assistant", text("So.")),
            ],
            [b, a],
            "4",
        ),
    }


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"image": "none.jpg", "conversations": TALK}, "picture", "are no picture"),
    ({"image": "cut.jpg", "conversations": TALK}, "picture", "cut short or damaged"),
    ({"image": "empty.jpg", "conversations": TALK}, "picture", "0 bytes are no picture"),
    ({"image": "gone.jpg", "conversations": TALK}, "missing picture", "gone.jpg does not exist"),
    ({"image": "inside", "conversations": TALK}, "missing picture", "inside does not exist or is no file"),
    ({"image": "a.png/b.png", "conversations": TALK}, "missing picture", "does not exist"),
    ({"image": "n" * 5000, "conversations": TALK}, "missing picture", "does not exist"),
    ({"image": "nul\0", "conversations": TALK}, "missing picture", "does not exist"),
    ({"image": "half \ud800", "conversations": TALK}, "missing picture", "does not exist"),
    ({"image": "../outside.png", "conversations": TALK}, "picture path", "'../outside.png' is no path inside"),
    ({"image": "inside/../../outside.png", "conversations": TALK}, "picture path", "is no path inside"),
    ({"image": "/etc/passwd", "conversations": TALK}, "picture path", "'/etc/passwd' is no path inside"),
    ({"image": 5, "conversations": TALK}, "picture path", "5 is no path"),
    ({"image": [None], "conversations": TALK}, "picture path", "None is no path"),
    ({"image": {"path": "a.png"}, "conversations": TALK}, "picture path", "is no path"),
    ({"image": ["a.png", "a.png"], "conversations": TALK}, "picture count", "1 places for pictures in the text, 2"),
    ({"conversations": TALK}, "picture count", "1 places for pictures in the text, 0"),
    ({"image": "a.png", "conversations": [human("?"), gpt("!")]}, "picture count", "0 places for pictures"),
    ({"conversations": [{"from": "robot", "value": "x"}]}, "conversation", "'robot'.*allowed is 'from' human, gpt"),
    ({"conversations": [human("Hi"), {"from": "gpt"}]}, "conversation", "with a text as 'value'"),
    ({"conversations": ["Hi"]}, "conversation", "a turn is 'Hi'"),
    ({"conversations": "Hi"}, "conversation", "'conversations' is str"),
    ({}, "conversation", "'conversations' is NoneType"),
    ({"conversations": []}, "conversation", "empty"),
    ({"conversations": [human("Hi")]}, "conversation", "ends with an answer"),
    ({"image": "a.png", "conversations": [human("?"), gpt("<image>")]}, "conversation", "outside an answer"),
]


@pytest.mark.parametrize(("record", "reason", "detail"), BAD)
def test_a_bad_record_is_rejected(
    pictures: Path, processor: MQWenProcessor, record: dict[str, Any], reason: str, detail: str
) -> None:
    (found,) = read(pictures, [{"id": "x"} | record]).values()
    with pytest.raises(SampleError, match=f"^{reason}: .*{detail}") as raised:
        if isinstance(found, SampleError):
            raise found
        encode(processor, found)
    assert raised.value.reason == reason


def test_keys_are_names_that_tars_can_hold(pictures: Path) -> None:
    def record(identity: Any, text: str) -> dict[str, Any]:
        return {"id": identity, "conversations": [human(text), gpt("!")]}

    ids = ["a/b.c", "a_b_c", "../up", "7", 7, "7-2", "图", "x" * 300, "", None, ["l"], "half \ud800", "new\nline"]
    records = [record(identity, str(n)) for n, identity in enumerate(ids)]
    records.append({"conversations": [human("no id"), gpt("!")]})
    found = read(pictures, records, size=3)
    assert list(found)[:6] == ["a_b_c", "a_b_c-2", "___up", "7", "7-2", "7-2-"]
    for key, sample in found.items():
        assert isinstance(sample, Sample)
        assert sample.key == key
        assert key.isascii() and 0 < len(key) < 80 and not set(key) & set("/. \n")
    assert [sample.source for sample in found.values() if isinstance(sample, Sample)][:3] == ["a/b.c", "a_b_c", "../up"]


def test_one_id_for_several_conversations(pictures: Path) -> None:
    """LLaVA's own files name a picture's conversations alike: these are all kept."""
    records = [{"id": "7", "conversations": [human(text), gpt("!")]} for text in ("one", "two", "one")]
    found = read(pictures, records, size=2)
    assert list(found) == ["7", "7-2", "7-3"]
    assert all(isinstance(sample, Sample) for sample in found.values())


def test_bytes_that_are_no_text_spoil_their_record_alone(pictures: Path) -> None:
    file = pictures.parent / "bytes.json"
    good, bad = ({"id": name, "conversations": [human("Hi"), gpt("!")]} for name in ("good", "bad!"))
    file.write_bytes(json.dumps([good, bad]).encode().replace(b"Hi", b"H\xff", 2).replace(b"H\xff", b"Hi", 1))
    (_, one), (_, two) = (pair for chunk in LlavaSource(locate(file), locate(pictures)).chunks(9) for pair in chunk)
    check_text(from_llava(one["conversations"]))
    with pytest.raises(SampleError, match="text: its text holds the byte 0xff, which is not UTF-8"):
        check_text(from_llava(two["conversations"]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe\xff", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"a": 1}', "must hold a list of conversations"),
        (b"[1]", "must hold a list of conversations"),
        (b"[]", "holds no conversations"),
        (None, "does not exist or is no file; it should be a JSON file"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "conversations.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        LlavaSource(locate(file), locate(tmp_path)).chunks(10)
    assert isinstance(raised.value, EmptyDatasetError) == (content == b"[]")


def test_a_pictures_folder_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "conversations.json").write_text(json.dumps([{"conversations": TALK}]))
    with pytest.raises(DataError, match=r"the pictures' folder .*nowhere does not exist"):
        LlavaSource(locate(tmp_path / "conversations.json"), locate(tmp_path / "nowhere")).chunks(10)


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=5)
    | st.sampled_from(["human", "gpt", "<image>", "a.png"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["from", "value", "x"]), inner),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries({}, optional={"id": anything, "image": anything, "conversations": anything}), min_size=1
    )
)
def test_no_record_raises(pictures: Path, processor: MQWenProcessor, records: list[dict[str, Any]]) -> None:
    for sample in read(pictures, records).values():
        if isinstance(sample, Sample):
            try:
                encode(processor, sample)
            except SampleError:
                continue
