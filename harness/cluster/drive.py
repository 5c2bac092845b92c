"""The driver: hands units to workers, hears what came of them, and starts again what has died. Knows neither Ray nor the job.

A worker is started again twice without having finished anything in between; a unit is tried again twice. A worker's death is
blamed on the unit that it worked on, not on those that waited behind it.
"""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from harness.cluster.job import Answer, Ledger
from harness.cluster.queue import Queue
from harness.errors import BadRequest

STARTS = 3  # of a worker that finishes nothing
TRIES = 3  # of a unit, or of opening a part
AHEAD = 2  # calls that a worker is sent at once, while enough waits: it need not wait for the driver
LISTEN_S = 1.0  # between two looks at what other processes have in hand


@dataclass(frozen=True, eq=False)
class Call:
    """What a worker is asked: to open or list a part, or to run a unit."""

    what: str  # open | list | run
    part: str
    unit: Any = None  # as the ledger told it
    asked: Any = None  # the unit, as the queue knows it


@dataclass(frozen=True)
class Event:
    """A worker's answer, or its death."""

    worker: int
    start: int  # which of its lives
    call: Call | None = None
    answer: Answer | None = None
    died: str = ""  # how


class Crew(Protocol):
    """The workers, numbered from 0."""

    size: int

    def start(self, worker: int, start: int) -> None:
        """Starts a worker, or starts it again."""
        ...

    def ask(self, worker: int, call: Call) -> None:
        """Calls of one worker are answered in turn."""
        ...

    def next(self, timeout: float) -> Event | None:
        """The next event, or None after so many seconds without any."""
        ...

    def stop(self) -> None:
        """Ends all workers, whatever they do."""
        ...


@dataclass
class Hand:
    """A worker, as the driver sees it."""

    number: int
    part: str | None = None  # that it has open, once it has answered its calls
    calls: list[Call] = field(default_factory=list)  # sent and not answered, in order
    pending: deque[Any] = field(default_factory=deque)  # of the group that it has taken
    start: int = 0
    in_vain: int = 0  # starts since it last finished a unit
    alive: bool = True
    never: set[str] = field(default_factory=set)  # parts that it cannot open


class Driver:
    """Everything between a job's parts and its ledger, until no unit is left."""

    def __init__(self, parts: Sequence[str], ledger: Ledger, crew: Crew) -> None:
        self.ledger, self.crew, self.queue = ledger, crew, Queue()
        self.hands = [Hand(number) for number in range(crew.size)]
        self.unlisted, self.listing = list(parts), set[str]()
        self.closed: set[str] = set()  # parts that were refused
        self.elsewhere: list[Any] = []  # what other processes have in hand
        self.tries: Counter[Hashable] = Counter()
        self.why = "no worker was started"  # the last one died
        self.news = True  # is there something for workers that had nothing to do?

    def run(self) -> None:
        """
        Raises:
            whatever the ledger raises; what had been answered by then is in the ledger.
        """
        try:
            for hand in self.hands:
                self._start(hand)
            self._fill()
            while self._under_way():
                event = self.crew.next(LISTEN_S)
                if event is not None:
                    self._hear(event)
                elif self.elsewhere:
                    self._ask_again()
                self._fill(self.hands[event.worker] if event is not None and not self.news else None)
        except BaseException:
            self._drain()
            raise
        finally:
            self.crew.stop()

    def _under_way(self) -> bool:
        if any(hand.calls for hand in self.hands):
            return True
        if not any(hand.alive for hand in self.hands):
            self._give_up()
            return False
        if self.elsewhere:
            return True
        for part in self.unlisted:  # no worker that is left can open it, or that of the units below
            self._close(part, BadRequest(f"no worker can open {part}: {self.why}"))
        for unit in self.queue.clear():
            self.ledger.lost(unit, f"no worker can open {unit.part}: {self.why}")
        return False

    def _start(self, hand: Hand) -> None:
        hand.start += 1
        hand.part = None
        self.crew.start(hand.number, hand.start)

    def _fill(self, only: Hand | None = None) -> None:
        """Gives every worker something to do, or one, as far as there is anything. Those that have just died come last."""
        if only is None:
            self.news = False
        for hand in sorted(self.hands, key=lambda hand: hand.in_vain) if only is None else [only]:
            while hand.alive and len(hand.calls) < (AHEAD if len(self.queue) > len(self.hands) else 1):
                if not self._next_call(hand):
                    break

    def _next_call(self, hand: Hand) -> bool:
        """Sends one call. False: there is nothing for this worker."""
        while hand.pending:
            if self._send(hand, hand.pending.popleft()):
                return True
        if self.unlisted and not hand.calls and not self.queue.has(hand.part) and self._is_sound(hand):
            part = next((part for part in self.unlisted if part not in hand.never), None)
            if part is not None:
                self.unlisted.remove(part)
                self.listing.add(part)
                return self._ask(hand, Call("list", part))
        mine = self.queue.has(hand.part)
        if hand.calls and not mine:
            return False  # another part only once it is known that nothing of this one is left
        group = self.queue.take(hand.part, Counter() if mine else self._opened(), hand.never)
        if group is not None:
            hand.pending.extend(group)
            return self._next_call(hand)
        if hand.part is None and not hand.calls and (coming := [part for part in self.listing if part not in hand.never]):
            workers = self._opened()  # opened beforehand, while another worker lists the units
            return self._ask(hand, Call("open", min(coming, key=lambda part: (workers[part], part))))
        return False

    def _is_sound(self, hand: Hand) -> bool:
        """Has no other worker died less often? What all wait for is not given to one that may die of itself."""
        return hand.in_vain <= min(other.in_vain for other in self.hands if other.alive)

    def _opened(self) -> Counter[str]:
        return Counter(hand.part for hand in self.hands if hand.alive and hand.part is not None)

    def _send(self, hand: Hand, unit: Any) -> bool:
        if not self.ledger.claim(unit):
            self.elsewhere.append(unit)
            return False
        told = self.ledger.left(unit)
        if told is None:
            self.ledger.back(unit)
            return False
        return self._ask(hand, Call("run", unit.part, told, unit))

    def _ask(self, hand: Hand, call: Call) -> bool:
        hand.part = call.part
        hand.calls.append(call)
        self.crew.ask(hand.number, call)
        return True

    def _hear(self, event: Event) -> None:
        hand = self.hands[event.worker]
        if event.start != hand.start or not hand.alive:
            return  # of an earlier life, which is buried
        if event.answer is None or event.call is None:
            self._bury(hand, event.died)
            return
        call, answer = event.call, event.answer
        hand.calls.remove(call)
        if answer.opening is not None:
            self.ledger.opened(call.part, answer.opening)
        if answer.unopened:
            self._cannot_open(hand, call, answer)
        elif call.what == "run":
            self._ran(hand, call, answer)
        elif call.what == "list":
            self._listed(call.part, answer)

    def _ran(self, hand: Hand, call: Call, answer: Answer) -> None:
        if (wrong := answer.wrong) is not None:
            self._blame(call.asked, str(wrong))
            return
        hand.in_vain = 0
        self.ledger.done(call.asked, answer.value, answer.seconds)

    def _listed(self, part: str, answer: Answer) -> None:
        self.listing.discard(part)
        self.news = True
        if answer.refusal is not None:
            self._close(part, answer.refusal)
        elif answer.failure is not None:
            self._list_again(part, answer.failure)
        else:
            self.queue.add(self.ledger.listed(part, answer.value))

    def _list_again(self, part: str, reason: str) -> None:
        self.tries[part] += 1
        if self.tries[part] < TRIES:
            self.unlisted.append(part)
        else:
            self._close(part, BadRequest(f"{part} was tried {TRIES} times: {reason}"))

    def _close(self, part: str, refusal: Exception) -> None:
        """A part that cannot be had; units of it that wait are lost."""
        if part in self.closed:
            return
        self.closed.add(part)
        for unit in self.queue.clear(part):
            self.ledger.lost(unit, str(refusal))
        self.ledger.refused(part, refusal)

    def _cannot_open(self, hand: Hand, call: Call, answer: Answer) -> None:
        """One worker cannot open a part that others perhaps can: it is given no unit of it, and none is blamed."""
        self.news = True
        hand.never.add(call.part)
        hand.part = None
        self.why = str(answer.wrong)
        if call.what == "run":
            self._return([call.asked])
        others = any(other.alive and call.part not in other.never for other in self.hands)
        if not others:
            self.listing.discard(call.part)
            self._close(call.part, answer.refusal or BadRequest(f"{call.part}: {answer.failure}"))
        elif call.what == "list":
            self.listing.discard(call.part)
            self.unlisted.append(call.part)

    def _bury(self, hand: Hand, how: str) -> None:
        """A worker is dead: what it had in hand goes back, and it is started again, or not."""
        guilty, waiting = hand.calls[:1], hand.calls[1:]
        self.why, self.news = how, True
        self._return([*(call.asked for call in waiting if call.what == "run"), *hand.pending])
        hand.calls, hand.part = [], None
        hand.pending.clear()
        for call in (*guilty, *waiting):
            if call.what == "list":
                self.listing.discard(call.part)
                self._list_again(call.part, how)
            elif call.what == "run" and call in guilty:
                self._blame(call.asked, how)
        hand.in_vain += 1
        if hand.in_vain < STARTS:
            self._start(hand)
        else:
            hand.alive = False

    def _return(self, units: Sequence[Any]) -> None:
        for unit in units:
            self.ledger.back(unit)
        self.queue.put_back(units)

    def _blame(self, unit: Any, reason: str) -> None:
        self.tries[unit] += 1
        if self.tries[unit] >= TRIES:
            self.ledger.lost(unit, f"tried {TRIES} times: {reason}")
            return
        self.ledger.back(unit)
        self.queue.put_back([unit], last=True)
        self.news = True

    def _ask_again(self) -> None:
        self.news = True
        units, self.elsewhere = self.elsewhere, []
        self.queue.put_back(units)

    def _give_up(self) -> None:
        """No worker is left."""
        print(f"no worker is left: {self.why}", file=sys.stderr)
        for unit in [*self.queue.clear(), *self.elsewhere]:
            self.ledger.lost(unit, f"no worker was left: {self.why}")
        for part in [*self.unlisted, *self.listing]:
            self._close(part, BadRequest(f"no worker was left that could open {part}: {self.why}"))

    def _drain(self) -> None:
        """Keeps what has been answered meanwhile, before all is stopped."""
        while (event := self.crew.next(0)) is not None:
            hand = self.hands[event.worker]
            if event.answer is not None and event.call is not None and event.start == hand.start and event.call.what == "run":
                self._ran(hand, event.call, event.answer)
