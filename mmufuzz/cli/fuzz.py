"""``mmufuzz fuzz``: search for a Case that breaks a property."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from mmufuzz.build.loader import in_use
from mmufuzz.campaign.campaign import Campaign, Result
from mmufuzz.campaign.corpus import OWN
from mmufuzz.campaign.covered import measure
from mmufuzz.campaign.files import InputError, checkout
from mmufuzz.campaign.jobs import collect, start_jobs
from mmufuzz.campaign.plan import DEFAULT_SECONDS, ENGINES, HARNESSES, Plan, shares
from mmufuzz.campaign.reached import summary
from mmufuzz.cli.arguments import add_json, add_kernel, count, duration, kernel_from, natural
from mmufuzz.cli.core import prepare_core
from mmufuzz.cli.output import Output
from mmufuzz.cli.status import Status
from mmufuzz.kvm.fixes import LATEST
from mmufuzz.kvm.marks import MARKS
from mmufuzz.outcome import HARNESS_ERROR


def add_parser(verbs: Any) -> None:
    """The verb's arguments."""
    parser = verbs.add_parser("fuzz", help="search for a Case that breaks a property")
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument("--time", metavar="T", type=duration, help="60s, 2m, 1h; default 60s")
    limit.add_argument("--cases", metavar="N", type=count, help="end after N Cases instead")
    parser.add_argument("--harness", choices=sorted(HARNESSES), default="", help="one harness instead of all")
    add_kernel(parser, LATEST)
    parser.add_argument(
        "--engine",
        choices=("auto", *ENGINES),
        default="auto",
        help="auto shares the time among all that can run here; random is blind, a control",
    )
    parser.add_argument("--jobs", metavar="N", type=count, default=1, help="processes, each with a seed of its own")
    parser.add_argument("--corpus", metavar="DIR", default=".mmufuzz/corpus", help="Cases to start from and to grow")
    parser.add_argument("--findings", metavar="DIR", default="findings", help="where reproducers go")
    parser.add_argument("--seed", metavar="N", type=natural, help="repeat a campaign; default: a random one, printed")
    parser.add_argument("--no-coverage", action="store_true", help=argparse.SUPPRESS)
    add_json(parser)
    parser.set_defaults(run=run)


def plan_from(arguments: argparse.Namespace) -> Plan:
    """The campaign that the arguments ask for. Raises ``CaseError`` or ``InputError``."""
    engine = arguments.engine
    if arguments.harness:
        needed = HARNESSES[arguments.harness]
        if engine not in ("auto", needed):
            raise InputError(f"--harness {arguments.harness}", f"expected --engine {needed}, got {engine}")
        engine = needed
    seed = arguments.seed if arguments.seed is not None else int.from_bytes(os.urandom(4), "little")
    seconds = arguments.time
    if seconds is None and arguments.cases is None:
        seconds = DEFAULT_SECONDS
    return Plan(
        kernel=kernel_from(arguments),
        seed=seed,
        corpus=Path(arguments.corpus),
        findings=Path(arguments.findings),
        seconds=seconds,
        cases=arguments.cases,
        engine=engine,
        harness=arguments.harness,
        jobs=arguments.jobs,
        checkout=checkout(),
    )


def run(arguments: argparse.Namespace, output: Output) -> Status:
    """Run the campaign and print what it did. JSON: see ``Result.as_json``."""
    plan = plan_from(arguments)
    chosen, left_out = shares(plan)
    if not chosen:
        raise InputError(f"--engine {plan.engine}", f"expected an engine that can run here ({'; '.join(left_out)})")
    if arguments.may_restart:
        prepare_core(output)
    campaign = Campaign(plan, output.line, output.progress)
    output.line(f"core {in_use().line}")
    output.line(f"fuzzing {plan.kernel} with {', '.join(share.name for share in chosen)}; seed {plan.seed}")
    with tempfile.TemporaryDirectory(prefix="mmufuzz-jobs-") as workdir:
        jobs = start_jobs(plan, Path(workdir))
        try:
            result = campaign.run()
        finally:
            failed = collect(jobs, campaign.stop.requested, campaign.tally, campaign.store)
    result.records = list(campaign.store.records.values())
    result.errors = list(campaign.store.errors.values())
    output.done()
    for line in failed:
        output.line(line)
    coverage = None if arguments.no_coverage or result.interrupted else measure(_covering(plan))
    summarize(result, coverage, output)
    output.json({**result.as_json(), "coverage": coverage, **in_use().as_json()})
    return status(result, failed)


def status(result: Result, failed: list[str]) -> Status:
    """The exit status that ``result`` deserves."""
    if result.interrupted:
        return Status.INTERRUPTED
    if result.verdict == "finding":
        return Status.FOUND
    return Status.INTERNAL if failed or result.verdict == HARNESS_ERROR else Status.CLEAN


def _covering(plan: Plan) -> list[Path]:
    seeds = [plan.checkout / "corpus" / "seeds"] if plan.checkout is not None else []
    return [*seeds, plan.corpus / OWN]


def summarize(result: Result, coverage: dict[str, Any] | None, output: Output) -> None:
    """Print the summary that a person can act on."""
    tally = result.tally
    output.line()
    output.line(f"{tally.cases} cases, {tally.schedules} schedules in {result.seconds:.1f} s; seed {result.plan.seed}")
    if result.plan.engine == "auto":
        out = f"; left out {'; '.join(result.left_out)}" if result.left_out else ""
        output.line(f"engines (auto)    {', '.join(tally.engines)}: all that can run here{out}")
    for name, engine in tally.engines.items():
        fields = engine.as_json()
        work = f"{engine.cases} cases" if engine.cases else f"{engine.executions} executions"
        line = f"  {name:<26} {work}, {engine.schedules} schedules, {fields['cases_per_second']:.0f}/s"
        output.line(f"{line}; {engine.note}" if engine.note else line)
    reached = sum(1 for name in MARKS if name in tally.marks)
    output.line(
        f"marks reached     {reached} of {len(MARKS)}; {result.reached.total} counters, {result.new_cases} cases kept"
    )
    output.line(f"counters reached  {summary(result.reached)}")
    exits = ", ".join(f"{name} {number}" for name, number in sorted(tally.exits.items())) or "none"
    output.line(f"kinds of exits    {exits}")
    verdicts = ", ".join(f"{name} {number}" for name, number in sorted(tally.verdicts.items()))
    output.line(f"verdicts          {verdicts or 'none'}")
    if coverage is not None:
        output.line(
            f"core coverage     {coverage['branch_percent']} % of {coverage['branches']} branches, "
            f"by {coverage['cases']} cases of the corpus"
        )
    elif not result.interrupted:
        output.line("core coverage     not measured (pip install coverage)")
    new = [record for record in result.records if record.new]
    output.line(f"findings          {len(new)} new, {len(result.records) - len(new)} known")
    for record in result.records:
        output.line(f"  {'new  ' if record.new else 'known'} {record.kind}: {record.fingerprint}")
        output.line(
            f"        {record.case}: {record.instructions} instructions, {record.edits} words, "
            f"{record.deviations} deviations; "
            f"after {record.found_after_cases} cases, {record.found_after_seconds:.1f} s"
            f"{'' if record.confirmed else '; NOT CONFIRMED by a replay'}"
        )
        if record.seen_in and record.seen_in != record.case:
            output.line(f"        seen before in {record.seen_in}")
    if result.dropped:
        output.line(f"  and {result.dropped} times something else, not kept: too many fingerprints for one campaign")
    for record in result.errors:
        output.line(f"  mmufuzz failed: {record.fingerprint} ({record.case})")
    for line in result.crashes:
        output.line(f"  mmufuzz failed: {line}")
    output.line(f"findings are in   {result.plan.findings.resolve()}")
    output.line(f"the corpus is in  {result.plan.corpus.resolve()}")
    if result.interrupted:
        output.line("interrupted; everything above is saved")
    elif new:
        output.line(f"next              mmufuzz explain {new[0].case}")
