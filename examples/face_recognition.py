"""Face recognition as in insightface's arcface_torch: a backbone in DDP, and a classifier sharded over the ranks.

    torchrun --nproc_per_node 2 examples/face_recognition.py --out runs/faces

Runs on CPUs and GPUs. The pictures are synthetic: each mixes the traits of its identity with stronger random ones, as
pose and light do. Verification asks whether two pictures of identities that were not trained show the same one. Run the
command again, with any number of ranks, to continue from the last checkpoint.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from megacid import Margin, PartialFC, RowSGD, clip_grad_norm_

UNSEEN, TRAITS, PIXELS, WIDTH, BATCH, LR, EVERY = 1_000, 16, 256, 64, 256, 0.3, 20
Result = tuple[int, float, float]  # step, loss, verification accuracy


class Faces:
    """Identities to train on, followed by UNSEEN ones to verify."""

    def __init__(self, identities: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.traits = torch.randn(identities + UNSEEN, TRAITS, generator=generator)
        self.mixing = torch.randn(4 * TRAITS, PIXELS, generator=generator) / 8

    def pictures(self, ids: Tensor, generator: torch.Generator) -> Tensor:
        own = 1.5 * torch.randn(len(ids), 3 * TRAITS, generator=generator)
        return (torch.cat([self.traits[ids], own], 1) @ self.mixing).tanh()

    @torch.no_grad()
    def verification(self, network: nn.Module, device: torch.device) -> float:
        """Share of right answers on half of the pairs, with the threshold that is best on the other half."""
        generator, left = torch.Generator().manual_seed(0), torch.arange(-UNSEEN, 0)
        same = left % 2 == 0
        right = torch.where(same, left, left.roll(1))
        first, second = (network(self.pictures(ids, generator).to(device)) for ids in (left, right))
        (cosine, other), (same, same_other) = F.cosine_similarity(first, second).cpu().chunk(2), same.chunk(2)
        threshold = other[((other >= other[:, None]) == same_other).sum(1).argmax()]
        return float(((cosine >= threshold) == same).float().mean())


def train(out: Path, steps: int, identities: int, stop: int | None = None) -> list[Result]:
    """Train to step `stop` of a run of `steps`; returns the results at the checkpoints."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(PIXELS, 256), nn.PReLU(), nn.Linear(256, WIDTH)).to(device)
    backbone, faces, results = DistributedDataParallel(network), Faces(identities), []
    head = PartialFC(identities, WIDTH, sample_rate=0.1, margin=Margin.arcface(0.5), scale=64.0, device=device)
    optimizer = torch.optim.SGD(backbone.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4)
    row_optimizer = RowSGD(head, lr=LR, momentum=0.9, weight_decay=5e-4)
    if (out / "last.pt").exists():
        state = torch.load(out / "last.pt", map_location=device, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        head.load_full_state(state["head"])
        row_optimizer.load_full_state(state["row_optimizer"])
        head.set_step(state["step"])  # the negatives of a step depend on its number
    for step in range(head.step, stop or steps):
        for group in optimizer.param_groups + row_optimizer.param_groups:
            group["lr"] = LR * (1 - step / steps) ** 2
        # Every rank draws the global batch and takes its part, so a run may continue on another number of ranks.
        generator, part = torch.Generator().manual_seed(1 + step), slice(dist.get_rank(), None, dist.get_world_size())
        labels = torch.randint(identities, (BATCH,), generator=generator)
        pictures = faces.pictures(labels, generator)[part].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            embeddings = backbone(pictures)
        loss = head(embeddings, labels[part])  # the mean over the global batch, the same on every rank
        loss.backward()
        clip_grad_norm_(backbone.parameters(), head, 5.0)
        for each in (optimizer, row_optimizer):
            each.step()
            each.zero_grad()
        if head.step % EVERY == 0 or head.step == (stop or steps):
            results.append((head.step, loss.item(), faces.verification(network, device)))
            state = {"step": head.step, "network": network.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"head": head.full_state(), "row_optimizer": row_optimizer.full_state()}  # of all ranks
            if dist.get_rank() == 0:
                print("step {}: loss {:.2f}, verification {:.1%}".format(*results[-1]), flush=True)
                torch.save(state, out / "last.pt.part")
                os.replace(out / "last.pt.part", out / "last.pt")  # a kill leaves the earlier checkpoint whole
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/faces"), help="directory of the checkpoint")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--identities", type=int, default=10_000)
    args = parser.parse_args()
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    args.out.mkdir(parents=True, exist_ok=True)
    train(args.out, args.steps, args.identities)
    dist.destroy_process_group()
