"""Labels and deviations as the lines people read and write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from mmufuzz.case.error import CaseError
from mmufuzz.case.model import Case
from mmufuzz.host.deviation import EVICT, FILL, HOLD, RUN, Deviation
from mmufuzz.host.sites import (
    BOOT,
    MAX_OCCURRENCE,
    MAX_STEPS,
    N_SITES,
    SITE_NAMES,
    label,
    label_occurrence,
    label_site,
    label_step,
    label_thread,
)

START: Final = "start"
"""The text of the label ``BOOT``."""

_LABEL_FORM: Final = "a label such as 'vcpu0@2.guest.store 1', or 'start'"
_LINE_FORM: Final = (
    "'after LABEL run THREAD', 'hold LABEL', 'hold LABEL until LABEL', 'evict VCPU ADDRESS after LABEL' or "
    "'fill VCPU ADDRESS after LABEL'"
)


def thread_names(case: Case) -> tuple[str, ...]:
    """Names of the case's threads by index: the vCPUs first, then the host threads."""
    names = [f"vcpu{index}" for index in range(len(case.vcpus))]
    for index in range(len(case.host)):
        names.append(f"host{index}")
    return tuple(names)


def label_text(packed: int, threads: Sequence[str]) -> str:
    """``packed`` as text. Threads and sites out of range are shown by number, so that any label can be printed."""
    if packed == BOOT:
        return START
    thread = label_thread(packed)
    site = label_site(packed)
    name = threads[thread] if thread < len(threads) else f"thread{thread}"
    site_name = SITE_NAMES[site] if site < N_SITES else f"site{site}"
    return f"{name}@{label_step(packed)}.{site_name} {label_occurrence(packed)}"


def _number(text: str, low: int, high: int, place: str, what: str) -> int:
    """A decimal or 0x number within ``low``..``high``."""
    base = 16 if text[:2] in ("0x", "0X") else 10
    digits = text[2:] if base == 16 else text
    value = -1
    if digits.isascii() and digits.isalnum():
        try:
            value = int(digits, base)
        except ValueError:
            value = -1
    if not low <= value <= high:
        raise CaseError(place, f"{what}, got '{text}'")
    return value


def _thread(text: str, threads: Sequence[str], place: str) -> int:
    for index in range(len(threads)):
        if threads[index] == text:
            return index
    raise CaseError(place, f"expected a thread of this case ({', '.join(threads)}), got '{text}'")


def parse_label(text: str, threads: Sequence[str], place: str = "label") -> int:
    """The label that ``text`` names. Raises ``CaseError`` at ``place``."""
    words = text.split()
    if words == [START]:
        return BOOT
    if len(words) != 2 or "@" not in words[0] or "." not in words[0]:
        raise CaseError(place, f"expected {_LABEL_FORM}, got '{text}'")
    name, _, rest = words[0].partition("@")
    step, _, site_name = rest.partition(".")
    if site_name not in SITE_NAMES:
        raise CaseError(place, f"expected the name of a site such as 'guest.store', got '{site_name}'")
    return label(
        _thread(name, threads, place),
        _number(step, 0, MAX_STEPS - 1, place, f"expected a step in 0..{MAX_STEPS - 1}"),
        SITE_NAMES.index(site_name),
        _number(words[1], 1, MAX_OCCURRENCE, place, f"expected an occurrence in 1..{MAX_OCCURRENCE}"),
    )


def deviation_text(deviation: Deviation, case: Case) -> str:
    """``deviation`` as a line, with the thread names of ``case``."""
    return deviation_line(deviation, thread_names(case))


def deviation_line(deviation: Deviation, threads: Sequence[str]) -> str:
    """``deviation`` as a line, with these thread names."""
    at = label_text(deviation.at, threads)
    if deviation.kind == HOLD:
        if deviation.until == BOOT:
            return f"hold {at}"
        return f"hold {at} until {label_text(deviation.until, threads)}"
    actor = threads[deviation.actor] if deviation.actor < len(threads) else f"thread{deviation.actor}"
    if deviation.kind == RUN:
        return f"after {at} run {actor}"
    verb = "evict" if deviation.kind == EVICT else "fill"
    return f"{verb} {actor} {deviation.address:#x} after {at}"


def parse_deviation(text: str, threads: Sequence[str], place: str = "schedule") -> Deviation:
    """The deviation that a line describes. Raises ``CaseError`` at ``place``."""
    words = text.split()
    verb = words[0] if words else ""
    if verb == "after" and len(words) >= 4 and words[-2] == "run":
        at = parse_label(" ".join(words[1:-2]), threads, place)
        return Deviation(RUN, at, _thread(words[-1], threads, place))
    if verb == "hold" and len(words) >= 2:
        end = words.index("until") if "until" in words else len(words)
        at = parse_label(" ".join(words[1:end]), threads, place)
        if at == BOOT:
            raise CaseError(place, "expected the label of a store after 'hold', got 'start'")
        until = BOOT
        if end < len(words):
            until = parse_label(" ".join(words[end + 1 :]), threads, place)
            if until == BOOT:
                raise CaseError(place, "expected the label of an event after 'until', got 'start'")
        return Deviation(HOLD, at, label_thread(at), until)
    if verb in ("evict", "fill") and len(words) >= 5 and words[3] == "after":
        actor = _thread(words[1], threads, place)
        address = _number(words[2], 0, (1 << 64) - 1, place, "expected a 64-bit address")
        at = parse_label(" ".join(words[4:]), threads, place)
        return Deviation(EVICT if verb == "evict" else FILL, at, actor, BOOT, address)
    raise CaseError(place, f"expected {_LINE_FORM}, got '{text}'")
