"""The fused margin cross entropy by itself: loss and gradients next to the unfused form, and the memory of both.

    python examples/kernel_alone.py
    python examples/kernel_alone.py --device cuda --classes 1000000

The unfused form keeps several [samples, classes] matrices for its backward, the fused one computes in chunks. Memory is
the peak above that before the forward pass, results included; on a CPU it is read from Linux's /proc.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megacid_kernels import Margin, linear_margin_cross_entropy

SCALE, MARGIN, NAMES = 64.0, 0.3, ("loss", "gradient of x", "gradient of w")


def fused(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return linear_margin_cross_entropy(x, w, target, margin=Margin.cosface(MARGIN), scale=SCALE)


def unfused(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    cosines = F.normalize(x) @ F.normalize(w).T
    cosines[torch.arange(len(x)), target] -= MARGIN
    return F.cross_entropy(SCALE * cosines, target)


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    (kib,) = re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return 1024 * int(kib)


def measure(form: Callable[[Tensor, Tensor, Tensor], Tensor], *inputs: Tensor) -> tuple[list[Tensor], float]:
    """The loss, the gradients of x and w, and the memory in MiB."""
    device = inputs[0].device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the memory in use
    before = peak_bytes(device)
    loss = form(*inputs)
    results = [loss.detach(), *torch.autograd.grad(loss, inputs[:2])]
    return results, (peak_bytes(device) - before) / 2**20


def compare(samples: int, classes: int, width: int, device: str) -> dict[str, tuple[float, float, float]]:
    """Loss, gradient norms of x and w, and memory: of the fused form, of the unfused one, and their difference."""
    torch.manual_seed(0)
    x, w = (torch.randn(rows, width, device=device, requires_grad=True) for rows in (samples, classes))
    target = torch.randint(classes, (samples,), device=device)
    measure(fused, x[:8], w[:8], target[:8] % 8)  # the first call loads libraries
    measure(unfused, x[:8], w[:8], target[:8] % 8)
    (ours, memory), (plain, plain_memory) = measure(fused, x, w, target), measure(unfused, x, w, target)
    norms = {name: (float(a.norm()), float(b.norm()), float((a - b).norm())) for name, a, b in zip(NAMES, ours, plain)}
    return {**norms, "memory, MiB": (memory, plain_memory, memory - plain_memory)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--classes", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    print(f"{'':14}{'fused':>14}{'unfused':>14}{'difference':>14}")
    for name, values in compare(**vars(parser.parse_args())).items():
        print(f"{name:14}" + "".join(f"{value:14.5g}" for value in values))
