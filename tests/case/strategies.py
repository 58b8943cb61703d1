"""Hypothesis strategies for whole valid Cases."""

from __future__ import annotations

from hypothesis import strategies as st

from mmufuzz.case.host_ops import interrupt_op
from mmufuzz.case.model import Case, Expect, HostThread, Options, Slot, Vcpu, Word
from mmufuzz.case.validate import FLAGS, canonical, least_mmu_pages
from mmufuzz.host.deviation import EVICT, FILL, HOLD, RUN, Deviation
from mmufuzz.host.sites import BOOT, MAX_OCCURRENCE, MAX_STEPS, N_SITES, STORE_SITES, label, label_thread

U64 = st.integers(0, (1 << 64) - 1) | st.integers(0, 0x3FFFF)
IDS = st.text("abcz019._-", min_size=1, max_size=30)
KERNELS = st.sampled_from(["v6.1", "v6.12", "latest", "mine"])
LINES = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Zl", "Zp")), max_size=40)
COMMENTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=60)
STEPS = st.binary(min_size=1, max_size=15)


@st.composite
def slot_lists(draw: st.DrawFn) -> tuple[Slot, ...]:
    """1..3 slots in disjoint ranges, in any order."""
    slots = [Slot(draw(st.integers(0, 8)), draw(st.integers(1, 40)), draw(st.booleans()))]
    if draw(st.booleans()):
        slots.append(Slot(draw(st.integers(100, 120)), draw(st.integers(1, 9))))
    if draw(st.booleans()):
        slots.append(Slot(0xFFF0, 16, draw(st.booleans())))
    return tuple(draw(st.permutations(slots)))


@st.composite
def vcpus(draw: st.DrawFn, gfns: st.SearchStrategy[int], paging: str) -> Vcpu:
    """A vCPU whose code lies in the slots."""
    gfn = draw(gfns)
    mode = draw(st.sampled_from(["flat32", paging]))
    gva = draw(st.integers(0, (1 << 52) - 1)) << 12
    if not canonical(gva) or not canonical(gva + 4095):
        gva &= (1 << 47) - 4096
    return Vcpu(
        mode=mode,
        cpl=draw(st.sampled_from([0, 3])),
        cr3=draw(st.integers(0, 0xFFFF)),
        flags=tuple(draw(st.lists(st.sampled_from(FLAGS), unique=True))),
        code_gva={"long4": gva, "npt4": gva & 0xFFFFF000, "flat32": gfn << 12}[mode],
        code_gfn=gfn,
        regs=tuple(draw(st.lists(st.tuples(st.integers(0, 15), U64), unique_by=lambda pair: pair[0], max_size=4))),
        program=tuple(draw(st.lists(STEPS, max_size=5))),
    )


def labels(threads: int, sites: st.SearchStrategy[int]) -> st.SearchStrategy[int]:
    """Labels of existing threads."""
    return st.builds(
        label, st.integers(0, threads - 1), st.integers(0, MAX_STEPS - 1), sites, st.integers(1, MAX_OCCURRENCE)
    )


def deviations(n_vcpus: int, n_host: int) -> st.SearchStrategy[Deviation]:
    """Deviations of every kind."""
    threads = n_vcpus + n_host
    events = st.just(BOOT) | labels(threads, st.integers(0, N_SITES - 1))
    stores = labels(threads, st.sampled_from(STORE_SITES))
    return st.one_of(
        st.builds(Deviation, st.just(RUN), events, st.integers(0, threads - 1)),
        st.builds(lambda at, until: Deviation(HOLD, at, label_thread(at), until), stores, events),
        st.builds(
            Deviation, st.sampled_from([EVICT, FILL]), events, st.integers(0, n_vcpus - 1), st.just(BOOT), U64
        ),
    )


EXPECTATIONS = st.builds(Expect, st.just("ok"), reach=st.lists(IDS, max_size=2).map(tuple)) | st.builds(
    Expect, st.just("finding"), IDS | st.just(""), LINES, st.lists(IDS, max_size=2).map(tuple)
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any small valid Case."""
    slots = draw(slot_lists())
    frames = [gfn for slot in slots for gfn in range(slot.base_gfn, slot.base_gfn + slot.npages)]
    gfns = st.sampled_from(frames)
    words = draw(st.lists(st.builds(Word, gfns, st.integers(0, 511), U64), max_size=6))
    paging = draw(st.sampled_from(["long4", "npt4"]))
    machines = draw(st.lists(vcpus(gfns, paging), min_size=1, max_size=3))
    targets = [index for index, one in enumerate(machines) if one.mode != "npt4"]
    ops = st.just("zap_all_fast")
    if targets:
        ops |= st.builds(interrupt_op, st.sampled_from(targets), st.integers(32, 255))
    host = draw(st.lists(st.builds(HostThread, st.lists(ops, max_size=2).map(tuple)), max_size=2))
    return Case(
        kernel=draw(KERNELS),
        revert=tuple(draw(st.lists(IDS, max_size=2))),
        apply=tuple(draw(st.lists(IDS, max_size=2))),
        memory_model=draw(st.sampled_from(["tso", "sc"])),
        options=Options(
            fep=draw(st.booleans()),
            n_max_mmu_pages=draw(st.integers(least_mmu_pages(len(machines)), 0xFFFF)),
            write_track=tuple(draw(st.lists(gfns, unique=True, max_size=3))),
            event_limit=draw(st.integers(1, 1_000_000)),
            decode_to_skip=draw(st.booleans()),
            tsc=draw(U64),
        ),
        slots=slots,
        memory=tuple({(word.gfn, word.index): word for word in words}.values()),
        vcpus=tuple(machines),
        host=tuple(host),
        schedule=tuple(draw(st.lists(deviations(len(machines), len(host)), max_size=4))),
        expect=draw(EXPECTATIONS),
        comment=draw(COMMENTS),
    )
