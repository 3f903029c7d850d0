"""Cost of the head by arithmetic: products, bytes, and lower bounds of the time of each schedule. Nothing is measured.

The peak rates are those of one H200: device copy (bytes read and written) and a bf16 product of random numbers as
measured, exponentials per second from its data sheet.
"""

from __future__ import annotations

from benchmarks.classifier_providers import Shape

BYTES_PER_S, FLOP_PER_S, EXP_PER_S = 4.3e12, 780e12, 132 * 16 * 1.755e9
# bytes of [B, C]-sized traffic per logit, and products in units of B C D
SCHEDULES = {
    "stored gradient, fused exponentials": (6, 6),
    "stored gradient, exponentials in place": (10, 6),
    "recomputed gradient": (6, 8),
    "published scheme": (154, 6),
}


def lower_bound_s(shape: Shape, bytes_per_logit: float, products: int) -> float:
    """The larger of the time of the products and that of the memory traffic: their perfect overlap."""
    logits = shape.batch * shape.classes
    return max(products * logits * shape.width / FLOP_PER_S, bytes_per_logit * logits / BYTES_PER_S)


def lines(shapes: list[Shape]) -> list[str]:
    gib = 1 / 2**30
    table = [
        f"Computed from {BYTES_PER_S / 1e12:g} TB/s, {FLOP_PER_S / 1e12:g} TFLOP/s and {EXP_PER_S:.1e} exponentials "
        "per second (one H200). Nothing in these two tables was measured.",
        "",
        f"| lower bound in ms | TFLOP of 6BCD | {' | '.join(SCHEDULES)} | exp alone |",
        f"|---|{'---:|' * (len(SCHEDULES) + 2)}",
    ]
    for shape in shapes:
        logits = shape.batch * shape.classes
        times = [f"{1e3 * lower_bound_s(shape, *costs):,.2f}" for costs in SCHEDULES.values()]
        times.append(f"{1e3 * logits / EXP_PER_S:,.2f}")
        table.append(f"| {shape} | {6e-12 * logits * shape.width:,.2f} | {' | '.join(times)} |")
    table += [
        "",
        "| GiB | rows fp32 | their gradient fp32 | one 16-bit copy | exponentials bf16 | logits fp32 |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for shape in shapes:
        matrix, logits = shape.classes * shape.width, shape.batch * shape.classes
        sizes = (4 * matrix, 4 * matrix, 2 * matrix, 2 * logits, 4 * logits)
        table.append(f"| {shape} | {' | '.join(f'{size * gib:,.2f}' for size in sizes)} |")
    return table
