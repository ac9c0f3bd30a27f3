"""The README's figures, written between its markers from the committed tables in benchmarks/results."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from bti_fast.errors import UserError

from . import network
from .rows import MACHINE, PEAK, TIME, Row, gains, losses, read, together, with_best_sdpa
from .scaling import fits
from .whole_network import shares

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = Path(__file__).resolve().parent / "results"
BEGIN, END = "<!-- figures: begin (bti-fast benchmark --readme) -->", "<!-- figures: end -->"
MAPPED = "entropy_uncertainty", "gated_fusion", "task_interaction"  # at every level of the decoders
GROUP_NAMES = {
    "3D": "32 channels, 48³",
    "layout": "other memory layout",
    "dtype": "bfloat16 and float16",
    "module": "batch 8, four levels",
}
PROVIDER_NAMES = {
    "reference": "operators in plain PyTorch, contiguous layout, the allocator as it comes",
    "bti_fast:folded": "bti_fast, `model.fold()`",
    "bti_fast:checkpointing": "bti_fast, activation checkpointing",
}
MODES = {"forward": "forward", "forward+backward": "with backward"}


def update(readme: Path = README, results: Path = RESULTS) -> str:
    """Rewrites the section; one line that says what was done.

    UserError where the README has no markers or there is no table.
    """
    if not readme.exists():
        raise UserError(f"{readme}: there is no README here; --readme works in a checkout")
    text = readme.read_text(encoding="utf-8")
    new = with_section(text, section(results))
    if new == text:
        return f"{readme.name}: its figures are those of the tables already"
    readme.write_text(new, encoding="utf-8")
    return f"{readme.name}: figures written from {results.name}"


def with_section(text: str, made: str) -> str:
    """The README's text with the section between the markers."""
    if BEGIN not in text or END not in text:
        raise UserError(f"README: the markers {BEGIN!r} and {END!r} are not there")
    head, rest = text.split(BEGIN, 1)
    return f"{head}{BEGIN}\n{made}\n{END}{rest.split(END, 1)[1]}"


def section(results: Path = RESULTS) -> str:
    """Markdown: for each device with a table, what was measured on it."""
    tables = sorted(results.glob("*.csv"))
    if not tables:
        raise UserError(f"{results}: no table (*.csv) to take figures from")
    return "\n\n".join(_device(path.stem, read(path)) for path in tables)


def _device(name: str, rows: Sequence[Row]) -> str:
    """One device's figures; times that were taken while others used it are left out."""
    rows = [row for row in rows if not row.busy]
    times = [row for row in rows if row.metric == TIME]
    dates = sorted(row.date[:10] for row in times)
    first = times[0]
    span = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    parts = [
        f"{first.device}; torch {first.torch}; {span}; float32; "
        f"[every row](benchmarks/results/{name}.csv). Times faster than torch.compile / than eager PyTorch "
        "in the same run, medians:",
        _levels(rows),
        _other_groups(rows),
        _attention(rows),
        _network(rows),
        _growth(rows),
        _losses(rows),
        _machine(rows),
    ]
    return "\n\n".join(part for part in parts if part)


def _levels(rows: Sequence[Row]) -> str:
    """The operators at the paper's levels beside torch.compile and eager PyTorch."""
    found = defaultdict(dict)
    for row, peers in together(rows):
        if row.provider == "bti_fast" and row.group in ("levels", "K=4") and row.kernel in MAPPED:
            label = f"`{row.kernel}`" + (", K = 4" if row.group == "K=4" else "")
            found[label, row.mode][row.level] = _faster(row, peers)
    lines = [
        "| batch 8 | mode | 384x14² | 192x28² | 96x56² | 48x112² |",
        "|---|---|---|---|---|---|",
        *(
            f"| {label} | {MODES[mode]} | {' | '.join(by_level.get(n, '') for n in (1, 2, 3, 4))} |"
            for (label, mode), by_level in found.items()
        ),
    ]
    return "\n".join(lines) if found else ""


def _faster(row: Row, peers: dict[str, Row]) -> str:
    """Times faster than torch.compile / than eager PyTorch."""
    cells = (f"{peers[name].p50 / row.p50:.1f}" if name in peers else "–" for name in ("compile", "eager"))
    return " / ".join(cells)


def _attention(rows: Sequence[Row]) -> str:
    lines = [
        "| `cross_attention`, batch 2, 4 heads of 32 | forward, ms | SDPA twice | faster | with backward, ms "
        "| SDPA twice | faster |",
        "|---|---|---|---|---|---|---|",
    ]
    sizes = {}
    for row, peers in together(rows):
        if row.kernel == "cross_attention" and row.group == "levels" and row.provider == "bti_fast":
            best = with_best_sdpa(peers).get("best sdpa")
            if best:
                sizes.setdefault(row.size, {})[row.mode] = row.p50, best.p50
    for size, by_mode in sizes.items():
        tokens, m = size.split(" M=")
        cells = [
            cell
            for mode in MODES
            if mode in by_mode
            for ours, best in [by_mode[mode]]
            for cell in (f"{ours:.2f}", f"{best:.2f}", f"{best / ours:.1f}")
        ]
        lines.append(f"| N = {tokens.split('x')[2]}, M = {m} | {' | '.join(cells)} |")
    return "\n".join(lines) if sizes else ""


def _other_groups(rows: Sequence[Row]) -> str:
    """Geometric means over the cases of the other groups."""
    found = defaultdict(dict)
    for gain in gains(rows, ("compile", "eager")):
        if gain.group in ("batch 1", "3D", "layout", "dtype", "module") and gain.provider == "bti_fast":
            found[gain.kernel, gain.group].setdefault(gain.mode, {})[gain.peer] = f"{gain.mean:.1f}"
    lines = ["| geometric means | | forward | with backward |", "|---|---|---|---|"]
    for (kernel, group), by_mode in found.items():
        cells = (
            " / ".join(by_mode.get(mode, {}).get(peer, "–") for peer in ("compile", "eager"))
            for mode in MODES
        )
        lines.append(f"| `{kernel}` | {GROUP_NAMES.get(group, group)} | {' | '.join(cells)} |")
    return "\n".join(lines) if found else ""


def _network(rows: Sequence[Row]) -> str:
    """The whole network: seconds, times faster than with reference operators, and peak memory."""
    peaks = {(row.size, row.mode, row.provider, row.run): row.p50 for row in rows if row.metric == PEAK}
    found = defaultdict(dict)
    for row in rows:
        if row.kernel == "BTINet" and row.metric == TIME:
            encoder, size, interaction = row.size.split()
            found[encoder, size, interaction, row.provider][row.mode] = row
    lines = []
    for key in sorted(found, key=lambda key: (key[0], -int(key[1].split("x")[0]), key[2] == "proxy")):
        encoder, size, interaction, provider = key
        cells = []
        for mode in network.MODES:
            row, base = (found.get((*key[:3], name), {}).get(mode) for name in (provider, "reference"))
            if row is None:
                cells += ["", ""]
                continue
            faster = f" ({base.p50 / row.p50:.2f} times faster)" if base and base is not row else ""
            peak = peaks[row.size, mode, provider, row.run]
            cells += [f"{row.p50 / 1e3:.2f}{faster}", f"{peak / 1e3:.1f}"]
        name = PROVIDER_NAMES.get(provider, provider)
        lines.append(f"| {encoder}, {size} | {interaction} | {name} | {' | '.join(cells)} |")
    if not lines:
        return ""
    head = [
        "| BTINet | interaction | | inference, s | peak, GB | training step, s | peak, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    parts = [
        f"{row.size.split()[-1]} {share:+.1%} ({row.mode})"
        for row, share in shares(rows)
        if row.provider == "bti_fast"
    ]
    share = (
        "\n\nWhat an interaction adds to the network's time, by the difference to none (fresh processes "
        f"differ by a few percent, so small and negative ones say nothing): {', '.join(parts)}."
    )
    return "\n".join(head + lines) + (share if parts else "")


def _growth(rows: Sequence[Row]) -> str:
    """How time and memory of ours grow along the sweeps."""
    found = defaultdict(dict)
    for fit in fits(rows):
        if fit.provider == "bti_fast":
            found[fit.kernel, fit.group, fit.points[0][0], fit.points[-1][0]][fit.mode, fit.metric] = (
                fit.exponent
            )
    if not found:
        return ""
    columns = [(mode, metric) for mode in MODES for metric in (TIME, PEAK)]
    lines = [
        "How the cost grows: exponents fitted to sweeps (1.0 is linear; small sizes fit caches, and calls "
        "have a fixed cost), with freed memory kept. With the allocator as it comes, maps above 32 MB cost "
        "everybody several times as much: see `keep_freed_memory()` below.",
        "",
        "| | from, to | time, forward | memory | time, with backward | memory |",
        "|---|---|---|---|---|---|",
    ]
    for (kernel, group, first, last), exponents in found.items():
        cells = (f"{exponents[column]:.2f}" if column in exponents else "" for column in columns)
        name = group.removeprefix("sweep ")
        lines.append(f"| `{kernel}`, {name} | {first:g}, {last:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _losses(rows: Sequence[Row]) -> str:
    found = [loss for loss in losses(rows) if loss.row.provider == "bti_fast"]
    if not found:
        return "No peer is faster in any row."
    named = {}
    for loss in found:
        named.setdefault((loss.row.kernel, loss.peer.provider), []).append(loss)
    parts = [
        f"`{kernel}` against {peer} in {len(them)} ({min(loss.ratio for loss in them):.2f} at "
        f"{min(them, key=lambda loss: loss.ratio).row.size}, "
        f"{min(them, key=lambda loss: loss.ratio).row.mode})"
        for (kernel, peer), them in named.items()
    ]
    return f"Where a peer is faster, with the worst case: {'; '.join(parts)}."


def _machine(rows: Sequence[Row]) -> str:
    found = {}
    for row in rows:
        if row.kernel == MACHINE:
            found.setdefault((row.provider, row.size, row.metric), []).append(row.p50)
    parts = [
        f"{provider} ({size}) {min(values):.0f} to {max(values):.0f} {unit}"
        for (provider, size, unit), values in found.items()
    ]
    return f"The machine's own ceilings during these runs: {', '.join(parts)}." if parts else ""
