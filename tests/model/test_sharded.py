"""The network sharded from outside by FSDP2: ranks whose rows differ in kind stay in step."""

from __future__ import annotations

import socket
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard

from tests.model.golden import IMAGE_TOKEN, tiny_model, whole

LABELLED = 30  # what both ranks divide by


def rows(rank: int) -> dict[str, Any]:
    """Rank 0 has a picture and labels; rank 1 neither, and packed rows."""
    if rank == 0:
        ids = whole("c2_image.input_ids")[:1]
        labels = torch.where(ids == IMAGE_TOKEN, -100, ids)
        return {"input_ids": ids, "pixel_values": whole("c2_image.images_fp16")[:1], "labels": labels}
    ids = torch.arange(40).view(1, 40)
    segments = torch.arange(40).view(1, 40) // 15 + 1
    blank = torch.empty(0, 3, 28, 28, dtype=torch.float16)
    return {"input_ids": ids, "pixel_values": blank, "labels": torch.full_like(ids, -100), "segment_ids": segments}


def one_rank(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = tiny_model().train()
    for block in model.transformer.h:
        fully_shard(block)
    fully_shard(model)
    alone = tiny_model().train()
    loss = model(**rows(rank), logits_to_keep="labels", num_items_in_batch=LABELLED).loss
    loss.backward()
    expected = alone(**rows(0), num_items_in_batch=LABELLED).loss
    expected.backward()
    assert torch.allclose(loss, expected if rank == 0 else torch.zeros(()), atol=1e-6)
    for (name, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
        if theirs.grad is not None:
            assert torch.allclose(2 * ours.grad.full_tensor(), theirs.grad, atol=1e-5), name  # FSDP takes the mean
    dist.barrier()  # a rank that leaves while the other's last exchange is under way is ended with SIGABRT
    dist.destroy_process_group()


def test_a_rank_without_pictures_or_labels_stays_in_step() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(one_rank, args=(port,), nprocs=2)
