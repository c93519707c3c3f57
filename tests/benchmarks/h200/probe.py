"""Alternatives for each part of a training step, measured alone: what the model's choices rest on.

Each figure is one line: seconds, and the rate or the share of what could be. A kernel that is not there says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from mqwen.model import MQWenConfig
from mqwen.model.attention import CAUSAL, AttentionPlan
from mqwen.model.blocks import Block, VisionTower
from mqwen.model.loss import CHUNK, linear_cross_entropy, softmax_gradient
from mqwen.model.rotary import rotary_tables
from tests.benchmarks.h200.measure import attempt, print_kernels, profiled, seconds


@dataclass(frozen=True)
class Probe:
    """Sizes: a forward pass has `rows` rows of `length` positions, or rows of four times that, as many positions."""

    device: torch.device
    config: MQWenConfig
    product: float  # FLOP/s, the ceiling
    copy: float  # bytes/s
    rows: int = 16
    length: int = 2048
    images: int = 80
    weights: int = 1_840_000_000
    dtype: torch.dtype = torch.bfloat16

    @property
    def positions(self) -> int:
        return self.rows * self.length

    def randn(self, *shape: int, std: float = 1.0) -> Tensor:
        return torch.empty(*shape, device=self.device, dtype=self.dtype).normal_(std=std)

    def say(self, name: str, took: float, flops: float = 0.0, moved: float = 0.0) -> None:
        rate = f"{flops / took / 1e12:7.1f} TFLOP/s {flops / took / self.product:5.2f}" if flops else ""
        rate += f"{moved / took / 1e12:7.2f} TB/s {moved / took / self.copy:5.2f}" if moved else ""
        print(f"  {name:52s} {took * 1e3:9.3f} ms  {rate}", flush=True)

    def time(self, name: str, work: Callable[[], Any], flops: float = 0.0, moved: float = 0.0) -> None:
        def run() -> None:
            self.say(name, seconds(work, self.device), flops, moved)

        attempt(f"  {name}", run)


def products(p: Probe) -> None:
    """The step's matrix products, forward and both backward ones, by either library."""
    c = p.config
    width = c.intermediate_size // 2
    shapes = {
        "c_attn": (p.positions, c.hidden_size, 3 * c.hidden_size),
        "attn.c_proj": (p.positions, c.hidden_size, c.hidden_size),
        "w1": (p.positions, c.hidden_size, width),
        "w1 and w2 in one": (p.positions, c.hidden_size, 2 * width),
        "mlp.c_proj": (p.positions, width, c.hidden_size),
        "lm_head, a chunk of 1/8": (p.positions // 8, c.hidden_size, c.vocab_size),
        "lm_head, a chunk of 1/4": (p.positions // 4, c.hidden_size, c.vocab_size),
    }
    for library in ("cublas", "cublaslt") if p.device.type == "cuda" else ("default",):
        print(f"products by {library}")
        if p.device.type == "cuda":
            torch.backends.cuda.preferred_blas_library(library)
        for name, (m, k, n) in shapes.items():
            x, w, y = p.randn(m, k), p.randn(n, k, std=0.02), p.randn(m, n)
            flops = 2.0 * m * k * n
            p.time(f"{name} {m}x{k}x{n} y = x W'", lambda x=x, w=w: x @ w.t(), flops)
            p.time(f"{name} dx = dy W", lambda y=y, w=w: y @ w, flops)
            p.time(f"{name} dW = dy' x", lambda y=y, x=x: y.t() @ x, flops)
            if n == c.vocab_size:
                total = torch.zeros(n, k, device=p.device)

                def add(y: Tensor = y, x: Tensor = x, total: Tensor = total) -> Tensor:
                    return torch.addmm(total, y.t(), x, out_dtype=torch.float32, out=total)

                p.time(f"{name} dW += dy' x in float32", add, flops)
    if p.device.type == "cuda":
        torch.backends.cuda.preferred_blas_library("default")


def attention_of(p: Probe, name: str, work: Callable[[Tensor, Tensor, Tensor], Tensor], runs: list[int]) -> Any:
    """Times forward and backward of an attention over (1, L, H, D) flat tensors, or what `work` makes of them."""
    heads, channels = p.config.num_attention_heads, p.config.kv_channels
    torch.manual_seed(0)
    q, k, v = (p.randn(p.positions, heads, channels).requires_grad_() for _ in range(3))
    grad = p.randn(p.positions, heads, channels)
    flops = 2.0 * heads * channels * sum(run * run for run in runs)  # causal: half of the square, two products

    def run() -> Any:
        out = work(q, k, v)
        forward = seconds(lambda: work(q, k, v), p.device)

        def both() -> None:
            torch.autograd.grad(work(q, k, v), (q, k, v), grad)

        taken = seconds(both, p.device)
        p.say(f"{name} forward", forward, flops)
        p.say(f"{name} backward", taken - forward, 2 * flops)
        return [x.detach().float().cpu() for x in (out, *torch.autograd.grad(out, (q, k, v), grad))]

    return attempt(f"  {name}", run)


def dense(p: Probe, length: int, backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def work(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        a, b, c = (x.view(-1, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(a, b, c, is_causal=True).transpose(1, 2).reshape(q.shape)

    return work


class CudnnRuns(torch.autograd.Function):
    """cuDNN's kernel over runs of unlike length, by torch's own operator for nested tensors."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int) -> Tensor:
        found = torch.ops.aten._cudnn_attention_forward(
            q, k, v, None, offsets, offsets, longest, longest, True, 0.0, True, False
        )
        out, lse, seed, offset = found[0], found[1], found[6], found[7]
        ctx.save_for_backward(q, k, v, out, lse, seed, offset, offsets)
        ctx.longest = longest
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, out, lse, seed, offset, offsets = ctx.saved_tensors
        longest = ctx.longest
        return (
            *torch.ops.aten._cudnn_attention_backward(
                grads[0].contiguous(),
                q,
                k,
                v,
                out,
                lse,
                seed,
                offset,
                None,
                offsets,
                offsets,
                longest,
                longest,
                0.0,
                True,
            ),
            None,
            None,
        )


def flex(p: Probe, runs: list[int]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    document = torch.repeat_interleave(torch.arange(len(runs)), torch.tensor(runs)).to(p.device)

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (document[i] == document[j]) & (i >= j)

    mask = torch.compile(create_block_mask)(seen, None, None, p.positions, p.positions, device=p.device)
    compiled = torch.compile(flex_attention)

    def work(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        a, b, c = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        return compiled(a, b, c, block_mask=mask)[0].transpose(0, 1)

    return work


def over_runs(offsets: Tensor, longest: int) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    empty = torch.cat([offsets, offsets[-1:].expand(16)])
    return {
        "varlen_attn": lambda q, k, v: varlen_attn(q, k, v, offsets, offsets, longest, longest, **CAUSAL),
        "varlen_attn, longest said to be twice as long": lambda q, k, v: varlen_attn(
            q, k, v, offsets, offsets, 2 * longest, 2 * longest, **CAUSAL
        ),
        "cuDNN over runs": lambda q, k, v: CudnnRuns.apply(q, k, v, offsets, longest),
        "cuDNN over runs, 16 empty ones": lambda q, k, v: CudnnRuns.apply(q, k, v, empty, longest),
    }


def attention(p: Probe) -> None:
    draw = torch.Generator().manual_seed(0)
    cuts = sorted((torch.randperm(p.positions // 8 - 1, generator=draw)[: p.rows * 3] + 1).mul(8).tolist())
    packed = [b - a for a, b in zip([0, *cuts], [*cuts, p.positions], strict=True)]
    layouts = {
        f"{p.rows} x {p.length}": [p.length] * p.rows,
        f"{p.rows // 4} x {4 * p.length}": [4 * p.length] * (p.rows // 4),
        f"{len(packed)} runs of {min(packed)} to {max(packed)}": packed,
    }
    for layout, runs in layouts.items():
        print(f"attention over {layout}")
        offsets = torch.tensor([0, *accumulate(runs)], dtype=torch.int32, device=p.device)
        longest = max(runs)
        expected = None
        if len(set(runs)) == 1:
            for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
                found = attention_of(p, backend.name, dense(p, longest, backend), runs)
                expected = expected or found
        for name, work in over_runs(offsets, longest).items():
            found = attention_of(p, name, work, runs)
            if found and expected:
                errors = [((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]
                print(f"    differs by {max(errors):.1e}", flush=True)
            expected = expected or found
        if p.device.type == "cuda" and longest != 4 * p.length:
            attempt("  flex", lambda runs=runs: attention_of(p, "flex_attention", flex(p, runs), runs))


def cross_entropy(p: Probe) -> None:
    """Forward and backward of head and loss over all positions; the products alone would take six times M C V."""
    c = p.config
    states = p.randn(p.positions, c.hidden_size).requires_grad_()
    weight = p.randn(c.vocab_size, c.hidden_size, std=0.02).requires_grad_()
    targets = torch.randint(0, c.vocab_size, (p.positions,), device=p.device)
    flops = 6.0 * p.positions * c.hidden_size * c.vocab_size
    print("cross-entropy with the head, forward and backward")

    def run(work: Callable[[], Tensor]) -> None:
        states.grad = weight.grad = None
        work().backward()

    def checkpointed() -> Tensor:
        from torch.utils.checkpoint import checkpoint

        def some(x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy((x @ weight.t()).float(), y, reduction="sum")

        parts = zip(states.split(p.length), targets.split(p.length), strict=True)
        return torch.stack([checkpoint(some, x, y, use_reentrant=False) for x, y in parts]).sum()  # type: ignore[misc]

    p.time("checkpointed chunks of a row", lambda: run(checkpointed), flops)
    kernel = torch.compile(softmax_gradient, dynamic=True) if p.device.type == "cuda" else softmax_gradient
    for chunk in (p.length, 2 * p.length, 4 * p.length, 8 * p.length):

        def fused(chunk: int = chunk) -> Tensor:
            return linear_cross_entropy(states, weight, targets, kernel, chunk)

        p.time(f"gradient with the forward, chunks of {chunk}", lambda f=fused: run(f), flops)
    some = p.randn(min(CHUNK, p.positions), c.vocab_size)
    theirs = targets[: len(some)]
    p.time("  its kernel alone, compiled", lambda: kernel(some, theirs), moved=6.0 * some.numel())


def optimizer(p: Probe) -> None:
    """One step over all weights: fused AdamW of float32 weights, the casts, the clipping, adding up gradients."""
    c = p.config
    count = max(1, p.weights // (c.hidden_size * c.hidden_size))
    sizes = [c.hidden_size * c.hidden_size] * count
    weights = [nn.Parameter(torch.zeros(n, device=p.device).normal_(std=0.02)) for n in sizes]
    half = [p.randn(n, std=1e-3) for n in sizes]
    n = sum(sizes)
    print(f"optimizer over {n / 1e9:.2f}e9 weights")
    for weight, grad in zip(weights, half, strict=True):
        weight.grad = grad.float()
    grads = [w.grad for w in weights if w.grad is not None]
    adam = torch.optim.AdamW(weights, lr=1e-5, fused=True)
    p.time("fused AdamW, float32", adam.step, moved=28.0 * n)
    p.time("clip_grad_norm_, foreach", lambda: nn.utils.clip_grad_norm_(weights, 1.0, foreach=True), moved=12.0 * n)
    p.time("the norm alone", lambda: torch.nn.utils.get_total_norm(grads), moved=4.0 * n)
    p.time("cast to bfloat16", lambda: torch._foreach_copy_(half, [w.detach() for w in weights]), moved=6.0 * n)
    p.time("float32 gradients += bfloat16", lambda: torch._foreach_add_(grads, half), moved=10.0 * n)


def vision(p: Probe) -> None:
    """The frozen tower's forward pass."""
    vision = p.config.vision_config
    places = (vision.image_size // vision.patch_size) ** 2 + 1
    h, w = vision.hidden_size, vision.intermediate_size
    flops = 2.0 * p.images * places * vision.num_hidden_layers * (4 * h * h + 2 * h * w + 2 * places * h)
    pictures = p.randn(p.images, 3, vision.image_size, vision.image_size)
    print(f"CLIP, {p.images} pictures")
    with torch.device(p.device):
        tower = VisionTower(vision).to(p.dtype).requires_grad_(False)
    with torch.no_grad():
        p.time("eager", lambda: tower(pictures), flops)
        if p.device.type != "cuda":
            return
        for name, flash in (("layers compiled, flash", True), ("layers compiled, cuDNN", False)):
            torch.backends.cuda.enable_flash_sdp(flash)
            torch._dynamo.reset()
            for layer in tower.vision_model.encoder.layers:
                layer.forward = torch.compile(type(layer).forward.__get__(layer), dynamic=False)
            p.time(name, lambda: tower(pictures), flops)
        for layer in tower.vision_model.encoder.layers:
            del layer.forward
        torch._dynamo.reset()
        whole = torch.compile(lambda x: tower(x))
        p.time("whole tower compiled, cuDNN", lambda: whole(pictures), flops)
        torch.backends.cuda.enable_flash_sdp(True)
        p.time("whole tower compiled, and pictures in twos", lambda: [whole(x) for x in pictures.split(p.images // 2)])


class FusedMLP(nn.Module):
    """w1 and w2 in one product; the weights stay apart."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp: Any = mlp

    def forward(self, x: Tensor) -> Tensor:
        up, gate = F.linear(x, torch.cat([self.mlp.w1.weight, self.mlp.w2.weight])).chunk(2, dim=-1)
        return self.mlp.c_proj(up * F.silu(gate))


def blocks(p: Probe) -> None:
    """Forward and backward of one block, eager and compiled, by attention kernel; then where its time goes."""
    c = p.config
    per_position = 24.0 * c.hidden_size**2 / 3 + 6.0 * c.hidden_size * c.intermediate_size / 2

    def block(fused: bool = False) -> nn.Module:
        torch.manual_seed(0)
        with torch.device(p.device):
            made = Block(c, 0).to(p.dtype)
        if fused:
            made.mlp = FusedMLP(made.mlp)  # type: ignore[assignment]
        return made

    def plan_of(length: int, packed: bool) -> AttentionPlan:
        positions = torch.arange(length, device=p.device).unsqueeze(0)
        plan = AttentionPlan(*rotary_tables(positions, None, c.rotary_dim, c.rotary_emb_base), None)
        if packed:
            plan.runs = [length] * (p.positions // length)
            plan.offsets = torch.arange(0, p.positions + 1, length, dtype=torch.int32, device=p.device)
            plan.longest = length
        else:
            plan.causal = True
        return plan

    def measure(name: str, compiled: bool, flash: bool, fused: bool, length: int, packed: bool) -> Callable[[], None]:
        torch._dynamo.reset()
        if p.device.type == "cuda":
            torch.backends.cuda.enable_flash_sdp(flash)
        made, plan = block(fused), plan_of(length, packed)
        forward = torch.compile(made.forward, fullgraph=True, dynamic=False) if compiled else made.forward
        hidden = p.randn(p.positions // length, length, c.hidden_size).requires_grad_()
        grad = p.randn(*hidden.shape)
        flops = p.positions * (per_position + 2.0 * c.hidden_size * length)

        def both() -> None:
            forward(hidden, plan).backward(grad)

        started = time.perf_counter()
        both()
        first = time.perf_counter() - started
        taken_forward = seconds(lambda: forward(hidden, plan), p.device)
        taken = seconds(both, p.device)
        p.say(f"{name} forward", taken_forward, flops)
        p.say(f"{name} backward", taken - taken_forward, 2 * flops)
        p.say(f"{name} both (first call {first:.0f} s)", taken, 3 * flops)
        return both

    print(f"one block over {p.positions} positions")
    rows = p.length
    cases = [("eager", False, True, False, rows, False)]
    if p.device.type == "cuda":
        cases += [
            ("compiled, flash", True, True, False, rows, False),
            ("compiled, cuDNN", True, False, False, rows, False),
            ("compiled, cuDNN, w1 w2 in one", True, False, True, rows, False),
            ("compiled, varlen", True, True, False, rows, True),
            ("compiled, cuDNN, long rows", True, False, False, 4 * rows, False),
        ]
    for case in cases:
        found = attempt(f"  {case[0]}", lambda case=case: measure(*case))
        if case[0] in ("eager", "compiled, cuDNN") and found is not None:
            attempt("  profile", lambda found=found: profile(found))
    if p.device.type == "cuda":
        torch.backends.cuda.enable_flash_sdp(True)


def profile(work: Callable[[], None]) -> None:
    """The kernels that take the time, of three calls."""
    with profiled() as trace:
        for _ in range(3):
            work()
    print_kernels(trace, 3, 24)


PARTS = {
    "attention": attention,
    "cross-entropy": cross_entropy,
    "blocks": blocks,
    "vision": vision,
    "optimizer": optimizer,
    "products": products,
}


def run(p: Probe, parts: list[str], minutes: float) -> None:
    """All parts that begin within `minutes`."""
    end = time.monotonic() + 60 * minutes
    for name in parts:
        if time.monotonic() > end:
            print(f"{name}: left out, the time is up", flush=True)
            continue
        started = time.monotonic()
        attempt(name, lambda name=name: PARTS[name](p))
        print(f"[{name}: {time.monotonic() - started:.0f} s]", flush=True)
