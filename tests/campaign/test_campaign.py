"""The campaign's own parts: budgets, the store of findings, the corpus, counters, expectations."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mmufuzz.campaign.corpus
from mmufuzz.campaign import reducing
from mmufuzz.campaign.attribution import attributed, shown_unchanged
from mmufuzz.campaign.budget import Budget, Stop, parse_duration
from mmufuzz.campaign.corpus import Corpus, files, load_directory
from mmufuzz.campaign.engine_guided import RARE_SCHEDULES, SCHEDULES, GuidedEngine
from mmufuzz.campaign.engine_random import RandomEngine
from mmufuzz.campaign.expect import unmet
from mmufuzz.campaign.files import InputError, write_atomic
from mmufuzz.campaign.findings import FindingStore, Record, slug
from mmufuzz.campaign.kernel import MOST_EVENTS, Kernel
from mmufuzz.campaign.plan import Plan, missing, shares
from mmufuzz.campaign.reached import MORE, NEW, NOTHING, Reached, bucket
from mmufuzz.campaign.recorder import Recorder
from mmufuzz.campaign.reducing import shrink
from mmufuzz.campaign.tally import Tally
from mmufuzz.case import bytes as case_bytes
from mmufuzz.case import toml
from mmufuzz.case.error import CaseError
from mmufuzz.case.generate import GenerateOptions, generate
from mmufuzz.case.model import FINDING, FLAT32, Case, Expect, Options, Slot, Vcpu, Word
from mmufuzz.case.rng import Rng
from mmufuzz.host.deviation import HOLD, RUN, Deviation
from mmufuzz.host.sites import EMUL_STORE, THREAD_START, label
from mmufuzz.kvm.counters import BLOCKS, N_COUNTERS
from mmufuzz.outcome import SUSPECT, Finding, Outcome
from mmufuzz.run import run
from mmufuzz.x86.asm import assemble

CASE = generate(Rng(7))
RACE = Finding("coherence", "coherence|fetch|L1", "a stale translation", 0)


@pytest.mark.parametrize("text, seconds", [("60s", 60), ("2m", 120), ("1.5h", 5400), ("30", 30)])
def test_durations_have_units(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "1d", "-1s", "0", "0s", "1e3", "inf", "nan", "1.2.3s"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_duration(text)


def test_a_budget_is_spent_by_cases_or_by_time() -> None:
    assert not Budget(None, 3).spent(2)
    assert Budget(None, 3).spent(3)
    assert Budget(1e-9).spent(0)
    assert not Budget().spent(10**9)


def test_the_first_signal_asks_and_the_second_interrupts() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Stop() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_failed_write_leaves_neither_the_file_nor_a_half_of_it(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(InputError, match="taken"):
        write_atomic(tmp_path / "taken", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.text(min_size=1), st.text(min_size=1))
def test_file_names_of_two_fingerprints_differ_and_are_plain(one: str, two: str) -> None:
    assert (slug(one) == slug(two)) == (one == two)
    assert "/" not in slug(one) and not slug(one).startswith(".") and len(slug(one)) < 80


def store_with(directory: Path, corpus: Path | None = None) -> tuple[FindingStore, Record]:
    """A store that has just met ``RACE``."""
    store = FindingStore(directory, corpus)
    return store, store.add(CASE, CASE, RACE, {"engine": "random", "cases": 5, "seconds": 1.5, "confirmed": True})


def test_a_finding_is_saved_with_its_expectation_and_its_first_seen(tmp_path: Path) -> None:
    _, record = store_with(tmp_path)
    saved = toml.load(record.case)
    assert saved.expect == Expect(FINDING, RACE.kind, RACE.fingerprint)
    assert replace(saved, expect=CASE.expect, comment=CASE.comment) == CASE
    sidecar = json.loads(Path(record.case).with_suffix(".json").read_text())
    assert sidecar["first_seen"]["cases"] == 5 and sidecar["fingerprint"] == RACE.fingerprint


def test_only_what_the_corpus_knows_is_not_new(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    for name in ("known", "regressions"):
        (corpus / name).mkdir(parents=True)
    assert store_with(tmp_path / "one", corpus)[1].new
    regression = corpus / "regressions" / "race.toml"
    regression.write_text(toml.dumps(replace(CASE, expect=Expect(FINDING, RACE.kind, RACE.fingerprint))))
    record = store_with(tmp_path / "two", corpus)[1]
    assert record.new and record.seen_in == str(regression)
    regression.rename(corpus / "known" / "race.toml")
    assert not store_with(tmp_path / "three", corpus)[1].new


def test_a_finding_of_an_earlier_run_stays_new(tmp_path: Path) -> None:
    first = store_with(tmp_path)[1]
    second = store_with(tmp_path)[1]
    assert second.new and second.seen_in == first.case


def test_the_smaller_reproducer_stays(tmp_path: Path) -> None:
    _, first = store_with(tmp_path)
    bigger = replace(CASE, vcpus=(replace(CASE.vcpus[0], program=(*CASE.vcpus[0].program, b"\x90")), *CASE.vcpus[1:]))
    again = FindingStore(tmp_path, None).add(bigger, bigger, RACE, {})
    assert (again.instructions, again.case) == (first.instructions, first.case)


def test_a_damaged_file_among_earlier_findings_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "damaged.toml").write_text("format = ")
    assert store_with(tmp_path)[1].new


def test_a_damaged_file_in_the_corpus_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "corpus" / "known").mkdir(parents=True)
    (tmp_path / "corpus" / "known" / "damaged.toml").write_text("format = ")
    with pytest.raises(CaseError, match=r"damaged\.toml"):
        FindingStore(tmp_path / "findings", tmp_path / "corpus")


def test_a_kept_case_comes_back_from_disk(tmp_path: Path) -> None:
    Corpus(tmp_path / "corpus").keep(CASE)
    (loaded,) = load_directory(tmp_path / "corpus")
    assert case_bytes.encode(loaded) == case_bytes.encode(CASE)


def test_a_counter_is_new_once_and_then_counts_again_in_another_class_of_hits() -> None:
    reached = Reached()
    assert [reached.add({5: count}) for count in (1, 1, 2, 4, 7, 8)] == [NEW, NOTHING, MORE, MORE, NOTHING, MORE]
    assert reached.add({5: 1, 6: 1}) == NEW
    assert reached.total == 2


def test_classes_of_hits_are_libfuzzer_s() -> None:
    starts = [count for count in range(1, 300) if bucket(count) != bucket(count - 1)]
    assert starts == [1, 2, 3, 4, 8, 16, 32, 128]


def test_what_two_processes_reached_adds_up() -> None:
    one, other = Reached(), Reached()
    one.add({1: 1, 2: 1})
    other.add({2: 4, N_COUNTERS - 1: 1})
    one.absorb(other.as_json())
    assert one.total == 3 and one.add({2: 5}) == NOTHING
    assert one.by_block()["interleaving"] == {"reached": 1, "of": BLOCKS[-1].size}
    with pytest.raises(ValueError):
        one.absorb("00")


def test_a_corpus_in_memory_is_bounded_and_the_most_worn_case_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmufuzz.campaign.corpus, "MOST_CASES", 3)
    corpus = Corpus(None)
    cases = [generate(Rng(seed)) for seed in range(4)]
    for case in cases[:3]:
        corpus.add(case)
    chosen = [corpus.choose(Rng(seed)) for seed in range(40)]
    assert {chosen.count(case) for case in cases[:3]} <= {12, 13, 14, 15}
    worn = max(cases[:3], key=chosen.count)
    corpus.add(cases[3])
    assert [corpus.at(index) for index in range(3)] == [case for case in cases if case is not worn]


def test_files_of_a_directory_come_in_order(tmp_path: Path) -> None:
    for name in ("b.toml", "a.case", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in files(tmp_path)] == ["a.case", "b.toml"]


def outcome_with(verdict: str, *findings: Finding) -> Outcome:
    """An outcome that passed the mark "here"."""
    outcome = Outcome()
    outcome.verdict = verdict
    outcome.findings = list(findings)
    outcome.marks = {"here": 1}
    return outcome


EXPECTATIONS = {
    "verdict": (Expect(), outcome_with(FINDING, RACE), "verdict"),
    "kind": (Expect(FINDING, "livelock"), outcome_with(FINDING, RACE), "livelock"),
    "fingerprint": (Expect(FINDING, "coherence", "another"), outcome_with(FINDING, RACE), "another"),
    "reach": (Expect(reach=("here", "there")), outcome_with("ok"), "there"),
}


@pytest.mark.parametrize("expect, outcome, word", EXPECTATIONS.values(), ids=EXPECTATIONS.keys())
def test_an_expectation_that_is_not_met_says_what_was_expected(expect: Expect, outcome: Outcome, word: str) -> None:
    (complaint,) = unmet(Case(expect=expect), outcome)
    assert word in complaint


def test_an_expectation_that_is_met_says_nothing() -> None:
    assert unmet(Case(expect=Expect(reach=("here",))), outcome_with("ok")) == []
    assert unmet(Case(expect=Expect(FINDING, RACE.kind, RACE.fingerprint)), outcome_with(FINDING, RACE)) == []


def test_a_kernel_on_the_command_line_replaces_the_case_s_changes() -> None:
    case = Case(kernel="v6.9", revert=("retry-guard",))
    assert Kernel("v6.12").override(case) == Case(kernel="v6.12")
    assert Kernel("").override(case) == case


def test_applying_what_the_case_reverts_takes_the_revert_s_place_and_the_other_way_round() -> None:
    case = Case(revert=("retry-guard", "dummy-root"))
    applied = Kernel("", (), ("retry-guard",)).override(case)
    assert (applied.revert, applied.apply) == (("dummy-root",), ("retry-guard",))
    assert Kernel("", ("retry-guard",)).override(applied).apply == ()


def test_sums_of_processes_add_up() -> None:
    one, two = Tally(), Tally()
    for tally in (one, two):
        tally.engine("random").cases += 2
        tally.engine("random").schedules += 7
        tally.count(outcome_with("ok"))
    one.absorb(two.as_json())
    assert (one.cases, one.schedules, one.marks, one.verdicts) == (4, 14, {"here": 2}, {"ok": 2})


def plan(**changes: object) -> Plan:
    """A plan for v6.12."""
    return replace(Plan(Kernel(), 1, Path("corpus"), Path("findings")), **changes)


def test_without_a_checkout_only_our_own_engine_runs_and_the_others_say_why() -> None:
    chosen, left_out = shares(plan())
    assert [share.name for share in chosen] == ["guided"]
    assert len(left_out) == 2 and all("checkout" in line for line in left_out)
    assert missing("guided", None) == ""


def test_the_blind_engine_runs_only_on_request(tmp_path: Path) -> None:
    assert "random" not in [share.engine for share in shares(plan(checkout=tmp_path))[0]]
    assert [share.name for share in shares(plan(engine="random"))[0]] == ["random"]


def test_a_harness_asked_for_by_name_is_the_only_one(tmp_path: Path) -> None:
    chosen, _ = shares(plan(harness="state_machine", engine="hypothesis", checkout=tmp_path))
    assert [share.name for share in chosen] == ["hypothesis:state_machine"]


def barrier(revert: tuple[str, ...]) -> Case:
    """The store-buffering race of the zoo's first entry, in two instructions, on v6.12 without ``revert``."""
    tables = [Word(gfn, 0, (gfn + 1) << 12 | 0x27) for gfn in (4, 5, 6)]
    fep_store = bytes.fromhex("0f0b6b766d890f")  # mov [edi], ecx
    return Case(
        revert=revert,
        options=Options(fep=True),
        slots=(Slot(0, 16),),
        memory=(*tables, Word(7, 18, 2 << 12 | 0x67)),
        vcpus=(
            Vcpu("flat32", code_gva=0x1000, code_gfn=1, regs=((7, 0x4000),), program=(fep_store,)),
            Vcpu("long4", cr3=4, code_gva=0x12000, code_gfn=2, program=(b"\x90",)),
        ),
        schedule=(
            Deviation(RUN, label(1, 0, THREAD_START, 1), 0),
            Deviation(HOLD, label(0, 0, EMUL_STORE, 1), 0),
        ),
    )


def test_a_finding_that_only_the_changed_kernel_shows_is_attributed_to_the_change() -> None:
    case = barrier(("track-write-barrier",))
    (finding,) = run(case).findings
    assert attributed(case, finding, 20)
    assert not shown_unchanged(case, finding)


def test_a_finding_of_the_unchanged_kernel_is_not_attributed_to_a_change() -> None:
    (finding,) = run(barrier(("track-write-barrier",))).findings
    # On 6.8, which lacks the barrier, reverting something else changes nothing about it.
    case = replace(barrier(("retry-guard",)), kernel="v6.8")
    assert finding.fingerprint in [other.fingerprint for other in run(case).findings]
    assert not attributed(case, finding)
    assert not attributed(replace(case, revert=()), finding)


def test_a_reduction_keeps_the_kernel_and_what_is_attributed_to_it() -> None:
    case = barrier(("track-write-barrier", "retry-guard"))
    (finding,) = run(case).findings
    small, runs = shrink(case, finding, 400, lambda: False, lambda made: None)
    assert (small.kernel, small.revert) == (case.kernel, case.revert)
    assert runs > 10 and attributed(small, finding, 0)


def test_a_reduction_of_a_stuck_run_is_stuck_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def exits_for_cpuid(outcome: Outcome) -> bool:
        return outcome.exits.get("cpuid", 0) > 0

    program = (*(assemble(line, False) for line in ("nop", "cpuid", "nop")), b"\xeb\xfe")
    vcpu = Vcpu(mode=FLAT32, flags=(), code_gva=0x2000, code_gfn=2, program=program)
    case = Case(options=Options(event_limit=200), slots=(Slot(0, 16),), vcpus=(vcpu,))
    (finding,) = run(case).findings
    assert finding.kind == SUSPECT
    assert shrink(case, finding, 400, lambda: False, lambda made: None)[0].vcpus[0].program == (b"\xeb\xfe",)
    monkeypatch.setattr(reducing, "stuck", exits_for_cpuid)
    small, _ = shrink(case, finding, 400, lambda: False, lambda made: None)
    assert small.vcpus[0].program == (program[1], b"\xeb\xfe")


def test_the_record_says_whether_the_change_is_to_blame(tmp_path: Path) -> None:
    kernel = Kernel("v6.12", ("track-write-barrier",))
    store = FindingStore(tmp_path, None)
    recorder = Recorder(kernel, store, Corpus(None), Tally(), Stop(), Budget())
    recorder.begin("test", 1)
    recorder.check(barrier(kernel.revert))
    (record,) = store.records.values()
    assert record.attributed and record.as_json()["attributed"] is True
    assert json.loads(Path(record.case).with_suffix(".json").read_text())["attributed"] is True
    saved = toml.load(record.case)
    assert saved.expect.fingerprint == record.fingerprint and saved.revert == kernel.revert
    assert record.instructions == 2 and record.deviations <= 2


def test_a_known_finding_is_not_reduced_again(tmp_path: Path) -> None:
    case = barrier(("track-write-barrier",))
    noisy = replace(case, vcpus=(*case.vcpus, Vcpu("flat32", code_gva=0x3000, code_gfn=3, program=(b"\x90",) * 3)))
    (finding,) = run(noisy).findings
    (tmp_path / "corpus" / "known").mkdir(parents=True)
    known = replace(case, expect=Expect(FINDING, finding.kind, finding.fingerprint))
    (tmp_path / "corpus" / "known" / "barrier.toml").write_text(toml.dumps(known))
    store = FindingStore(tmp_path / "findings", tmp_path / "corpus")
    recorder = Recorder(Kernel("v6.12", case.revert), store, Corpus(None), Tally(), Stop(), Budget())
    recorder.begin("test", 1)
    recorder.check(noisy)
    (record,) = store.records.values()
    assert not record.new and record.instructions == 5


def schedules_of(case: Case, tmp_path: Path) -> int:
    """How many runs the guided engine gives ``case``, found in a corpus of its own, and every Case after it."""
    recorder = Recorder(Kernel(), FindingStore(tmp_path, None), Corpus(None), Tally(), Stop(), Budget())
    recorder.begin("guided", 1)
    engine = GuidedEngine(recorder, 1, Budget(None, 1), lambda: None)
    recorder.corpus.add(case)
    engine.run()
    return recorder.tally.schedules


def test_a_case_of_one_thread_is_run_once_and_one_of_two_also_under_another_schedule(tmp_path: Path) -> None:
    two = barrier(())
    assert schedules_of(replace(two, vcpus=two.vcpus[:1], schedule=()), tmp_path) == 1
    assert schedules_of(two, tmp_path) > 1


def fresh_cases(
    engine: type[GuidedEngine] | type[RandomEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[Case]:
    """What the generator answers to ``engine`` in its first Cases."""
    made: list[Case] = []

    def generated(rng: Rng, options: GenerateOptions) -> Case:
        made.append(generate(rng, options))
        return made[-1]

    monkeypatch.setattr(f"{engine.__module__}.generate", generated)
    recorder = Recorder(Kernel(), FindingStore(tmp_path, None), Corpus(None), Tally(), Stop(), Budget())
    recorder.reduce_findings = False
    recorder.begin("test", 1)
    engine(recorder, 9, Budget(None, 12), lambda: None).run()
    return made


def test_the_blind_engine_is_a_control_it_makes_the_same_fresh_cases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guided = fresh_cases(GuidedEngine, tmp_path, monkeypatch)
    blind = fresh_cases(RandomEngine, tmp_path, monkeypatch)
    assert len(blind) == 12 and 4 < len(guided) <= 12
    assert guided == blind[: len(guided)]


def test_the_blind_engine_does_not_look_at_the_corpus(tmp_path: Path) -> None:
    def counts(start: list[Case]) -> tuple[int, dict[str, int]]:
        recorder = Recorder(Kernel(), FindingStore(tmp_path, None), Corpus(None), Tally(), Stop(), Budget())
        recorder.begin("random", 1)
        for case in start:
            recorder.corpus.add(case)
        RandomEngine(recorder, 1, Budget(None, 5), lambda: None).run()
        return recorder.tally.schedules, recorder.tally.marks

    assert counts([]) == counts([barrier(())] * 5)


def test_a_case_gets_more_schedules_while_its_kinds_of_races_are_rare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmufuzz.campaign.engine_guided.generate", lambda rng, options: barrier(()))
    monkeypatch.setattr("mmufuzz.campaign.engine_guided.FRESH", 100)
    recorder = Recorder(Kernel(), FindingStore(tmp_path, None), Corpus(None), Tally(), Stop(), Budget())
    recorder.begin("guided", 1)
    engine = GuidedEngine(recorder, 1, Budget(None, 200), lambda: None)
    engine.run()
    # So many while the Case's critical cycles are rare, fewer afterwards.
    assert SCHEDULES + 1 < recorder.tally.schedules / recorder.tally.cases < RARE_SCHEDULES + 2
    start = recorder.tally.schedules
    kept = len(recorder.corpus)
    engine.aims.tried = dict.fromkeys(engine.aims.tried, 10**6)
    engine.budget = Budget(None, 300)
    engine.run()
    # Starting points get one schedule besides their own.
    assert recorder.tally.schedules - start == 2 * kept + (100 - kept) * (SCHEDULES + 1)


def test_the_seed_decides_what_the_guided_engine_does(tmp_path: Path) -> None:
    def campaign(seed: int, name: str) -> tuple[int, dict[str, int], bytes]:
        work = Recorder(Kernel(), FindingStore(tmp_path / name, None), Corpus(None), Tally(), Stop(), Budget())
        work.begin("guided", seed)
        GuidedEngine(work, seed, Budget(None, 15), lambda: None).run()
        return work.tally.schedules, work.tally.marks, bytes(work.corpus.reached.buckets)

    assert campaign(1, "one") == campaign(1, "two") != campaign(2, "three")


def test_a_campaign_bounds_the_events_of_a_run() -> None:
    limits = [
        Kernel().dress(replace(CASE, options=replace(CASE.options, event_limit=limit))).options.event_limit
        for limit in (500, MOST_EVENTS, 1_000_000)
    ]
    assert limits == [500, MOST_EVENTS, MOST_EVENTS]
