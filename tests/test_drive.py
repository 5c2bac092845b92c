"""The driver of workers, without Ray: whose fault a death is, who takes what, and that every unit ends in the ledger once."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from crews import Book, InlineCrew, Number, Squares

from harness.cluster.drive import Call, Driver
from harness.cluster.options import RayOptions
from harness.cluster.places import Machine, places_for
from harness.errors import BadRequest

A = [Number("a", number) for number in range(12)]
DEAD = "its worker's process ended"


def drive(crew: InlineCrew, book: Book, *parts: str) -> Driver:
    driver = Driver(parts or ("a",), book, crew)
    driver.run()
    assert crew.stopped and not book.held
    return driver


def order(crew: InlineCrew, part: str = "") -> list[Number]:
    return [call.unit for _, call in crew.log if call.what == "run" and part in ("", call.part)]


def test_every_unit_is_done_once_and_long_ones_first() -> None:
    units = [Number("a", number, size=number % 5) for number in range(12)]
    crew, book = InlineCrew(Squares(units), 3), Book()
    drive(crew, book)
    assert book.found == {unit: unit.number**2 for unit in units} and not book.reasons
    sizes = [call.unit.size for call in crew.asked if call.what == "run"]
    assert sizes == sorted(sizes, reverse=True)


def test_a_death_is_blamed_on_the_unit_that_was_worked_on() -> None:
    """Calls that waited behind it are not charged with it: a unit is given up when it was tried three times itself."""
    poison = Number("a", 100, size=9)
    crew, book = InlineCrew(Squares([poison, *A]), 2, lambda _worker, _start, call: DEAD if call.unit == poison else ""), Book()
    drive(crew, book)
    assert set(book.found) == set(A)
    assert book.reasons == {poison: f"tried 3 times: {DEAD}"}
    assert Counter(order(crew))[poison] == 3


def test_a_worker_is_started_again_twice_and_anew_once_it_has_finished_something() -> None:
    """Dies at its first call of every life: three lives. Dies at every third call: as many as are needed."""
    crew, book = InlineCrew(Squares(A), 2, lambda worker, _start, _call: DEAD if worker == 0 else ""), Book()
    drive(crew, book)
    assert set(book.found) == set(A) and crew.workers[0][0] == 3
    seen: Counter[tuple[int, int]] = Counter()

    def now_and_then(worker: int, start: int, call: Call) -> str:
        seen[worker, start] += 1
        return DEAD if seen[worker, start] == 4 else ""

    crew, book = InlineCrew(Squares(A), 1, now_and_then), Book()
    drive(crew, book)
    assert set(book.found) == set(A) and crew.workers[0][0] > 3


def test_without_workers_all_is_lost_with_its_reason() -> None:
    crew, book = InlineCrew(Squares(A), 2, lambda _worker, _start, call: DEAD if call.what == "run" else ""), Book()
    drive(crew, book)
    assert not book.found and set(book.reasons) == set(A)
    assert sum(reason == f"no worker was left: {DEAD}" for reason in book.reasons.values()) >= len(A) - 2
    crew, book = InlineCrew(Squares(A), 2, lambda *_: DEAD), Book()
    drive(crew, book, "a", "b")
    assert set(book.closed) == {"a", "b"} and DEAD in book.closed["b"]


def test_what_is_raised_is_tried_again_and_told() -> None:
    broken = Number("a", -3)
    crew, book = InlineCrew(Squares([*A, broken])), Book()
    drive(crew, book)
    assert set(book.found) == set(A)
    assert book.reasons == {broken: "tried 3 times: ZeroDivisionError: numbers below 0"}


def test_a_part_that_nobody_can_open_is_refused_and_the_others_go_on() -> None:
    units = [*A, *(Number("b", number) for number in range(4))]
    job = Squares(units, lambda part: BadRequest("no such model") if part == "a" else None)
    crew, book = InlineCrew(job), Book()
    drive(crew, book, "a", "b")
    assert book.closed == {"a": "no such model"} and {unit.part for unit in book.found} == {"b"} and len(book.found) == 4


def test_a_worker_that_cannot_open_a_part_takes_no_unit_of_it_and_blames_none() -> None:
    crew = InlineCrew(Squares(A), 3)
    crew.start(1, 1)
    lame = Squares(A, lambda _part: MemoryError("too small a GPU"))
    start = crew.start

    def one_is_lame(worker: int, life: int) -> None:
        start(worker, life)
        if worker == 1:
            crew.workers[1][1].job = lame

    crew.start = one_is_lame  # type: ignore[method-assign]
    book = Book()
    drive(crew, book)
    assert set(book.found) == set(A) and not book.reasons and not book.closed
    assert 1 <= len(lame.opened) <= 2, "asked again for units, when it had said that it cannot"


def test_workers_stay_with_their_part() -> None:
    """Three models on three workers: each is opened by few of them, though all are listed first."""
    units = [Number(part, number) for part in "abc" for number in range(20)]
    job = Squares(units)
    crew, book = InlineCrew(job, 3), Book()
    drive(crew, book, *"abc")
    assert len(book.found) == 60
    assert len(job.opened) <= 5


def test_questions_on_one_context_go_to_one_worker_in_a_row() -> None:
    units = [Number("a", number, together=f"text {number % 4}") for number in range(16)]
    crew, book = InlineCrew(Squares(units), 3), Book()
    drive(crew, book)
    assert len(book.found) == 16
    for text in range(4):
        mine = [worker for worker, call in crew.log if call.what == "run" and call.unit.number % 4 == text]
        assert len(set(mine)) == 1


def test_what_another_process_has_in_hand_comes_last() -> None:
    book = Book(elsewhere={A[0]: 2})
    crew = InlineCrew(Squares(A))
    drive(crew, book)
    assert set(book.found) == set(A) and order(crew)[-1] == A[0]


def test_a_stop_keeps_what_was_answered() -> None:
    crew, book = InlineCrew(Squares(A), 2), Book(stops_at=5)
    with pytest.raises(KeyboardInterrupt):
        Driver(("a",), book, crew).run()
    assert crew.stopped and len(book.found) > 5, "what was answered when the stop came is drained"


@pytest.mark.parametrize("seed", range(20))
def test_at_random_deaths_nothing_is_lost_or_doubled(seed: int) -> None:
    rng = random.Random(seed)
    units = [Number(rng.choice("abc"), number, rng.random(), rng.choice(("", "", "x"))) for number in range(60)]
    crew = InlineCrew(Squares(units), rng.randint(1, 6), lambda *_: DEAD if rng.random() < 0.03 else "")
    book = Book()
    drive(crew, book, *"abc")
    assert book.found.keys() | book.reasons.keys() == set(units) and not book.found.keys() & book.reasons.keys()


NODES = [Machine("1", "10.0.0.1", 8, 0), Machine("2", "10.0.0.2", 16, 4), Machine("3", "10.0.0.3", 16, 8)]


@pytest.mark.parametrize(
    ("options", "device", "workers", "cores", "gpus"),
    [
        ({}, None, 12, 2, 1),  # all GPUs; cores as the fullest node has them
        ({"workers": 3}, None, 3, 16, 1),
        ({"gpus_per_worker": 4}, None, 3, 8, 4),
        ({"gpus_per_worker": 8}, None, 1, 16, 8),
        ({}, "cpu", 40, 1, 0),
        ({"workers": 5}, "cpu", 5, 8, 0),
    ],
)
def test_places(options: dict[str, int], device: str | None, workers: int, cores: int, gpus: int) -> None:
    where = places_for(RayOptions("auto", **options), NODES, device)
    if workers == 3 and gpus == 1:
        assert (where.workers, where.gpus) == (3, 1) and where.cores >= 5
    else:
        assert (where.workers, where.cores, where.gpus) == (workers, cores, gpus)
    assert sum(machine.holds(where.cores, where.gpus) for machine in where.machines) >= workers


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"workers": 13},
            "13 is more than 40 cores and 12 GPUs on 3 nodes are enough for, which is 12 workers of 1 GPU",
        ),
        ({"workers": 4, "gpus_per_worker": 4}, "which is 3 workers of 4 GPUs"),
        ({"gpus_per_worker": 16}, "which is 0 workers of 16 GPUs"),
    ],
)
def test_more_workers_than_there_is_room_for(options: dict[str, int], says: str) -> None:
    with pytest.raises(BadRequest) as refusal:
        places_for(RayOptions("auto", **options), NODES, None)
    assert says in str(refusal.value)
