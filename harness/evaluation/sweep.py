"""One prefill, many cells: every method and budget of an example from one dense pass, decoded together.

`Sweep.example` does the work for one prompt; harness/evaluation/run.py goes through tasks and examples and makes the records.
No method is known here by name or class: the sweep calls the members that every `Method` has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce

import torch
from torch import Tensor

from harness.cache import Arena, Budget, Keeper, Needs, Prefill, Selection, keep_all, renumbers
from harness.engine.evict import Held, Turns, remember
from harness.engine.generate import MOST_DRAFTS, Answer, Decoder, NgramTable, Sampler, Stop, generate
from harness.engine.measure import Lap, OutOfMemory, memory_errors, stopwatch
from harness.engine.model import Model
from harness.engine.prepacked import Prepacked
from harness.engine.renumber import renumber
from harness.engine.rows import Counts, RowCache, compact, slack_for
from harness.engine.scoring import FullAnswer, Likelihood, branch, losses
from harness.evaluation.prompts import Prompt, Protocol, turn_end_of
from harness.evaluation.reading import Reading, read_of
from harness.storage import as_many_packed, row_bytes, storage_of
from methods.base import CannotRun, Method

NOT_A_NUMBER = "not a number"  # how the reason of a cell begins that holds one
RANGES = 8  # of a streamed text, equally long, whose losses are told apart
CELL_BYTES = 600_000_000  # rows of the cells decoded together, unless asked otherwise


@dataclass(frozen=True)
class Cell:
    """One method at one budget; None where a method takes none."""

    name: str
    method: Method
    budget: Budget | None


@dataclass
class Outcome:
    """What came out of one cell, or why nothing did."""

    answer: Answer | None = None
    fidelity: dict[str, float] = field(default_factory=dict)
    counts: Counts | None = None  # right after compaction
    entries_asked: int | None = None
    compressed: bool | None = None
    packed: bool = False  # fewer bits: its bytes are counted against the full cache in 16 bits
    kept: list[list[int]] | None = None  # [L][Hq] entries that each query head reads, right after compaction
    skipped: str | None = None
    failed: str | None = None
    by_distance: list[float] | None = None  # mean loss of each of RANGES parts of a streamed text, nats

    def checked(self) -> Outcome:
        """Itself, or a failure where it holds what is no number."""
        likelihoods = self.answer.likelihoods if self.answer else {}
        found = {name: value for name, value in self.fidelity.items() if not math.isfinite(value)}
        found |= {f"likelihood {number}": one.logprob for number, one in likelihoods.items() if math.isnan(one.logprob)}
        said = [f"{name} is {value}" for name, value in found.items()]
        if self.answer is not None and self.answer.stop_reason == "no number":
            said.insert(0, f"the logits of token {len(self.answer.tokens)} of the answer are not finite")
        return Outcome(failed=f"{NOT_A_NUMBER}: {', '.join(said[:3])}") if said else self

    def joined(self, other: Outcome) -> Outcome:
        """One example's outcome over two prompts: likelihoods side by side, counts summed. Whatever stopped one stops both."""
        if self.answer is None or other.answer is None or self.counts is None or other.counts is None:
            return self if self.answer is None else other
        both = dict(self.answer.likelihoods)
        for number, likelihood in other.answer.likelihoods.items():
            both[number] = both[number] + likelihood if number in both else likelihood
        return Outcome(
            Answer([], self.answer.stop_reason, likelihoods=both),
            {},
            self.counts + other.counts,
            (self.entries_asked or 0) + (other.entries_asked or 0),
            bool(self.compressed and other.compressed),
            self.packed,
            self.kept,
        )


@dataclass
class Laps:
    """Seconds of a sweep's phases."""

    prefill: Lap = field(default_factory=Lap)
    observe: Lap = field(default_factory=Lap)
    score: Lap = field(default_factory=Lap)
    compact: Lap = field(default_factory=Lap)
    append: Lap = field(default_factory=Lap)
    decode: Lap = field(default_factory=Lap)
    fidelity: Lap = field(default_factory=Lap)


@dataclass
class Sweep:
    """Settings and memory that the examples of one model share."""

    model: Model
    protocol: Protocol
    cell_bytes: int = CELL_BYTES
    with_fidelity: bool = True
    seed: int = 0  # of sampled answers
    laps: Laps = field(default_factory=Laps)
    arena: Arena = field(default_factory=Arena)
    read: int = 0  # contexts, rather than questions
    _reading: Reading | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.model.prepacked.layers:
            self.model.prepacked = Prepacked.of(self.model.network)

    @property
    def reading(self) -> Reading | None:
        """What was read last, unless another sweep has read into the same memory since."""
        return self._reading if self._reading is self.arena.tenant else None

    @reading.setter
    def reading(self, reading: Reading | None) -> None:
        self._reading = self.arena.tenant = reading

    def example(self, prompt: Prompt, cells: Sequence[Cell], most: int) -> Iterator[tuple[Cell, Outcome]]:
        """Outcomes of the cells of one prompt, as they are finished. Every cell gets exactly one."""
        work = _Example(self, prompt, most)
        try:
            with memory_errors():
                work.read(reduce(Needs.__or__, (cell.method.needs for cell in cells), Needs()))
        except OutOfMemory as error:
            yield from ((cell, Outcome(failed=f"prefill: {error}")) for cell in cells)
            return
        ready: list[tuple[Cell, Selection]] = []
        for cell in cells:
            outcome = work.select(cell)
            if isinstance(outcome, Outcome):
                yield cell, outcome
            else:
                ready.append((cell, outcome))
        selections = dict(ready)
        for cell, outcome in work.answer_all(ready):
            outcome.entries_asked, outcome.kept = work.asked(cell), work.by_head(selections[cell])
            yield cell, outcome


@dataclass
class _Example:
    """The work on one prompt."""

    sweep: Sweep
    prompt: Prompt
    most: int
    full: FullAnswer | None = None
    ngrams: NgramTable = field(default_factory=NgramTable)

    def read(self, needs: Needs) -> None:
        """The context, unless the last question was asked on the same one."""
        held = self.sweep.reading
        self.reading = held if held is not None and held.serves(self.prompt, needs) else self._read(needs)
        self.prefill: Prefill = self.reading.prefill
        self.everything = self.reading.without_question(keep_all(self.prefill))
        self.ngrams.learn(self.prompt.ids)

    def _read(self, needs: Needs) -> Reading:
        sweep, prompt = self.sweep, self.prompt
        laps, model = sweep.laps, sweep.model
        sweep.reading = None  # its memory is the next one's
        ids = torch.tensor(read_of(prompt), device=model.device)
        turn_end = turn_end_of(model.tokenizer, sweep.protocol.chat) if needs.replays else ""
        with stopwatch(model.device, laps.prefill):
            prefill, observed = model.prefill(
                ids, needs, sweep.arena, sweep.protocol.routing, len(prompt.one_pass), turn_end, True
            )
        laps.prefill.seconds -= observed.seconds
        laps.observe.seconds += observed.seconds
        sweep.read += 1
        prefill = prefill.at(sweep.protocol.granularity)
        sweep.reading = Reading(read_of(prompt), len(prompt.looked), len(prompt.one_pass), needs, prefill)
        return sweep.reading

    def select(self, cell: Cell) -> Selection | Outcome:
        """The rows that a cell keeps, or why it keeps none."""
        reading = self.reading
        if cell in reading.selections:
            return reading.selections[cell]
        try:
            with memory_errors(), stopwatch(self.sweep.model.device, self.sweep.laps.score):
                chosen = cell.method.compress(self.prefill, self.asked(cell), reading.scores_of(cell.method.scorer))
                return reading.selections.setdefault(cell, reading.without_question(chosen))
        except CannotRun as reason:
            return Outcome(skipped=str(reason))
        except (ValueError, OutOfMemory) as error:
            return Outcome(failed=f"{type(error).__name__}: {error}")

    def asked(self, cell: Cell, tokens: int | None = None) -> int:
        """Entries of the model's type that the cell's budget stands for, of the prefill's tokens or of so many."""
        if cell.budget is None:
            return self.entries(self.everything)
        return cell.budget.entries(self.sweep.model.parent_shape, tokens or self.prefill.tokens, self.sweep.protocol.granularity)

    def entries(self, selection: Selection) -> int:
        return sum(row.entries(kv.keys.shape[1]) for kv, rows in zip(self.prefill.layers, selection, strict=True) for row in rows)

    def by_head(self, selection: Selection) -> list[list[int]]:
        """[L][Hq] entries that each query head reads."""
        found = [[0] * self.prefill.shape.query_heads for _ in self.prefill.layers]
        for heads, kv, rows in zip(found, self.prefill.layers, selection, strict=True):
            for row in rows:
                for head in range(row.first, row.first + row.width):
                    heads[head] += row.entries(kv.keys.shape[1])
        return found

    @property
    def to_come(self) -> int:
        """Tokens that a cell may yet take: the question, its answer, and draft tokens that may be rejected."""
        appended = max((len(b.ids) for b in self.prompt.branches), default=len(self.prompt.forced))
        return len(self.prompt.ids) - self.prompt.context + appended + self.most + MOST_DRAFTS

    def answer_all(self, cells: list[tuple[Cell, Selection]]) -> Iterator[tuple[Cell, Outcome]]:
        compared = self.sweep.with_fidelity and not self.prompt.asks_likelihoods
        if not self.prompt.streamed and (self.prompt.forced or compared):
            mine = [pair for pair in cells if pair[0].method.is_reference]
            cells = [pair for pair in cells if not pair[0].method.is_reference]
            outcome = self._answer_full()
            yield from ((cell, outcome) for cell, _ in mine)
            if outcome.failed:
                yield from ((cell, Outcome(failed=f"the full cache failed: {outcome.failed}")) for cell, _ in cells)
                return
        for batch in self._batches(cells):
            yield from self._answer_or_split(batch)

    def keeper(self, cell: Cell) -> Keeper | None:
        """What the cell's method does while the answer is decoded; None where the answer ends before its first turn."""
        keeper = None if cell.budget is None else cell.method.while_decoding(partial(self._cap, cell))
        return None if keeper is None or (storage_of(cell.method) is None and self._ends_before(keeper)) else keeper

    def _ends_before(self, keeper: Keeper) -> bool:
        """Is the answer over before the keeper's first turn? Then its cells go with the others, drafts and all."""
        read = len(self.prompt.ids) - self.prompt.context + self.most - 1
        routed = any(len(groups) > 1 for groups in self.prefill.expert_groups)  # which rows grow is not known beforehand
        alike = not renumbers(keeper)
        return alike and read < keeper.every and not (routed or self.prompt.forced or self.prompt.asks_likelihoods)

    def _held(self, cell: Cell, answer: Answer, before: Counts) -> Held | None:
        """What a cell held that would have evicted, had its answer been longer."""
        evicts = cell.budget is not None and cell.method.while_decoding(int) is not None
        if answer.end is None or not evicts or answer.held is not None or self.prompt.asks_likelihoods:
            return answer.held
        return Held.growing(before, answer.end, len(answer.tokens) - 1)

    def _cap(self, cell: Cell, tokens: int) -> int:
        """Entries that the cell's budget holds, as its method holds them."""
        assert cell.budget is not None
        total, storage = self.asked(cell, tokens), storage_of(cell.method)
        return total if storage is None else as_many_packed(total, storage, self.prefill.shape.head_dim)

    def _answer_full(self) -> Outcome:
        """Full first: the others' fidelity is measured against its answer."""
        try:
            with memory_errors():
                cache, logits = self._open([self.everything])
                outcome = self._outcomes([self.everything])[0]
                read = cache.seen
                outcome.answer = self._generate(cache, logits)[0]
                if (checked := outcome.checked()).failed:
                    return checked
                cache.crop(cache.seen - read)
                with stopwatch(self.sweep.model.device, self.sweep.laps.fidelity):
                    self.full = FullAnswer.of(self.sweep.model, cache, outcome.answer.tokens, self._lead(logits))
                    outcome.fidelity = self.full.of_itself()
        except OutOfMemory as error:
            return Outcome(failed=str(error))
        return outcome.checked()

    def _batches(self, cells: list[tuple[Cell, Selection]]) -> Iterator[list[tuple[Cell, Selection]]]:
        """Cells in as many batches as the byte limit asks for; a cell over the limit goes alone.

        Small cells go first: their steps are cheap, and what they say are the draft tokens of the large ones.
        """
        kinds = {cell: self._kind(cell, self.keeper(cell)) for cell, _ in cells}
        for kind in sorted(set(kinds.values())):  # cells that evict while decoding go among themselves: they make no drafts
            batch: list[tuple[Cell, Selection]] = []
            held = 0
            mine = [(self._bytes(c, s), c, s) for c, s in cells if kinds[c] == kind]
            for size, cell, selection in sorted(mine, key=lambda item: item[0]):
                if batch and held + size > self.sweep.cell_bytes:
                    yield batch
                    batch, held = [], 0
                batch.append((cell, selection))
                held += size
            if batch:
                yield batch

    def _kind(self, cell: Cell, keeper: Keeper | None) -> tuple[bool, bool, str]:
        """Cells of one kind may be decoded together."""
        return keeper is not None, renumbers(keeper), repr(storage_of(cell.method)) if keeper else ""

    def _room(self, cell: Cell) -> int:
        """Tokens that a row of the cell must have room for behind what it keeps of the prefill."""
        keeper = self.keeper(cell)
        if keeper is None or self.prompt.asks_likelihoods:
            return self.to_come
        question = len(self.prompt.ids) - self.prompt.context
        # a share's cap grows with the answer, and a cache may begin below a cap that the prompt does not fill
        held = min(self._cap(cell, self.prefill.tokens), self.entries(self.everything))
        grown = self._cap(cell, self.prefill.tokens + self.to_come) - held
        rows = sum(len(rows) for rows in keep_all(self.prefill))
        return min(self.to_come, max(question, keeper.every) - (-grown // rows))

    def _bytes(self, cell: Cell, selection: Selection) -> int:
        shape, slack, total = self.prefill.shape, slack_for(self._room(cell)), 0
        for kv, rows in zip(self.prefill.layers, selection, strict=True):
            for row in rows:
                entries = row.entries(kv.keys.shape[1])
                if row.storage is None:
                    total += (entries + slack) * (shape.entry_bytes() + 4)
                else:  # a token to come may lie twice
                    total += row_bytes(row.storage, entries, shape.head_dim) + 2 * slack * shape.deployed_bytes() + 4 * entries
        return total

    def _answer_or_split(self, batch: list[tuple[Cell, Selection]]) -> Iterator[tuple[Cell, Outcome]]:
        """Answers a batch; one that does not fit in memory is tried in halves, down to single cells."""
        try:
            with memory_errors():
                outcomes = self._answer([cell for cell, _ in batch], [selection for _, selection in batch])
        except OutOfMemory as error:
            if len(batch) == 1:
                yield batch[0][0], Outcome(failed=str(error))
                return
            yield from self._answer_or_split(batch[: len(batch) // 2])
            yield from self._answer_or_split(batch[len(batch) // 2 :])
            return
        yield from ((cell, outcome) for (cell, _), outcome in zip(batch, outcomes, strict=True))

    def _answer(self, cells: list[Cell], selections: list[Selection]) -> list[Outcome]:
        """All of the cells evict while decoding, or none does; and all positions are renumbered, or none."""
        keepers = [keeper for cell in cells if (keeper := self.keeper(cell)) and not self.prompt.asks_likelihoods]
        rooms = [self._room(cell) for cell in cells]
        inside = renumbers(self.keeper(cells[0]))
        cache, logits = self._open(selections, rooms, keepers, inside)
        outcomes = self._outcomes(selections)
        if self.prompt.streamed:
            return self._streamed(cache, logits, outcomes, self._turns(cache, keepers))
        opened, begun = cache.counts(), None
        if self.full is not None:
            turns = self._turns(cache, keepers)
            with stopwatch(self.sweep.model.device, self.sweep.laps.fidelity):
                if turns is not None or self.prompt.forced:
                    measured = self.full.fidelity(self.sweep.model, cache, self._lead(logits), turns)
                else:
                    sample = self._sampler.sample
                    measured, begun = self.full.follow(self.sweep.model, cache, logits, self._lead(logits), sample)
            for outcome, numbers in zip(outcomes, measured, strict=True):
                outcome.fidelity = numbers
            if turns is not None and self.prompt.forced:
                for outcome, end, held in zip(outcomes, cache.counts(), turns.held, strict=True):
                    outcome.answer = Answer(list(self.prompt.forced), "forced", end, held=held)
                return [outcome.checked() for outcome in outcomes]
            if turns is not None:  # what was evicted for the full cache's answer is there for the cell's own
                cache, logits = self._open(selections, rooms, keepers, inside)
        answers = self._generate(cache, logits, self._turns(cache, keepers), begun)
        for cell, outcome, answer, before in zip(cells, outcomes, answers, opened, strict=True):
            outcome.answer = replace(answer, held=self._held(cell, answer, before))
        return [outcome.checked() for outcome in outcomes]

    def _streamed(self, cache: RowCache, logits: Tensor, outcomes: list[Outcome], turns: Turns | None) -> list[Outcome]:
        """Every token scored as it comes; no other cache is compared with."""
        text = list(self.prompt.forced)
        ends = cache.grown(len(text) - 1)
        with stopwatch(self.sweep.model.device, self.sweep.laps.decode):
            found = losses(self.sweep.model, cache, logits, text, turns)
        for number, (outcome, mine) in enumerate(zip(outcomes, found.double(), strict=True)):
            end = cache.counts()[number] if turns is not None else ends[number] if ends else None
            outcome.answer = Answer(list(text), "forced", end, held=None if turns is None else turns.held[number])
            outcome.fidelity = {"loss": float(mine.mean())}
            outcome.by_distance = [float(part.mean()) for part in mine.tensor_split(min(RANGES, len(text)))]
        return [outcome.checked() for outcome in outcomes]

    def _turns(self, cache: RowCache, keepers: list[Keeper]) -> Turns | None:
        return Turns(cache, keepers, len(self.prompt.ids) - self.prompt.context) if keepers else None

    def _open(
        self,
        selections: list[Selection],
        rooms: Sequence[int] | None = None,
        keepers: Sequence[Keeper] = (),
        inside: bool = False,
    ) -> tuple[RowCache, Tensor]:
        """A cache that has read the whole prompt, and each cell's logits for the first token, [C, V].

        Args:
            rooms: tokens of each cell that its rows have room for; None: for all that may come.
            inside: positions are those inside the cache.
        """
        laps, model = self.sweep.laps, self.sweep.model
        with stopwatch(model.device, laps.compact):
            cache = compact(self.prefill, selections, rooms or self.to_come, self.sweep.arena)
            cache.seen = cache.seen - len(self.prompt.looked)  # their entries are in no selection
            self.counts = cache.counts()
            if keepers:
                remember(cache, self.prefill.layers, keepers)
            if inside:
                renumber(model, cache)
        question = self.prompt.ids[self.prompt.context :]
        if not question:
            return cache, self.prefill.logits.expand(len(selections), -1)
        with stopwatch(model.device, laps.append):
            ids = torch.tensor(question, device=model.device).expand(len(selections), -1)
            return cache, model.decode(cache, ids)[:, -1]

    def _outcomes(self, selections: list[Selection]) -> list[Outcome]:
        everything = self.entries(self.everything)
        packed = [any(row.storage is not None for layer in selection for row in layer) for selection in selections]
        return [
            Outcome(counts=counts, compressed=fewer_bits or counts.entries < everything, packed=fewer_bits)
            for counts, fewer_bits in zip(self.counts, packed, strict=True)
        ]

    def _lead(self, logits: Tensor) -> Tensor | None:
        """The first token's log-probabilities, where they depend on the cell's cache."""
        return None if self.prompt.context == len(self.prompt.ids) else logits.float().log_softmax(-1)

    @property
    def _sampler(self) -> Sampler:
        temperature = self.sweep.protocol.temperature
        return Sampler(temperature, f"{self.sweep.seed}/{self.prompt.ids}" if temperature else "")

    def _generate(
        self, cache: RowCache, logits: Tensor, turns: Turns | None = None, begun: Sequence[Sequence[int]] | None = None
    ) -> list[Answer]:
        """`begun`: as the cells' answers begin, where that is known, see `FullAnswer.follow`."""
        if self.prompt.forced:
            ends = cache.grown(len(self.prompt.forced) - 1)
            said = list(self.prompt.forced)
            return [Answer(list(said), "forced", ends[cell] if ends else None) for cell in range(cache.cells)]
        if self.prompt.asks_likelihoods:
            return self._likelihoods(cache, logits)
        model, protocol = self.sweep.model, self.sweep.protocol
        stop_ids = model.stop_ids if protocol.stop == "eos" else frozenset()
        stop = Stop(stop_ids, self.most, self.prompt.until, partial(model.words, special=True))
        sampler = self._sampler
        with stopwatch(model.device, self.sweep.laps.decode):
            begun = begun or [[token] for token in sampler.sample(logits, [0] * cache.cells)]
            return generate(model, cache, begun, Decoder(self.ngrams, stop, sampler), turns)

    def _likelihoods(self, cache: RowCache, logits: Tensor) -> list[Answer]:
        answers = [Answer([], "forced") for _ in range(cache.cells)]
        if self.prefill.tail is not None:
            read = Likelihood.of(self.prefill.tail, torch.tensor(self.prompt.one_pass, device=self.prefill.tail.device))
            for answer in answers:
                answer.likelihoods[self.prompt.request] = read
        with stopwatch(self.sweep.model.device, self.sweep.laps.decode):
            for asked in self.prompt.branches:
                found = branch(self.sweep.model, cache, logits, asked.ids, asked.scored)
                for answer, likelihood in zip(answers, found, strict=True):
                    answer.likelihoods[asked.request] = likelihood
        return answers
