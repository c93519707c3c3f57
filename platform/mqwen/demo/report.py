"""What the demo leaves behind: a table on the console, report.json and a page of pictures with their answers."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mqwen.demo.quiz import Question, score
from mqwen.demo.stages import Stages

SHOWN = 8  # questions of each kind on the page


def write_report(
    out: Path, stages: Stages, quiz: list[Question], shuffled: list[Question], peak_memory: int, loss: bytes
) -> None:
    """Writes report.json, loss.png and report.html into `out` and prints the tables."""
    accuracy, baseline = score(quiz), score(shuffled)
    report = {
        "seconds": {name: round(value, 1) for name, value in stages.seconds.items()},
        "accuracy": accuracy,
        "accuracy_shuffled_pictures": baseline,
        "questions": len(quiz),
        "peak_memory_bytes": peak_memory,
    }
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "loss.png").write_bytes(loss)
    (out / "report.html").write_text(_page(stages, quiz, accuracy, baseline, peak_memory, loss))

    console = Console(width=100)
    table = Table("stage", "seconds", "figure", title="The demo")
    table.columns[1].justify = "right"
    for name, seconds in stages.seconds.items():
        table.add_row(name, f"{seconds:.1f}", stages.figures.get(name, ""))
    table.add_row("all", f"{sum(stages.seconds.values()):.1f}", f"peak memory {peak_memory / 2**30:.1f} GiB")
    console.print(table)
    answers = Table("question", "language", "right", "with shuffled pictures", title="Exact answers over HTTP")
    for kind, languages in accuracy.items():
        for language, share in languages.items():
            answers.add_row(kind, language, f"{share:.1%}", f"{baseline[kind][language]:.1%}")
    console.print(answers)
    console.print(
        f"{out}/report.html shows pictures, {out}/report.json holds the figures, {out}/loss.png the loss curve"
    )


def _page(
    stages: Stages,
    quiz: list[Question],
    accuracy: dict[str, dict[str, float]],
    baseline: dict[str, dict[str, float]],
    peak_memory: int,
    loss: bytes,
) -> str:
    rows = "".join(
        f"<tr><td>{kind}<td>{language}<td>{share:.1%}<td>{baseline[kind][language]:.1%}"
        for kind, languages in accuracy.items()
        for language, share in languages.items()
    )
    times = "".join(
        f"<tr><td>{name}<td>{seconds:.1f} s<td>{html.escape(stages.figures.get(name, ''))}"
        for name, seconds in stages.seconds.items()
    )
    shown = [question for kind in accuracy for question in [q for q in quiz if q.kind == kind][:SHOWN]]
    cards = "".join(
        f'<figure><img alt="" src="{_data(question.picture, "jpeg")}"><figcaption>{html.escape(question.text)}<br>'
        f'<b class="{"right" if question.right else "wrong"}">{html.escape(question.given)}</b>'
        f"{'' if question.right else f' (right: {html.escape(question.expected)})'}</figcaption></figure>"
        for question in shown
    )
    return f"""<!doctype html>
<meta charset="utf-8"><title>MQWen demo</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
td, th {{ border: 1px solid #ccc; padding: .2rem .7rem; text-align: left }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 1rem }}
figure {{ margin: 0; border: 1px solid #ddd; border-radius: 6px; padding: .6rem; font-size: .85rem }}
figure img {{ width: 100%; image-rendering: pixelated; border-radius: 3px }}
.right {{ color: #18794e }} .wrong {{ color: #c62828 }} .loss {{ max-width: 100% }}
</style>
<h1>MQWen demo</h1>
<p>{len(quiz)} questions over HTTP about pictures made of digits that training never saw.</p>
<table><tr><th>question<th>language<th>right<th>with shuffled pictures{rows}</table>
<div class="cards">{cards}</div>
<h2>Stages</h2>
<table><tr><th>stage<th>time<th>figure{times}</table>
<p>Peak memory of all processes: {peak_memory / 2**30:.1f} GiB.</p>
<img class="loss" alt="Loss curve" src="{_data(loss, "png")}">
"""


def _data(picture: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
