"""``explain``: a Case and its run as text, a column per thread and rows in time."""

from __future__ import annotations

from typing import Final

from mmufuzz.case.model import CODE_SLOT, FLAT32, LONG4, NPT4, Case, Vcpu
from mmufuzz.case.text import deviation_text, label_text
from mmufuzz.case.toml_dump import REGISTERS, entry_text
from mmufuzz.host.sites import BOOT
from mmufuzz.outcome import Outcome
from mmufuzz.report.rows import Row, cell, fold, mark_conflicts, mark_deviations, rows
from mmufuzz.x86.asm import disassemble

MIN_COLUMN: Final = 14

_MODES: Final = {
    LONG4: "64-bit, 4-level paging",
    FLAT32: "32-bit, paging off",
    NPT4: "L2, 32-bit, paging off, behind a nested page table",
}


def explain(case: Case, outcome: Outcome, name: str, full: bool = False) -> list[str]:
    """Lines that explain what ``outcome`` says about ``case``. ``full`` shows every visible operation."""
    threads = outcome.threads or tuple(f"vcpu{index}" for index in range(len(case.vcpus)))
    lines = _header(case, outcome, name)
    table = rows(outcome)
    missed = mark_deviations(table, case.schedule, threads)
    if case.schedule:
        lines.append("")
        lines.append("schedule: the current thread goes on until it waits, yields or ends, except")
        for deviation in case.schedule:
            unused = "   (never came up)" if deviation in missed else ""
            lines.append(f"  {deviation_text(deviation, case)}{unused}")
    mark_conflicts(table)
    lines.append("")
    lines.extend(_table(table, outcome, threads, full))
    lines.extend(_finding(outcome, threads))
    return lines


def _header(case: Case, outcome: Outcome, name: str) -> list[str]:
    lines = [name]
    if case.comment:
        lines.extend(f"  {line}" for line in case.comment.strip().splitlines()[:8])
    changes = [f"without {fix}" for fix in case.revert] + [f"with {fix}" for fix in case.apply]
    lines.append(f"kernel {', '.join([case.kernel, *changes])}; memory model {case.memory_model}")
    lines.append(f"verdict {outcome.verdict}: {outcome.instructions} instructions retired, {outcome.events} events")
    for finding in outcome.findings:
        lines.append(f"{finding.kind}: {finding.fingerprint}")
    for index, vcpu in enumerate(case.vcpus):
        lines.append("")
        lines.extend(_program(index, vcpu))
    for index, thread in enumerate(case.host):
        lines.extend(["", f"host{index}: {', '.join(thread.ops) or 'nothing'}"])
    if case.memory:
        lines.extend(["", "guest memory"])
        for word in case.memory:
            text = entry_text(word.value)
            shown = f"gfn {text}" if text else "zero" if word.value == 0 else "data"
            lines.append(f"  gfn {word.gfn:#x}[{word.index}] = {word.value:#018x}  {shown}")
    return lines


def _program(index: int, vcpu: Vcpu) -> list[str]:
    root = f", root table gfn {vcpu.cr3:#x}" if vcpu.mode in (LONG4, NPT4) else ""
    mode = _MODES[vcpu.mode]
    flags = f", {' '.join(vcpu.flags)}" if vcpu.flags else ""
    lines = [f"vcpu{index}: {mode}{root}, CPL {vcpu.cpl}{flags}"]
    if vcpu.regs:
        lines.append("  " + ", ".join(f"{REGISTERS[register]} = {value:#x}" for register, value in vcpu.regs))
    for step, code in enumerate(vcpu.program):
        gva = vcpu.code_gva + CODE_SLOT * step
        lines.append(f"  {step:>3}  {gva:#x}  {disassemble(code, vcpu.mode == LONG4):<40} {code.hex(' ')}")
    return lines


def _table(table: list[Row], outcome: Outcome, threads: tuple[str, ...], full: bool) -> list[str]:
    """The rows, with one period of a lasso set off and what repeats it left out."""
    start, end = outcome.period
    before = [row for row in table if not end or row.first < start]
    period = [row for row in table if end and start <= row.first < end]
    if not full:
        before, period = fold(before), fold(period)
    widths = [max(MIN_COLUMN, len(name)) for name in threads]
    for row in before + period:
        if 0 <= row.thread < len(widths):
            widths[row.thread] = max(widths[row.thread], len(cell(row)))
    number = max(4, len(str(len(outcome.trace))))
    lines = [" " * number + "  " + "  ".join(name.ljust(width) for name, width in zip(threads, widths, strict=True))]
    lines[0] = lines[0].rstrip()
    lines.append("─" * number + "  " + "  ".join("─" * width for width in widths))
    for row in before:
        lines.extend(_lines(row, widths, number))
    if end:
        lines.append(
            f"┌ one period: from here the same {end - start} trace entries repeat for ever, and no guest CPU advances"
        )
        for row in period:
            lines.extend("│" + line for line in _lines(row, widths, number - 1))
        lines.append("└ ↺ and again")
    return lines


def _lines(row: Row, widths: list[int], number: int) -> list[str]:
    """A row, and the marks and notes beside and below it."""
    cells = [" " * width for width in widths]
    if 0 <= row.thread < len(cells):
        cells[row.thread] = cell(row).ljust(widths[row.thread])
    beside = row.marks + [f"· {note}" for note in row.notes]
    line = f"{row.first:>{number}}  {'  '.join(cells)}"
    if not beside:
        return [line.rstrip()]
    pad = " " * len(line)
    return [f"{line}  {beside[0]}"] + [f"{pad}  {text}" for text in beside[1:]]


def _finding(outcome: Outcome, threads: tuple[str, ...]) -> list[str]:
    lines: list[str] = []
    for finding in outcome.findings:
        lines.append("")
        where = f" (seen after {label_text(finding.label, threads)})" if finding.label != BOOT else ""
        lines.append(f"{finding.kind}{where}")
        lines.extend(f"  {line}" for line in finding.detail.splitlines())
    return lines
