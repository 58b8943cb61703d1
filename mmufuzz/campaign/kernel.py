"""Which kernel a campaign or a verb is about: a profile and changes to it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mmufuzz.case.model import Case, Expect, Options
from mmufuzz.kvm.fixes import LATEST, behaviours, find

MOST_EVENTS = Options().event_limit
"""Events of a run in a campaign: a mutated limit of a million would cost as much time and memory as a thousand runs."""


@dataclass(frozen=True)
class Kernel:
    """A profile with fixes taken away and added. An empty ``name`` on a Case means the Case's own profile."""

    name: str = LATEST
    revert: tuple[str, ...] = ()
    apply: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises ``CaseError`` for an unknown profile or fix."""
        behaviours(self.name or LATEST, self.revert, self.apply)

    def dress(self, case: Case) -> Case:
        """``case`` on exactly this kernel, of at most ``MOST_EVENTS``, expecting nothing in particular."""
        options = case.options
        if options.event_limit > MOST_EVENTS:
            options = replace(options, event_limit=MOST_EVENTS)
        return replace(
            case, kernel=self.name, revert=self.revert, apply=self.apply, options=options, expect=Expect()
        )

    def override(self, case: Case) -> Case:
        """``case`` with these changes on top of what it says.

        A profile replaces the Case's profile and its changes with it; then ``revert`` and ``apply`` change that, each
        taking the place of the opposite the Case had.
        """
        reverts, applies = ([], []) if self.name else (list(case.revert), list(case.apply))
        for name in self.revert:
            applies = [other for other in applies if other != name]
            reverts.append(name)
        for name in self.apply:
            reverts = [other for other in reverts if other != name]
            applies.append(name)
        return replace(case, kernel=self.name or case.kernel, revert=_unique(reverts), apply=_unique(applies))

    def __str__(self) -> str:
        words = [self.name]
        if self.revert:
            words.append(f"without {', '.join(self.revert)}")
        if self.apply:
            words.append(f"with {', '.join(self.apply)}")
        return " ".join(words)


def kernel_of(case: Case) -> Kernel:
    """The kernel that ``case`` runs on."""
    return Kernel(case.kernel, case.revert, case.apply)


def canonical(name: str) -> str:
    """The id of the fix that ``name``, an id or a zoo entry, stands for. Raises ``CaseError``."""
    return find(name).id


def _unique(names: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
