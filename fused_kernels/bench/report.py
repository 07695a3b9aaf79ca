"""One run's records as plain text, for a terminal."""

from .records import SUSTAINED, select


def summary(records):
    """Lay out one run's records as plain text: time (also sustained), speedup over eager in its group, error, right or not."""
    lines = []
    names = ("operator", "dtype", "precision", "layout", "direction", "shape")
    for group in dict.fromkeys(tuple(getattr(r, name) for name in names) for r in records if r.operator != "ceiling"):
        operator, dtype, precision, layout, direction, shape = group
        title = " ".join(dict.fromkeys((operator, dtype, precision, layout, *[direction] * (direction != "forward"))))
        where = dict(zip(names, group, strict=True))
        group, held = select(records, **where), {r.rung: r.p50_ms for r in select(records, **where, clock=SUSTAINED)}
        more = f"{SUSTAINED:>11}" if held else ""
        lines += ["", f"{title}, {shape}", f"{'rung':<22}{'ms':>10}{more}{'speedup':>10}{'rms error':>12}  correct"]
        eager = next((r.p50_ms for r in group if r.rung == "eager"), None)
        for r in group:
            speedup = f"{eager / r.p50_ms:.2f}x" if eager else ""
            more = f"{held[r.rung]:>11.3f}" if held else ""
            right = "yes" if r.correct else "NO"
            lines.append(f"{r.rung:<22}{r.p50_ms:>10.3f}{more}{speedup:>10}{r.rms_error:>12.2e}  {right}")
        for r in select(records, operator="ceiling", rung="read", dtype=dtype, layout=layout, shape=shape):
            lines.append(f"{'(reading it once)':<22}{r.p50_ms:>10.3f}")
    for r in select(records, operator="ceiling", layout="flat"):
        rate = f"{r.tflops:.3g} TFLOP/s" if r.rung == "matmul" else f"{r.gbps:.4g} GB/s"
        lines += [""] * (r.rung == "copy") + [
            f"ceiling {r.rung:<8}{' '.join(dict.fromkeys((r.dtype, r.precision))):<18}{rate:>16}"
        ]
    return "\n".join(lines[1:])
