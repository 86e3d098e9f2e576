"""Sessions that answers share: each running answer has one, and their steps run together. Knows no server.

An answer gets the free session that holds the longest beginning of its prompt. Where another session holds more, such
as a system message, that beginning is copied. The least recently used session gives way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from merino_edge.runtime.engine import SequenceGroup
from merino_edge.runtime.session import Session
from merino_edge.runtime.turns import Step


class SharedSessions:
    """The sessions of a group's sequences. Use it from one thread."""

    def __init__(self, group: SequenceGroup) -> None:
        self._group = group
        self.every = [Session(engine) for engine in group.members]
        self._free = list(self.every)  # the least recently used first

    def __len__(self) -> int:
        return len(self.every)

    @property
    def free(self) -> int:
        """How many are free: so often may `take` be called."""
        return len(self._free)

    def take(self, ids: Sequence[int]) -> Session:
        """A free session for the prompt `ids`; `give_back` must follow."""
        held = {id(session): session.first_to_run(ids) for session in self.every}
        chosen = max(self._free, key=lambda session: held[id(session)])  # of equals the least recently used
        source = max(self.every, key=lambda session: held[id(session)])
        if 2 * held[id(chosen)] < len(chosen.ids):  # it holds more of another conversation, which may go on
            chosen = self._free[0]
        positions = held[id(source)]
        if positions > held[id(chosen)] and self._group.copy_prefix(source.engine, chosen.engine, positions):
            chosen.hold(ids[:positions])
        self._free.remove(chosen)
        return chosen

    def give_back(self, session: Session) -> None:
        """The answer that used `session` has ended."""
        self._free.append(session)

    def together(self, steps: Iterable[Step]) -> list[list[Step]]:
        """The steps of several answers, put together into those that `run` takes at once."""
        joint, apart = list[Step](), list[list[Step]]()
        for step in steps:
            if self._group.joins_steps and step.can_join:
                joint.append(step)
            else:
                apart.append([step])
        return [joint, *apart] if joint else apart

    def run(self, steps: Sequence[Step]) -> None:
        """Run steps that `together` returned."""
        if len(steps) == 1:
            steps[0].run()
            return
        for step, logits in zip(steps, self._group.step([step.row() for step in steps]), strict=True):
            step.take(logits)
