"""Training Qwen-1.8B with CLIP-L on one H200: `PYTHONPATH=platform:. python tests/benchmarks/train_h200.py`.

First the ceilings, then the cases that `--cases` names (patterns; all where none is given), as many as begin within
`--minutes`. Writes a dated Markdown file and the same as JSON into tests/benchmarks/results, or into `--out`.
`--ray` then trains under Ray, fed by its stream from JPEGs in shards. `--float8` trains in 8 bits and in bfloat16, the
same 200 steps on rows that can be learnt; `--draw` makes the picture of what that wrote, where there is matplotlib.
`--probe` measures the alternatives for each part of a step instead. `--plan` compares measured memory with what
jobs/plan.py estimates. `--tiny` shows on a CPU that all of it runs.
"""

from __future__ import annotations

import argparse
import fnmatch
import time
from pathlib import Path
from typing import Any

import torch

from mqwen.model import MQWenConfig, loss
from mqwen.train.recipes import QWEN_7B
from mqwen.train.settings import ComputeSettings
from tests.benchmarks.h200 import float8, probe, report
from tests.benchmarks.h200.cases import Case, Result, one_process, run_case, run_llava
from tests.benchmarks.h200.measure import attempt, ceilings, machine
from tests.benchmarks.h200.plan import print_plans
from tests.benchmarks.h200.rows import Shape

RESULTS = Path(__file__).parent / "results"
TINY = MQWenConfig(
    vocab_size=512,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    kv_channels=16,
    intermediate_size=96,
    seq_length=256,
    image_token_id=511,
    vision_config={
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    },
)


def cases(rows: int, length: int, every: int, larger: dict[str, Any]) -> list[Case]:
    """`rows` rows of `length` a pass, or a quarter of them four times as long, with a picture each `every` places.
    `larger` is the configuration of the larger model."""
    short, long = Shape(rows, length, every), Shape(max(1, rows // 4), 4 * length, every)
    eager = ComputeSettings()
    eight_bits = ComputeSettings(compile=True, float8=True)
    answers = Shape(rows, length, every, "answers")
    fewer = Shape(max(1, rows // 4), length, every, "answers")
    selective, full = (ComputeSettings(compile=True, recompute=what) for what in ("selective", "full"))
    return [
        Case(f"sft-full {length}", "sft-full", short),
        Case(f"sft-full {length} answers", "sft-full", answers),
        Case(f"sft-full {4 * length}", "sft-full", long),
        Case(f"sft-full {length} text", "sft-full", Shape(rows, length, every, "text")),
        Case(f"sft-full {length} one pass", "sft-full", short, passes=1),
        Case(f"sft-full {length} eager", "sft-full", Shape(max(1, rows // 2), length, every), compute=eager),
        Case(f"sft-full {length} selective", "sft-full", short, compute=selective),
        Case(f"sft-full {length} full", "sft-full", short, compute=full),
        Case(f"sft-full {4 * length} selective", "sft-full", long, compute=selective),
        Case(f"sft-full {4 * length} full", "sft-full", long, compute=full),
        Case(f"sft-full {length} checkpoint", "sft-full", short, saves=True),
        Case(f"sft-lora {length}", "sft-lora", short),
        Case(f"sft-lora {length} answers", "sft-lora", answers),
        Case(f"align {length}", "align", short),
        Case(f"align {length} answers", "align", answers),
        Case(f"sft-full {length} float8", "sft-full", short, compute=eight_bits),
        Case(f"sft-full {length} answers float8", "sft-full", answers, compute=eight_bits),
        Case(f"sft-lora {length} answers float8", "sft-lora", answers, compute=eight_bits),
        Case(f"sft-lora-7b {length} answers", "sft-lora-7b", fewer, config=larger),
        Case(f"sft-lora-7b {length} answers float8", "sft-lora-7b", fewer, compute=eight_bits, config=larger),
    ]


def check_softmax() -> bool:
    """Whether the kernel computes what plain torch does."""
    from mqwen.model.softmax_kernel import softmax_gradient_in_place

    logits = torch.randn(64, 151_936, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(0, 151_936, (64,), device="cuda").index_fill(0, torch.tensor([5], device="cuda"), -100)
    expected = loss.softmax_gradient(logits, targets)
    found = softmax_gradient_in_place(logits.clone(), targets)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a.float(), b.float(), rtol=1e-2, atol=1e-6)
    return True


def check_product() -> bool:
    """Whether this torch adds up products of bfloat16 in float32."""
    total, a = torch.ones(64, 64, device="cuda"), torch.randn(64, 64, device="cuda", dtype=torch.bfloat16)
    loss._add_product(total, a, a)
    assert torch.allclose(total, 1 + a.float() @ a.float(), atol=0.1)
    return True


def main(arguments: list[str] | None = None) -> list[Result]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=["*"], help="patterns of names, in the order to be run")
    parser.add_argument("--steps", type=int, default=4, help="measured steps of a case")
    parser.add_argument("--minutes", type=float, default=9.0, help="no case or part begins later")
    parser.add_argument("--probe", nargs="*", choices=list(probe.PARTS), help="parts to probe; all where none is named")
    parser.add_argument("--profile", action="store_true", help="prints the kernels of each case's last step")
    parser.add_argument("--ray", action="store_true", help="then the whole job, beside the bare loop on the same rows")
    parser.add_argument("--plan", type=Path, help="a JSON file of results: prints what memory is planned for its cases")
    parser.add_argument("--float8", action="store_true", help="first, what is learnt in 8 bits and in bfloat16")
    parser.add_argument("--float8-steps", type=int, default=200)
    parser.add_argument("--draw", type=Path, help="a float8-learning.json, whose curves are drawn beside it")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--list", action="store_true", help="names the cases")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    begun = time.monotonic()

    config, rows, length, every = (TINY, 4, 64, 32) if given.tiny else (MQWenConfig(), 16, 2048, 409)
    device = torch.device("cuda" if torch.cuda.is_available() and not given.tiny else "cpu")
    known = cases(rows, length, every, {} if given.tiny else QWEN_7B)
    llava = [f"transformers {length}", f"transformers {4 * length}"]
    names = [case.name for case in known] + llava
    if given.list:
        print("\n".join(names))
        return []
    if given.plan:
        print_plans(given.plan, config)
        return []
    if given.draw:
        print(float8.draw(given.draw))
        return []
    torch.manual_seed(0)
    about = machine(device)
    print(about, flush=True)
    found = ceilings(device, *((64, 0.01) if given.tiny else (8192, 2.0)))
    print(
        f"bf16 product {found.product / 1e12:.0f} TFLOP/s ({found.sustained / 1e12:.0f} over 2 s), "
        f"copy {found.copy / 1e12:.2f} TB/s",
        flush=True,
    )
    if given.probe is not None:
        if given.tiny:
            sizes = probe.Probe(device, config, found.product, found.copy, 4, 64, 2, 10**5, torch.float32)
        else:
            sizes = probe.Probe(device, config, found.product, found.copy)
        probe.run(sizes, given.probe or list(probe.PARTS), given.minutes)
        return []

    if device.type == "cuda" and attempt("addmm into float32", check_product) is None:
        loss._add_product = lambda total, a, b: total.add_(a @ b)  # type: ignore[assignment]
    if device.type == "cuda" and attempt("the kernel of the loss", check_softmax) is None:
        return []
    wanted = list(dict.fromkeys(name for pattern in given.cases for name in fnmatch.filter(names, pattern)))
    results = list[Result]()
    with one_process(device):
        if given.float8:
            shape, words = (Shape(4, 64, 32, "answers"), 32) if given.tiny else (Shape(4, 2048, 512, "answers"), 256)
            curves = attempt(
                "8 bits beside bfloat16",
                lambda: float8.train_both(
                    config, shape, words, given.float8_steps, device, given.out, compiled=not given.tiny
                ),
            )
            print(curves and curves.told(), flush=True)
        for name in wanted:
            if time.monotonic() - begun > 60 * given.minutes:
                print(f"{name}: left out, the time is up", flush=True)
                continue
            started = time.monotonic()
            if name in llava:
                shape = Shape(max(1, rows // 2), length, every) if name == llava[0] else Shape(1, 4 * length, every)
                result = attempt(name, lambda s=shape: run_llava(s, config, device, found, given.steps))
            else:
                case = next(case for case in known if case.name == name)
                result = attempt(name, lambda c=case: run_case(c, config, device, found, given.steps, given.profile))
            if result is not None:
                results.append(result)
                report.write(given.out, about, found, results)
                print(f"{report.line(result)}  [{time.monotonic() - started:.0f} s]", flush=True)
    if given.ray:
        from tests.benchmarks.h200.whole_job import Job, run_job  # Ray is wanted for nothing else here

        job = Job.tiny() if given.tiny else Job()
        results += attempt("the whole job", lambda: run_job(job, config, device, found)) or []
    report.write(given.out, about, found, results)
    return results


if __name__ == "__main__":
    main()
